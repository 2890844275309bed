//! Rebuilding what can be rebuilt, and saying what cannot.
//!
//! Packs are the truth. From them come the index (always), the page size if
//! the configuration is damaged, and tags whose files are damaged or whose
//! directory is gone, under the names they were first committed as. Chunks
//! whose bytes are damaged are left out of the index, so that committing the
//! same page again stores it anew. A pack that holds damage is set aside in
//! `damaged/` after its whole chunks have been copied to a new pack (`salvage`);
//! pack files themselves are never changed.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use crate::chunks::{Chunks, Place};
use crate::durable;
use crate::error::{Damage, Error, IoContext as _, Result};
use crate::format::config::{Config, StoreFormat};
use crate::format::{entry, pack_v1, pack_v2};
use crate::gc::mark::Reach;
use crate::gc::state::CollectorState;
use crate::id::{ChunkId, ChunkKind, SnapshotId};
use crate::index::{self, IndexReader, IndexWriter};
use crate::layout::Layout;
use crate::lease;
use crate::lock::{self, LockKind};
use crate::manifest;
use crate::opening;
use crate::pack::PackNumber;
use crate::pack::codec::{self, Encoding};
use crate::pack::reader::{PackReader, payload_limit};
use crate::pack::writer::{EncodedChunk, PackWriter, SealedPack};
use crate::page::PageSize;
use crate::progress::Progress;
use crate::regular::{self, Opened};
use crate::rewrite::rewrite;
use crate::salvage::{self, Found, Wanted};
use crate::scratch::Scratch;
use crate::sim::{self, Fault};
use crate::store::Store;
use crate::tags;

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

