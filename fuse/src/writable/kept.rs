//! Views that nobody serves: what was written to them is in no commit, and takes room.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use super::place::{Shown, all};
use super::state::Ended;
use crate::error::Result;

/// A view that can be gone on with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KeptView {
    /// Where what was written is.
    pub place: PathBuf,
    /// The directory at which it was mounted, and will be.
    pub dir: PathBuf,
    /// The store of the snapshot it is made from.
    pub store: PathBuf,
    /// What it takes of the disk.
    pub disk_bytes: u64,
}

/// What is there of a view whose server has ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kept {
    /// Nothing.
    Nothing,
    /// What was written, which is on the disk.
    OnDisk,
    /// What was written. Whether it is on the disk is not known.
    Unconfirmed,
}

/// What is kept in `place`.
///
/// # Errors
/// It cannot be read, or is damaged.
pub fn is_kept(place: &Path) -> Result<Kept> {
    Ok(match Shown::of(place)? {
        None => Kept::Nothing,
        Some(_) if Ended::is_of(place)? => Kept::OnDisk,
        Some(_) => Kept::Unconfirmed,
    })
}

/// This user's views in a directory for overlays whose servers have ended. Nothing is changed,
/// and nobody is waited for.
///
/// # Errors
/// The directory cannot be listed.
pub fn kept_views(overlays: &Path) -> Result<Vec<KeptView>> {
    let mut kept = Vec::new();
    for place in all(overlays)? {
        let Ok(Some(shown)) = Shown::of(&place) else {
            continue;
        };
        if is_served(&place) {
            continue;
        }
        kept.push(KeptView {
            // What goes meanwhile takes nothing.
            disk_bytes: disk_bytes(&place).unwrap_or(0),
            dir: shown.dir,
            store: shown.store,
            place,
        });
    }
    Ok(kept)
}

/// Whether a server, or who is about to be one, has it locked.
fn is_served(place: &Path) -> bool {
    let shared = FlockOperation::NonBlockingLockShared;
    File::open(place.join("lock")).is_ok_and(|lock| flock(&lock, shared).is_err())
}

fn disk_bytes(dir: &Path) -> io::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let found = entry.metadata()?;
        bytes += found.blocks() * 512;
        if found.is_dir() {
            bytes += disk_bytes(&entry.path())?;
        }
    }
    Ok(bytes)
}
