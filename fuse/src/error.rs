//! What can go wrong with a mount, and which errno a reader sees.

use std::io;
use std::path::{Path, PathBuf};

use fuser::Errno;
use snapstore_store::ErrorClass;

/// The result of a mount operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Any failure of mounting or unmounting.
#[derive(thiserror::Error, Debug)]
#[non_exhaustive]
pub enum Error {
    /// The store refused.
    #[error(transparent)]
    Store(#[from] snapstore_store::Error),
    /// FUSE is not available.
    #[error(
        "cannot open /dev/fuse: {source}; load the kernel module (modprobe fuse) or, in a container, pass the device in"
    )]
    NoFuse {
        /// The operating system's error.
        source: io::Error,
    },
    /// The mount point is not a directory.
    #[error("{} is not a directory; create it first", path.display())]
    NotADirectory {
        /// The path.
        path: PathBuf,
    },
    /// Something is mounted there already.
    #[error("{} is already a mount point; `snapstore umount` it first", path.display())]
    AlreadyMounted {
        /// The path.
        path: PathBuf,
    },
    /// The mount would hide the store that it shows, or lie in it.
    #[error(
        "{} holds the store {}, or lies in it: a mount there would wait for itself; choose another directory", path.display(), store.display()
    )]
    HidesStore {
        /// The path.
        path: PathBuf,
        /// The store.
        store: PathBuf,
    },
    /// The mount would hide something that is needed.
    #[error("a mount on {} would hide {}; choose another directory", path.display(), hidden.display())]
    Hides {
        /// The path.
        path: PathBuf,
        /// What would be hidden.
        hidden: PathBuf,
    },
    /// The setuid helper of libfuse cannot be started.
    #[error(
        "cannot start fusermount3, which users other than root need to mount: {source}; install it (the package fuse3)"
    )]
    NoHelper {
        /// The operating system's error.
        source: io::Error,
    },
    /// No snapstore mount is at this path.
    #[error("{} is not a snapstore mount; `grep snapstore: /proc/mounts` lists them", path.display())]
    NotMounted {
        /// The path.
        path: PathBuf,
    },
    /// A process uses the mount.
    #[error("{} is in use by a process (`fuser -vm` shows it); stop it, or use --lazy", path.display())]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// There is nothing to go on with.
    #[error(
        "{} has no view of {}; was it mounted with another --overlay-dir?", overlays.display(), dir.display()
    )]
    NoView {
        /// The mount point.
        dir: PathBuf,
        /// Where it was looked for.
        overlays: PathBuf,
    },
    /// Several views were mounted there one after the other.
    #[error(
        "there are two views of {}: {} and {}; remove the one that is not wanted", dir.display(), places[0].display(), places[1].display()
    )]
    TwoViews {
        /// The mount point.
        dir: PathBuf,
        /// Where they are kept.
        places: [PathBuf; 2],
    },
    /// What a view is of is damaged.
    #[error(
        "{0}/view.json is damaged ({reason}), so nobody can tell which mount it is of; put it right, or remove {0} if what was written there is not wanted", place.display()
    )]
    ViewDamaged {
        /// Where it is kept.
        place: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// What a clone is made from is damaged.
    #[error(
        "{} is damaged ({reason}), so nobody can tell what was written there; put it back from a copy, or remove {} to give up what was written to that clone", path.display(), clone.display()
    )]
    StateDamaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
        /// The clone's directory.
        clone: PathBuf,
    },
    /// Whether a view ended in order cannot be told.
    #[error(
        "{} is damaged ({reason}); remove that file: what had been brought to the disk is then gone on with", path.display()
    )]
    EndDamaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A view's files are damaged.
    #[error("cannot go on with {}: {source}; put back a copy, or remove {} to give up what was written to that clone", clone.display(), clone.display())]
    OverlayDamaged {
        /// The clone's directory.
        clone: PathBuf,
        /// What is wrong.
        source: io::Error,
    },
    /// The disk did not take all that is kept.
    #[error("what was written is kept in {}, but is not known to be on the disk: {reason}", place.display())]
    NotOnDisk {
        /// Where it is kept.
        place: PathBuf,
        /// Why.
        reason: String,
    },
    /// What was written to an earlier view is still there.
    #[error(
        "what was written to an earlier view of {0} and not committed is in {1}: go on with it by `snapstore mount --rw --resume --overlay-dir {2} {0}`, or remove that directory", dir.display(), place.display(), place.parent().unwrap_or(place).display()
    )]
    ViewLeft {
        /// The mount point.
        dir: PathBuf,
        /// Where it is kept.
        place: PathBuf,
    },
    /// Its server has ended, and a commit of it has not.
    #[error("a commit still reads what was written to the view in {}; try again when it has ended", place.display())]
    ViewCommitted {
        /// Where it is kept.
        place: PathBuf,
    },
    /// Another user could put something else in the place of what is written.
    #[error(
        "{} is no place for overlays: other users can rename or remove what is in {}; use a directory that only you and root can change, by --overlay-dir", overlays.display(), path.display()
    )]
    OverlaysOfOthers {
        /// The directory for overlays.
        overlays: PathBuf,
        /// It, or one above it.
        path: PathBuf,
    },
    /// A later version made it.
    #[error("the view in {} was made by a newer snapstore; go on with it there", place.display())]
    NewerView {
        /// Where it is kept.
        place: PathBuf,
    },
    /// Its server lives.
    #[error("the view in {} is served by another process; unmount it there first", place.display())]
    ViewServed {
        /// Where it is kept.
        place: PathBuf,
    },
    /// A mount is no writable view.
    #[error("{} is no writable view; `snapstore mount --rw TAG DIR` makes one", path.display())]
    NotWritable {
        /// The path.
        path: PathBuf,
    },
    /// The server of a view refused.
    #[error("the server of {}: {message}", path.display())]
    ViewRefused {
        /// The path.
        path: PathBuf,
        /// What it said.
        message: String,
        /// Whether trying again may help.
        busy: bool,
    },
    /// The operating system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// To which path.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
}

/// What a reader of a file sees. Damage is an I/O error: wrong bytes are never
/// served.
pub(crate) fn errno(error: &snapstore_store::Error) -> Errno {
    match error.class() {
        ErrorClass::NotFound => Errno::ENOENT,
        ErrorClass::Cancelled => Errno::EINTR,
        ErrorClass::Busy => Errno::EAGAIN,
        ErrorClass::Usage | ErrorClass::Invalid => Errno::EINVAL,
        ErrorClass::Newer => Errno::EOPNOTSUPP,
        ErrorClass::Damaged => Errno::EIO,
        ErrorClass::Io if matches!(error, snapstore_store::Error::Denied { .. }) => Errno::EACCES,
        ErrorClass::Io => exhausted(error).unwrap_or(Errno::EIO),
    }
}

/// What is used up is told as what it is.
fn exhausted(error: &snapstore_store::Error) -> Option<Errno> {
    let snapstore_store::Error::Io { source, .. } = error else {
        return None;
    };
    let errno = Errno::from_i32(source.raw_os_error()?);
    let told = [
        Errno::ENOSPC,
        Errno::EDQUOT,
        Errno::EMFILE,
        Errno::ENFILE,
        Errno::ENOMEM,
    ];
    told.contains(&errno).then_some(errno)
}

/// An operation on a file that failed.
pub(crate) fn cannot(action: &'static str, path: &Path, source: io::Error) -> Error {
    Error::Io {
        action,
        path: path.to_owned(),
        source,
    }
}
