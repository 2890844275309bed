//! The mounted snapshot that machines are restored from: one that is there
//! already, or one made for them, which all machines of a snapshot share and
//! which ends with the last of them.
//!
//! A mount made for machines is `mounts/ID`, and `mounts/ID.lock` is its users'
//! lock: each holds it shared (the machines inherit it from whoever restores
//! them), and the mount's server waits to get it alone, which the kernel grants
//! when the last user is gone, however that ended. Mounts are made and undone
//! under a lock of `mounts` itself: nobody finds one that is half gone.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use snapstore_fuse::Mountpoint;
use snapstore_store::{SnapshotId, Store};

use crate::args::MountArgs;
use crate::commands::mount::launch;
use crate::vms::runtime::Runtime;

/// How often a mount that is just ending is looked at again, and how long that
/// may go on.
const RETRY: Duration = Duration::from_millis(10);
const RETRIES: usize = 500;

/// A snapshot as files.
pub struct MountedSnapshot {
    pub dir: PathBuf,
    /// Keeps the mount, if it was made for machines.
    pub users_lock: Option<File>,
}

/// A mount that shows the snapshot; started if there is none.
pub fn find_or_start(
    runtime: &Runtime,
    store: &Store,
    id: SnapshotId,
) -> anyhow::Result<MountedSnapshot> {
    if let Some(dir) = find(store, id, &runtime.mounts())? {
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
        start(runtime, store, id, &dir, &lock_path)?;
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
    let same = match (lock.metadata(), fs::metadata(path)) {
        (Ok(ours), Ok(theirs)) => (ours.dev(), ours.ino()) == (theirs.dev(), theirs.ino()),
        _ => false,
    };
    Ok(same.then_some(lock))
}

/// Starts the server unless it is there; one process at a time does so.
fn start(
    runtime: &Runtime,
    store: &Store,
    id: SnapshotId,
    dir: &Path,
    lock_path: &Path,
) -> anyhow::Result<()> {
    let _starting = lock_dir(&runtime.mounts())?;
    if shows(dir, id) {
        return Ok(());
    }
    match fs::create_dir(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(error).with_context(|| format!("cannot create {}", dir.display()));
        }
        _ => snapstore_fuse::prepare(dir)?,
    }
    let args = MountArgs {
        while_locked: Some(lock_path.to_owned()),
        ..MountArgs::of(vec![id.to_string(), dir.display().to_string()])
    };
    launch(store, &args, dir)?;
    Ok(())
}

/// Held, exclusively, while a mount is made or undone in this directory.
pub fn lock_dir(mounts: &Path) -> anyhow::Result<File> {
    let dir = File::open(mounts).with_context(|| format!("cannot open {}", mounts.display()))?;
    loop {
        match rustix::fs::flock(&dir, FlockOperation::LockExclusive) {
            Err(Errno::INTR) => {}
            other => {
                other.context("cannot lock the mounts' directory")?;
                return Ok(dir);
            }
        }
    }
}

/// A mount of the user's own that shows the snapshot.
fn find(store: &Store, id: SnapshotId, not_under: &Path) -> anyhow::Result<Option<PathBuf>> {
    let path = fs::canonicalize(store.path())?;
    let trusted = [0, rustix::process::geteuid().as_raw()];
    for mount in Mountpoint::all()? {
        // Another user's server could show what it likes, or hang whoever looks.
        if !trusted.contains(&mount.user) {
            continue;
        }
        let same_store = fs::canonicalize(&mount.store).is_ok_and(|store| store == path);
        if !same_store || mount.dir.starts_with(not_under) || snapstore_fuse::is_dead(&mount.dir) {
            continue;
        }
        if shows(&mount.dir, id) {
            return Ok(Some(mount.dir));
        }
        for (tag, tagged) in store.tags()? {
            let dir = mount.dir.join(tag);
            if tagged == id && shows(&dir, id) {
                return Ok(Some(dir));
            }
        }
    }
    Ok(None)
}

/// Whether the files in a directory are those of the snapshot.
fn shows(dir: &Path, id: SnapshotId) -> bool {
    let Ok(manifest) = fs::read(dir.join("manifest.json")) else {
        return false;
    };
    serde_json::from_slice::<serde_json::Value>(&manifest)
        .is_ok_and(|manifest| manifest["id"] == id.to_string())
}
