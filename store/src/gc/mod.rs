//! Garbage collection: freeing what no root needs, beside running commits.
//!
//! Roots are tags and the pins of live leases. The collector
//!
//! 1. marks, without stopping anybody;
//! 2. plans: each pack is kept, repacked or deleted;
//! 3. under the publish lock, marks roots added meanwhile, writes the packs to
//!    go as *condemned* with the present epoch, and raises the epoch;
//! 4. copies what is live in packs to be repacked, and points the index at the
//!    copies;
//! 5. under the publish lock, once no writer of that epoch or before lives,
//!    marks roots added since, revives what they need, and deletes the rest:
//!    index entries first, then files.
//!
//! Why nothing is lost: a writer that began before step 3 holds a lease which
//! stops step 5; what it publishes is a root when step 5 comes. A writer that
//! began after step 3 does not reuse chunks of condemned packs, not even as bases
//! of deltas, and pins its parent. A pack that a commit is just publishing is not
//! judged, since entries of condemned packs may move to it after marking. There is deliberately no time-based rule: clocks decide nothing.

pub(crate) mod mark;
pub(crate) mod plan;
pub(crate) mod state;

use std::collections::BTreeSet;

use crate::commit::sink::EncodedRun;
use crate::durable;
use crate::error::Result;
use crate::id::{ChunkKey, SnapshotId};
use crate::index::IndexWriter;
use crate::lease::{self, LiveLease};
use crate::pack::reader::PackReader;
use crate::pack::writer::{EncodedChunk, PackWriter, SealedPack};
use crate::pack::{Location, PackNumber};
use crate::progress::Progress;
use crate::store::Store;
use crate::verify::check_stored;
use mark::{Marks, Reach};
pub use plan::{Decision, GcPlan, PackPlan};
use state::{CollectorState, Epoch};

/// Stored bytes that a repack hands to its writer at a time.
const COPY_RUN_BYTES: usize = 4 << 20;

/// How to collect.
#[derive(Clone, Copy, Debug)]
pub struct GcOptions {
    /// Only make the plan.
    pub dry_run: bool,
    /// A pack with less than this share of live bytes is repacked.
    pub keep_percent: u8,
}

impl Default for GcOptions {
    fn default() -> Self {
        Self {
            dry_run: false,
            keep_percent: 50,
        }
    }
}

/// What a collection did, or would do.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct GcReport {
    /// The plan.
    pub plan: GcPlan,
    /// Packs deleted by this collection.
    pub deleted_packs: u64,
    /// Bytes of packs deleted, less the bytes of packs written.
    pub freed_bytes: i64,
    /// Packs that will be deleted by a later collection, once the writers that
    /// may rely on them have ended.
    pub waiting_packs: u64,
    /// Those writers.
    pub waiting_for: Vec<String>,
    /// Unfinished packs of dead writers that were removed.
    pub swept_packs: u64,
}

impl Store {
    /// Frees what no tag and no live lease needs.
    ///
    /// # Errors
    /// If any root cannot be read whole, nothing is deleted and the damage is
    /// returned. [`crate::Error::Busy`] if another collection runs.
    pub fn gc(&self, options: GcOptions, progress: &dyn Progress) -> Result<GcReport> {
        let span = tracing::debug_span!("gc");
        let _entered = span.enter();
        let _collect = self.collect_lock()?;
        let mut report = GcReport::default();
        if !options.dry_run {
            report.swept_packs = self.chunks.packs().sweep()? as u64;
        }
        let before = CollectorState::read(&self.layout)?;
        // Before marking looks at the index: a pack that got its entries after
        // that could hold the only live copies of chunks marked elsewhere.
        let numbers = self.chunks.packs().published()?;
        // Also before: a root that is published between the two would be missing
        // from the index as it was seen.
        let roots = self.roots()?;
        let mut reach = Reach::of_store(&self.chunks)?;
        let mut marked = BTreeSet::new();
        mark_roots(&mut reach, &roots, &mut marked, progress)?;
        let packs = self.chunks.packs();
        report.plan = GcPlan::make(packs, &numbers, reach.marks(), options.keep_percent)?;
        if options.dry_run || nothing_to_do(&report.plan, &before) {
            return Ok(report);
        }
        {
            let _publish = self.publish_lock()?;
            reach.refresh()?;
            mark_roots(&mut reach, &self.roots()?, &mut marked, &crate::Silent)?;
            report.plan = GcPlan::make(packs, &numbers, reach.marks(), options.keep_percent)?;
            self.condemn(&report.plan)?;
        }
        let copied = self.copy_live(&report.plan, reach.marks())?;
        drop(reach);
        self.delete(&marked, &mut report)?;
        report.freed_bytes -= copied.cast_signed();
        Ok(report)
    }

