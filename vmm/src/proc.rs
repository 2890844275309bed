//! What the kernel tells a process of itself and its children: files of `/proc`.
//!
//! A confined process has no `/proc` in its root. It keeps a descriptor of one in
//! which it sees itself and its children only ([`crate::confine`]).

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::OnceLock;

use rustix::fs::{Mode, OFlags, openat};

static ROOT: OnceLock<OwnedFd> = OnceLock::new();

/// Opens `/proc/RELATIVE`, read-only.
pub(crate) fn open(relative: &str) -> io::Result<File> {
    let Some(root) = ROOT.get() else {
        return File::open(Path::new("/proc").join(relative));
    };
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    Ok(openat(root, relative, flags, Mode::empty())?.into())
}

/// Reads `/proc/RELATIVE`.
pub(crate) fn read(relative: &str) -> io::Result<String> {
    let mut text = String::new();
    open(relative)?.read_to_string(&mut text)?;
    Ok(text)
}

/// From here on files are opened under this directory; the first one counts.
pub(crate) fn use_root(root: OwnedFd) -> BorrowedFd<'static> {
    ROOT.get_or_init(|| root).as_fd()
}
