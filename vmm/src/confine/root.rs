//! Namespaces of a machine's own, and a root directory that holds only the machine's.
//!
//! The directory stays root's on its filesystem. In the machine's mount, which is
//! read-only, it is the machine's user's (an idmapped mount, from Linux 5.12 on, on
//! tmpfs from 6.3 on): so the guest's sockets reach programs of the host that listen
//! beside `vsock.sock`, and the machine changes nothing there. Where a filesystem
//! cannot do that, they only reach those that let everybody connect.

use std::ffi::c_uint;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
    mount_change, move_mount, open_tree, unmount,
};
use rustix::process::{chdir, pivot_root};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::refused::refused;
use crate::error::Result;

/// What a process keeps of where it was.
pub(super) struct Entered {
    /// A `/proc` that shows this process and its children.
    pub proc: OwnedFd,
    /// Whether the directory is the machine's user's.
    pub owns_directory: bool,
}

/// Makes `dir` the root of this process, in new namespaces. The process is root's and
/// has one thread.
pub(super) fn enter(dir: &Path, user_namespace: &OwnedFd) -> Result<Entered> {
    let all = UnshareFlags::NEWNS
        | UnshareFlags::NEWNET
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS
        | UnshareFlags::NEWCGROUP;
    // SAFETY: with these flags the descriptors stay shared, of which the caller's only
    // thread is the only user.
    unsafe { unshare_unsafe(all) }.map_err(refused("have namespaces of its own"))?;
    // Until the old root is gone, what the host unmounts goes here, too: no mount of
    // another's is kept.
    let own = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    mount_change("/", own).map_err(refused("have mounts of its own"))?;
    let proc = new_proc().map_err(refused("mount a /proc of its own"))?;
    let (tree, owns_directory) = tree_of(dir, user_namespace)?;
    let change_root = || -> rustix::io::Result<()> {
        move_mount(&tree, "", CWD, dir, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
        chdir(dir)?;
        // The old root goes on top of the new one, and away (pivot_root(2)).
        pivot_root(".", ".")?;
        unmount(".", UnmountFlags::DETACH)?;
        chdir("/")
    };
    change_root().map_err(refused("make its directory its root"))?;
    Ok(Entered {
        proc,
        owns_directory,
    })
}

/// A `/proc` that is mounted nowhere, so that no path leads out of it, and read-only,
/// so that nobody writes to code through `mem`. Others' processes are not there.
fn new_proc() -> rustix::io::Result<OwnedFd> {
    let fs = fsopen("proc", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(fs.as_fd(), "hidepid", "invisible")?;
    fsconfig_set_string(fs.as_fd(), "subset", "pid")?;
    fsconfig_create(fs.as_fd())?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    fsmount(fs.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

/// The host's `/proc`, for those who cannot mount one.
pub(super) fn host_proc() -> Result<OwnedFd> {
    directory(Path::new("/proc"))
}

/// A descriptor that names a directory.
pub(super) fn directory(path: &Path) -> Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).map_err(refused("open a directory"))
}

/// A mount of the directory, and whether it is the user's.
fn tree_of(dir: &Path, user_namespace: &OwnedFd) -> Result<(OwnedFd, bool)> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(CWD, dir, flags).map_err(refused("mount its directory"))?;
    match set_attributes(&tree, Some(user_namespace.as_fd())) {
        Ok(()) => Ok((tree, true)),
        // A filesystem that cannot map users.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            set_attributes(&tree, None).map_err(refused("mount its directory read-only"))?;
            Ok((tree, false))
        }
        Err(error) => Err(refused("mount its directory read-only")(error)),
    }
}

/// `struct mount_attr`, linux/mount.h.
#[repr(C)]
struct MountAttributes {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

const MOUNT_ATTR_IDMAP: u64 = 0x0010_0000;

fn set_attributes(tree: &OwnedFd, user_namespace: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let read_only = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let namespace = user_namespace.map(|fd| u64::from(fd.as_raw_fd().cast_unsigned()));
    let attributes = MountAttributes {
        set: u64::from(read_only.bits()) | namespace.map_or(0, |_| MOUNT_ATTR_IDMAP),
        clear: 0,
        propagation: 0,
        user_namespace: namespace.unwrap_or(0),
    };
    // SAFETY: the path and the structure are as the kernel expects them; it only reads.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH as c_uint,
            &raw const attributes,
            size_of::<MountAttributes>(),
        )
    };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
