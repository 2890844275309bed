//! Splitting off a process that stands still.
//!
//! This process has several threads; the child has one, and whatever lock
//! another thread held stays locked in it. So the child makes system calls by
//! number only, from memory prepared beforehand, and never returns. glibc's
//! `fork` is not used: it takes the allocator's locks and runs other libraries'
//! handlers, in the parent while the guest waits, and in the child.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// What the child is called, as `ps` shows it. The kernel keeps 15 bytes.
const NAME: &std::ffi::CStr = c"snapstore-frozen";

/// Forks a child that waits for the end of `pipe` to read from, and then exits.
/// It ignores every signal that can be ignored and keeps no descriptor but that
/// of the pipe, as number 0. Returns its process id and a pidfd.
///
/// The child's end is told to nobody: no SIGCHLD is sent, and only a wait for
/// this child with `__WALL` finds it, so that code that waits for other children
/// never sees it.
///
/// # Errors
/// The kernel's: `EAGAIN` or `ENOMEM` when it has no room for a process.
pub(super) fn fork_frozen(pipe: BorrowedFd<'_>) -> io::Result<(i32, OwnedFd)> {
    let pipe = pipe.as_raw_fd();
    let mut pidfd: libc::c_int = -1;
    let mut all = MaybeUninit::<libc::sigset_t>::uninit();
    let mut before = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: both sets are written before they are read; the mask is this
    // thread's own.
    unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr());
    }
    // SAFETY: without CLONE_VM the child has a copy of this address space and
    // goes on with a copy of this stack. It only calls `stand_still`, which
    // fulfils what this module promises. The kernel writes the pidfd in the
    // parent only.
    let pid = unsafe {
        let pid = libc::syscall(
            libc::SYS_clone,
            libc::c_long::from(libc::CLONE_PIDFD),
            0_usize,
            &raw mut pidfd,
            0_usize,
            0_usize,
        );
        if pid == 0 {
            stand_still(pipe);
        }
        pid
    };
    let failed = (pid < 0).then(io::Error::last_os_error);
    // SAFETY: `before` was filled in above.
    unsafe {
        libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), std::ptr::null_mut());
    }
    if let Some(error) = failed {
        return Err(error);
    }
    let pid = i32::try_from(pid).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for this caller.
    Ok((pid, unsafe { OwnedFd::from_raw_fd(pidfd) }))
}

/// What the child does until it ends.
///
/// # Safety
/// Only for a child that shares no memory with another process: it closes
/// descriptors that others own.
unsafe fn stand_still(pipe: libc::c_int) -> ! {
    let mut byte = 0_u8;
    // SAFETY: system calls without locks or allocation; the pointers are to the
    // child's own stack and to a constant. Descriptor 0 is the pipe from the
    // second call on. An unexpected failure ends the child, which its owner
    // notices when nothing can be read from it.
    unsafe {
        libc::syscall(libc::SYS_prctl, libc::PR_SET_NAME, NAME.as_ptr(), 0, 0, 0);
        if (pipe == 0 || libc::syscall(libc::SYS_dup2, pipe, 0) == 0)
            && libc::syscall(libc::SYS_close_range, 1, libc::c_uint::MAX, 0) == 0
        {
            // All signals are blocked: only the pipe's end gets here.
            libc::syscall(libc::SYS_read, 0, &raw mut byte, 1_usize);
        }
        loop {
            libc::syscall(libc::SYS_exit_group, 0);
        }
    }
}

/// Ends a child and takes note of it, so that its process id is free again.
pub(super) fn end(pidfd: &OwnedFd) -> io::Result<()> {
    // SAFETY: a signal to a process that this one owns; no pointer but null.
    let sent = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            libc::SIGKILL,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if sent < 0 {
        return Err(io::Error::last_os_error());
    }
    let id = pidfd.as_raw_fd().cast_unsigned();
    let mut info = MaybeUninit::<libc::siginfo_t>::uninit();
    loop {
        // SAFETY: the kernel fills in `info`, which nobody reads.
        let waited = unsafe {
            libc::waitid(
                libc::P_PIDFD,
                id,
                info.as_mut_ptr(),
                libc::WEXITED | libc::__WALL,
            )
        };
        if waited == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
