//! Files that Firecracker writes a snapshot into: files in memory, which it opens by `/proc`.
//! One in a chroot, as its jailer makes, has no `/proc`: there they are files in that chroot,
//! by the names that they have in it, which are removed at once.

use std::fs::{self, File};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use rustix::fs::{Gid, MemfdFlags, Mode, OFlags, Uid, fchown, memfd_create, openat, unlinkat};

use crate::monitors::peer::Peer;

/// How what is made in a chroot is called; the number of its process follows.
const PREFIX: &str = ".snapstore-";

/// A file for Firecracker to write to.
pub struct Written {
    /// It, open for reading.
    pub file: File,
    /// Where Firecracker finds it.
    pub path: String,
    /// The directory that it has a name in.
    placed: Option<OwnedFd>,
}

impl Written {
    /// An empty file for the process to write to.
    pub fn new(peer: &Peer, what: &str) -> anyhow::Result<Self> {
        match peer.own_root()? {
            Some(root) => Self::within(&root, peer, what),
            None => {
                let file = memfd_create(format!("snapstore-{what}"), MemfdFlags::CLOEXEC)?;
                let file = File::from(file);
                Ok(Self {
                    path: format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()),
                    file,
                    placed: None,
                })
            }
        }
    }

    fn within(root: &Path, peer: &Peer, what: &str) -> anyhow::Result<Self> {
        clear(root)?;
        let failed = || format!("cannot make a file in the chroot of process {}", peer.pid);
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = rustix::fs::open(root, flags, Mode::empty()).with_context(failed)?;
        let name = format!("{PREFIX}{}-{what}", std::process::id());
        // Nothing that is there already, nor a link that somebody in there has made.
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = openat(&dir, &name, flags, Mode::RUSR | Mode::WUSR).with_context(failed)?;
        let written = Self {
            file: file.into(),
            path: format!("/{name}"),
            placed: Some(dir),
        };
        let (user, group) = peer.owner()?;
        let (user, group) = (Uid::from_raw(user), Gid::from_raw(group));
        fchown(&written.file, Some(user), Some(group)).with_context(failed)?;
        Ok(written)
    }
}

impl Drop for Written {
    fn drop(&mut self) {
        if let Some(dir) = &self.placed {
            let name = self.path.trim_start_matches('/');
            let _ = unlinkat(dir, name, rustix::fs::AtFlags::empty());
        }
    }
}

/// Removes what commits that were killed have left.
fn clear(root: &Path) -> anyhow::Result<()> {
    let entries = fs::read_dir(root).with_context(|| format!("cannot list {}", root.display()))?;
    for entry in entries {
        let name = entry?.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix(PREFIX));
        let pid = pid.and_then(|rest| rest.split_once('-')?.0.parse::<u32>().ok());
        if pid.is_some_and(|pid| !PathBuf::from(format!("/proc/{pid}")).exists()) {
            let _ = fs::remove_file(root.join(name));
        }
    }
    Ok(())
}
