//! Nothing open of whoever started a process.

use std::collections::BTreeSet;
use std::os::fd::{FromRawFd as _, OwnedFd, RawFd};

use crate::error::{OsContext as _, Result};

/// Closes every descriptor but standard input, output and error and those named, which
/// it returns, in their order and close-on-exec.
///
/// For the beginning of a process that was just executed or forked, before it has
/// opened anything: what it owned is closed under it.
///
/// # Errors
/// One of those named is not open.
pub fn keep_only(kept: &[RawFd]) -> Result<Vec<OwnedFd>> {
    for fd in kept {
        // SAFETY: sets a flag of a number that the caller says is a descriptor.
        if unsafe { libc::fcntl(*fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
            return Err(std::io::Error::last_os_error()).os("keep an inherited descriptor");
        }
    }
    let wanted: BTreeSet<RawFd> = kept.iter().copied().filter(|fd| *fd > 2).collect();
    let mut from: RawFd = 3;
    for fd in wanted.iter().copied().chain([RawFd::MAX]) {
        if from < fd {
            close_range(from, fd.saturating_sub(1))?;
        }
        from = fd.saturating_add(1);
    }
    // SAFETY: each is open, as was just seen, and the caller gives it to nobody else.
    Ok(wanted_in_order(kept, |fd| unsafe {
        OwnedFd::from_raw_fd(fd)
    }))
}

fn wanted_in_order(kept: &[RawFd], own: impl Fn(RawFd) -> OwnedFd) -> Vec<OwnedFd> {
    let mut seen = BTreeSet::new();
    let once = kept.iter().filter(|fd| seen.insert(**fd));
    once.map(|fd| own(*fd)).collect()
}

fn close_range(first: RawFd, last: RawFd) -> Result<()> {
    let (first, last) = (first.cast_unsigned(), last.cast_unsigned());
    // SAFETY: closes what the caller of `keep_only` gives up.
    if unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } < 0 {
        return Err(std::io::Error::last_os_error()).os("close inherited descriptors");
    }
    Ok(())
}
