//! Mounts of ours in the kernel's table, and undoing them, live or dead.
//!
//! A path says where to look, not what is there: what was looked at is held open
//! (`O_PATH`), and it is that which is detached. Whatever has taken its place
//! meanwhile stays.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;
use snapstore_store::{MountEntry, mount_id, mount_table};

use crate::error::{Error, Result, cannot};
use crate::helper;

/// What the source of our mounts begins with; the store follows.
pub(crate) const SOURCE_PREFIX: &str = "snapstore:";

/// A snapstore mount in the kernel's table.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mountpoint {
    /// Where it is mounted.
    pub dir: PathBuf,
    /// The store it shows, as its server says.
    pub store: PathBuf,
    /// The user whose server it is.
    pub user: u32,
    /// Whether it can be written to (`mount --rw`).
    pub is_writable: bool,
    /// The device number of the filesystem: the same wherever else it is shown.
    pub device: (u32, u32),
}

impl Mountpoint {
    /// All snapstore mounts of this machine that this process can see.
    ///
    /// # Errors
    /// If the kernel's table cannot be read.
    pub fn all() -> Result<Vec<Self>> {
        Ok(table()?.iter().filter_map(Self::of).collect())
    }

    pub(crate) fn of(entry: &MountEntry) -> Option<Self> {
        // Older servers mounted as `fuse`, without a subtype.
        if entry.filesystem != "fuse.snapstore" && entry.filesystem != "fuse" {
            return None;
        }
        let store = entry.source.as_bytes();
        Some(Self {
            dir: entry.dir.clone(),
            store: OsStr::from_bytes(store.strip_prefix(SOURCE_PREFIX.as_bytes())?).into(),
            user: entry.option("user_id")?.to_str()?.parse().ok()?,
            is_writable: entry.options.iter().any(|option| option == "rw"),
            device: entry.device,
        })
    }

    /// The snapstore mount of which `dir` is the root; `None` if it is none. Its server is
    /// not asked.
    ///
    /// # Errors
    /// If the kernel's table cannot be read.
    pub fn at(dir: &Path) -> Result<Option<Self>> {
        let Ok(seen) = Seen::at(dir) else {
            return Ok(None);
        };
        Ok(seen.mounted_here()?.as_ref().and_then(Self::of))
    }
}

pub(crate) fn table() -> Result<Vec<MountEntry>> {
    mount_table().map_err(|source| Error::Io {
        action: "read",
        path: "/proc/self/mountinfo".into(),
        source,
    })
}

/// A directory, held open without being asked for anything, and the mount that
/// it is on.
pub(crate) struct Seen {
    pub fd: OwnedFd,
    /// Absolute, without symbolic links.
    pub path: PathBuf,
    pub mount: u64,
}

impl Seen {
    pub fn at(dir: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(dir, flags, Mode::empty())?;
        let path = fs::read_link(through_proc(&fd))?;
        let mount = mount_id(&fd)?;
        Ok(Self { fd, path, mount })
    }

    /// The table's line of the mount of which this is the root directory.
    pub fn mounted_here(&self) -> Result<Option<MountEntry>> {
        let entry = table()?.into_iter().find(|entry| entry.id == self.mount);
        Ok(entry.filter(|entry| entry.dir == self.path))
    }

    /// Detaches the mount of which this is the root, or one that somebody has put on top of it
    /// since: the kernel takes the topmost (`umount2(2)` through `/proc/self/fd`).
    pub fn detach(&self) -> Result<()> {
        match rustix::mount::unmount(through_proc(&self.fd), UnmountFlags::DETACH) {
            // Somebody else was faster.
            Ok(()) | Err(Errno::INVAL) => Ok(()),
            Err(Errno::PERM) => helper::unmount(&self.path, true),
            Err(errno) => Err(cannot("unmount", &self.path, errno.into())),
        }
    }
}

/// What the kernel follows to the open file itself.
pub(crate) fn through_proc(fd: &OwnedFd) -> PathBuf {
    format!("/proc/self/fd/{}", fd.as_raw_fd()).into()
}

/// Whether `dir` is a FUSE mount whose server is gone. It waits for a server that
/// is there, however long that takes to answer.
#[must_use]
pub fn is_dead(dir: &Path) -> bool {
    // Not stat(2): the kernel answers that from its cache. A request that is under
    // way when the connection ends is aborted.
    rustix::fs::statvfs(dir)
        .is_err_and(|errno| matches!(errno, Errno::NOTCONN | Errno::CONNABORTED))
}

/// Unmounts a snapstore mount. With `lazy` it disappears at once and ends when
/// its last user lets go of it. One that is in use and, as `is_dead` says, has no
/// server any more, always does.
///
/// # Errors
/// [`Error::NotMounted`], [`Error::InUse`].
pub fn unmount(dir: &Path, lazy: bool, is_dead: &dyn Fn(&Path) -> bool) -> Result<()> {
    let not_mounted = || Error::NotMounted {
        path: dir.to_owned(),
    };
    let seen = match Seen::at(dir) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            return Err(cannot("inspect", dir, error));
        }
        other => other.map_err(|_| not_mounted())?,
    };
    let mounted = seen.mounted_here()?;
    if mounted.as_ref().and_then(Mountpoint::of).is_none() {
        return Err(not_mounted());
    }
    if lazy {
        return seen.detach();
    }
    // Held open it would be in use.
    let path = seen.path.clone();
    drop(seen);
    let in_use = || Error::InUse {
        path: dir.to_owned(),
    };
    let undone = match unmount_patiently(&path) {
        Ok(()) => Ok(()),
        Err(Errno::BUSY) => Err(in_use()),
        Err(Errno::PERM) => helper::unmount(&path, false),
        Err(errno) => Err(cannot("unmount", dir, errno.into())),
    };
    match undone {
        Err(Error::InUse { .. }) if is_dead(&path) => match Seen::at(&path) {
            Ok(again) if again.mounted_here()? == mounted => again.detach(),
            _ => Ok(()),
        },
        Err(Error::InUse { .. }) => Err(in_use()),
        other => other,
    }
}

/// Waits for users that are gone in a moment: a process that looks whether the server is
/// alive, or one that was just forked off and has not begun its own program.
fn unmount_patiently(path: &Path) -> std::result::Result<(), Errno> {
    const PATIENCE: Duration = Duration::from_millis(500);
    const RETRY: Duration = Duration::from_millis(10);
    let started = Instant::now();
    loop {
        match rustix::mount::unmount(path, UnmountFlags::NOFOLLOW) {
            Err(Errno::BUSY) if started.elapsed() < PATIENCE => std::thread::sleep(RETRY),
            done => return done,
        }
    }
}

/// The snapstore mount of which this is the root directory.
pub(crate) fn ours(seen: &Seen) -> Result<bool> {
    let mounted = seen.mounted_here()?;
    Ok(mounted.as_ref().and_then(Mountpoint::of).is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_mounted_cannot_be_unmounted() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        for path in [dir.path(), &dir.path().join("nowhere"), Path::new("/proc")] {
            let error = unmount(path, false, &is_dead).expect_err("nothing is mounted");
            assert!(matches!(error, Error::NotMounted { .. }), "{error}");
        }
    }
}
