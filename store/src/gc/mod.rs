//! Garbage collection: freeing what no root needs, beside running commits.
//!
//! Roots are tags and the pins of live leases. The collector
//!
//! 1. marks, without stopping anybody: of each chunk that a root needs the one
//!    place that counts, see [`mark`];
//! 2. plans: each pack is kept, repacked or deleted;
//! 3. under the publish lock, marks roots added meanwhile, writes the packs to
//!    go as *condemned* with the present epoch, and raises the epoch;
//! 4. deletes the packs without anything live (step 6), which makes room;
//! 5. copies what is live in packs to be repacked, and points the index at the
//!    copies;
//! 6. deletes condemned packs, a few at a time: under the publish lock, once no
//!    writer of that epoch or before lives, marks roots added since, revives what
//!    they need, and unlinks the rest.
//!
//! Why nothing is lost: a writer that began before step 3 holds a lease which
//! stops step 6; what it publishes is a root when step 6 comes. A writer that
//! began after step 3 does not reuse chunks of condemned packs, not even as bases
//! of deltas, and pins its parent. A pack that a commit is just publishing is not
//! judged, since the index does not lead to it yet. There is deliberately no
//! time-based rule: clocks decide nothing.
//!
//! The publish lock is held for what came since the last look, for one batch of
//! index entries ([`INDEX_BATCH`]), for a file of very many that the index takes over,
//! or for a few files ([`delete`]) at once, never for as long as the store is large.

mod copy;
mod delete;
pub(crate) mod mark;
mod optimize;
pub(crate) mod plan;
pub(crate) mod rewrites;
pub(crate) mod state;

use std::collections::{BTreeMap, BTreeSet};

use crate::durable;
use crate::error::{Damage, IoContext as _, Result};
use crate::id::{ChunkKey, SnapshotId};
use crate::index::{self, IndexWriter};
use crate::lease;
use crate::lock::Lock;
use crate::pack::{Location, PackIdentity, PackNumber};
use crate::placement::{self, INDEX_BATCH, ManyGone};
use crate::progress::Progress;
use crate::sim::{self, Fault};
use crate::store::Store;
use crate::working_set;
use delete::Deletion;
use mark::Reachability;
pub use optimize::{OptimizeOptions, OptimizeReport, OptimizeStop};
pub use plan::{Decision, GcPlan, PackPlan};
use rewrites::Ledger;
use state::{CollectorState, Condemned};

/// Entries of the index to packs that are gone which one collection cleans up.
const MAX_ASTRAY: usize = 1 << 20;
/// How often entries are looked up before the lock is taken to change them.
const LOOKED_AHEAD_AT_MOST: usize = 3;

/// Few in the simulator, whose stores are small.
pub(crate) fn index_batch() -> usize {
    match sim::is_simulated() {
        true if sim::on(Fault::PublishHeldThroughout) => usize::MAX,
        true => 8,
        false => INDEX_BATCH,
    }
}

/// Changes of the index that are made a batch at a time. More are worked out before the
/// publish lock is taken, and made at once.
pub(crate) fn at_once() -> usize {
    match sim::is_simulated() {
        true => 4,
        false => INDEX_BATCH,
    }
}

/// How to collect.
///
/// ```
/// use snapstore_store::{GcOptions, PageSize, Silent, Store};
///
/// # let dir = tempfile::tempdir()?;
/// # let store = Store::create(&dir.path().join("store"), PageSize::default())?;
/// let only_say = GcOptions {
///     dry_run: true,
///     ..GcOptions::default()
/// };
/// let report = store.gc(only_say, &Silent)?;
/// println!("would free {} bytes", report.plan.freed_bytes());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
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
    /// Damaged chunks that a snapshot needs: their packs were not repacked.
    pub not_copied: Vec<Damage>,
    /// The disk had no room for the copies that a repack makes. What was dead as a
    /// whole is deleted; another collection can do the rest.
    pub out_of_room: bool,
}

/// Whether small packs of which there are many are merged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Merging {
    Yes,
    No,
}

impl Store {
    /// Frees what no tag and no live lease needs.
    ///
    /// On a full disk the packs without anything live are deleted first, for
    /// which no room is needed if no commit is under way.
    ///
    /// # Errors
    /// If any root cannot be read whole, nothing is deleted and the damage is
    /// returned. [`crate::Error::Busy`] if another collection runs.
    pub fn gc(&self, options: GcOptions, progress: &dyn Progress) -> Result<GcReport> {
        let span = tracing::debug_span!("gc");
        let _entered = span.enter();
        let _collect = if options.dry_run {
            self.collect_lock_to_read()?
        } else {
            Some(self.collect_lock()?)
        };
        self.collect(options, Merging::Yes, progress)
    }

