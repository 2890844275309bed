//! The store's locks: flock(2) on files in `locks/`, released by the kernel
//! when their holder ends.
//!
//! Three of them that matter, always taken in this order: `collect` (one garbage
//! collection, verification or repair at a time), `publish` (one process
//! changes index, tags or collector state at a time; held briefly),
//! `allocate` (handing out pack numbers and lease files; held for
//! microseconds).
//!
//! Who waits for `publish` holds `publish-turn` meanwhile, and whoever wants `publish`
//! waits for that first, for a moment: else a collection, which takes the lock again and again, would
//! have it each time that a commit looks.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use crate::cancel::Cancel;
use crate::error::{Damage, Error, IoContext as _, Result};
use crate::layout::Layout;
use crate::lock_probe;
use crate::patience::Awake;
use crate::regular::{self, Opened};
use crate::sim::{self, StepKind};

/// How long an operation waits for a lock unless told otherwise.
pub(crate) const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(50);
/// The same for the one whose turn it is.
const LONGEST_PAUSE_OF_NEXT: Duration = Duration::from_millis(4);
/// How long a turn is waited for.
const LONGEST_TURN: Duration = Duration::from_millis(250);
/// Held by the one whose turn it is to take the publish lock.
const TURN: &str = "publish-turn";
const SILENT_FOR: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, Debug)]
pub(crate) enum LockKind {
    Collect,
    Publish,
    Allocate,
}

impl LockKind {
    /// All of them, in the order in which they are taken.
    pub const ALL: [Self; 3] = [Self::Collect, Self::Publish, Self::Allocate];

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
    taken: Instant,
    /// Dropped last: commits wait for what is short.
    _awake: Option<Awake>,
}

impl Drop for Lock {
    fn drop(&mut self) {
        tracing::trace!(lock = ?self.path, held = ?self.taken.elapsed());
        // Not left to the closing of the file: a child that another thread has
        // forked meanwhile has a duplicate, which would keep the lock.
        let _ = rustix::fs::flock(&self.file, FlockOperation::Unlock);
        sim::released(&self.path);
    }
}

/// Waits for the lock; [`Error::Busy`] names the holder after `timeout`.
pub(crate) fn acquire(layout: &Layout, kind: LockKind, timeout: Duration) -> Result<Lock> {
    acquire_unless(&Cancel::default(), layout, kind, timeout)
}

/// The same, for as long as it is not cancelled.
pub(crate) fn acquire_unless(
    cancel: &Cancel,
    layout: &Layout,
    kind: LockKind,
    timeout: Duration,
) -> Result<Lock> {
    let path = layout.locks().join(kind.file_name());
    sim::before(StepKind::Lock, &path).context("lock", &path)?;
    lock_probe::check(layout)?;
    let file = whole(open_to_write(&path), &path)?;
    // The simulator decides by itself who is next.
    if !matches!(kind, LockKind::Publish) || sim::is_simulated() {
        return wait_for(file, path, kind, timeout, cancel, LONGEST_PAUSE);
    }
    let started = Instant::now();
    let turn_path = layout.locks().join(TURN);
    let for_turn = timeout.min(LONGEST_TURN);
    let turn = whole(open_to_write(&turn_path), &turn_path)
        .and_then(|file| wait_for(file, turn_path, kind, for_turn, cancel, LONGEST_PAUSE));
    let (turn, pause) = match turn {
        // Its holder may be stopped, or something else stand in its place: it keeps nobody
        // from the lock itself.
        Err(Error::Busy { .. } | Error::Damaged(_)) => (None, LONGEST_PAUSE),
        other => (Some(other?), LONGEST_PAUSE_OF_NEXT),
    };
    let left = timeout.saturating_sub(started.elapsed());
    let lock = wait_for(file, path, kind, left, cancel, pause);
    drop(turn);
    lock
}

/// The same for an operation that changes nothing. Where the lock's file cannot
/// be opened for writing, reading is enough; where there is no such file, nobody
/// has ever changed the store.
pub(crate) fn acquire_to_read(
    layout: &Layout,
    kind: LockKind,
    timeout: Duration,
) -> Result<Option<Lock>> {
    acquire_to_read_unless(&Cancel::default(), layout, kind, timeout)
}

/// The same, for as long as it is not cancelled.
pub(crate) fn acquire_to_read_unless(
    cancel: &Cancel,
    layout: &Layout,
    kind: LockKind,
    timeout: Duration,
) -> Result<Option<Lock>> {
    let path = layout.locks().join(kind.file_name());
    sim::before(StepKind::Lock, &path).context("lock", &path)?;
    let opened = match open_to_write(&path) {
        Err(error) if is_read_only(&error) => regular::open(&path),
        other => other,
    };
    if matches!(opened, Ok(Opened::Absent)) {
        return Ok(None);
    }
    let file = whole(opened, &path)?;
    wait_for(file, path, kind, timeout, cancel, LONGEST_PAUSE).map(Some)
}

