//! Making a mount, and undoing that mount and no other.
//!
//! fuser is given an open `/dev/fuse` and nothing else: what it unmounts, it
//! unmounts by path, and by then another mount may be there.
//!
//! A mount of ours is known by the device number of its filesystem. The kernel
//! gives that number to another one when ours is gone; so ours is what has the
//! number while our connection lives.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount,
};
use rustix::process::{getegid, geteuid};
use snapstore_store::{MountEntry, mount_id};

use crate::claim::{Claim, DirLock, is_exhausted};
use crate::error::{Error, Result, cannot};
use crate::helper;
use crate::mountpoint::{SOURCE_PREFIX, Seen, table, through_proc};

/// The longest value that fsconfig(2) takes, without its final zero.
const SOURCE_BYTES: usize = 255;
const SUBTYPE: &str = "snapstore";

/// A mount that this process made.
#[derive(Debug)]
pub(crate) struct Attached {
    dir: PathBuf,
    device: (u32, u32),
    /// A duplicate of the server's `/dev/fuse`.
    connection: OwnedFd,
    /// Of the directory below.
    lock: DirLock,
}

/// Who may use a mount, and for what.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Access {
    pub others: bool,
    pub writing: bool,
}

/// Mounts on the claimed directory. `serve` gets `/dev/fuse`, and returns once the
/// kernel is answered; where that is possible, the mount is seen only then.
pub(crate) fn attach<T>(
    mut claim: Claim,
    store: &Path,
    access: Access,
    serve: impl FnOnce(OwnedFd) -> Result<T>,
) -> Result<(Attached, T)> {
    let source = source_of(store);
    let made = match make(&claim, &source, access)? {
        Some((mount, connection)) => {
            let ours = duplicate(&connection, &claim)?;
            let served = serve(connection)?;
            Made::by_root(&claim, &mount, ours).map(|made| (made, served))
        }
        None => {
            let connection = made_by_helper(&claim, &source, access)?;
            let ours = duplicate(&connection, &claim)?;
            let made = Made::by_helper(&claim, &source, ours)?;
            let served = serve(connection);
            if served.is_err() {
                let _ = made.seen.detach();
            }
            served.map(|served| (made, served))
        }
    };
    let (made, served) = made?;
    // On top of a mount that somebody has made since we looked.
    if made.entry.parent != claim.seen.mount {
        let undone = made.seen.detach();
        return Err(undone.err().unwrap_or_else(|| already_mounted(&claim)));
    }
    claim.lock.release();
    let lock = std::mem::take(&mut claim.lock);
    let attached = Attached {
        dir: claim.seen.path.clone(),
        device: made.entry.device,
        connection: made.connection,
        lock,
    };
    Ok((attached, served))
}

impl Attached {
    /// Undoes the mount if it is still there; it ends when its last user lets go
    /// of it. Of mounts that others have made at its path, none is touched.
    pub fn detach(&self) -> Result<()> {
        // Nobody mounts a snapshot there meanwhile.
        let locked = self.lock.acquire();
        let undone = self.detach_locked();
        if locked {
            self.lock.release();
        }
        undone
    }

    fn detach_locked(&self) -> Result<()> {
        let seen = match Seen::at(&self.dir) {
            // Nobody can tell of it; there it would be.
            Err(error) if is_exhausted(&error) => {
                return Err(cannot("look after the mount on", &self.dir, error));
            }
            Err(_) => return Ok(()),
            Ok(seen) => seen,
        };
        match seen.mounted_here()? {
            Some(entry) if entry.device == self.device && self.lives()? => seen.detach(),
            _ => Ok(()),
        }
    }

    /// Lets as much of what is stored through mappings wait in the kernel as of a file on a
    /// disk, where this user may decide that. By default the kernel lets very little of a
    /// FUSE filesystem wait: whoever stores to a mapping would wait for the server again
    /// and again. Its share of what may wait at all stays small, so that a disk's files, to
    /// which the server writes, are never kept waiting for it.
    pub fn let_stores_wait(&self) {
        let (major, minor) = self.device;
        let path = format!("/sys/class/bdi/{major}:{minor}/strict_limit");
        if let Err(error) = std::fs::write(&path, "0") {
            tracing::debug!(%error, path, "stores through mappings will be slow");
        }
    }

    /// Whether the filesystem exists: its number is then no other's.
    fn lives(&self) -> Result<bool> {
        let mut fds = [PollFd::new(&self.connection, PollFlags::empty())];
        match rustix::io::retry_on_intr(|| poll(&mut fds, Some(&Timespec::default()))) {
            // The kernel reports an error for a connection that has ended.
            Ok(_) => Ok(!fds[0].revents().contains(PollFlags::ERR)),
            Err(errno) => Err(cannot("look after the mount on", &self.dir, errno.into())),
        }
    }
}

/// A mount that is just made.
struct Made {
    seen: Seen,
    entry: MountEntry,
    connection: OwnedFd,
}

