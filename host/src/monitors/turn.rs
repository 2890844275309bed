//! Commits of one monitor take turns: each pauses and resumes it, and one that another one's
//! resume lets go on reads memory of several instants.
//!
//! The turn is a lock of a file in the runtime directory, which is called as the socket's inode.
//! Whoever resumes the monitor after a commit that was killed inherits it, and holds it as long
//! as it may still do so.

use std::fs::{self, DirBuilder, File};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rustix::fs::FlockOperation;
use rustix::io::Errno;

use crate::error::Busy;
use crate::runtime::Runtime;

/// Where the files are, in the runtime directory.
const DIR: &str = "monitors";
/// How long another commit, or who resumes after one, is waited for.
const PATIENCE: Duration = Duration::from_secs(60);
const RETRY: Duration = Duration::from_millis(10);

/// While it lives nobody else commits this monitor.
pub struct Turn {
    lock: File,
    path: PathBuf,
    stays: bool,
}

impl Turn {
    /// Waits for the turn; `None` if there is no such socket, which is told by who connects.
    ///
    /// # Errors
    /// [`Busy`] if another one does not come to its end.
    pub fn take(socket: &Path) -> anyhow::Result<Option<Self>> {
        let Ok(found) = fs::metadata(socket) else {
            return Ok(None);
        };
        let dir = Runtime::open()?.path().join(DIR);
        match DirBuilder::new().mode(0o700).create(&dir) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            made => made.with_context(|| format!("cannot create {}", dir.display()))?,
        }
        let path = dir.join(format!("{:x}-{:x}.lock", found.dev(), found.ino()));
        let began = Instant::now();
        let mut is_told = false;
        loop {
            let lock =
                File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
            match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                // Who had it before has removed its name.
                Ok(()) if !is_at(&lock, &path) => continue,
                Ok(()) => {
                    return Ok(Some(Self {
                        lock,
                        path,
                        stays: false,
                    }));
                }
                Err(Errno::WOULDBLOCK | Errno::INTR) => {}
                Err(error) => {
                    Err(error).with_context(|| format!("cannot lock {}", path.display()))?
                }
            }
            if began.elapsed() > PATIENCE {
                anyhow::bail!(Busy(format!(
                    "another commit of the monitor at {} is under way",
                    socket.display()
                )));
            }
            if !is_told && began.elapsed() > Duration::from_secs(1) {
                is_told = true;
                tracing::info!(socket = %socket.display(), "another commit of this monitor is waited for");
            }
            std::thread::sleep(RETRY);
        }
    }

    /// Another process has it still when this one ends.
    pub fn leave(&mut self) {
        self.stays = true;
    }

    /// What holds it.
    pub fn lock(&self) -> BorrowedFd<'_> {
        self.lock.as_fd()
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if !self.stays {
            // Who waits sees that it is not the file of this name any more.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn is_at(lock: &File, path: &Path) -> bool {
    let (held, named) = (lock.metadata(), fs::metadata(path));
    held.is_ok_and(|held| named.is_ok_and(|named| held.ino() == named.ino()))
}
