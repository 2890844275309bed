//! Nothing open of whoever started a process.

use std::collections::BTreeSet;
use std::io;
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
    if unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        // A kernel before Linux 5.9, or a container that does not know the call.
        Some(libc::ENOSYS | libc::EPERM) => close_one_by_one(first, last),
        _ => Err(error),
    }
    .os("close inherited descriptors")
}

fn close_one_by_one(first: u32, last: u32) -> io::Result<()> {
    let mut open = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd")? {
        let number = entry?.file_name().to_str().and_then(|it| it.parse().ok());
        open.extend(number.filter(|fd: &u32| (first..=last).contains(fd)));
    }
    for fd in open {
        // SAFETY: as above. One that is closed by now, as that of the list, is an error that
        // says so.
        unsafe { libc::close(fd.cast_signed()) };
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::fd::AsRawFd as _;

    use super::*;

    #[test]
    fn what_is_closed_one_by_one_is_what_is_in_the_range() {
        let (mine, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        // Numbers that nothing else of this process has.
        let copies = [801, 802, 804].map(|to| {
            // SAFETY: makes a descriptor of a number that nobody has.
            unsafe { libc::fcntl(mine.as_raw_fd(), libc::F_DUPFD_CLOEXEC, to) }
        });
        assert_eq!(copies, [801, 802, 804]);
        close_one_by_one(802, 803).unwrap();
        // SAFETY: asks for the flags of a number.
        let is_open = |fd: &i32| unsafe { libc::fcntl(*fd, libc::F_GETFD) } >= 0;
        assert_eq!(copies.map(|fd| is_open(&fd)), [true, false, true]);
        close_one_by_one(800, 810).unwrap();
        assert_eq!(copies.map(|fd| is_open(&fd)), [false; 3]);
    }
}
