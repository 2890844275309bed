//! A filesystem in memory that forgets what was not synced, to test what a
//! program leaves behind when the power fails.
//!
//! A [`Disk`] holds for every inode what is *current*, as processes see it, and
//! what is *durable*. `fsync` and `fdatasync` make the contents and the size of
//! a file durable, and nothing else: for its name, even a new one, the directory
//! has to be synced too. `fsync` of a directory makes its entries durable, but
//! not the files and directories they refer to. A rename between two directories
//! needs both: with only the new one synced the file is found at both places,
//! with only the old one it is lost. Writes with `O_SYNC` or `O_DSYNC` are
//! durable when they return.
//!
//! [`Disk::after_power_cut`] makes a new disk of what is left. It may be called
//! at any moment, also while programs use the mounted disk. To test a crash,
//! mount that new disk and let the program start on it.
//!
//! The disk is served by a thread of the process that mounts it. Other processes
//! may be killed while they use it; if this one is killed while it reads or maps
//! a file there itself, it waits for its own answer until `umount -f`.
//!
//! # What it does not model
//!
//! - Anything between the extremes of [`Lost`]: of all that was not synced, the
//!   chosen kind is lost whole. There are no torn writes, no writes that
//!   survive out of order, no writeback by the kernel's own decision and no
//!   journal that commits one file's entry along with another's `fsync`.
//! - Durability of attributes: mode, owner and times always survive.
//! - `sync` and `syncfs`: FUSE does not pass them on, so they make nothing
//!   durable. Neither does closing a file or unmounting.
//! - Writable shared mappings: they work, but are current only from `msync` on.
//! - A directory at two places, as a half synced move of one would leave: it
//!   keeps only one of them.
//! - Holes, running out of space, I/O errors but for [`Disk::refuse`], files over 1 GiB, symbolic links,
//!   special files, extended attributes, `O_TMPFILE` and exchanging renames.
//!   `flock` and other locks are the kernel's own and need no disk.

mod disk;
mod fs;
mod inode;
#[cfg(test)]
mod tests;

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::Context;
use fuser::{BackgroundSession, Config, Session, SessionACL};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::{getegid, geteuid};

use disk::State;
use fs::Mounted;

const DEVICE: &str = "/dev/fuse";
/// How long a mount may stay busy before it is only detached.
const BUSY: Duration = Duration::from_millis(200);
/// How long the session may take to notice that its mount is gone.
const ENDING: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(1);

/// What a power cut takes away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lost {
    /// Everything that was not synced: directory entries and data.
    All,
    /// Data that was not synced, while every change of a directory survives.
    ///
    /// A file has the length and the contents of its last `fsync`, so one that
    /// was never synced is there, but empty. This is the worst order in which a
    /// filesystem may write things down: names before what they stand for.
    DataOnly,
    /// Nothing: the processes are killed, but the system goes on.
    ///
    /// What was not synced yet is not synced on the new disk either.
    Nothing,
}

/// What is refused of a file that is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// To open it.
    Open(Errno),
    /// To read it once it is open.
    Read(Errno),
}

/// A disk in memory. Clones are handles to the same disk.
#[derive(Clone)]
pub struct Disk(Arc<Mutex<State>>);

impl Disk {
    /// An empty disk.
    #[must_use]
    pub fn new() -> Self {
        Self::with(State::new())
    }

    fn with(state: State) -> Self {
        Self(Arc::new(Mutex::new(state)))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is left after a power cut at this moment: a new disk, independent
    /// of this one, on which everything left is durable unless nothing was lost.
    #[must_use]
    pub fn after_power_cut(&self, lost: Lost) -> Self {
        let state = self.state().after_power_cut(lost);
        Self::with(state)
    }

    /// From now on a file cannot be opened or read, as on a disk with a bad sector. It can
    /// be renamed, replaced and removed.
    ///
    /// # Errors
    /// If there is no such file: `path` is that from the root of the disk.
    pub fn refuse(&self, path: &Path, refused: Refused) -> anyhow::Result<()> {
        let done = self.state().refuse(path, refused);
        done.map_err(|errno| anyhow::anyhow!("{}: {errno:?}", path.display()))
    }

    /// Mounts the disk at an existing directory; needs root.
    ///
    /// A disk should be mounted at one place at a time, since two mounts do not
    /// see each other's changes of files they have cached.
    pub fn mount(&self, dir: &Path) -> anyhow::Result<MountedDisk> {
        let dir = dir
            .canonicalize()
            .with_context(|| format!("finding {}", dir.display()))?;
        let device = open_device().with_context(|| format!("opening {DEVICE}"))?;
        let options = format!(
            "fd={},rootmode=40755,user_id={},group_id={}",
            device.as_raw_fd(),
            geteuid().as_raw(),
            getegid().as_raw()
        );
        let options = CString::new(options)?;
        let flags = MountFlags::NODEV | MountFlags::NOSUID;
        mount("powercut", &dir, "fuse", flags, Some(options.as_c_str()))
            .with_context(|| format!("mounting at {}", dir.display()))?;
        let (fs, acl) = (Mounted::new(self.clone()), SessionACL::Owner);
        let session = Session::from_fd(fs, device, acl, Config::default()).and_then(Session::spawn);
        let session = session.inspect_err(|_| {
            let _ = unmount(&dir, UnmountFlags::DETACH);
        });
        Ok(MountedDisk {
            session: Some(session.context("starting the FUSE session")?),
            dir,
        })
    }
}

impl Default for Disk {
    fn default() -> Self {
        Self::new()
    }
}

/// A mounted disk, unmounted on drop.
///
/// If a process still uses it, the mount is detached from its directory and
/// goes away with the last use.
pub struct MountedDisk {
    /// Serves the mount, but does not own it: fuser would try to unmount a
    /// second time when the mount is gone already.
    session: Option<BackgroundSession>,
    dir: PathBuf,
}

impl MountedDisk {
    /// Where the disk is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Whether the mount is gone now, and not just detached.
    fn unmount(&self) -> bool {
        let start = Instant::now();
        loop {
            match unmount(&self.dir, UnmountFlags::NOFOLLOW) {
                Ok(()) => return true,
                // A process that has just ended may not be gone entirely.
                Err(Errno::BUSY) if start.elapsed() < BUSY => sleep(POLL),
                Err(_) => break,
            }
        }
        // Fails if somebody else has unmounted it.
        let _ = unmount(&self.dir, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
        false
    }
}

impl Drop for MountedDisk {
    fn drop(&mut self) {
        let Some(session) = self.session.take() else {
            return;
        };
        let start = Instant::now();
        let gone = self.unmount();
        // A copy of the mount in another namespace may keep the session going.
        while gone && !session.guard.is_finished() && start.elapsed() < ENDING {
            sleep(POLL);
        }
        if session.guard.is_finished() {
            let _ = session.join();
        }
    }
}

fn open_device() -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    Ok(rustix::fs::open(DEVICE, flags, Mode::empty())?)
}

/// Why no disk can be mounted here, if so: tests print it and return.
#[must_use]
pub fn unavailable() -> Option<String> {
    match open_device() {
        Err(error) => Some(format!("cannot open {DEVICE}: {error}")),
        Ok(_) if !geteuid().is_root() => Some("mounting needs root".to_owned()),
        Ok(_) => None,
    }
}