    /// The same for who holds the collect lock.
    fn collect(
        &self,
        options: GcOptions,
        merging: Merging,
        progress: &dyn Progress,
    ) -> Result<GcReport> {
        let mut report = GcReport::default();
        if !options.dry_run {
            report.swept_packs = self.chunks.packs().sweep()? as u64;
            self.sweep_temporary()?;
        }
        let before = CollectorState::read(&self.layout)?;
        // Before marking looks at the index: a pack that got its entries after
        // that could hold the only live copies of chunks marked elsewhere.
        let numbers = self.chunks.packs().published()?;
        // Also before: a root that is published between the two would be missing
        // from the index as it was seen.
        // And these: the set of a snapshot that gets its tag between the two would be taken for
        // that of one that is gone.
        let mut recorded = working_set::files(&self.layout);
        let roots = self.roots()?;
        if sim::on(Fault::SetsListedLate) {
            recorded = working_set::files(&self.layout);
        }
        let mut reach = Reachability::of_store(&self.chunks)?;
        let mut marked = BTreeSet::new();
        mark_roots(&mut reach, &roots, &mut marked, progress)?;
        tracing::debug!(roots = roots.len(), packs = numbers.len(), "marked");
        self.cancel.check()?;
        let packs = self.chunks.packs();
        report.plan = GcPlan::make(packs, &numbers, reach.marks(), options.keep_percent)?;
        let mut ledger = Ledger::read(&self.layout)?;
        ledger.see(&report.plan);
        if merging == Merging::Yes {
            let allowance = ledger.allowance(&report.plan);
            report.plan.merge_small(allowance);
        }
        report.plan.spare_marked(reach.marks(), reach.exact());
        let count = |decision| report.plan.with(decision).count();
        let (delete, repack) = (count(Decision::Delete), count(Decision::Repack));
        tracing::debug!(delete, repack, "planned");
        if options.dry_run {
            return Ok(report);
        }
        working_set::collect(&self.layout, &recorded, &roots);
        if nothing_to_do(&report.plan, &before) {
            self.clean_index()?;
            tracing::debug!("nothing to free");
            return Ok(report);
        }
        // Most of what came meanwhile is marked before the lock is taken. Roots
        // first, as above.
        let roots = self.roots()?;
        reach.refresh()?;
        mark_roots(&mut reach, &roots, &mut marked, &crate::Silent)?;
        self.condemn_planned(&mut reach, &mut marked, &mut report)?;
        tracing::debug!("condemned");
        let numbers_of = |plan: &GcPlan, decision| -> BTreeSet<PackNumber> {
            plan.with(decision).map(|pack| pack.number).collect()
        };
        self.cancel.check()?;
        let mut deletion = Deletion::new(self, &marked)?;
        let dead = numbers_of(&report.plan, Decision::Delete);
        deletion.delete(&dead, &mut report)?;
        tracing::debug!(packs = report.deleted_packs, "deleted");
        let copied = match self.copy_live(&mut report, reach.marks(), &mut ledger) {
            // What was deleted is free; there is no room for copies.
            Err(error) if error.is_full_disk() && report.deleted_packs > 0 => {
                report.out_of_room = true;
                return Ok(report);
            }
            other => other?,
        };
        let repacked = numbers_of(&report.plan, Decision::Repack);
        tracing::debug!(bytes = copied, "copied");
        deletion.delete(&repacked, &mut report)?;
        report.freed_bytes -= copied.cast_signed();
        self.clean_index()?;
        tracing::debug!(
            packs = report.deleted_packs,
            bytes = report.freed_bytes,
            waiting = report.waiting_packs,
            "collected"
        );
        Ok(report)
    }