impl Made {
    fn by_root(claim: &Claim, mount: &OwnedFd, connection: OwnedFd) -> Result<Self> {
        let failed = |errno: Errno| cannot("mount on", &claim.seen.path, errno.into());
        let flags =
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        move_mount(mount, "", &claim.seen.fd, "", flags).map_err(failed)?;
        let made = Self::found(claim, mount, connection);
        if made.is_err() {
            // By the descriptor that is there: there may be no other.
            let _ = rustix::mount::unmount(through_proc(mount), UnmountFlags::DETACH);
        }
        made
    }

    fn found(claim: &Claim, mount: &OwnedFd, connection: OwnedFd) -> Result<Self> {
        let failed = |source| cannot("find the mount on", &claim.seen.path, source);
        let id = mount_id(mount).map_err(failed)?;
        let entry = table()?.into_iter().find(|entry| entry.id == id);
        let entry = entry.ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
        let path = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(mount, ".", path, Mode::empty());
        Ok(Self {
            seen: Seen {
                fd: fd.map_err(|errno| failed(errno.into()))?,
                path: entry.dir.clone(),
                mount: id,
            },
            entry,
            connection,
        })
    }

    fn by_helper(claim: &Claim, source: &OsStr, connection: OwnedFd) -> Result<Self> {
        let path = &claim.seen.path;
        let seen = Seen::at(path).map_err(|error| cannot("find the mount on", path, error))?;
        let entry = seen.mounted_here()?.filter(|entry| {
            entry.filesystem.as_bytes().ends_with(SUBTYPE.as_bytes()) && entry.source == source
        });
        // Somebody else's, who was not to be kept away by a lock.
        let entry = entry.ok_or_else(|| already_mounted(claim))?;
        Ok(Self {
            seen,
            entry,
            connection,
        })
    }
}

fn already_mounted(claim: &Claim) -> Error {
    Error::AlreadyMounted {
        path: claim.seen.path.clone(),
    }
}

fn duplicate(connection: &OwnedFd, claim: &Claim) -> Result<OwnedFd> {
    connection
        .try_clone()
        .map_err(|source| cannot("mount on", &claim.seen.path, source))
}

/// A mount that is nowhere yet, and the server's end of it; `None` for who may
/// not make one, or on a kernel from before that was possible (Linux 5.2).
fn make(claim: &Claim, source: &OsStr, access: Access) -> Result<Option<(OwnedFd, OwnedFd)>> {
    let failed = |errno: Errno| cannot("mount on", &claim.seen.path, errno.into());
    let filesystem = match fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC) {
        Err(Errno::PERM | Errno::NOSYS) => return Ok(None),
        other => other.map_err(failed)?,
    };
    let connection = rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(failed)?;
    let set = |name: &str, value: &OsStr| fsconfig_set_string(&filesystem, name, value);
    let number = std::os::fd::AsRawFd::as_raw_fd(&connection).to_string();
    set("source", source).map_err(failed)?;
    set("fd", number.as_ref()).map_err(failed)?;
    set("rootmode", "40555".as_ref()).map_err(failed)?;
    set("user_id", geteuid().as_raw().to_string().as_ref()).map_err(failed)?;
    set("group_id", getegid().as_raw().to_string().as_ref()).map_err(failed)?;
    set("subtype", SUBTYPE.as_ref()).map_err(failed)?;
    let flags = [
        (!access.writing).then_some("ro"),
        Some("default_permissions"),
        access.others.then_some("allow_other"),
    ];
    for flag in flags.into_iter().flatten() {
        fsconfig_set_flag(&filesystem, flag).map_err(failed)?;
    }
    match fsconfig_create(&filesystem) {
        // As root of a container that may not mount.
        Err(Errno::PERM) => return Ok(None),
        other => other.map_err(failed)?,
    }
    let mut attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOATIME;
    if !access.writing {
        attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY;
    }
    let mount = fsmount(&filesystem, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(failed)?;
    Ok(Some((mount, connection)))
}

fn made_by_helper(claim: &Claim, source: &OsStr, access: Access) -> Result<OwnedFd> {
    let how = if access.writing { "rw" } else { "ro" };
    let mut options = format!("{how},nosuid,nodev,noatime,default_permissions,subtype={SUBTYPE}");
    if access.others {
        options += ",allow_other";
    }
    helper::mount(&claim.seen.path, source, &options)
}

/// What is shown as the mount's source. Of a path that is too long, its end is.
fn source_of(store: &Path) -> OsString {
    let mut source = SOURCE_PREFIX.as_bytes().to_vec();
    let path = store.as_os_str().as_bytes();
    let room = SOURCE_BYTES - source.len();
    if path.len() > room {
        const CUT: &[u8] = b"...";
        source.extend_from_slice(CUT);
        source.extend_from_slice(&path[path.len() - (room - CUT.len())..]);
    } else {
        source.extend_from_slice(path);
    }
    OsString::from_vec(source)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_paths_are_cut_to_what_the_kernel_takes() {
        assert_eq!(source_of("/srv/a,b".as_ref()), "snapstore:/srv/a,b");
        let long = format!("/{}", "x/".repeat(400));
        let source = source_of(long.as_ref());
        assert_eq!(source.len(), SOURCE_BYTES);
        assert!(source.as_bytes().starts_with(b"snapstore:..."));
    }
}
