//! The mounted snapshot that machines are restored from: one that is there
//! already, or one made for them, which all machines of a snapshot share and
//! which ends with the last of them.
//!
//! A mount made for machines is `mounts/ID`, and `mounts/ID.lock` is its users'
//! lock: each holds it shared (the machines inherit it from whoever restores
//! them), and the mount's server waits to get it alone, which the kernel grants
//! when the last user is gone, however that ended. Mounts are made and undone
//! under a lock of `mounts` itself: nobody finds one that is half gone.
//!
//! `mounts/ID-PROCESS-NUMBER` is a writable view for machines that write to their disks through
//! it, made for those of one command.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use snapstore_fuse::Mountpoint;
use snapstore_store::{SnapshotId, Store};

use crate::error::Busy;
use crate::look;
use crate::mount_server::{Reading, RemoteReading, ServerRequest, Writing, launch};
use crate::runtime::{Runtime, is_same};
use crate::snapshot_files;
use crate::starter::Starter;

/// How often a mount that is just ending is looked at again, and how long that
/// may go on.
const RETRY: Duration = Duration::from_millis(10);
const RETRIES: usize = 500;
/// How long another process may take to make or undo a mount.
const PATIENCE: Duration = Duration::from_secs(60);

/// A snapshot as files.
pub struct MountedSnapshot {
    /// Where its files are.
    pub dir: PathBuf,
    /// Keeps the mount, if it was made for machines.
    pub users_lock: Option<File>,
}

/// What a mount is to show.
#[derive(Clone, Copy, Debug)]
pub struct Shown<'a> {
    /// The snapshot.
    pub id: SnapshotId,
    /// The tag of a remote that names it, and how it is read there; of this store without.
    pub elsewhere: Option<(&'a str, &'a RemoteReading)>,
}

impl Shown<'_> {
    /// A snapshot of this store.
    #[must_use]
    pub fn here(id: SnapshotId) -> Self {
        Self {
            id,
            elsewhere: None,
        }
    }
}

/// A mount that shows the snapshot; started if there is none, to be read like that. `starter`
/// looks at mounts meanwhile.
pub fn find_or_start(
    runtime: &Runtime,
    store: &Store,
    shown: &Shown<'_>,
    reading: Reading,
    mut starter: Option<&mut Starter>,
) -> anyhow::Result<MountedSnapshot> {
    let id = shown.id;
    // One that shows all of it would take pages that nobody asks it for, since others have them, for
    // pages that are not needed.
    let is_whole = reading.part.is_none();
    if is_whole && let Some(dir) = find(store, id, &runtime.mounts(), starter.as_deref_mut())? {
        return Ok(MountedSnapshot {
            dir,
            users_lock: None,
        });
    }
    let dir = runtime.mounts().join(id.to_string());
    let lock_path = runtime.mounts().join(format!("{id}.lock"));
    for _ in 0..RETRIES {
        let Some(lock) = try_share(&lock_path)? else {
            std::thread::sleep(RETRY);
            continue;
        };
        let starter = starter.as_deref_mut();
        start(runtime, store, (shown, reading), &lock_path, starter)?;
        return Ok(MountedSnapshot {
            dir,
            users_lock: Some(lock),
        });
    }
    bail!(
        "the mount at {} does not come to its end; undo it with `snapstore umount {0}`",
        dir.display()
    )
}