/// Opens or creates a lock's file. A copy of a store may have lost its directory.
fn open_to_write(path: &Path) -> std::io::Result<Opened> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    let found = regular::open_with(path, &options)?;
    if !matches!(found, Opened::Absent) {
        return Ok(found);
    }
    let options = regular::never_waiting(options.create(true));
    let created = match options.open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            std::fs::create_dir(path.parent().unwrap_or(path))?;
            options.open(path)
        }
        other => other,
    };
    created.map(Opened::File)
}

/// Fails if what stands in the place of a lock's file is none.
pub(crate) fn check(layout: &Layout, kind: LockKind) -> Result<()> {
    let path = layout.locks().join(kind.file_name());
    match regular::oddity(&path) {
        Some(reason) => Err(Damage::File { path, reason }.into()),
        None => Ok(()),
    }
}

/// The file of a lock that has one.
fn whole(opened: std::io::Result<Opened>, path: &Path) -> Result<File> {
    match opened.context("open", path)? {
        Opened::File(file) => Ok(file),
        Opened::Absent => Err(ErrorKind::NotFound).context("open", path),
        Opened::Odd(reason) => Err(Damage::File {
            path: path.to_owned(),
            reason,
        }
        .into()),
    }
}

/// Opens a file to lock it. NFS locks only what is open for writing.
pub(crate) fn open_to_lock(path: &Path) -> std::io::Result<Opened> {
    match regular::open_with(path, OpenOptions::new().read(true).write(true)) {
        Err(error) if is_read_only(&error) => regular::open(path),
        other => other,
    }
}

/// Whether nothing can be written there, at all or by this user.
pub(crate) fn is_read_only(error: &std::io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    matches!(errno, Some(Errno::ROFS | Errno::ACCESS | Errno::PERM))
}

fn wait_for(
    mut file: File,
    path: PathBuf,
    kind: LockKind,
    timeout: Duration,
    cancel: &Cancel,
    longest_pause: Duration,
) -> Result<Lock> {
    cancel.check()?;
    // Of a collection as a whole nobody waits. Before it is taken: right after that it could be
    // kept from the processor.
    let awake = match kind {
        LockKind::Collect => None,
        LockKind::Publish | LockKind::Allocate => Awake::while_held(),
    };
    let started = Instant::now();
    let mut pause = FIRST_PAUSE;
    let mut said = false;
    while !try_exclusive(&file, &path)? {
        if sim::wait_for(&path).context("lock", &path)? {
            continue;
        }
        cancel.check()?;
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
        pause = (pause * 2).min(longest_pause);
    }
    // Only for the message above: a failure to note the holder is harmless.
    let _ = note_holder(&mut file);
    sim::locked(&path);
    let taken = Instant::now();
    tracing::trace!(lock = ?path, waited = ?taken - started);
    Ok(Lock {
        file,
        path,
        taken,
        _awake: awake,
    })
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

    #[test]
    fn who_takes_the_lock_again_and_again_lets_who_waits_have_it() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path().to_owned());
        std::fs::create_dir(layout.locks()).unwrap();
        let take = || acquire(&layout, LockKind::Publish, DEFAULT_TIMEOUT).unwrap();
        let mut held = Some(take());
        let (begun, has_begun) = std::sync::mpsc::channel();
        let taken = std::sync::atomic::AtomicU32::new(0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                begun.send(()).unwrap();
                for _ in 0..8 {
                    drop(take());
                    taken.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                }
            });
            has_begun.recv().unwrap();
            // Until it has its turn.
            while try_turn(&layout) {
                std::thread::yield_now();
            }
            // Not at any moment is the lock free for longer than it takes to ask.
            let mut again = 0;
            while taken.load(std::sync::atomic::Ordering::SeqCst) < 8 {
                drop(held.take());
                held = Some(take());
                again += 1;
                std::thread::sleep(Duration::from_millis(1));
            }
            assert!(again < 200, "taken {again} times, and only 8 by the other");
        });
    }

    #[test]
    fn what_stands_in_the_place_of_the_turn_keeps_nobody_from_the_lock() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path().to_owned());
        std::fs::create_dir_all(layout.locks().join(TURN)).unwrap();
        acquire(&layout, LockKind::Publish, DEFAULT_TIMEOUT).unwrap();
    }

    #[test]
    fn one_that_is_stopped_while_it_waits_keeps_nobody_from_the_lock() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path().to_owned());
        std::fs::create_dir(layout.locks()).unwrap();
        let path = layout.locks().join(TURN);
        let stopped = whole(open_to_write(&path), &path).unwrap();
        assert!(try_exclusive(&stopped, &path).unwrap());
        acquire(&layout, LockKind::Publish, DEFAULT_TIMEOUT).unwrap();
    }

    fn try_turn(layout: &Layout) -> bool {
        let path = layout.locks().join(TURN);
        let file = whole(open_to_write(&path), &path).unwrap();
        try_exclusive(&file, &path).unwrap()
    }
}
