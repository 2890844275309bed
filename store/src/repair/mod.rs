//! Rebuilding what can be rebuilt, and saying what cannot.
//!
//! Packs are the truth. From them come the index (always), the page size if
//! the configuration is damaged, and tags whose files are damaged or whose
//! directory is gone, under the names they were first committed as. Chunks
//! whose bytes are damaged are left out of the index, so that committing the
//! same page again stores it anew. A pack that holds damage is set aside in
//! `damaged/` after its whole chunks have been copied to a new pack (`salvage`);
//! pack files themselves are never changed.

mod aside;
mod files;
mod index;
mod report;

use std::path::Path;
use std::time::Duration;

use crate::cancel::Cancel;
use crate::durable;
use crate::error::{Damage, Error, IoContext as _, Result};
use crate::format::config::Config;
use crate::gc::mark::Reachability;
use crate::layout::Layout;
use crate::lease;
use crate::lock::{self, LockKind};
use crate::manifest;
use crate::opening;
use crate::pack::codec::Encoding;
use crate::pack::reader::PackReader;
use crate::progress::Progress;
use crate::store::Store;
use crate::tags;
use aside::set_aside;
use files::{odd_files, repair_collector, repair_config, set_odd_aside};
pub use report::RepairReport;

/// How to repair. There may be no open store to say it to.
///
/// ```
/// use snapstore_store::{Cancel, PageSize, RepairOptions, Silent, Store};
///
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("store");
/// # Store::create(&path, PageSize::default())?;
/// std::fs::remove_dir_all(path.join("index"))?;
/// let options = RepairOptions {
///     cancel: Cancel::default(), // kept by whoever may want to stop it
///     ..RepairOptions::default()
/// };
/// let report = Store::repair_with(&path, &options, &Silent)?;
/// assert!(report.remaining.is_empty());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct RepairOptions {
    /// Stops it until the new index is in its place; what was there before is there then.
    pub cancel: Cancel,
    /// How long to wait for another process that is publishing or collecting.
    pub lock_timeout: Duration,
}

impl Default for RepairOptions {
    fn default() -> Self {
        Self {
            cancel: Cancel::default(),
            lock_timeout: lock::DEFAULT_TIMEOUT,
        }
    }
}

impl Store {
    /// As [`Store::repair_with`], to its end.
    ///
    /// # Errors
    /// As [`Store::repair_with`].
    pub fn repair(path: &Path, progress: &dyn Progress) -> Result<RepairReport> {
        Self::repair_with(path, &RepairOptions::default(), progress)
    }

    /// Rebuilds the index of the store at `path`, and whatever else can be.
    ///
    /// Needs the store for itself: it fails if commits are under way.
    ///
    /// # Errors
    /// [`Error::Busy`] if commits are under way; [`Error::NoStore`] if there are
    /// no packs either; [`Error::Cancelled`]; I/O errors.
    pub fn repair_with(
        path: &Path,
        options: &RepairOptions,
        progress: &dyn Progress,
    ) -> Result<RepairReport> {
        let layout = Layout::new(std::path::absolute(path).context("resolve", path)?);
        if !opening::is_store(&layout)? {
            return Err(Error::NoStore {
                path: path.to_owned(),
            });
        }
        if let Err(error @ (Error::Newer { .. } | Error::Denied { .. })) =
            Config::read(&layout.config())
        {
            return Err(error);
        }
        let mut report = RepairReport::default();
        let mut missing_tags_dir = false;
        for odd in odd_files(&layout) {
            set_odd_aside(&layout, &odd, &mut report)?;
        }
        let mut others = opening::no_directories(&layout);
        others.extend(opening::no_directories_beside(&layout));
        for path in others {
            set_aside(&layout, &path)?;
            report.remaining.push(Damage::File {
                path,
                reason: opening::NO_DIRECTORY,
            });
        }
        for dir in layout.directories() {
            if !dir.is_dir() {
                missing_tags_dir |= dir == layout.tags();
                durable::make_dir(&dir)?;
                durable::sync_dir(layout.root())?;
            }
        }
        // Before the lock is taken that this takes, too.
        opening::restore_empty(&layout)?;
        let lock =
            |kind| lock::acquire_unless(&options.cancel, &layout, kind, options.lock_timeout);
        let _collect = lock(LockKind::Collect)?;
        let _publish = lock(LockKind::Publish)?;
        refuse_writers(&layout)?;
        repair_config(&layout, &mut report)?;
        let store = Self::open(path)?.with_cancel(options.cancel.clone());
        store.check_writable()?;
        store.refuse_newer_packs()?;
        repair_collector(&layout, store.format(), &mut report)?;
        store.rebuild_index(&mut report, progress)?;
        store.repair_tags(missing_tags_dir, &mut report)?;
        let mut reach = Reachability::new(&store.chunks)?;
        for (tag, id) in tags::each(&layout)? {
            let Ok(id) = id else { continue };
            match reach.add_snapshot(id) {
                Err(Error::Damaged(_)) => {
                    if let Err(Error::Damaged(_)) = manifest::read(&store.chunks, id) {
                        report.lost_manifests.push(tag.clone());
                    }
                    report.broken_snapshots.push(tag);
                }
                // What a newer version wrote is not broken.
                Err(error) if error.is_lost() => {}
                other => other?,
            }
        }
        Ok(report)
    }

    /// What a newer version wrote is not looked into, so nothing is moved or
    /// rewritten beside it.
    fn refuse_newer_packs(&self) -> Result<()> {
        for number in self.chunks.packs().sealed()? {
            match self.chunks.packs().get(number) {
                Ok(Some(pack)) if pack.is_sound()? => refuse_unknown(&pack)?,
                Err(Error::Damaged(_)) | Ok(_) => {}
                Err(other) => return Err(other),
            }
        }
        Ok(())
    }
}

/// A commit under way has opened the index that is about to be replaced.
fn refuse_writers(layout: &Layout) -> Result<()> {
    let writers: Vec<String> = lease::live(layout)?
        .into_iter()
        .filter(|lease| lease.claim.writing_since.is_some())
        .map(|lease| lease.holder)
        .collect();
    if writers.is_empty() {
        return Ok(());
    }
    Err(Error::Busy {
        path: layout.leases(),
        holder: format!("a commit under way ({})", writers.join(", ")),
    })
}

/// A chunk that only a newer version can read.
pub(crate) fn refuse_unknown(pack: &PackReader) -> Result<()> {
    let mut scan = pack.scan();
    for slot in scan.by_ref() {
        match slot {
            Ok(slot) => {
                if let Encoding::Unknown(encoding) = slot.entry.encoding {
                    return Err(pack.newer(slot.entry, encoding));
                }
            }
            Err(Error::Damaged(_)) => {}
            Err(other) => return Err(other),
        }
    }
    match scan.unknown_kind() {
        Some(kind) => Err(pack.newer_kind(kind)),
        None => Ok(()),
    }
}
