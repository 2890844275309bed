//! Rebuilding what can be rebuilt, and saying what cannot.
//!
//! Packs are the truth. From them come the index (always), the page size if
//! the configuration is damaged, and tags whose files are damaged or whose
//! directory is gone, under the names they were first committed as. Chunks
//! whose bytes are damaged are left out of the index, so that committing the
//! same page again stores it anew. A pack that holds damage is set aside in
//! `damaged/` after its whole chunks have been copied to a new pack; pack files
//! themselves are never changed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read as _;
use std::path::Path;

use rayon::prelude::*;

use crate::chunks::Chunks;
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
use crate::pack::codec::Encoding;
use crate::pack::reader::PackReader;
use crate::pack::writer::EncodedChunk;
use crate::pack::{EntryNumber, Location, PackNumber, format};
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
    /// Damage that was found; the packs that hold it are now in `damaged/`.
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
                durable::make_dir(&dir)?;
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
        let fresh = self.layout.with_fresh_index();
        let old_path = self.layout.root().join("index.old");
        for stale in [&fresh.index(), &old_path] {
            durable::remove_dir(stale)?;
        }
        let bad = self.fill_index(&fresh, report, progress)?;
        self.salvage(&fresh, &bad)?;
        if self.layout.index().exists() {
            durable::rename(&self.layout.index(), &old_path)?;
        }
        durable::rename(&fresh.index(), &self.layout.index())?;
        durable::sync_dir(self.layout.root())?;
        // Only now: until the new index is in place, the old one may still lead
        // to these packs.
        self.set_aside(&bad)?;
        durable::remove_dir(&old_path)?;
        self.chunks.refresh_index()?;
        Ok(())
    }

    /// Enters all whole chunks into a new index. Returns the packs that hold
    /// damage, with the entries that are damaged.
    fn fill_index(
        &self,
        fresh: &Layout,
        report: &mut RepairReport,
        progress: &dyn Progress,
    ) -> Result<BTreeMap<PackNumber, BTreeSet<EntryNumber>>> {
        let condemned = CollectorState::read(&self.layout)?.condemned;
        let numbers = self.chunks.packs().sealed()?;
        // A process killed while it sealed a pack may not have synced its name:
        // the index must not lead to what a power cut takes away.
        durable::sync_dir(&self.layout.packs())?;
        // Condemned packs first, so that other copies of their chunks win.
        let is_condemned = |number: &PackNumber| condemned.contains_key(number);
        let (going, staying): (Vec<_>, Vec<_>) = numbers.into_iter().partition(is_condemned);
        let numbers: Vec<_> = going.into_iter().chain(staying).collect();
        let mut bad: BTreeMap<PackNumber, BTreeSet<EntryNumber>> = BTreeMap::new();
        // Deltas second: their bases are looked up in the index of the first pass.
        for deltas in [false, true] {
            progress.begin("packs", numbers.len() as u64);
            let chunks = if deltas {
                Chunks::new(fresh.clone(), self.page_size())
            } else {
                Chunks::new(self.layout.clone(), self.page_size())
            };
            let index = IndexWriter::open_or_create(&fresh.index())?;
            for (done, number) in (1..).zip(&numbers) {
                match chunks.packs().get(*number) {
                    Ok(Some(pack)) => {
                        let damaged = index_whole_chunks(&chunks, &pack, deltas, &index, report)?;
                        if !damaged.is_empty() {
                            bad.entry(*number).or_default().extend(damaged);
                        }
                    }
                    Ok(None) => {}
                    Err(Error::Damaged(damage)) if !deltas => {
                        report.remaining.push(damage);
                        bad.entry(*number).or_default();
                    }
                    Err(Error::Damaged(_)) => {}
                    Err(other) => return Err(other),
                }
                progress.advance(done);
            }
            index.flush()?;
        }
        Ok(bad)
    }

    /// Copies the whole chunks of damaged packs into a new pack.
    fn salvage(
        &self,
        fresh: &Layout,
        bad: &BTreeMap<PackNumber, BTreeSet<EntryNumber>>,
    ) -> Result<()> {
        let index = IndexWriter::open(&fresh.index())?;
        for (number, damaged) in bad {
            let Ok(Some(pack)) = self.chunks.packs().get(*number) else {
                continue;
            };
            let mut writer = self.chunks.packs().create()?;
            for (position, entry) in pack.entries() {
                if damaged.contains(&position) {
                    continue;
                }
                let stored = pack.stored_bytes(position, entry);
                let chunk = EncodedChunk {
                    key: entry.key,
                    encoding: entry.encoding,
                    check: entry.check,
                    len: stored.bytes.len(),
                };
                writer.append(&[chunk], stored.bytes.to_vec())?;
            }
            let sealed = writer.seal()?;
            sealed.keep();
            index.put(sealed.locations())?;
        }
        index.flush()
    }

    fn set_aside(&self, bad: &BTreeMap<PackNumber, BTreeSet<EntryNumber>>) -> Result<()> {
        if bad.is_empty() {
            return Ok(());
        }
        let dir = self.layout.damaged();
        durable::make_dir(&dir)?;
        for number in bad.keys() {
            let to = dir.join(format!("{number}.pack"));
            durable::rename(&self.layout.pack(*number), &to)?;
            self.chunks.packs().forget(*number);
        }
        durable::sync_dir(&dir)?;
        durable::sync_dir(&self.layout.packs())
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

/// Enters the whole chunks of a pack, only deltas or only the others. Returns
/// the damaged ones.
fn index_whole_chunks(
    chunks: &Chunks,
    pack: &PackReader,
    deltas: bool,
    index: &IndexWriter,
    report: &mut RepairReport,
) -> Result<Vec<EntryNumber>> {
    let entries: Vec<_> = pack
        .entries()
        .filter(|(_, entry)| (entry.encoding == Encoding::Delta) == deltas)
        .collect();
    let checked: Vec<_> = entries
        .par_iter()
        .map(|(number, entry)| {
            let stored = pack.stored_bytes(*number, *entry);
            check_stored(chunks, pack, stored)
        })
        .collect();
    let mut whole = Vec::with_capacity(checked.len());
    let mut damaged = Vec::new();
    for ((number, entry), result) in entries.into_iter().zip(checked) {
        match result {
            Ok(()) => {
                let at = Location {
                    pack: pack.number(),
                    entry: number,
                };
                whole.push((entry.key, at));
            }
            Err(Error::Damaged(damage)) => {
                report.remaining.push(damage);
                damaged.push(number);
            }
            Err(other) => return Err(other),
        }
    }
    report.indexed_chunks += whole.len() as u64;
    index.put(whole)?;
    Ok(damaged)
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
        if read.is_ok()
            && let Some(page_size) = format::page_size_in_header(&header)
        {
            return Ok(Some(page_size));
        }
    }
    Ok(None)
}
