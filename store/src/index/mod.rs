//! The index: chunk key -> location.
//!
//! It is a cache of the pack footers. Losing it loses nothing: `repair` writes
//! it anew. `files` keeps it on disk, in RocksDB (`rocks`) and in short runs of what
//! is not in there yet (`run`); that is the only one a program that is shipped has.
//! `latest` reads the runs alone. `double` keeps it in the memory of one process, for
//! the simulator, and promises what the others promise and nothing more.

#[cfg(feature = "sim")]
mod double;
#[cfg_attr(feature = "sim", allow(dead_code))]
mod files;
#[cfg_attr(feature = "sim", allow(dead_code))]
mod latest;
#[cfg_attr(feature = "sim", allow(dead_code))]
mod rocks;
#[cfg_attr(feature = "sim", allow(dead_code))]
mod run;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use std::path::Path;

use crate::error::{Damage, Error, Result};
use crate::id::ChunkKey;
use crate::pack::{Location, PackNumber};

#[cfg(feature = "sim")]
pub(crate) use double::{
    IndexReader, IndexWriter, LatestRuns, Prepared, forget as forget_indexes, sweep, tidy,
};
#[cfg(not(feature = "sim"))]
pub(crate) use files::{IndexReader, IndexWriter, Prepared, sweep, tidy};
#[cfg(not(feature = "sim"))]
pub(crate) use latest::LatestRuns;

/// Sorted runs beside the oldest that a collection leaves.
pub(crate) const FEW_RUNS: u64 = 2;
/// Those that a commit leaves where nobody collects.
pub(crate) const MANY_RUNS: u64 = 3;

/// Where a chunk with this key is, as a reader or a writer of the index sees it.
pub(crate) trait Lookup {
    /// The place; `None` if there is no entry.
    fn look_up(&self, key: ChunkKey) -> Result<Option<Location>>;
}

impl Lookup for IndexReader {
    fn look_up(&self, key: ChunkKey) -> Result<Option<Location>> {
        self.get(key)
    }
}

impl Lookup for IndexWriter {
    fn look_up(&self, key: ChunkKey) -> Result<Option<Location>> {
        self.get(key)
    }
}

/// What changes of the index that a writer can take over are written for.
#[derive(Clone, Copy)]
pub(crate) enum PreparedFor {
    /// Entries of this pack, whose file is locked by whoever writes them.
    Pack(PackNumber),
    /// Entries that a collection removes.
    Removal,
}

fn damaged(path: &Path, reason: &str) -> Error {
    Damage::Index {
        path: path.to_owned(),
        reason: reason.to_owned(),
    }
    .into()
}