/// A writable view of the snapshot for so many machines, whose directories in it are called
/// `0`, `1` and so on. It ends with the last of them, and what they wrote with it.
pub fn start_writable(
    runtime: &Runtime,
    store: &Store,
    id: SnapshotId,
    count: usize,
    overlay_dir: &Path,
) -> anyhow::Result<MountedSnapshot> {
    let process = std::process::id();
    let mut number = 0;
    let (lock_path, lock) = loop {
        let path = runtime
            .mounts()
            .join(format!("{id}-{process}-{number}.lock"));
        // One that is there was left by a process that had this number, too.
        match path.exists() || path.with_extension("").exists() {
            true => number += 1,
            false => {
                if let Some(lock) = try_share(&path)? {
                    break (path, lock);
                }
            }
        }
    };
    let dir = lock_path.with_extension("");
    let _starting = lock_dir(&runtime.mounts())?;
    fs::create_dir(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let request = ServerRequest {
        snapshot: Some(id.to_string()),
        while_locked: Some(lock_path.clone()),
        reading: Reading::wanted(false),
        writable: Some(Writing {
            count: Some(u32::try_from(count)?),
            owner: None,
            mode: Some(0o600),
            overlay_dir: overlay_dir.to_owned(),
            limit_bytes: None,
            resume: false,
            discard: true,
        }),
        ..ServerRequest::new(&dir)
    };
    if let Err(error) = launch(store, &request) {
        let _ = fs::remove_dir(&dir);
        let _ = fs::remove_file(&lock_path);
        return Err(error);
    }
    Ok(MountedSnapshot {
        dir,
        users_lock: Some(lock),
    })
}

/// Takes the users' lock; `None` if the mount is just ending.
fn try_share(path: &Path) -> anyhow::Result<Option<File>> {
    let lock = OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockShared) {
        Err(Errno::WOULDBLOCK) => return Ok(None),
        other => other.with_context(|| format!("cannot lock {}", path.display()))?,
    }
    // The server removes the file before it gives up the lock.
    Ok(is_same(&lock, path).then_some(lock))
}

/// The users' lock of a mount that is there, which then stays; `None` if nobody has it any
/// more.
pub(crate) fn share_if_used(path: &Path) -> anyhow::Result<Option<File>> {
    let Ok(lock) = File::open(path) else {
        return Ok(None);
    };
    match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockShared) {
        Err(Errno::WOULDBLOCK) => Ok(None),
        other => {
            other.with_context(|| format!("cannot lock {}", path.display()))?;
            Ok(is_same(&lock, path).then_some(lock))
        }
    }
}

/// Starts the server unless it is there; one process at a time does so.
fn start(
    runtime: &Runtime,
    store: &Store,
    (shown, reading): (&Shown<'_>, Reading),
    lock_path: &Path,
    starter: Option<&mut Starter>,
) -> anyhow::Result<()> {
    let id = shown.id;
    let dir = &lock_path.with_extension("");
    let _starting = lock_dir(&runtime.mounts())?;
    match fs::create_dir(dir) {
        // Nothing is mounted there.
        Ok(()) => {}
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(error).with_context(|| format!("cannot create {}", dir.display()));
        }
        Err(_) => {
            let id = id.to_string();
            if look::which_shows(&id, &[vec![dir.to_owned()]], starter)?.is_some() {
                return Ok(());
            }
            if look::state(dir) == look::State::Silent {
                // Its machines keep it; others get one that answers.
                tracing::warn!(dir = %dir.display(), "the mount's server does not answer; another is started");
                snapstore_fuse::unmount(dir, true, &look::is_dead)?;
            }
        }
    }
    let (name, remote) = match shown.elsewhere {
        None => (id.to_string(), None),
        Some((name, reading)) => {
            let id = Some(id.to_string());
            (
                name.to_owned(),
                Some(RemoteReading {
                    id,
                    ..reading.clone()
                }),
            )
        }
    };
    let request = ServerRequest {
        snapshot: Some(name),
        remote,
        while_locked: Some(lock_path.to_owned()),
        reading,
        ..ServerRequest::new(dir)
    };
    launch(store, &request)?;
    Ok(())
}

/// Clears away mounts made for machines whose server was killed, once no machine has them
/// any more. A server that lives does so itself.
pub fn clear_abandoned(mounts: &Path) -> anyhow::Result<()> {
    // As the kernel tells of them.
    let mounts =
        &fs::canonicalize(mounts).with_context(|| format!("cannot find {}", mounts.display()))?;
    let mut locks = Vec::new();
    for entry in
        fs::read_dir(mounts).with_context(|| format!("cannot list {}", mounts.display()))?
    {
        let path = entry?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "lock")
        {
            locks.push(path);
        }
    }
    clear_directories(mounts)?;
    for path in locks {
        let Some(_alone) = try_alone(&path)? else {
            continue;
        };
        let held = File::open(mounts)?;
        if rustix::fs::flock(&held, FlockOperation::NonBlockingLockExclusive).is_err() {
            // Somebody makes or undoes one.
            return Ok(());
        }
        let dir = path.with_extension("");
        let is_mounted = Mountpoint::all()?.iter().any(|mount| mount.dir == dir);
        if is_mounted {
            if !look::is_dead(&dir) {
                // Its server is about to end.
                continue;
            }
            snapstore_fuse::unmount(&dir, true, &look::is_dead)?;
        }
        // In this order: without its lock nobody would look for a directory.
        match fs::remove_dir(&dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot remove {}", dir.display()));
            }
            _ => {}
        }
        let _ = fs::remove_file(&path);
    }
    Ok(())
}

