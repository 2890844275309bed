//! A store's snapshots as directories of flat files, through FUSE.
//!
//! Each snapshot shows `memory.bin`, one `NAME.img` per disk, its attached
//! files (such as `vmstate`) and `manifest.json`. Everything is read-only and
//! immutable, so the kernel may cache it for as long as it likes. A mount can also be one that
//! is written to and committed: `writable`.
//!
//! `view` and `table` hold the tree of files and are tested without FUSE; `server`
//! adapts it to the kernel, `requests` is what it and the server of a writable mount do
//! alike; `chores` does what may wait, `waiting` the reads that wait for pages from
//! elsewhere; `warm` records which pages are touched first and
//! pushes them in the next mount; `counters` is what the server tells of itself;
//! `layout` gives files other names; `mounted` joins all; `claim` finds out whether a
//! directory can be mounted on, `attach` mounts, `helper` does so for users other than
//! root, `mountpoint` looks at and undoes mounts. The server reads through the store's
//! library and nothing else. It is meant to be a process of its own: one that faults on a
//! mount it serves itself can deadlock (Linux, Documentation/filesystems/fuse.rst).

#![forbid(unsafe_code)]

mod attach;
mod chores;
mod claim;
mod counters;
mod error;
mod helper;
mod layout;
mod mounted;
mod mountpoint;
pub mod path_json;
mod requests;
mod server;
mod table;
mod view;
mod waiting;
mod warm;
mod writable;

pub use claim::{Surroundings, prepare};
pub use counters::{MountCounters, OverlayUse};
pub use error::{Error, Result};
pub use layout::Layout;
pub use mounted::{Ended, MountOptions, Mounted, Undo, mount, mount_writable};
pub use mountpoint::{Mountpoint, is_dead, unmount};
pub use view::MountTarget;
pub use warm::Part;
pub use writable::{
    CloneStatus, FrozenFileInfo, FrozenForCommit, FrozenImage, FrozenView, Kept, KeptView,
    MOST_CLONES, Status, ViewClient, WritableOptions, image_of, is_kept, kept_views,
};
