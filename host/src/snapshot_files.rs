//! A mounted snapshot's directory, held so that all that is opened in it is of one mount.
//!
//! A mount is found by its path, and its user may undo it at any time, or mount something
//! else there. A held directory stays what it is; whether it is the right one, its manifest
//! tells.

use std::fs::File;
use std::io::Read as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags, fstatfs, openat, statx};

use crate::error::Unmounted;

/// What describes a mounted snapshot, in its directory.
const MANIFEST: &str = "manifest.json";
/// The kind of filesystem that mounts are (statfs(2)).
const FUSE: i64 = 0x6573_5546;

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
        #[allow(clippy::unnecessary_cast, reason = "its type depends on the platform")]
        let is_mount = fstatfs(&self.held).is_ok_and(|of| of.f_type as i64 == FUSE);
        is_mount
            && self
                .open(MANIFEST)
                .is_ok_and(|mut file| file.read_to_end(&mut manifest).is_ok())
            && is_of(&manifest, snapshot)
    }

    /// Opens one of its files.
    pub fn open(&self, name: &str) -> anyhow::Result<File> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let opened = openat(&self.held, name, flags, Mode::empty());
        opened
            .map(File::from)
            .with_context(|| format!("cannot open {}", self.dir.join(name).display()))
    }

    /// Whether it has such a file.
    pub fn has(&self, name: &str) -> bool {
        statx(&self.held, name, AtFlags::empty(), StatxFlags::TYPE).is_ok()
    }

    /// Whether its path still leads to it: what others opened by that since this is held was of
    /// this mount. No server is asked.
    pub fn is_still_there(&self) -> bool {
        let device = |dir, path: &Path, flags| {
            let flags = flags | AtFlags::STATX_DONT_SYNC;
            // The device is always told.
            let found = statx(dir, path, flags, StatxFlags::empty()).ok()?;
            Some((found.stx_dev_major, found.stx_dev_minor))
        };
        let held = device(self.held.as_fd(), Path::new(""), AtFlags::EMPTY_PATH);
        let found = device(rustix::fs::CWD, &self.dir, AtFlags::empty());
        held.is_some() && held == found
    }
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