/// Removes directories that have neither a mount nor a lock any more: of servers that ended
/// between the two.
fn clear_directories(mounts: &Path) -> anyhow::Result<()> {
    let held = File::open(mounts)?;
    if rustix::fs::flock(&held, FlockOperation::NonBlockingLockExclusive).is_err() {
        // Somebody makes or undoes one.
        return Ok(());
    }
    let mounted = Mountpoint::all()?;
    let entries =
        fs::read_dir(mounts).with_context(|| format!("cannot list {}", mounts.display()))?;
    for entry in entries {
        let dir = entry?.path();
        let is_used = dir.with_extension("lock").exists()
            || mounted.iter().any(|mount| mount.dir == dir)
            || dir.extension().is_some();
        if !is_used {
            // One that is not empty, or in use after all, stays.
            let _ = fs::remove_dir(&dir);
        }
    }
    Ok(())
}

/// The users' lock, if it has no users and is still the one at this path.
fn try_alone(path: &Path) -> anyhow::Result<Option<File>> {
    let Ok(lock) = File::open(path) else {
        return Ok(None);
    };
    match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => Ok(None),
        other => {
            other.with_context(|| format!("cannot lock {}", path.display()))?;
            Ok(is_same(&lock, path).then_some(lock))
        }
    }
}

/// Held, exclusively, while a mount is made or undone in this directory.
pub fn lock_dir(mounts: &Path) -> anyhow::Result<File> {
    let dir = File::open(mounts).with_context(|| format!("cannot open {}", mounts.display()))?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        match rustix::fs::flock(&dir, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::INTR) => {}
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => std::thread::sleep(RETRY),
            Err(Errno::WOULDBLOCK) => {
                let message = format!(
                    "another process makes or undoes a mount in {}, and does not come to an end",
                    mounts.display()
                );
                return Err(Busy(message).into());
            }
            other => {
                other.context("cannot lock the mounts' directory")?;
                return Ok(dir);
            }
        }
    }
}

/// A mount that shows the snapshot, the user's own or one made for machines.
pub fn find_any(
    runtime: &Runtime,
    store: &Store,
    id: SnapshotId,
) -> anyhow::Result<Option<PathBuf>> {
    if let Some(dir) = find(store, id, &runtime.mounts(), None)? {
        return Ok(Some(dir));
    }
    let dir = runtime.mounts().join(id.to_string());
    look::which_shows(&id.to_string(), &[vec![dir]], None)
}

/// A mount of the user's own that shows the snapshot. None of them is touched by
/// this process: any may hang.
fn find(
    store: &Store,
    id: SnapshotId,
    not_under: &Path,
    starter: Option<&mut Starter>,
) -> anyhow::Result<Option<PathBuf>> {
    let path = fs::canonicalize(store.path())?;
    let user = rustix::process::geteuid().as_raw();
    let mounts = Mountpoint::all()?.into_iter().filter(|mount| {
        snapshot_files::trusts(user, mount.user)
            && mount.store == path
            && !mount.dir.starts_with(not_under)
            // Machines are told of it as text.
            && mount.dir.to_str().is_some()
    });
    let mounts: Vec<_> = mounts.map(|mount| mount.dir).collect();
    if mounts.is_empty() {
        return Ok(None);
    }
    let tags = store.tags_of(id)?;
    let lists: Vec<Vec<PathBuf>> = mounts
        .into_iter()
        .map(|dir| {
            let of_tags = tags.iter().map(|tag| dir.join(tag)).collect::<Vec<_>>();
            [vec![dir], of_tags].concat()
        })
        .collect();
    look::which_shows(&id.to_string(), &lists, starter)
}
