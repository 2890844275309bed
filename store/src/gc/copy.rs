//! Copying what is live in packs that are to go.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::chunks::Place;
use crate::commit::chunk_writer::EncodedRun;
use crate::error::{Damage, Error, Result};
use crate::format::rewrites::Tier;
use crate::gc::GcReport;
use crate::gc::mark::Marks;
use crate::gc::plan::Decision;
use crate::gc::rewrites::Ledger;
use crate::gc::state::CollectorState;
use crate::gc::{at_once, index_batch};
use crate::id::ChunkKey;
use crate::index::IndexReader;
use crate::pack::reader::PackReader;
use crate::pack::writer::{PackWriter, SealedPack};
use crate::pack::{Location, PackNumber};
use crate::placement::{self, Copies, ManyCopies, Moved, PREPARED_AT_MOST};
use crate::rewrite::rewrite;
use crate::scratch::Scratch;
use crate::sim::{self, Fault};
use crate::store::Store;

/// Stored bytes that a repack hands to its writer at a time.
const COPY_RUN_BYTES: usize = 4 << 20;

/// Copies on their way into one new pack.
struct Copying<'a> {
    ledger: &'a mut Ledger,
    tier: Tier,
    writer: Option<PackWriter>,
    moved: Vec<Moved>,
    /// The packs that the collection deletes.
    going: BTreeSet<PackNumber>,
}

impl Store {
    /// Copies the live chunks of packs to be repacked, and points the index at
    /// the copies. A pack with a live chunk that is damaged stays: the plan then
    /// keeps it. Returns the bytes written.
    pub(super) fn copy_live(
        &self,
        report: &mut GcReport,
        live: &Marks,
        ledger: &mut Ledger,
    ) -> Result<u64> {
        let plan = &report.plan;
        // Copies of what was optimised are as good.
        let are_kept = plan.with(Decision::Repack).all(|pack| ledger.is_kept(pack));
        let mut copying = Copying {
            tier: if are_kept { Tier::Kept } else { Tier::Copied },
            ledger,
            writer: None,
            moved: Vec::new(),
            going: plan.going().map(|pack| pack.number).collect(),
        };
        let mut written = 0;
        let mut spared = BTreeSet::new();
        let numbers: Vec<PackNumber> = report
            .plan
            .with(Decision::Repack)
            .map(|pack| pack.number)
            .collect();
        for number in numbers {
            self.cancel.check()?;
            let Some(pack) = self.chunks.packs().get(number)? else {
                continue;
            };
            if let Some(damage) = self.copy_pack(&pack, live, &mut copying)? {
                report.not_copied.push(damage);
                spared.insert(number);
            }
            if copying.writer.as_ref().is_some_and(PackWriter::is_full) {
                written += self.finish_copies(&mut copying)?;
            }
        }
        written += self.finish_copies(&mut copying)?;
        self.spare(&spared, report)?;
        Ok(written)
    }

    /// Copies the whole live chunks of a pack; returns the first damage among them.
    fn copy_pack(
        &self,
        pack: &Arc<PackReader>,
        live: &Marks,
        copying: &mut Copying<'_>,
    ) -> Result<Option<Damage>> {
        let mut run = EncodedRun::default();
        let mut damage = None;
        let mut stored = Scratch::take();
        for slot in pack.scan() {
            let slot = slot?;
            let from = Location {
                pack: pack.number(),
                entry: slot.number,
            };
            if !live.has(from) {
                continue;
            }
            let place = Place {
                pack: pack.clone(),
                slot,
            };
            let bases: Option<&IndexReader> = None;
            let rewritten = rewrite(&self.chunks, self.format(), &place, bases, &mut stored);
            let chunk = match rewritten {
                Err(Error::Damaged(found)) => {
                    damage.get_or_insert(found);
                    continue;
                }
                other => other?,
            };
            let writer = self.writer(&mut copying.writer)?;
            let mut to = writer.next_location();
            to.entry.0 += u32::try_from(run.chunks.len()).expect("a run is short");
            copying.moved.push(Moved {
                key: chunk.key,
                from,
                to,
                standalone: chunk.encoding.is_standalone(),
            });
            run.chunks.push(chunk);
            run.bytes.extend_from_slice(&stored);
            if run.bytes.len() >= COPY_RUN_BYTES {
                let run = std::mem::take(&mut run);
                writer.append(&run.chunks, run.bytes)?;
            }
        }
        if !run.chunks.is_empty() {
            let writer = self.writer(&mut copying.writer)?;
            writer.append(&run.chunks, run.bytes)?;
        }
        Ok(damage)
    }

    fn writer<'w>(&self, writer: &'w mut Option<PackWriter>) -> Result<&'w mut PackWriter> {
        if writer.is_none() {
            *writer = Some(self.chunks.packs().create()?);
        }
        Ok(writer.as_mut().expect("just set"))
    }

    /// Seals the copies, then points the index at them: the other way round a crash
    /// could leave index entries that lead nowhere.
    fn finish_copies(&self, copying: &mut Copying<'_>) -> Result<u64> {
        let Some(writer) = copying.writer.take() else {
            return Ok(0);
        };
        let copies = Copies::new(std::mem::take(&mut copying.moved), &copying.going);
        if sim::on(Fault::CopiesEnteredBeforeSealed) {
            let _publish = self.publish_lock()?;
            let index = self.index_writer()?;
            placement::enter_copies(&self.chunks, &index, &copies, copies.moved())?;
        }
        copying.ledger.charge(&writer, copying.tier)?;
        let sealed = writer.seal()?;
        self.chunks.packs().look_again();
        self.enter_copies(&sealed, &copies)?;
        Ok(sealed.file_len)
    }

    /// Points the index at the copies in a pack: at all at once if they are very many,
    /// else a batch at a time.
    fn enter_copies(&self, sealed: &SealedPack, copies: &Copies<'_>) -> Result<()> {
        if copies.moved().len() > at_once() {
            for _ in 0..PREPARED_AT_MOST {
                let many = ManyCopies::prepare(&self.chunks, sealed.number, copies)?;
                let _publish = self.publish_lock()?;
                sealed.keep();
                if many.enter(&self.index_writer()?)? {
                    return Ok(());
                }
            }
        }
        for moved in copies.moved().chunks(index_batch()) {
            let keys: Vec<ChunkKey> = moved.iter().map(|chunk| chunk.key).collect();
            let (_publish, index) = self.publish_lock_to_change(&keys)?;
            sealed.keep();
            placement::enter_copies(&self.chunks, &index, copies, moved)?;
        }
        Ok(())
    }

    /// Keeps packs that were condemned and could not be copied.
    fn spare(&self, spared: &BTreeSet<PackNumber>, report: &mut GcReport) -> Result<()> {
        if spared.is_empty() {
            return Ok(());
        }
        for pack in &mut report.plan.packs {
            if spared.contains(&pack.number) {
                pack.decision = Decision::Keep;
            }
        }
        let _publish = self.publish_lock()?;
        let mut state = CollectorState::read(&self.layout)?;
        state.condemned.retain(|pack, _| !spared.contains(pack));
        state.write(&self.layout, self.format())
    }
}
