//! The index made anew of the whole chunks of every pack, and packs that hold damage
//! set aside.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

use super::aside::set_aside;
use super::report::RepairReport;
use crate::chunks::{Chunks, Place};
use crate::durable;
use crate::error::{Error, Result};
use crate::format::config::StoreFormat;
use crate::format::entry;
use crate::gc::state::CollectorState;
use crate::id::ChunkId;
use crate::index::{self, IndexReader, IndexWriter};
use crate::layout::Layout;
use crate::pack::PackNumber;
use crate::pack::codec;
use crate::pack::reader::payload_limit;
use crate::pack::writer::{EncodedChunk, PackWriter, SealedPack};
use crate::progress::Progress;
use crate::rewrite::rewrite;
use crate::salvage::{self, Found, Wanted};
use crate::scratch::Scratch;
use crate::sim::{self, Fault};
use crate::store::Store;

impl Store {
    /// Writes a new index beside the old one, then exchanges them: whoever reads
    /// meanwhile finds the one or the other. Where the filesystem cannot exchange, the
    /// old one is moved away first; readers find no index for a moment, and a crash
    /// there leaves none, which the next repair puts right.
    ///
    /// A commit that began meanwhile finds out that a pack it relies on was set
    /// aside when it gets the publish lock, which is held here.
    pub(super) fn rebuild_index(
        &self,
        report: &mut RepairReport,
        progress: &dyn Progress,
    ) -> Result<()> {
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
                self.cancel.check()?;
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
            self.cancel.check()?;
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
        index::tidy(&fresh.index(), index::FEW_RUNS)?;
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
            let mut payload = Scratch::of_len(payload_limit(base.kind(), self.page_size()));
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
            self.cancel.check()?;
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
        for number in bad {
            set_aside(&self.layout, &self.layout.pack(*number))?;
            self.chunks.packs().forget(*number);
        }
        durable::sync_dir(&dir)?;
        durable::sync_dir(&self.layout.packs())
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
            let pack = match chunks.packs().open_unsealed(number) {
                Err(Error::Damaged(_)) => None,
                other => other?,
            };
            let Some(pack) = pack else {
                return Ok(Found::default());
            };
            return Ok(Found {
                torn: salvage::unsealed_chunks_of(chunks, &Arc::new(pack), wanted)?,
                ..Found::default()
            });
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