    /// What must be kept: tags, and pins. A pin is made of what is tagged or
    /// pinned at that moment, so under the publish lock, which keeps the tags as
    /// they are, one of the two is seen.
    fn roots(&self) -> Result<BTreeSet<SnapshotId>> {
        let mut roots: BTreeSet<_> = self.tags()?.into_values().collect();
        for lease in lease::live(&self.layout)? {
            roots.extend(lease.claim.pins);
        }
        Ok(roots)
    }

    /// Writes down which packs are to go, and raises the epoch. Packs condemned
    /// before keep their epoch, or are revived if the plan keeps them.
    fn condemn(&self, plan: &GcPlan) -> Result<()> {
        let mut state = CollectorState::read(&self.layout)?;
        let going: BTreeSet<PackNumber> = plan
            .packs
            .iter()
            .filter(|pack| pack.decision != Decision::Keep)
            .map(|pack| pack.number)
            .collect();
        state.condemned.retain(|pack, _| going.contains(pack));
        // Should the state have been lost, its epoch is behind those of writers.
        for lease in lease::live(&self.layout)? {
            state.epoch = state
                .epoch
                .max(lease.claim.writing_since.unwrap_or(state.epoch));
        }
        for pack in going {
            state.condemned.entry(pack).or_insert(state.epoch);
        }
        state.epoch = state.epoch.next();
        state.write(&self.layout)
    }

    /// Copies the live chunks of packs to be repacked. Returns the bytes written.
    fn copy_live(&self, plan: &GcPlan, live: &Marks) -> Result<u64> {
        let mut writer = None;
        let mut moved: Vec<(ChunkKey, Location)> = Vec::new();
        let mut written = 0;
        for pack in plan.with(Decision::Repack) {
            let Some(pack) = self.chunks.packs().get(pack.number)? else {
                continue;
            };
            self.copy_pack(&pack, live, &mut writer, &mut moved)?;
            if writer.as_ref().is_some_and(PackWriter::is_full) {
                written += self.finish_copy(writer.take(), &mut moved)?;
            }
        }
        written += self.finish_copy(writer.take(), &mut moved)?;
        Ok(written)
    }

    fn copy_pack(
        &self,
        pack: &PackReader,
        live: &Marks,
        writer: &mut Option<PackWriter>,
        moved: &mut Vec<(ChunkKey, Location)>,
    ) -> Result<()> {
        let mut run = EncodedRun::default();
        for (number, entry) in pack.entries() {
            let at = Location {
                pack: pack.number(),
                entry: number,
            };
            if !live.has(at) {
                continue;
            }
            let stored = pack.stored_bytes(number, entry);
            // Damage is not copied on: it would get a fresh checksum.
            check_stored(&self.chunks, pack, stored)?;
            run.chunks.push(EncodedChunk {
                key: entry.key,
                encoding: entry.encoding,
                check: entry.check,
                len: stored.bytes.len(),
            });
            run.bytes.extend_from_slice(stored.bytes);
            moved.push((entry.key, at));
            if run.bytes.len() >= COPY_RUN_BYTES {
                let run = std::mem::take(&mut run);
                self.writer(writer)?.append(&run.chunks, run.bytes)?;
            }
        }
        if !run.chunks.is_empty() {
            self.writer(writer)?.append(&run.chunks, run.bytes)?;
        }
        Ok(())
    }

