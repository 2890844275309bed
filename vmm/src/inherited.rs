//! What a process has of the one that started it, and how to be rid of it.
//!
//! Rust opens all its files close-on-exec; what lacks that mark when a program
//! begins was inherited. A lock, a pipe or a deleted file of whoever called this
//! program would otherwise live as long as what it left in the background.

use std::ffi::CStr;
use std::io;

use crate::error::{OsContext as _, Result};
use crate::spawn::has_one_thread;

/// Marks every descriptor but the standard three close-on-exec: no program that
/// this process starts gets what this one has inherited. What it is to have
/// anyhow is unmarked afterwards.
///
/// # Errors
/// The kernel has no close_range(2) with `CLOSE_RANGE_CLOEXEC` (Linux 5.11), and
/// `/proc` cannot be read either.
pub fn keep_descriptors_from_children() -> Result<()> {
    const FIRST: libc::c_uint = 3;
    // SAFETY: only sets a flag of descriptors; no memory is passed.
    let marked = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            FIRST,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    if marked == 0 {
        return Ok(());
    }
    mark_one_by_one().os("keep descriptors from other programs")
}

fn mark_one_by_one() -> io::Result<()> {
    for entry in std::fs::read_dir("/proc/self/fd")? {
        let number = entry?.file_name().to_str().and_then(|it| it.parse().ok());
        let Some(fd) = number.filter(|fd: &libc::c_int| *fd > libc::STDERR_FILENO) else {
            continue;
        };
        // SAFETY: as above. One that is closed by now is an error that says so.
        unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
    }
    Ok(())
}

/// Forgets the environment but for these variables. What is forgotten is overwritten with
/// zeros: `/proc/PID/environ` would show it as long as the process lives.
///
/// # Errors
/// The calling process has more than one thread: another might be reading it.
pub fn forget_environment(kept: &[&str]) -> Result<()> {
    has_one_thread()?;
    // SAFETY: nobody else reads or writes the environment meanwhile. It is a list of pointers
    // to writable strings (environ(7)), both of which end with a zero. The list only becomes
    // shorter, and what is overwritten is in it no more.
    unsafe {
        let mut from = libc::environ;
        let mut to = libc::environ;
        while !from.is_null() && !(*from).is_null() {
            let bytes = CStr::from_ptr(*from).to_bytes();
            let is_kept = kept.iter().any(|name| {
                let value = bytes.strip_prefix(name.as_bytes());
                value.is_some_and(|value| value.first() == Some(&b'='))
            });
            if is_kept {
                *to = *from;
                to = to.add(1);
            } else {
                let len = bytes.len();
                std::ptr::write_bytes(*from, 0, len);
            }
            from = from.add(1);
        }
        if !to.is_null() {
            *to = std::ptr::null_mut();
        }
    }
    Ok(())
}

/// Gives every signal that the caller had ignored or blocked its usual meaning
/// again, but for `SIGPIPE`, which Rust ignores by itself. Before any handler of
/// this program is set.
///
/// # Errors
/// The mask of blocked signals cannot be changed.
pub fn reset_signals() -> Result<()> {
    for signal in 1..=libc::SIGRTMAX() {
        if signal != libc::SIGPIPE {
            stop_ignoring(signal);
        }
    }
    // SAFETY: both calls get a set that lives here; sigemptyset initialises it.
    let unblocked = unsafe {
        let mut none = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut())
    };
    match unblocked {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)).os("unblock signals"),
    }
}

/// A caller that ignores `SIGCHLD` would have this program never learn how a
/// program that it started has ended.
pub fn heed_children() {
    stop_ignoring(libc::SIGCHLD);
}

fn stop_ignoring(signal: libc::c_int) {
    // SAFETY: the structure lives here, and all zeros are a valid one. No handler
    // is installed or removed: only what is ignored becomes the default. A
    // signal that cannot be asked about is left as it is.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        if libc::sigaction(signal, std::ptr::null(), &raw mut action) == 0
            && action.sa_sigaction == libc::SIG_IGN
        {
            action.sa_sigaction = libc::SIG_DFL;
            libc::sigaction(signal, &raw const action, std::ptr::null_mut());
        }
    }
}
