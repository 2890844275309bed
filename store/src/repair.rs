//! Rebuilding what can be rebuilt, and saying what cannot.
//!
//! Packs are the truth. From them come the index (always), the page size if
//! the configuration is damaged, and tags whose files are damaged or whose
//! directory is gone, under the names they were first committed as. Chunks
//! whose bytes are damaged are left out of the index, so that committing the
//! same page again stores it anew. Pack files themselves are never changed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read as _;
use std::path::Path;

use rayon::prelude::*;

use crate::durable;
use crate::error::{Damage, Error, IoContext as _, Result};
use crate::gc::mark::Reach;
use crate::gc::state::CollectorState;
use crate::id::{ChunkKind, SnapshotId};
use crate::index::IndexWriter;
use crate::layout::Layout;
use crate::lease;
use crate::lock::{self, LockKind};
use crate::manifest;
use crate::pack::reader::PackReader;
use crate::pack::{Location, PackNumber, format};
use crate::page::PageSize;
use crate::progress::Progress;
use crate::store::{CONFIG_FORMAT, Store};
use crate::tags;
use crate::verify::check_stored;

/// What a repair did and what it could not do.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct RepairReport {
    /// Chunks in the new index.
    pub indexed_chunks: u64,
    /// Small files that were rebuilt.
    pub rebuilt_files: Vec<String>,
    /// Tags that were recovered, and the snapshots they name now.
    pub recovered_tags: BTreeMap<String, SnapshotId>,
    /// Tags whose files are damaged and that no readable snapshot fits. They are
    /// left as they are.
    pub lost_tags: Vec<String>,
    /// Damage that stays.
    pub remaining: Vec<Damage>,
    /// Tags of snapshots that cannot be read whole.
    pub broken_snapshots: Vec<String>,
}

impl Store {
    /// Rebuilds the index of the store at `path`, and whatever else can be.
    ///
    /// Needs the store for itself: it fails if commits are under way.
    ///
    /// # Errors
    /// [`Error::Busy`] if commits are under way; [`Error::NoStore`] if there are
    /// no packs either; I/O errors.
    pub fn repair(path: &Path, progress: &dyn Progress) -> Result<RepairReport> {
        let layout = Layout::new(std::path::absolute(path).context("resolve", path)?);
        if !layout.packs().is_dir() {
            return Err(Error::NoStore {
                path: path.to_owned(),
            });
        }
        let mut report = RepairReport::default();
        let mut missing_tags_dir = false;
        for dir in layout.directories() {
            if !dir.is_dir() {
                missing_tags_dir |= dir == layout.tags();
                fs::create_dir_all(&dir).context("create", &dir)?;
                durable::sync_dir(layout.root())?;
            }
        }
        let _collect = lock::acquire(&layout, LockKind::Collect, lock::DEFAULT_TIMEOUT)?;
        let _publish = lock::acquire(&layout, LockKind::Publish, lock::DEFAULT_TIMEOUT)?;
        refuse_writers(&layout)?;
        repair_config(&layout, &mut report)?;
        repair_collector(&layout, &mut report)?;
        let store = Self::open(path)?;
        store.rebuild_index(&mut report, progress)?;
        store.repair_tags(missing_tags_dir, &mut report)?;
        for (tag, id) in tags::each(&layout)? {
            let Ok(id) = id else { continue };
            if Reach::new(&store.chunks)?.add_snapshot(id).is_err() {
                report.broken_snapshots.push(tag);
            }
        }
        Ok(report)
    }

    /// Writes a new index beside the old one, then swaps them. A crash between
    /// the two renames leaves no index, which the next repair puts right.
    fn rebuild_index(&self, report: &mut RepairReport, progress: &dyn Progress) -> Result<()> {
        let new_path = self.layout.root().join("index.new");
        let old_path = self.layout.root().join("index.old");
        for stale in [&new_path, &old_path] {
            remove_dir(stale)?;
        }
        let condemned = CollectorState::read(&self.layout)?.condemned;
        let index = IndexWriter::open_or_create(&new_path)?;
        let numbers = self.chunks.packs().sealed()?;
        progress.begin("packs", numbers.len() as u64);
        // Condemned packs first, so that other copies of their chunks win.
        let is_condemned = |number: &PackNumber| condemned.contains_key(number);
        let (going, staying): (Vec<_>, Vec<_>) = numbers.into_iter().partition(is_condemned);
        for (done, number) in (1..).zip(going.into_iter().chain(staying)) {
            match self.chunks.packs().get(number) {
                Ok(Some(pack)) => self.index_whole_chunks(&pack, &index, report)?,
                Ok(None) => {}
                Err(Error::Damaged(damage)) => report.remaining.push(damage),
                Err(other) => return Err(other),
            }
            progress.advance(done);
        }
        index.flush()?;
        drop(index);
        if self.layout.index().exists() {
            durable::rename(&self.layout.index(), &old_path)?;
        }
        durable::rename(&new_path, &self.layout.index())?;
        durable::sync_dir(self.layout.root())?;
        remove_dir(&old_path)?;
        self.chunks.refresh_index()?;
        Ok(())
    }