impl RepairReport {
    /// Each pack is looked at more than once.
    fn add(&mut self, damage: Damage) {
        if !self.remaining.contains(&damage) {
            self.remaining.push(damage);
        }
    }
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
        if !opening::is_store(&layout)? {
            return Err(Error::NoStore {
                path: path.to_owned(),
            });
        }
        if let Err(error @ Error::Newer { .. }) = Config::read(&layout.config()) {
            return Err(error);
        }
        let mut report = RepairReport::default();
        let mut missing_tags_dir = false;
        for odd in odd_files(&layout) {
            set_odd_aside(&layout, &odd, &mut report)?;
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
        let _collect = lock::acquire(&layout, LockKind::Collect, lock::DEFAULT_TIMEOUT)?;
        let _publish = lock::acquire(&layout, LockKind::Publish, lock::DEFAULT_TIMEOUT)?;
        refuse_writers(&layout)?;
        repair_config(&layout, &mut report)?;
        let store = Self::open(path)?;
        store.check_writable()?;
        store.refuse_newer_packs()?;
        repair_collector(&layout, store.format(), &mut report)?;
        store.rebuild_index(&mut report, progress)?;
        store.repair_tags(missing_tags_dir, &mut report)?;
        let mut reach = Reach::new(&store.chunks)?;
        for (tag, id) in tags::each(&layout)? {
            let Ok(id) = id else { continue };
            match reach.add_snapshot(id) {
                Err(Error::Damaged(_)) => report.broken_snapshots.push(tag),
                // What a newer version wrote is not broken.
                Err(Error::Newer { .. }) => {}
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

    /// Writes a new index beside the old one, then exchanges them: whoever reads
    /// meanwhile finds the one or the other. Where the filesystem cannot exchange, the
    /// old one is moved away first; readers find no index for a moment, and a crash
    /// there leaves none, which the next repair puts right.
    ///
    /// A commit that began meanwhile finds out that a pack it relies on was set
    /// aside when it gets the publish lock, which is held here.
    fn rebuild_index(&self, report: &mut RepairReport, progress: &dyn Progress) -> Result<()> {
        let fresh = self.layout.with_fresh_index();
        let old_path = self.layout.old_index();
        for stale in [&fresh.index(), &old_path] {
            durable::remove_dir(stale)?;
        }
        let bad = match self.fill_index(&fresh, report, progress) {
            Ok(bad) => bad,
            Err(error) => {
                // It takes room, perhaps the room that there was none of.
                let _ = durable::remove_dir(&fresh.index());
                return Err(error);
            }
        };
        if self.format() == StoreFormat::One {
            IndexWriter::open(&fresh.index())?.without_runs().flush()?;
        }
        let index = self.layout.index();
        let in_one_step = index.exists()
            && !sim::on(Fault::IndexMovedAway)
            && durable::exchange(&fresh.index(), &index)?;
        if !in_one_step {
            if index.exists() {
                durable::move_away(&index, &old_path)?;
            }
            durable::rename(&fresh.index(), &index)?;
        }
        durable::sync_dir(self.layout.root())?;
        // Only now: until the new index is in place, the old one may still lead
        // to these packs.
        self.set_aside(&bad)?;
        durable::remove_dir(&old_path)?;
        durable::remove_dir(&fresh.index())?;
        self.chunks.refresh_index()?;
        Ok(())
    }

    /// Enters all whole chunks into a new index, and copies those of packs that
    /// hold damage. Returns these packs.
    fn fill_index(
        &self,
        fresh: &Layout,
        report: &mut RepairReport,
        progress: &dyn Progress,
    ) -> Result<BTreeSet<PackNumber>> {
        let condemned = CollectorState::read(&self.layout)?.condemned;
        let mut numbers = self.chunks.packs().sealed()?;
        // A process killed while it sealed a pack may not have synced its name:
        // the index must not lead to what a power cut takes away.
        durable::sync_dir(&self.layout.packs())?;
        // Condemned packs last: other copies of their chunks win.
        numbers.sort_by_key(|number| (condemned.contains_key(number), *number));
        let mut bad = BTreeSet::new();
        let mut rescued: Option<PackWriter> = None;
        progress.begin("packs", 2 * numbers.len() as u64);
        {
            let chunks = Chunks::new(self.layout.clone(), &self.config);
            let index = IndexWriter::open_or_create(&fresh.index())?;
            // Condemned packs first: later copies of their chunks win.
            for (done, number) in (1..).zip(numbers.iter().rev()) {
                let found = look_at(&chunks, *number, Wanted::Standalone, &mut bad, report)?;
                self.rescue(&found.torn, &mut rescued)?;
                let whole = found.whole;
                report.indexed_chunks += whole.len() as u64;
                index.put(
                    whole
                        .iter()
                        .map(|place| (place.slot.entry.key, place.location())),
                )?;
                progress.advance(done);
            }
            report.indexed_chunks += enter_rescued(rescued.take(), &index)?;
            index.flush()?;
        }
        // Then the deltas, whose bases are looked up in what there is by now. A
        // chunk that has a standalone copy needs none.
        let chunks = Chunks::new(fresh.clone(), &self.config);
        let standalone = chunks.index()?;
        let mut entered = HashSet::new();
        let mut baseless = Vec::new();
        let index = IndexWriter::open(&fresh.index())?;
        for (done, number) in (numbers.len() as u64 + 1..).zip(&numbers) {
            let found = look_at(&chunks, *number, Wanted::Deltas, &mut bad, report)?;
            baseless.extend(found.baseless);
            let mut torn = found.torn;
            for place in std::mem::take(&mut torn) {
                let key = place.slot.entry.key;
                if standalone.get(key)?.is_none() && entered.insert(key) {
                    torn.push(place);
                }
            }
            self.rescue(&torn, &mut rescued)?;
            let mut entries = Vec::new();
            for place in found.whole {
                let key = place.slot.entry.key;
                let only_copy = standalone.get(key)?.is_none();
                if (only_copy || sim::on(Fault::RepairEntersDeadDelta)) && entered.insert(key) {
                    entries.push((key, place.location()));
                }
            }
            report.indexed_chunks += entries.len() as u64;
            index.put(entries)?;
            progress.advance(done);
        }
        report.indexed_chunks += enter_rescued(rescued.take(), &index)?;
        index.flush()?;
        drop(index);
        self.store_bases(baseless, fresh, report)?;
        self.copy_out_of(&bad, fresh)?;
        index::tidy(&fresh.index(), index::FEW_FILES)?;
        Ok(bad)
    }

    /// Copies chunks that only their content tells into a pack of their own.
    fn rescue(&self, torn: &[Place], writer: &mut Option<PackWriter>) -> Result<()> {
        let mut stored = Scratch::take();
        for place in torn {
            place.pack.read(&place.slot, &mut stored)?;
            if writer.is_none() {
                *writer = Some(self.chunks.packs().create()?);
            }
            let chunk = EncodedChunk {
                key: place.slot.entry.key,
                encoding: place.slot.entry.encoding,
                check: place.slot.entry.check,
                len: stored.len(),
            };
            let writer = writer.as_mut().expect("just set");
            writer.append(&[chunk], stored.to_vec())?;
        }
        Ok(())
    }

    /// Stores the bases of deltas standalone which are there only as deltas
    /// themselves, and enters the deltas that are whole by that. An older version
    /// could collect the standalone copy of such a base.
    fn store_bases(
        &self,
        mut baseless: Vec<Place>,
        fresh: &Layout,
        report: &mut RepairReport,
    ) -> Result<()> {
        // Each round can make others whole, which may be bases in their turn.
        let mut written = HashSet::new();
        while let Some(sealed) = self.write_bases(&baseless, fresh, &mut written)? {
            sealed.keep();
            let index = IndexWriter::open(&fresh.index())?;
            index.put(sealed.chunks().map(|chunk| (chunk.key, chunk.at)))?;
            index.flush()?;
            let chunks = Chunks::new(fresh.clone(), &self.config);
            let (whole, rest): (Vec<_>, Vec<_>) = baseless
                .into_iter()
                .partition(|place| chunks.check_at(place).is_ok());
            let reader = chunks.index()?;
            let mut entries = Vec::new();
            for place in whole {
                let key = place.slot.entry.key;
                if reader.get(key)?.is_none() {
                    entries.push((key, place.location()));
                }
            }
            report.indexed_chunks += entries.len() as u64;
            index.put(entries)?;
            index.flush()?;
            baseless = rest;
        }
        Ok(())
    }

    /// Writes the bases of these deltas that can be read, standalone.
    /// Each once.
    fn write_bases(
        &self,
        baseless: &[Place],
        fresh: &Layout,
        written: &mut HashSet<ChunkId>,
    ) -> Result<Option<SealedPack>> {
        let chunks = Chunks::new(fresh.clone(), &self.config);
        let mut writer = None;
        for place in baseless {
            let base = match place.pack.base(&place.slot) {
                Ok(Some(base)) => base.id,
                Ok(None) | Err(Error::Damaged(_)) => continue,
                Err(other) => return Err(other),
            };
            if place.needs_one_copy() || written.contains(&base) {
                continue;
            }
            let mut payload = Scratch::zeroed(payload_limit(base.kind(), self.page_size()));
            let len = match chunks.read(base, None, &mut payload) {
                Err(Error::Damaged(_) | Error::Newer { .. }) => continue,
                other => other?,
            };
            written.insert(base);
            let mut stored = Vec::new();
            let encoding = codec::encode(&payload[..len], None, &mut stored);
            if writer.is_none() {
                writer = Some(self.chunks.packs().create()?);
            }
            let writer: &mut PackWriter = writer.as_mut().expect("just set");
            let chunk = EncodedChunk {
                key: self.chunks.keys().of(base),
                encoding,
                check: entry::stored_check(&stored),
                len: stored.len(),
            };
            writer.append(&[chunk], stored)?;
        }
        writer.map(PackWriter::seal).transpose()
    }

    /// Copies the whole chunks of damaged packs into new packs, and points the
    /// new index at them where it leads to a damaged pack.
    fn copy_out_of(&self, bad: &BTreeSet<PackNumber>, fresh: &Layout) -> Result<()> {
        let chunks = Chunks::new(fresh.clone(), &self.config);
        for number in bad {
            let Ok(Some(pack)) = chunks.packs().get(*number) else {
                continue;
            };
            let found = salvage::chunks_of(&chunks, &pack, Wanted::All)?;
            let mut stored = Scratch::take();
            let mut writer = None;
            let index = chunks.refresh_index()?;
            let mut leads_here = Vec::new();
            for place in &found.whole {
                let entry = place.slot.entry;
                let bases: Option<&IndexReader> = None;
                let chunk = rewrite(&chunks, self.format(), place, bases, &mut stored)?;
                if writer.is_none() {
                    writer = Some(self.chunks.packs().create()?);
                }
                let writer: &mut PackWriter = writer.as_mut().expect("just set");
                writer.append(&[chunk], stored.to_vec())?;
                leads_here.push(index.get(entry.key)? == Some(place.location()));
            }
            let Some(writer) = writer else { continue };
            let sealed = writer.seal()?;
            sealed.keep();
            let moved = sealed.chunks().zip(leads_here);
            let entries = moved.filter_map(|(chunk, here)| here.then_some((chunk.key, chunk.at)));
            let index = IndexWriter::open(&fresh.index())?;
            index.put(entries)?;
            index.flush()?;
        }
        Ok(())
    }

    fn set_aside(&self, bad: &BTreeSet<PackNumber>) -> Result<()> {
        if bad.is_empty() {
            return Ok(());
        }
        let dir = self.layout.damaged();
        durable::make_dir(&dir)?;
        for number in bad {
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
                    let path = self.layout.tags().join(&name);
                    if regular::oddity(&path).is_some() {
                        set_odd_aside(&self.layout, &path, report)?;
                    }
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
                // One that was set aside is gone with what stood in its place.
                None if !tags::exists(&self.layout, &tag) => {}
                None => report.lost_tags.push(tag),
            }
        }
        Ok(())
    }

    /// The newest whole snapshot that was first committed under each name.
    fn newest_by_first_tag(&self) -> Result<BTreeMap<String, SnapshotId>> {
        let mut newest: BTreeMap<String, (u64, SnapshotId)> = BTreeMap::new();
        let index = self.chunks.index()?;
        let mut reach = Reach::new(&self.chunks)?;
        for entry in index.manifests() {
            let (key, at) = entry?;
            debug_assert_eq!(key.kind, ChunkKind::Manifest);
            let Some(id) = self.chunks.manifest_id_at(key, at)? else {
                continue;
            };
            let manifest = match manifest::read(&self.chunks, id) {
                Err(Error::Damaged(_) | Error::Newer { .. }) => continue,
                other => other?,
            };
            match reach.add_snapshot(id) {
                Err(Error::Damaged(_) | Error::Newer { .. }) => continue,
                other => other?,
            }
            let found = (manifest.created_unix_seconds, id);
            let best = newest.entry(manifest.first_tag).or_insert(found);
            *best = (*best).max(found);
        }
        Ok(newest.into_iter().map(|(tag, (_, id))| (tag, id)).collect())
    }
}

/// The chunks of a pack. Notes it among `bad` if it holds damage.
fn look_at(
    chunks: &Chunks,
    number: PackNumber,
    wanted: Wanted,
    bad: &mut BTreeSet<PackNumber>,
    report: &mut RepairReport,
) -> Result<Found> {
    let pack = match chunks.packs().get(number) {
        Ok(Some(pack)) => pack,
        Ok(None) => return Ok(Found::default()),
        Err(Error::Damaged(damage)) => {
            bad.insert(number);
            report.add(damage);
            return Ok(Found::default());
        }
        Err(other) => return Err(other),
    };
    let mut found = salvage::chunks_of(chunks, &pack, wanted)?;
    if !found.damage.is_empty() {
        bad.insert(number);
    }
    found.damage.drain(..).for_each(|damage| report.add(damage));
    Ok(found)
}

/// Seals a pack of rescued chunks, and enters them; returns how many.
fn enter_rescued(writer: Option<PackWriter>, index: &IndexWriter) -> Result<u64> {
    let Some(writer) = writer else { return Ok(0) };
    let sealed = writer.seal()?;
    sealed.keep();
    index.put(sealed.chunks().map(|chunk| (chunk.key, chunk.at)))?;
    Ok(sealed.chunks().count() as u64)
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

/// What stands in the place of a file of the store and is none, but for tags and packs.
fn odd_files(layout: &Layout) -> Vec<PathBuf> {
    let locks = ["collect", "publish", "allocate", "next-pack"];
    let mut files: Vec<PathBuf> = locks.map(|name| layout.locks().join(name)).into();
    files.extend([layout.config(), layout.config_copy()]);
    files.extend([layout.collector(), layout.recent_tags()]);
    for dir in [layout.root().to_owned(), layout.tags()] {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        let temporary = entries.filter(|entry| durable::is_temporary(&entry.file_name()));
        files.extend(temporary.map(|entry| entry.path()));
    }
    files.retain(|path| regular::oddity(path).is_some());
    files
}

/// Moves it to `damaged/`, under a name of its own there.
fn set_odd_aside(layout: &Layout, path: &Path, report: &mut RepairReport) -> Result<()> {
    let reason = regular::oddity(path).unwrap_or("it is not a file");
    let dir = layout.damaged();
    durable::make_dir(&dir)?;
    let name = path.file_name().unwrap_or_default();
    let free = (0_u32..).find_map(|number| {
        let mut name = name.to_owned();
        if number > 0 {
            name.push(format!(".{number}"));
        }
        let to = dir.join(name);
        fs::symlink_metadata(&to).is_err().then_some(to)
    });
    durable::rename(path, &free.expect("numbers do not run out"))?;
    report.remaining.push(Damage::File {
        path: path.to_owned(),
        reason,
    });
    Ok(())
}

/// Makes the configuration anew: from its copy, or, in format 1, from what the packs
/// say.
fn repair_config(layout: &Layout, report: &mut RepairReport) -> Result<()> {
    let readable = |path: &Path| match Config::read(path) {
        Err(Error::Damaged(_)) => Ok(None),
        other => other,
    };
    let (path, copy_path) = (layout.config(), layout.config_copy());
    let (config, copy) = (readable(&path)?, readable(&copy_path)?);
    if let Some(config) = &config
        && (config.two.is_none() || copy.as_ref() == Some(config))
    {
        return Ok(());
    }
    let rebuilt = if config.is_some() {
        "config-copy"
    } else {
        "config"
    };
    let known = match config.or(copy) {
        Some(known) => known,
        None => Config::new(page_size_of_packs(layout)?, StoreFormat::One)?,
    };
    known.write(&path, &copy_path)?;
    report.rebuilt_files.push(rebuilt.to_owned());
    Ok(())
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

/// With nothing condemned nothing is deleted until the next collection has
/// marked everything; and there are no writers now whose epoch could matter.
fn repair_collector(layout: &Layout, format: StoreFormat, report: &mut RepairReport) -> Result<()> {
    match CollectorState::read(layout) {
        Ok(_) => return Ok(()),
        Err(Error::Damaged(_)) => {}
        Err(other) => return Err(other),
    }
    CollectorState::new().write(layout, format)?;
    report.rebuilt_files.push("collector".to_owned());
    Ok(())
}

/// The page size that the first readable pack header of version 1 names.
///
/// # Errors
/// [`Error::NoStore`] if there is none; [`Damage::File`] if there are packs of
/// version 2: what their keys are made with is lost.
fn page_size_of_packs(layout: &Layout) -> Result<PageSize> {
    let dir = layout.packs();
    let mut found = None;
    for entry in fs::read_dir(&dir).context("list", &dir)? {
        let path = entry.context("list", &dir)?.path();
        let mut header = [0; pack_v2::HEADER_LEN];
        let Ok(Opened::File(mut file)) = regular::open(&path) else {
            continue;
        };
        if file.read_exact(&mut header).is_err() {
            continue;
        }
        if pack_v2::read_header(&header) != pack_v2::Header::Other {
            return Err(Damage::File {
                path: layout.config(),
                reason: "it and its copy, which hold the secret of the keys; get one of them from a copy of the store",
            }
            .into());
        }
        let head = header.first_chunk().expect("it is longer");
        found = found.or(pack_v1::page_size_in_header(head));
    }
    found.ok_or_else(|| Error::NoStore {
        path: layout.root().to_owned(),
    })
}
