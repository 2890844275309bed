//! Deleting condemned packs that nobody can need any more.

use std::collections::BTreeSet;

use crate::durable;
use crate::error::{Error, Result};
use crate::gc::mark::Reachability;
use crate::gc::plan::Decision;
use crate::gc::state::{CollectorState, Condemned, Epoch};
use crate::gc::{GcReport, mark_roots};
use crate::id::SnapshotId;
use crate::lease::{self, LiveLease};
use crate::lock::{self, LockKind};
use crate::pack::PackNumber;
use crate::sim::{self, Fault};
use crate::store::Store;

/// Files that are unlinked under one hold of the publish lock, at least.
const FILES_PER_HOLD: usize = 32;
/// Tags that are read in the time in which a file is unlinked.
const TAGS_PER_FILE: usize = 4;
/// Condemned packs that are read and written in that time.
const CONDEMNED_PER_FILE: usize = 64;

/// How many files are unlinked under one hold of the publish lock. Each hold reads all tags
/// and the collector's state: were it for a few files, a collection of many packs would take
/// the product of the two.
///
/// Few in the simulator, whose stores are small.
fn files_per_hold(tags: usize, condemned: usize) -> usize {
    match sim::is_simulated() {
        true if sim::on(Fault::PublishHeldThroughout) => usize::MAX,
        true => 2,
        false => FILES_PER_HOLD
            .max(tags / TAGS_PER_FILE)
            .max(condemned / CONDEMNED_PER_FILE),
    }
}

/// Deletes packs beside commits, a few at a time.
///
/// The index is cleaned up later: an entry that leads to a pack which is gone is
/// harmless, while a hold of the lock that changes as many entries as a pack has
/// chunks would be long.
pub(super) struct Deletion<'a> {
    store: &'a Store,
    /// Marks what was published since the plan was made.
    since: Reachability<'a>,
    marked: BTreeSet<SnapshotId>,
}

impl<'a> Deletion<'a> {
    /// `marked` are the roots that the plan is made of.
    pub fn new(store: &'a Store, marked: &BTreeSet<SnapshotId>) -> Result<Self> {
        Ok(Self {
            store,
            since: Reachability::new(&store.chunks)?,
            marked: marked.clone(),
        })
    }

    /// Deletes those of `going` that are condemned, not needed by what came
    /// since, and not waited for by any writer.
    pub fn delete(&mut self, going: &BTreeSet<PackNumber>, report: &mut GcReport) -> Result<()> {
        let mut left: Vec<PackNumber> = going.iter().copied().collect();
        while !left.is_empty() {
            // Most of the marking is done before the lock is taken. Roots first: one
            // that is published between the two would be missing from the index.
            let roots = self.store.roots()?;
            self.since.refresh()?;
            mark_roots(&mut self.since, &roots, &mut self.marked, &crate::Silent)?;
            left = self.delete_some(left, report)?;
        }
        report.waiting_for.sort();
        report.waiting_for.dedup();
        Ok(())
    }

    /// One hold of the publish lock; returns what is left to look at.
    fn delete_some(
        &mut self,
        left: Vec<PackNumber>,
        report: &mut GcReport,
    ) -> Result<Vec<PackNumber>> {
        let store = self.store;
        let locked = !sim::on(Fault::DeletedWithoutLock);
        let _publish = locked.then(|| store.publish_lock()).transpose()?;
        // A process killed while it changed a tag may not have synced it: the
        // tags that are read here must also be those after a power cut.
        if !sim::on(Fault::TagsNotSyncedBeforeDeletion) {
            durable::sync_dir(&store.layout.tags())?;
        }
        // Read once: a lease that is being rewritten and cannot be parsed shows
        // no pins, but then it blocks everything.
        let leases: Vec<LiveLease> = lease::live(&store.layout)?;
        let mut roots: BTreeSet<_> = store.tags()?.into_values().collect();
        roots.extend(leases.iter().flat_map(|lease| &lease.claim.pins));
        self.since.refresh()?;
        if sim::on(Fault::LateRootsNotMarked) {
            roots.clear();
        }
        mark_roots(&mut self.since, &roots, &mut self.marked, &crate::Silent)?;
        let mut state = CollectorState::read(&store.layout)?;
        let condemned_before = state.condemned.len();
        let at_once = files_per_hold(roots.len(), condemned_before);
        let since = self.since.marks();
        state.condemned.retain(|pack, _| !since.has_any(*pack));
        let mut deleted = Vec::new();
        let mut left = left.into_iter();
        for number in left.by_ref() {
            // Revived, by us or by a commit that relies on it.
            let Some(condemned) = state.condemned.get(&number).copied() else {
                continue;
            };
            let blockers = blocking(&leases, condemned.epoch);
            if !blockers.is_empty() && !sim::on(Fault::OldWriterIgnored) {
                report.waiting_packs += 1;
                report.waiting_for.extend(blockers);
                continue;
            }
            // Another pack may have come under the number: it is not what was judged.
            if is_meant(store, number, condemned)? {
                unlink(store, number, report)?;
            }
            deleted.push(number);
            if deleted.len() >= at_once {
                break;
            }
        }
        if !deleted.is_empty() {
            durable::sync_dir(&store.layout.packs())?;
        }
        // Last: were a pack no longer condemned before it is gone for good, a
        // commit could begin to rely on it.
        for number in &deleted {
            state.condemned.remove(number);
        }
        if state.condemned.len() != condemned_before {
            match state.write(&store.layout, store.format()) {
                // A number that stays condemned is never used again.
                Err(error) if error.is_full_disk() => {}
                other => other?,
            }
        }
        Ok(left.collect())
    }
}

