//! The store's locks: flock(2) on files in `locks/`, released by the kernel
//! when their holder ends.
//!
//! Three of them, always taken in this order: `collect` (one garbage
//! collection, verification or repair at a time), `publish` (one process
//! changes index, tags or collector state at a time; held briefly),
//! `allocate` (handing out pack numbers and lease files; held for
//! microseconds).

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use crate::error::{Error, IoContext as _, Result};
use crate::layout::Layout;
use crate::lock_probe;
use crate::sim::{self, StepKind};

/// How long an operation waits for a lock unless told otherwise.
pub(crate) const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(50);
const SILENT_FOR: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, Debug)]
pub(crate) enum LockKind {
    Collect,
    Publish,
    Allocate,
}

impl LockKind {
    fn file_name(self) -> &'static str {
        match self {
            Self::Collect => "collect",
            Self::Publish => "publish",
            Self::Allocate => "allocate",
        }
    }
}

/// A lock held until this is dropped.
#[derive(Debug)]
pub(crate) struct Lock {
    file: File,
    path: PathBuf,
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Not left to the closing of the file: a child that another thread has
        // forked meanwhile has a duplicate, which would keep the lock.
        let _ = rustix::fs::flock(&self.file, FlockOperation::Unlock);
        sim::released(&self.path);
    }
}

/// Waits for the lock; [`Error::Busy`] names the holder after `timeout`.
pub(crate) fn acquire(layout: &Layout, kind: LockKind, timeout: Duration) -> Result<Lock> {
    let path = layout.locks().join(kind.file_name());
    sim::before(StepKind::Lock, &path).context("lock", &path)?;
    lock_probe::check(layout)?;
    let file = open_to_write(&path).context("open", &path)?;
    wait_for(file, path, kind, timeout)
}

/// The same for an operation that changes nothing. Where the lock's file cannot
/// be opened for writing, reading is enough; where there is no such file, nobody
/// has ever changed the store.
pub(crate) fn acquire_to_read(
    layout: &Layout,
    kind: LockKind,
    timeout: Duration,
) -> Result<Option<Lock>> {
    let path = layout.locks().join(kind.file_name());
    sim::before(StepKind::Lock, &path).context("lock", &path)?;
    let file = match open_to_write(&path) {
        Err(error) if is_read_only(&error) => match File::open(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            other => other.context("open", &path)?,
        },
        other => other.context("open", &path)?,
    };
    wait_for(file, path, kind, timeout).map(Some)
}

fn open_to_write(path: &Path) -> std::io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
}

/// Opens a file to lock it. NFS locks only what is open for writing.
pub(crate) fn open_to_lock(path: &Path) -> std::io::Result<File> {
    match OpenOptions::new().read(true).write(true).open(path) {
        Err(error) if is_read_only(&error) => File::open(path),
        other => other,
    }
}

/// Whether nothing can be written there, at all or by this user.
pub(crate) fn is_read_only(error: &std::io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    matches!(errno, Some(Errno::ROFS | Errno::ACCESS | Errno::PERM))
}

fn wait_for(mut file: File, path: PathBuf, kind: LockKind, timeout: Duration) -> Result<Lock> {
    let started = Instant::now();
    let mut pause = FIRST_PAUSE;
    let mut said = false;
    while !try_exclusive(&file, &path)? {
        if sim::wait_for(&path).context("lock", &path)? {
            continue;
        }
        let waited = started.elapsed();
        if waited >= timeout {
            return Err(Error::Busy {
                holder: holder(&mut file),
                path,
            });
        }
        if waited >= SILENT_FOR && !said {
            said = true;
            tracing::warn!(
                lock = kind.file_name(),
                holder = holder(&mut file),
                "waiting for the store"
            );
        }
        std::thread::sleep(pause.min(timeout.saturating_sub(waited)));
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
    // Only for the message above: a failure to note the holder is harmless.
    let _ = note_holder(&mut file);
    sim::locked(&path);
    Ok(Lock { file, path })
}

/// Takes an exclusive flock if nobody has one.
pub(crate) fn try_exclusive(file: &File, path: &Path) -> Result<bool> {
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(errno) => Err(errno).context("lock", path),
    }
}

fn note_holder(file: &mut File) -> std::io::Result<()> {
    let line = format!("process {}\n", std::process::id());
    file.rewind()?;
    file.write_all(line.as_bytes())?;
    file.set_len(line.len() as u64)
}

fn holder(file: &mut File) -> String {
    let mut line = String::new();
    let read = file
        .rewind()
        .and_then(|()| file.take(64).read_to_string(&mut line));
    match read {
        Ok(_) if !line.trim().is_empty() => line.trim().to_owned(),
        _ => "another process".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_holder_waits_and_is_told_who_has_it() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path().to_owned());
        std::fs::create_dir(layout.locks()).unwrap();
        let held = acquire(&layout, LockKind::Publish, Duration::ZERO).unwrap();
        let error = acquire(&layout, LockKind::Publish, Duration::from_millis(5)).unwrap_err();
        assert!(
            error.to_string().contains(&std::process::id().to_string()),
            "{error}"
        );
        drop(held);
        acquire(&layout, LockKind::Publish, Duration::ZERO).unwrap();
    }
}
