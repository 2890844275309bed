//! A mounted snapshot's directory, held so that all that is opened in it is of one mount.
//!
//! A mount is found by its path, and its user may undo it at any time, or mount something
//! else there. A held directory stays what it is; whether it is the right one, its manifest
//! tells, if its server is this user's or root's.

use std::fs::File;
use std::io::Read as _;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags, openat, statx};
use snapstore_fuse::Mountpoint;

use crate::error::Unmounted;

/// What describes a mounted snapshot, in its directory.
const MANIFEST: &str = "manifest.json";

/// A held directory.
pub(crate) struct SnapshotFiles {
    dir: PathBuf,
    held: OwnedFd,
}

impl SnapshotFiles {
    /// Holds the directory, which must be a mount of this snapshot.
    ///
    /// # Errors
    /// [`Unmounted`], if it is not any more.
    pub fn hold(dir: &Path, snapshot: &str) -> anyhow::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let held = rustix::fs::open(dir, flags, Mode::empty());
        let files = Self {
            dir: dir.to_owned(),
            held: held.map_err(|_| gone(dir, snapshot))?,
        };
        match files.shows(snapshot) {
            true => Ok(files),
            false => Err(gone(dir, snapshot)),
        }
    }

    fn shows(&self, snapshot: &str) -> bool {
        let mut manifest = Vec::new();
        // Nothing is asked of another user's server.
        self.is_trusted()
            && self
                .open(MANIFEST)
                .is_ok_and(|mut file| file.read_to_end(&mut manifest).is_ok())
            && is_of(&manifest, snapshot)
    }

    fn is_trusted(&self) -> bool {
        let device = device(self.held.as_fd(), Path::new(""), AtFlags::EMPTY_PATH);
        let mounts = Mountpoint::all().unwrap_or_default();
        let user = rustix::process::geteuid().as_raw();
        device.is_some_and(|device| is_trusted(&mounts, device, user))
    }

    /// Opens one of its files.
    pub fn open(&self, name: &str) -> anyhow::Result<File> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let opened = openat(&self.held, name, flags, Mode::empty());
        opened
            .map(File::from)
            .with_context(|| format!("cannot open {}", self.dir.join(name).display()))
    }

    /// The number of the descriptor that holds it.
    pub fn as_raw_fd(&self) -> RawFd {
        self.held.as_raw_fd()
    }

    /// Whether it has such a file.
    pub fn has(&self, name: &str) -> bool {
        statx(&self.held, name, AtFlags::empty(), StatxFlags::TYPE).is_ok()
    }

    /// Whether its path still leads to it: what others opened by that since this is held was of
    /// this mount. No server is asked.
    pub fn is_still_there(&self) -> bool {
        let held = device(self.held.as_fd(), Path::new(""), AtFlags::EMPTY_PATH);
        let found = device(rustix::fs::CWD, &self.dir, AtFlags::empty());
        held.is_some() && held == found
    }
}

/// The filesystem that this is on. No server is asked.
fn device(dir: BorrowedFd<'_>, path: &Path, flags: AtFlags) -> Option<(u32, u32)> {
    let flags = flags | AtFlags::STATX_DONT_SYNC;
    // The device is always told.
    let found = statx(dir, path, flags, StatxFlags::empty()).ok()?;
    Some((found.stx_dev_major, found.stx_dev_minor))
}

/// Whether a user relies on mounts of a server. Another user's server could show what it
/// likes, or hang whoever looks.
pub(crate) fn trusts(user: u32, server: u32) -> bool {
    server == 0 || server == user
}

/// Whether a filesystem is a mount whose server is this user's or root's.
fn is_trusted(mounts: &[Mountpoint], device: (u32, u32), user: u32) -> bool {
    let mut its = mounts.iter().filter(|mount| mount.device == device);
    its.any(|mount| trusts(user, mount.user))
}

/// Whether a mount's manifest is that of the snapshot, under this program's own names of files.
pub(crate) fn is_of(manifest: &[u8], snapshot: &str) -> bool {
    serde_json::from_slice::<serde_json::Value>(manifest)
        // A layout has other names for what is looked for here.
        .is_ok_and(|manifest| manifest["id"] == snapshot && manifest["layout"].is_null())
}

/// What to say of a mount that is there no more.
pub(crate) fn gone(dir: &Path, snapshot: &str) -> anyhow::Error {
    let short = snapshot.get(..12).unwrap_or(snapshot);
    Unmounted(format!(
        "{} was unmounted, or shows something else than the snapshot {short} by now; try again",
        dir.display()
    ))
    .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_mounts_of_this_user_and_of_root_are_trusted() {
        let mount = |device, user| Mountpoint {
            dir: "/there".into(),
            store: "/store".into(),
            user,
            is_writable: false,
            device,
        };
        let mounts = [
            mount((0, 50), 0),
            mount((0, 51), 1000),
            mount((0, 52), 1001),
        ];
        let trusted = |device, user| is_trusted(&mounts, device, user);
        assert!(trusted((0, 50), 1000) && trusted((0, 51), 1000));
        assert!(!trusted((0, 52), 1000) && !trusted((0, 51), 0));
        assert!(!trusted((0, 53), 1000), "no mount of ours");
    }

    #[test]
    fn what_is_no_mount_is_not_held() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(MANIFEST), r#"{"id":"abc"}"#).unwrap();
        assert!(SnapshotFiles::hold(dir.path(), "abc").is_err());
    }
}
