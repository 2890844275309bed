//! Stored bytes that are not what they should be, and how a disk says so.

use std::io;
use std::path::{Path, PathBuf};

use super::Error;

/// A place in the store whose bytes are not what they should be.
#[derive(thiserror::Error, Debug, Clone, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Damage {
    /// A small checksummed file (store configuration, tag, collector state) fails its checksum.
    #[error("{} is damaged ({reason})", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        reason: &'static str,
    },
    /// A pack's header, footer or seal is damaged.
    #[error("pack {} is damaged: {reason}", path.display())]
    Pack {
        /// The pack file.
        path: PathBuf,
        /// What does not fit.
        reason: &'static str,
    },
    /// A block of a pack's footer is damaged: where its chunks are is not known.
    #[error("block {block} of the footer of pack {} (chunks {first_entry} to {}) is damaged: {reason}", path.display(), u64::from(*first_entry) + u64::from(*entries) - 1)]
    Footer {
        /// The pack file.
        path: PathBuf,
        /// Which block, counted from 0.
        block: u32,
        /// The number of its first chunk.
        first_entry: u32,
        /// How many chunks it is of.
        entries: u32,
        /// What does not fit.
        reason: &'static str,
    },
    /// A chunk's stored bytes are damaged.
    #[error("{chunk} in pack {} at offset {offset_bytes} is damaged: {reason}", path.display())]
    Chunk {
        /// The chunk.
        chunk: String,
        /// The pack file.
        path: PathBuf,
        /// Where in that file.
        offset_bytes: u64,
        /// What does not fit.
        reason: &'static str,
    },
    /// A chunk that something refers to is nowhere in the store.
    #[error("{chunk} is missing from the store")]
    Missing {
        /// The chunk.
        chunk: String,
    },
    /// A manifest that has the bytes of its id, which no snapstore writes.
    #[error("the manifest of snapshot {snapshot} is damaged: {reason}")]
    Manifest {
        /// The beginning of the snapshot's id.
        snapshot: String,
        /// What does not fit.
        reason: &'static str,
    },
    /// A stream of snapshots is not what was exported.
    #[error("{} is damaged at byte {offset_bytes}: {reason}", path.display())]
    Stream {
        /// What the stream calls itself.
        path: PathBuf,
        /// Where the block begins that is damaged.
        offset_bytes: u64,
        /// What does not fit.
        reason: &'static str,
    },
    /// The index is damaged or disagrees with the packs.
    #[error("index {} is damaged: {reason}", path.display())]
    Index {
        /// The index directory.
        path: PathBuf,
        /// What does not fit.
        reason: String,
    },
}

/// Whether this is a disk that cannot read what it holds, or a file that has got
/// shorter: a fault of the bytes, not of the request.
pub(crate) fn is_unreadable(error: &io::Error) -> bool {
    use rustix::io::Errno;
    const MEDIUM: [Errno; 6] = [
        Errno::IO,
        Errno::NODATA,
        Errno::ILSEQ,
        Errno::UCLEAN,
        Errno::BADMSG,
        Errno::REMOTEIO,
    ];
    error.kind() == io::ErrorKind::UnexpectedEof
        || Errno::from_io_error(error).is_some_and(|errno| MEDIUM.contains(&errno))
}

/// What is wrong with a file that the disk cannot read.
pub(crate) const UNREADABLE: &str = "the disk cannot read it";

/// The error of opening or reading a file that the store is made of: what the disk
/// cannot read is damage of that file, and nothing else of the store.
pub(crate) fn cannot_read(
    action: &'static str,
    path: &Path,
    source: io::Error,
    damage: impl FnOnce(&'static str) -> Damage,
) -> Error {
    if is_unreadable(&source) {
        return damage(UNREADABLE).into();
    }
    match source.kind() {
        io::ErrorKind::PermissionDenied => Error::Denied {
            path: path.to_owned(),
        },
        _ => Error::io(action, path, source),
    }
}