/// Deletes what is dead while not even the collector's state can be written: the
/// disk is full.
///
/// Condemning keeps writers from relying on what is deleted; here there is none.
/// The allocate lock, under which leases are taken, keeps new ones and new pins
/// from coming while packs are unlinked, and the publish lock, which the caller
/// holds, keeps the tags as they are.
pub(super) fn make_room(
    store: &Store,
    marked: &BTreeSet<SnapshotId>,
    report: &mut GcReport,
) -> Result<()> {
    let allocate = lock::acquire(&store.layout, LockKind::Allocate, lock::DEFAULT_TIMEOUT)?;
    let leases = lease::live_under(&store.layout, &allocate)?;
    let writers: Vec<&LiveLease> = leases
        .iter()
        .filter(|lease| lease.claim.writing_since.is_some())
        .collect();
    if let Some(writer) = writers.first()
        && !sim::on(Fault::RoomMadeBesideWriters)
    {
        return Err(Error::Busy {
            path: store.layout.leases(),
            holder: format!(
                "{}, which commits, or reads and has found no room to say what; the disk is full",
                writer.holder
            ),
        });
    }
    durable::sync_dir(&store.layout.tags())?;
    let mut roots: BTreeSet<_> = store.tags()?.into_values().collect();
    roots.extend(leases.iter().flat_map(|lease| &lease.claim.pins));
    if roots.iter().any(|root| !marked.contains(root)) {
        return Err(Error::Busy {
            path: store.layout.leases(),
            holder: "somebody who has just pinned a snapshot".to_owned(),
        });
    }
    let dead: Vec<PackNumber> = report
        .plan
        .with(Decision::Delete)
        .map(|pack| pack.number)
        .collect();
    for number in dead {
        unlink(store, number, report)?;
    }
    durable::sync_dir(&store.layout.packs())
}

/// Whether the pack that is in its place is the one that was condemned.
fn is_meant(store: &Store, number: PackNumber, condemned: Condemned) -> Result<bool> {
    if condemned.identity.is_none() {
        return Ok(true);
    }
    match store.chunks.packs().open_now(number) {
        Ok(pack) => Ok(pack.is_none_or(|pack| condemned.is(pack.identity()))),
        Err(Error::Damaged(_)) => Ok(false),
        Err(other) => Err(other),
    }
}

fn unlink(store: &Store, number: PackNumber, report: &mut GcReport) -> Result<()> {
    // It made room before it could be condemned.
    if !store.chunks.packs().is_there(number)? {
        return Ok(());
    }
    let packs = &report.plan.packs;
    let planned = packs.binary_search_by_key(&number, |pack| pack.number);
    let file_len = planned.map_or(0, |position| packs[position].file_bytes);
    durable::unlink(&store.layout.pack(number))?;
    store.chunks.packs().forget(number);
    report.deleted_packs += 1;
    report.freed_bytes += file_len.cast_signed();
    Ok(())
}

/// The writers that may rely on a pack condemned in this epoch.
pub(super) fn blocking(leases: &[LiveLease], condemned_in: Epoch) -> Vec<String> {
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
