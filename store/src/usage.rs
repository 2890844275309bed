//! What a store takes and who uses it, as far as that is quickly told: nothing that is
//! stored is read, and no lock is waited for.

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

use crate::error::{ErrorClass, IoContext as _, Result, readable};
use crate::gc::rewrites::Ledger;
use crate::gc::state::CollectorState;
use crate::lease;
use crate::lock::{self, LockKind};
use crate::store::Store;

/// How long to wait for who looks at leases: they hold that lock for a moment.
const PATIENCE: Duration = Duration::from_secs(1);

/// Numbers about a store that are quickly told.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct StoreUsage {
    /// Tags, damaged ones too.
    pub tags: u64,
    /// Sealed packs.
    pub packs: u64,
    /// Their length.
    pub pack_bytes: u64,
    /// Packs that are being written, or were left by who was killed.
    pub open_packs: u64,
    /// Packs that a repair has set aside.
    pub damaged_packs: u64,
    /// Packs that a collection is about to delete; `None` if what it has written down is
    /// damaged.
    pub condemned_packs: Option<u64>,
    /// Length of the index's files.
    pub index_bytes: u64,
    /// Length of every file of the store.
    pub total_bytes: u64,
    /// Bytes that commits have written and collections have seen; a store of format 1 does
    /// not know, nor one in which that is damaged.
    pub committed_bytes: Option<u64>,
    /// Bytes that collections have written.
    pub rewritten_bytes: Option<u64>,
    /// Who uses the store: commits, and viewers such as mounts. `None` if somebody who
    /// does not come to an end keeps that from being looked at.
    pub leases: Option<(u64, u64)>,
    /// When a collection last found something to free.
    pub last_freed: Option<SystemTime>,
    /// When a tag was last set.
    pub last_tagged: Option<SystemTime>,
}

impl Store {
    /// Counts files and leases. Takes time in proportion to the number of files.
    ///
    /// # Errors
    /// I/O errors. What is damaged is not known ([`Store::verify`] tells of it).
    pub fn usage(&self) -> Result<StoreUsage> {
        let layout = &self.layout;
        let packs = files(&layout.packs())?;
        let of = |extension: &str| {
            let of = packs.iter().filter(|file| file.name.ends_with(extension));
            of.fold((0, 0), |(count, bytes), file| {
                (count + 1, bytes + file.bytes)
            })
        };
        let (sealed, pack_bytes) = of(".pack");
        let ledger = match layout.rewrites().exists() {
            true => readable(Ledger::read(layout))?,
            false => None,
        };
        let collector = readable(CollectorState::read(layout))?;
        Ok(StoreUsage {
            tags: self.tag_names()?.len() as u64,
            packs: sealed,
            pack_bytes,
            open_packs: of(".open").0,
            damaged_packs: files(&layout.damaged())?.len() as u64,
            condemned_packs: collector.map(|state| state.condemned.len() as u64),
            index_bytes: self.index_bytes()?,
            total_bytes: self.bytes_on_disk()?,
            committed_bytes: ledger.as_ref().map(Ledger::committed_bytes),
            rewritten_bytes: ledger.as_ref().map(Ledger::rewritten_bytes),
            leases: self.lease_counts()?,
            last_freed: modified(&layout.collector()),
            last_tagged: modified(&layout.tags()),
        })
    }

    fn lease_counts(&self) -> Result<Option<(u64, u64)>> {
        let lock = match lock::acquire_to_read(&self.layout, LockKind::Allocate, PATIENCE) {
            Err(error) if error.class() == ErrorClass::Busy => return Ok(None),
            other => other?,
        };
        let leases = match &lock {
            Some(lock) => lease::live_under(&self.layout, lock)?,
            // Nobody has ever changed the store.
            None => Vec::new(),
        };
        let is_writer = |lease: &&lease::LiveLease| lease.claim.writing_since.is_some();
        let writers = leases.iter().filter(is_writer).count() as u64;
        Ok(Some((writers, leases.len() as u64 - writers)))
    }
}

struct Entry {
    name: String,
    bytes: u64,
}

/// The files of a directory that may not be there. One that goes meanwhile is left out.
fn files(dir: &Path) -> Result<Vec<Entry>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.context("list", dir)?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.context("list", dir)?;
        if let Ok(metadata) = entry.metadata() {
            found.push(Entry {
                name: entry.file_name().to_string_lossy().into_owned(),
                bytes: metadata.len(),
            });
        }
    }
    Ok(found)
}

fn modified(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).ok()?.modified().ok()
}
