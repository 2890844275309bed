//! What can go wrong in a store, one variant per kind of cause.
//!
//! Messages say what happened, to which thing. They name no command and no option
//! of one: whoever shows them knows what its users can do.

mod class;
mod damage;

use std::io;
use std::path::{Path, PathBuf};

use crate::id::SnapshotId;
pub use damage::Damage;
pub(crate) use damage::{UNREADABLE, cannot_read, is_unreadable};

/// The result of a store operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What kind of failure an [`Error`] is, for exit codes and errno values.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ErrorClass {
    /// What was asked for cannot be meant, whatever the store holds: a name that is
    /// none, or one that is given twice.
    Usage,
    /// The request cannot be carried out as given.
    Invalid,
    /// The caller did not want it any more.
    Cancelled,
    /// A named thing does not exist.
    NotFound,
    /// Stored bytes are not what they should be.
    Damaged,
    /// Another process holds what is needed.
    Busy,
    /// A newer version of this program wrote what was asked for.
    Newer,
    /// The operating system refused.
    Io,
}

/// Any failure of a store operation.
///
/// ```
/// use snapstore_store::{Damage, Error, ErrorClass, PageSize, Store};
///
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("store");
/// # Store::create(&path, PageSize::default())?;
/// std::fs::write(path.join("tags/base"), "not what it was")?;
/// let error = Store::open(&path)?.snapshot("base").unwrap_err();
/// assert_eq!(error.class(), ErrorClass::Damaged);
/// assert!(matches!(error, Error::Damaged(Damage::File { .. })));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(thiserror::Error, Debug)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused an operation on a path.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// To which file or directory.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
    /// A change is done and seen by everybody, but the disk has not said that it will
    /// survive a power cut, though it was asked twice.
    #[error("{} is {what}, but the disk did not confirm it ({source}): it may or may not be so after a power cut; see to the disk, then look again", path.display())]
    Unconfirmed {
        /// What was done to the file.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
    /// It was cancelled ([`crate::Cancel`]).
    #[error("cancelled before it was done")]
    Cancelled,
    /// There is no store at this path.
    #[error("{} holds no store", path.display())]
    NoStore {
        /// Where a store was looked for.
        path: PathBuf,
    },
    /// The path already holds a store, with settings of its own.
    #[error("{} holds a store already, with pages of {page_bytes} bytes", path.display())]
    StoreExists {
        /// The directory.
        path: PathBuf,
        /// The size of its pages.
        page_bytes: u64,
    },
    /// The path already holds other files.
    #[error("{} is not empty; choose an empty directory for a new store", path.display())]
    NotEmpty {
        /// The directory.
        path: PathBuf,
    },
    /// A newer version of this program wrote it. That is not damage, and nothing
    /// moves, rewrites or deletes it.
    #[error("{} has {what} {version}, made by a newer snapstore than this one ({}); use that version or a later one", path.display(), env!("CARGO_PKG_VERSION"))]
    Newer {
        /// The file, or the store for what may lie anywhere in it.
        path: PathBuf,
        /// What has the unknown version, such as `format version`.
        what: String,
        /// The version it names, or another number that stands for one, such as
        /// that of an encoding.
        version: u32,
    },
    /// This process may not read a file of the store. That is no damage: somebody else may
    /// read it, and nothing moves, rewrites or deletes it.
    #[error("cannot read {}: permission denied; see to its owner and mode", path.display())]
    Denied {
        /// The file.
        path: PathBuf,
    },
    /// A newer version of this program uses a feature of the store which this one
    /// does not know, and which allows reading only.
    #[error("{} has the read-only compatible feature bit {bit}, made by a newer snapstore: this one ({}) can read the store and not change it; use that version or a later one", path.display(), env!("CARGO_PKG_VERSION"))]
    ReadOnlyFeature {
        /// The store's configuration.
        path: PathBuf,
        /// The bit.
        bit: u32,
    },
    /// The store was upgraded to another format since it was opened.
    #[error("{} shows that the store was upgraded after it was opened here; open it again", path.display())]
    Upgraded {
        /// The file that shows it.
        path: PathBuf,
    },
    /// The store is of an older format, in which this cannot be done, or its upgrade has
    /// not ended.
    #[error("{} is that of a store of an older format, or of one whose upgrade has not ended; upgrade it first", path.display())]
    OldFormat {
        /// The store's configuration.
        path: PathBuf,
    },
    /// A page size other than 4, 16 or 64 KiB.
    #[error("a page of {bytes} bytes is not supported; use 4096, 16384 or 65536")]
    PageSize {
        /// The size asked for.
        bytes: u64,
    },
    /// An image whose length is no multiple of the page size, or of a disk's
    /// sectors.
    #[error("{} is {size_bytes} bytes long, which is no multiple of {what} {grain_bytes} bytes; the nearest are {} and {}; is the file complete?", path.display(), size_bytes - size_bytes % grain_bytes, size_bytes.next_multiple_of(*grain_bytes))]
    PartialPage {
        /// The image.
        path: PathBuf,
        /// Its length.
        size_bytes: u64,
        /// Whose size its length has to be a multiple of.
        what: &'static str,
        /// That size.
        grain_bytes: u64,
    },
    /// An input without any bytes.
    #[error("{} is empty; there is nothing to store", path.display())]
    EmptyInput {
        /// The file.
        path: PathBuf,
    },
    /// An image that is longer than 16 TiB.
    #[error("{} is {size_bytes} bytes long; an image has at most 16 TiB", path.display())]
    ImageSize {
        /// The image.
        path: PathBuf,
        /// Its length.
        size_bytes: u64,
    },
    /// A VM state or other attached file over its limit.
    #[error("{} is {size_bytes} bytes long; the limit is {limit_bytes}", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its length.
        size_bytes: u64,
        /// The limit.
        limit_bytes: u64,
    },
    /// An input that is not a regular file.
    #[error("{} is not a regular file but {what}", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// A diff that would replace every page of the image.
    #[error("{} has no holes: as a diff it would replace the whole image. A copy may have filled them (scp, `cp --sparse=never`): then make the diff anew. A whole image is committed without diff", path.display())]
    DiffWithoutHoles {
        /// The diff file.
        path: PathBuf,
    },
    /// A diff whose holes do not tell which pages changed.
    #[error("the holes of {} do not tell which pages changed: its filesystem keeps data and holes apart by {grain_bytes} bytes only (huge pages, extent size or block size), so zeros that nobody wrote are data. A copy has lost the same: write the diff anew to a filesystem with holes of 4096 bytes, or commit the whole image", path.display())]
    DiffGrain {
        /// The diff file.
        path: PathBuf,
        /// What data and holes begin at multiples of.
        grain_bytes: u64,
    },
    /// An input changed while it was being read.
    #[error("{} changed while it was read; pause the VM or copy the file first", path.display())]
    InputChanged {
        /// The input.
        path: PathBuf,
    },
    /// An extent of an input that does not fit its image or its neighbour.
    #[error("extent {number} of {label} ({length} bytes at {image_offset}) {problem}")]
    BadExtent {
        /// What the input calls itself.
        label: String,
        /// Which extent, counted from 0.
        number: usize,
        /// Where it is in the image.
        image_offset: u64,
        /// How long it is.
        length: u64,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// What the extents of an input are read from could not be read.
    #[error(
        "{label} went away while it was read (at byte {offset_bytes} of the image: {source}); nothing was committed; make it anew and try again"
    )]
    InputLost {
        /// What the input calls itself.
        label: String,
        /// Where in the image the part begins that could not be read.
        offset_bytes: u64,
        /// The operating system's error; `UnexpectedEof` for bytes that are not
        /// there, as in the memory of a process that has ended.
        source: io::Error,
    },
    /// A diff whose length is not that of the image it applies to.
    #[error("diff {} is {size_bytes} bytes long but the parent's image {image:?} has {parent_bytes}", path.display())]
    DiffSize {
        /// The diff file.
        path: PathBuf,
        /// Its length.
        size_bytes: u64,
        /// The parent's image.
        image: String,
        /// The length of that image.
        parent_bytes: u64,
    },
    /// Images are to be carried over, and there is no parent to take them from.
    #[error("there is no parent to carry images over from")]
    NothingToInherit,
    /// A snapshot whose parts do not go together.
    #[error("{tag:?} cannot be committed: {problem}")]
    BadSnapshot {
        /// The tag it was to have.
        tag: String,
        /// What does not fit.
        problem: &'static str,
    },
    /// A diff was given without a parent, or for an image the parent lacks.
    #[error("the diff for image {image:?} needs a parent that has this image")]
    NoParentImage {
        /// The image.
        image: String,
    },
    /// A name that cannot be a tag, an image or a label.
    #[error("{name:?} cannot be {what}: {rule}")]
    BadName {
        /// The name given.
        name: String,
        /// What it was meant to name.
        what: &'static str,
        /// What such names look like.
        rule: &'static str,
    },
    /// The same name was given twice.
    #[error("{name:?} is given twice")]
    DuplicateName {
        /// The name.
        name: String,
    },
    /// An image that is carried over would have the file name of another one.
    #[error("the parent's {name:?} is carried over, and another image has this file name")]
    NameTaken {
        /// The file name.
        name: String,
    },
    /// No tag of this name, and no snapshot whose id begins so.
    #[error("no tag or snapshot {name:?}")]
    NotFound {
        /// What was asked for.
        name: String,
    },
    /// An id prefix that fits more than one snapshot.
    #[error("{prefix:?} is the beginning of {count} snapshot ids; give more digits")]
    Ambiguous {
        /// The prefix given.
        prefix: String,
        /// How many snapshots it fits.
        count: usize,
    },
    /// The tag exists and may not be moved.
    #[error("tag {tag:?} already names snapshot {}", id.short())]
    TagExists {
        /// The tag.
        tag: String,
        /// What it names.
        id: SnapshotId,
    },
    /// The tag may neither be removed nor moved.
    #[error("tag {tag:?} is protected")]
    Protected {
        /// The tag.
        tag: String,
    },
    /// Stored bytes are damaged.
    #[error("{0}")]
    Damaged(#[from] Damage),
    /// Both copies of the configuration of a store of format 2 are lost, and with them the
    /// secret that its chunks are filed under.
    #[error("{0}/config and {0}/config-copy cannot be read, and nothing else has the secret that the chunks are filed under; the packs are left as they are: put either file back, under its own name, from a copy of the store, and all is there again", path.display())]
    SecretLost {
        /// The store.
        path: PathBuf,
    },
    /// A lock was not free in time.
    #[error("the store is busy: {} is held by {holder}; try again when it is done", path.display())]
    Busy {
        /// The lock file.
        path: PathBuf,
        /// Who holds it, as far as is known.
        holder: String,
    },
    /// A pack that a commit relies on was set aside or deleted before the commit
    /// was acknowledged. Committing again finds what is there now.
    #[error("the store was changed meanwhile: {} is gone; run the command again", path.display())]
    Overtaken {
        /// The pack file.
        path: PathBuf,
    },
    /// What was to be imported is no stream of snapshots.
    #[error("{} does not begin as a stream of snapshots does", path.display())]
    NotAStream {
        /// What the stream calls itself.
        path: PathBuf,
    },
    /// A stream of snapshots with pages of another size than the store's.
    #[error("{} has pages of {stream_bytes} bytes, and the store {store_bytes}: a store takes snapshots of its own page size only", path.display())]
    OtherPageSize {
        /// What the stream calls itself.
        path: PathBuf,
        /// The size of its pages.
        stream_bytes: u64,
        /// The size of the store's pages.
        store_bytes: u64,
    },
    /// A stream with a snapshot that cannot be in this store.
    #[error("the snapshot with tag {tag:?} in {} cannot be imported: {problem}", path.display())]
    NotImportable {
        /// What the stream calls itself.
        path: PathBuf,
        /// The tag it was to have.
        tag: String,
        /// What does not fit.
        problem: &'static str,
    },
    /// Locks keep nobody away on the filesystem that the store is on.
    #[error(
        "{} is on {filesystem}, {why}: two processes could write at once, and what one has committed be lost; put the store elsewhere, or set SNAPSTORE_TRUST_LOCKS=1 if nobody else ever has it; reading works", path.display()
    )]
    NoLocks {
        /// The store.
        path: PathBuf,
        /// The type of the filesystem.
        filesystem: String,
        /// What is wrong with its locks.
        why: &'static str,
    },
    /// What is needed is elsewhere, and who asked does not wait for it.
    #[error("what is needed is not at hand")]
    NotAtHand,
    /// Chunks that are elsewhere than in this store could not be read from there
    /// ([`crate::ChunkSource`]).
    #[error("{source}")]
    Foreign {
        /// What kind of failure it is.
        class: ErrorClass,
        /// What happened there.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The index could not be opened, read or written.
    #[error("index {}: {message}", path.display())]
    Index {
        /// The index directory.
        path: PathBuf,
        /// What the index library said.
        message: String,
    },
}

impl Error {
    /// What a newer version wrote.
    pub(crate) fn newer(path: &Path, what: impl Into<String>, version: u32) -> Self {
        Self::Newer {
            path: path.to_owned(),
            what: what.into(),
            version,
        }
    }

    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>, source: io::Error) -> Self {
        Self::Io {
            action,
            path: path.into(),
            source,
        }
    }
}

/// `None` for what is damaged, was made by a newer version, or may not be read.
pub(crate) fn readable<T>(found: Result<T>) -> Result<Option<T>> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.is_of_what_is_stored() => Ok(None),
        Err(other) => Err(other),
    }
}

/// Attaches a path to an I/O result.
pub(crate) trait IoContext<T> {
    fn context(self, action: &'static str, path: &Path) -> Result<T>;
}

impl<T, E: Into<io::Error>> IoContext<T> for std::result::Result<T, E> {
    fn context(self, action: &'static str, path: &Path) -> Result<T> {
        self.map_err(|source| Error::io(action, path, source.into()))
    }
}