    fn index_whole_chunks(
        &self,
        pack: &PackReader,
        index: &IndexWriter,
        report: &mut RepairReport,
    ) -> Result<()> {
        let entries: Vec<_> = pack.entries().collect();
        let checked: Vec<_> = entries
            .par_iter()
            .map(|(number, entry)| {
                let stored = pack.stored_bytes(*number, *entry);
                let at = Location {
                    pack: pack.number(),
                    entry: *number,
                };
                // A delta's base is read through the index, which is being made:
                // its stored bytes are vouched for by the footer's check.
                if stored.base().is_some() {
                    let reason = "its stored bytes do not match the footer";
                    return match stored.passes_check() {
                        true => Ok((entry.key, at)),
                        false => Err(pack.damaged(*entry, reason)),
                    };
                }
                check_stored(&self.chunks, pack, stored).map(|()| (entry.key, at))
            })
            .collect();
        let mut whole = Vec::with_capacity(checked.len());
        for result in checked {
            match result {
                Ok(found) => whole.push(found),
                Err(Error::Damaged(damage)) => report.remaining.push(damage),
                Err(other) => return Err(other),
            }
        }
        report.indexed_chunks += whole.len() as u64;
        index.put(whole)
    }

    fn repair_tags(&self, dir_was_missing: bool, report: &mut RepairReport) -> Result<()> {
        let newest = self.newest_by_first_tag()?;
        let mut damaged = BTreeSet::new();
        for (name, id) in tags::each(&self.layout)? {
            match id {
                Ok(_) => {}
                Err(Error::Damaged(_)) => {
                    damaged.insert(name);
                }
                Err(other) => return Err(other),
            }
        }
        if dir_was_missing {
            damaged.extend(newest.keys().cloned());
        }
        for tag in damaged {
            match newest.get(&tag) {
                Some(id) => {
                    tags::set(&self.layout, &tag, *id)?;
                    report.recovered_tags.insert(tag, *id);
                }
                None => report.lost_tags.push(tag),
            }
        }
        Ok(())
    }

    /// The newest whole snapshot that was first committed under each name.
    fn newest_by_first_tag(&self) -> Result<BTreeMap<String, SnapshotId>> {
        let mut newest: BTreeMap<String, (u64, SnapshotId)> = BTreeMap::new();
        let index = self.chunks.index()?;
        for entry in index.manifests() {
            let (key, at) = entry?;
            debug_assert_eq!(key.kind, ChunkKind::Manifest);
            let Some(id) = self.chunks.manifest_id_at(key, at)? else {
                continue;
            };
            let Ok(manifest) = manifest::read(&self.chunks, id) else {
                continue;
            };
            if Reach::new(&self.chunks)?.add_snapshot(id).is_err() {
                continue;
            }
            let found = (manifest.created_unix_seconds, id);
            let best = newest.entry(manifest.first_tag).or_insert(found);
            *best = (*best).max(found);
        }
        Ok(newest.into_iter().map(|(tag, (_, id))| (tag, id)).collect())
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

fn repair_config(layout: &Layout, report: &mut RepairReport) -> Result<()> {
    match CONFIG_FORMAT.read(&layout.config()) {
        Ok(Some(_)) => return Ok(()),
        Ok(None) | Err(Error::Damaged(_)) => {}
        Err(other) => return Err(other),
    }
    let page_size = page_size_of_packs(layout)?.ok_or_else(|| Error::NoStore {
        path: layout.root().to_owned(),
    })?;
    CONFIG_FORMAT.write(&layout.config(), &page_size.as_u32().to_le_bytes())?;
    report.rebuilt_files.push("config".to_owned());
    Ok(())
}

/// With nothing condemned nothing is deleted until the next collection has
/// marked everything; and there are no writers now whose epoch could matter.
fn repair_collector(layout: &Layout, report: &mut RepairReport) -> Result<()> {
    match CollectorState::read(layout) {
        Ok(_) => return Ok(()),
        Err(Error::Damaged(_)) => {}
        Err(other) => return Err(other),
    }
    CollectorState::new().write(layout)?;
    report.rebuilt_files.push("collector".to_owned());
    Ok(())
}

/// The page size that the first readable pack header names.
fn page_size_of_packs(layout: &Layout) -> Result<Option<PageSize>> {
    let dir = layout.packs();
    for entry in fs::read_dir(&dir).context("list", &dir)? {
        let path = entry.context("list", &dir)?.path();
        let mut header = [0; format::HEADER_LEN];
        let read = fs::File::open(&path).and_then(|mut file| file.read_exact(&mut header));
        if read.is_ok() {
            if let Some(page_size) = format::page_size_in_header(&header) {
                return Ok(Some(page_size));
            }
        }
    }
    Ok(None)
}

fn remove_dir(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other.context("remove", path),
    }
}
