//! A user namespace that only maps: what belongs to root on a filesystem belongs to
//! another user in a mount that is idmapped with it (mount_setattr(2)).

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, WaitOptions, waitpid};

/// A namespace in which root is the user and group `id`. The calling process has one
/// thread.
pub(super) fn mapping_root_to(id: u32) -> io::Result<OwnedFd> {
    // A namespace is made by a process that enters it, and none returns.
    let (ready_read, ready_write) = pipe_with(PipeFlags::CLOEXEC)?;
    // The child stays until this process closes its end, however that comes about: one that is
    // killed leaves nobody who holds what it held.
    let (stay_read, stay_write) = pipe_with(PipeFlags::CLOEXEC)?;
    // SAFETY: this process has a single thread; the child makes system calls only.
    let child = match unsafe { libc::fork() } {
        -1 => return Err(io::Error::last_os_error()),
        // SAFETY: the descriptors are the child's; it never returns.
        0 => unsafe {
            libc::close(stay_write.as_raw_fd());
            let mut byte = u8::from(libc::unshare(libc::CLONE_NEWUSER) == 0);
            libc::write(ready_write.as_raw_fd(), (&raw const byte).cast(), 1);
            libc::read(stay_read.as_raw_fd(), (&raw mut byte).cast(), 1);
            libc::_exit(0)
        },
        child => child,
    };
    drop(ready_write);
    let mut entered = [0];
    let namespace = match rustix::io::read(&ready_read, &mut entered) {
        Ok(1) if entered[0] == 1 => map(child, id),
        Ok(_) => Err(io::ErrorKind::PermissionDenied.into()),
        Err(error) => Err(error.into()),
    };
    drop(stay_write);
    let pid = Pid::from_raw(child).ok_or(io::ErrorKind::InvalidData)?;
    rustix::io::retry_on_intr(|| waitpid(Some(pid), WaitOptions::empty()))?;
    namespace
}

fn map(child: i32, id: u32) -> io::Result<OwnedFd> {
    let one = format!("0 {id} 1\n");
    fs::write(format!("/proc/{child}/uid_map"), &one)?;
    fs::write(format!("/proc/{child}/gid_map"), &one)?;
    Ok(File::open(format!("/proc/{child}/ns/user"))?.into())
}