    fn writer<'w>(&self, writer: &'w mut Option<PackWriter>) -> Result<&'w mut PackWriter> {
        if writer.is_none() {
            *writer = Some(self.chunks.packs().create()?);
        }
        Ok(writer.as_mut().expect("just set"))
    }

    /// Seals the copies, then points the index at them: the other way round a
    /// crash could leave index entries that lead nowhere.
    fn finish_copy(
        &self,
        writer: Option<PackWriter>,
        moved: &mut Vec<(ChunkKey, Location)>,
    ) -> Result<u64> {
        let Some(writer) = writer else { return Ok(0) };
        let sealed: SealedPack = writer.seal()?;
        let _publish = self.publish_lock()?;
        let index = IndexWriter::open(&self.layout.index())?;
        let mut updates = Vec::with_capacity(moved.len());
        for ((key, from), (_, to)) in moved.drain(..).zip(sealed.locations()) {
            // Another commit may have stored the chunk elsewhere meanwhile.
            if index.get(key)?.is_none_or(|now| now == from) {
                updates.push((key, to));
            }
        }
        sealed.keep();
        index.put(updates)?;
        index.flush()?;
        Ok(sealed.file_len)
    }

    /// Deletes the condemned packs that nobody can need any more.
    fn delete(&self, marked: &BTreeSet<SnapshotId>, report: &mut GcReport) -> Result<()> {
        // Most of the marking is done before the lock is taken.
        let roots = self.roots()?;
        let mut since = Reach::new(&self.chunks)?;
        let mut marked = marked.clone();
        mark_roots(&mut since, &roots, &mut marked, &crate::Silent)?;
        let _publish = self.publish_lock()?;
        since.refresh()?;
        let mut state = CollectorState::read(&self.layout)?;
        // A process killed while it changed a tag may not have synced it: the
        // tags that are read here must also be those after a power cut.
        durable::sync_dir(&self.layout.tags())?;
        // Read once: a lease that is being rewritten and cannot be parsed shows
        // no pins, but then it blocks everything.
        let leases: Vec<LiveLease> = lease::live(&self.layout)?;
        let mut roots: BTreeSet<_> = self.tags()?.into_values().collect();
        roots.extend(leases.iter().flat_map(|lease| &lease.claim.pins));
        mark_roots(&mut since, &roots, &mut marked, &crate::Silent)?;
        state
            .condemned
            .retain(|pack, _| !since.marks().has_any(*pack));
        let mut doomed = BTreeSet::new();
        for (pack, condemned_in) in &state.condemned {
            let blockers = blocking(&leases, *condemned_in);
            if blockers.is_empty() {
                doomed.insert(*pack);
            } else {
                report.waiting_packs += 1;
                report.waiting_for.extend(blockers);
            }
        }
        report.waiting_for.sort();
        report.waiting_for.dedup();
        self.delete_packs(&doomed, report)?;
        state.condemned.retain(|pack, _| !doomed.contains(pack));
        state.write(&self.layout)
    }

    /// Order: index entries, files, directory. Were a file first, a crash could
    /// leave index entries to a missing pack, and the next commit of the same
    /// page would rely on it.
    fn delete_packs(&self, doomed: &BTreeSet<PackNumber>, report: &mut GcReport) -> Result<()> {
        if doomed.is_empty() {
            return Ok(());
        }
        let index = IndexWriter::open(&self.layout.index())?;
        for number in doomed {
            let Some(pack) = self.chunks.packs().get(*number)? else {
                continue;
            };
            let keys = pack.entries().map(|(_, entry)| entry.key);
            index.remove_if(keys, |at| at.pack == *number)?;
            report.deleted_packs += 1;
            report.freed_bytes += pack.file_len().cast_signed();
        }
        index.flush()?;
        drop(index);
        for number in doomed {
            durable::unlink(&self.layout.pack(*number))?;
            self.chunks.packs().forget(*number);
        }
        durable::sync_dir(&self.layout.packs())
    }
}

fn mark_roots(
    reach: &mut Reach<'_>,
    roots: &BTreeSet<SnapshotId>,
    marked: &mut BTreeSet<SnapshotId>,
    progress: &dyn Progress,
) -> Result<()> {
    progress.begin("mark", roots.len() as u64);
    for (done, id) in (1..).zip(roots) {
        if !marked.contains(id) {
            reach.add_snapshot(*id)?;
            marked.insert(*id);
        }
        progress.advance(done);
    }
    Ok(())
}

fn nothing_to_do(plan: &GcPlan, state: &CollectorState) -> bool {
    state.condemned.is_empty()
        && plan
            .packs
            .iter()
            .all(|pack| pack.decision == Decision::Keep)
}

/// The writers that may rely on a pack condemned in this epoch.
fn blocking(leases: &[LiveLease], condemned_in: Epoch) -> Vec<String> {
    leases
        .iter()
        .filter(|lease| {
            lease
                .claim
                .writing_since
                .is_some_and(|since| since <= condemned_in)
        })
        .map(|lease| lease.holder.clone())
        .collect()
}