    /// Removes what a killed process has left beside the files and the index that it
    /// was replacing.
    fn sweep_temporary(&self) -> Result<()> {
        let layout = &self.layout;
        let mut left = Vec::new();
        for dir in [layout.root().to_owned(), layout.tags()] {
            let entries = match std::fs::read_dir(&dir) {
                // Whoever reads the tags says so.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                other => other.context("list", &dir)?,
            };
            for entry in entries {
                let entry = entry.context("list", &dir)?;
                if durable::is_temporary(&entry.file_name()) {
                    left.push(entry.path());
                }
            }
        }
        if !left.is_empty() {
            // Whoever replaces one of these files holds it.
            let _publish = self.publish_lock()?;
            left.iter().for_each(|path| durable::discard(path));
        }
        // Only `repair` makes these, and it excludes collections.
        for index in [layout.with_fresh_index().index(), layout.old_index()] {
            if index.exists() && layout.index().exists() {
                durable::remove_dir(&index)?;
            }
        }
        let packs = self.chunks.packs();
        index::sweep(&layout.index(), |number| packs.is_being_published(number))
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

    /// Marks what came since, and condemns what the plan does not keep.
    fn condemn_planned(
        &self,
        reach: &mut Reachability<'_>,
        marked: &mut BTreeSet<SnapshotId>,
        report: &mut GcReport,
    ) -> Result<()> {
        let _publish = self.publish_lock()?;
        reach.refresh()?;
        mark_roots(reach, &self.roots()?, marked, &crate::Silent)?;
        report.plan.spare_marked(reach.marks(), reach.exact());
        let condemned = self
            .index_found(reach)
            .and_then(|()| self.condemn(&report.plan));
        match condemned {
            Err(error) if error.is_full_disk() => {
                delete::make_room(self, marked, report)?;
                self.index_found(reach)?;
                self.condemn(&report.plan)
            }
            other => other,
        }
    }

    /// Makes the index lead to what was only found by hints. After this step no
    /// entry of a live chunk leads to a pack that is about to be deleted.
    fn index_found(&self, reach: &Reachability<'_>) -> Result<()> {
        let found: &[(ChunkKey, Location)] = reach.not_indexed();
        if found.is_empty() || sim::on(Fault::FoundNotIndexed) {
            return Ok(());
        }
        let index = self.index_writer()?;
        placement::enter_found(&self.chunks, &index, found)
    }

    /// Writes down which packs are to go, and raises the epoch. Packs condemned
    /// before keep their epoch, or are revived if the plan keeps them.
    fn condemn(&self, plan: &GcPlan) -> Result<()> {
        let mut state = CollectorState::read(&self.layout)?;
        let going: BTreeMap<PackNumber, PackIdentity> = plan
            .going()
            .map(|pack| (pack.number, pack.identity))
            .collect();
        state
            .condemned
            .retain(|pack, condemned| going.get(pack).is_some_and(|it| condemned.is(*it)));
        // Should the state have been lost, its epoch is behind those of writers.
        for lease in lease::live(&self.layout)? {
            state.epoch = state
                .epoch
                .max(lease.claim.writing_since.unwrap_or(state.epoch));
        }
        for (pack, identity) in going {
            let condemned = state.condemned.entry(pack).or_insert(Condemned {
                epoch: state.epoch,
                identity: Some(identity),
            });
            // It may have been condemned while the store was of format 1, which does not
            // know identities.
            if !sim::on(Fault::CondemnedWithoutIdentity) {
                condemned.identity = Some(identity);
            }
        }
        state.epoch = state.epoch.next();
        state.write(&self.layout, self.format())
    }

    /// Removes entries of the index that lead to packs which are gone. They do no
    /// harm but take space.
    ///
    /// Whether a pack is gone is looked at again under the publish lock. A number is
    /// handed out long before the pack gets its name: one that was not there a moment
    /// ago, of whatever number, may have been sealed and entered since.
    fn clean_index(&self) -> Result<()> {
        let packs = self.chunks.packs();
        let there: BTreeSet<PackNumber> = packs.sealed()?.into_iter().collect();
        let view = self.chunks.refresh_index()?;
        let mut astray = Vec::new();
        for entry in view.entries() {
            let (key, at) = entry?;
            if !there.contains(&at.pack) && astray.len() < MAX_ASTRAY {
                astray.push((key, at.pack));
            }
        }
        let is_gone = |pack| Ok(sim::on(Fault::CleanedByOldList) || !packs.is_there(pack)?);
        if astray.len() > at_once() {
            let many = ManyGone::prepare(view, &astray);
            match many.and_then(|many| {
                let _publish = self.publish_lock()?;
                many.remove(&self.index_writer()?, is_gone)
            }) {
                Ok(true) => return index::tidy(&self.layout.index(), index::FEW_RUNS),
                // Something has changed: what is to go is looked at a few at a time.
                Ok(false) => {}
                // There is no room for less.
                Err(error) if error.is_full_disk() => return Ok(()),
                Err(other) => return Err(other),
            }
        }
        for batch in astray.chunks(index_batch()) {
            let keys: Vec<ChunkKey> = batch.iter().map(|(key, _)| *key).collect();
            let (_publish, index) = self.publish_lock_to_change(&keys)?;
            let mut gone: BTreeSet<PackNumber> = batch.iter().map(|(_, pack)| *pack).collect();
            for pack in gone.clone() {
                if !is_gone(pack)? {
                    gone.remove(&pack);
                }
            }
            match placement::remove(&index, &keys, |pack| gone.contains(&pack)) {
                // There is no room for less.
                Err(error) if error.is_full_disk() => return Ok(()),
                other => other?,
            }
        }
        index::tidy(&self.layout.index(), index::FEW_RUNS)
    }

    /// The publish lock, and the index to change these entries of it. They are looked up
    /// before: under the lock as many reads of the disk would keep commits waiting.
    fn publish_lock_to_change(&self, keys: &[ChunkKey]) -> Result<(Lock, IndexWriter)> {
        for _ in 0..LOOKED_AHEAD_AT_MOST {
            let ahead = self.chunks.refresh_index()?.look_ahead(keys)?;
            let publish = self.publish_lock()?;
            let index = self.index_writer()?;
            if index.use_ahead(ahead) {
                return Ok((publish, index));
            }
        }
        // Somebody writes sorted files all the time.
        let publish = self.publish_lock()?;
        Ok((publish, self.index_writer()?))
    }
}

pub(crate) fn mark_roots(
    reach: &mut Reachability<'_>,
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
