//! The seam for the simulator of `tests/`.
//!
//! Every step at which an operation can be interrupted, overtaken or refused
//! by the disk is told to an observer before it is done: durable steps, locks,
//! accesses of the index, reads of packs. What a step changed on the disk is
//! told afterwards. Only with the cargo feature `sim`, which no program that is
//! shipped has, is there an observer; without it all of this is nothing.

mod fault;
#[cfg(feature = "sim")]
mod hooks;
#[cfg(not(feature = "sim"))]
mod inert;

#[cfg(feature = "sim")]
pub use fault::Fault;
#[cfg(not(feature = "sim"))]
pub(crate) use fault::Fault;
pub(crate) use fault::{bases_by_id, no_second_look};
#[cfg(feature = "sim")]
pub use hooks::*;
#[cfg(not(feature = "sim"))]
pub(crate) use inert::*;

/// What an operation is about to do.
#[cfg_attr(not(feature = "sim"), allow(dead_code))]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum StepKind {
    /// Make a new file.
    Create,
    /// Write bytes to a file.
    Write,
    /// Flush a file.
    SyncFile,
    /// Flush a directory.
    SyncDir,
    /// Rename a file or a directory; the path is the new name.
    Rename,
    /// Remove a file.
    Unlink,
    /// Remove a file that nobody needs, with no care for durability.
    Discard,
    /// Make a directory.
    MakeDir,
    /// Remove a directory and all in it.
    RemoveDir,
    /// Read a small file whole.
    ReadFile,
    /// List a directory.
    List,
    /// Open a sealed pack.
    OpenPack,
    /// Read a part of a pack.
    ReadPack,
    /// Take a lock.
    Lock,
    /// Release a lock.
    Unlock,
    /// Open the index.
    IndexOpen,
    /// Look something up in the index.
    IndexGet,
    /// Change the index in memory.
    IndexPut,
    /// Make changes of the index durable.
    IndexFlush,
}
