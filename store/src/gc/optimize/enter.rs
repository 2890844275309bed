//! Making the index lead to what was written anew.
//!
//! 1. What is standalone in the new packs. From here on the index leads to every base of
//!    what was written.
//! 2. Deltas of what was a delta before, or is not there any more.
//! 3. Deltas of what was standalone, where that is no base and cannot become one
//!    ([`crate::placement::enter_rearranged`]): it is found out after the first two, by
//!    marking all that roots need as if the index led to these deltas already. What turns
//!    up as a base stays as it is, and so does its pack.
//!
//! Swapped, deltas would be entered before their bases, or marks would be made of deltas
//! that were not entered after all. Wherever it is interrupted, every entry leads to what
//! can be read, and what is not entered is dead in its pack.

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

use crate::durable;
use crate::error::Result;
use crate::gc::delete::blocking;
use crate::gc::mark::Reachability;
use crate::gc::state::{CollectorState, Epoch};
use crate::gc::{index_batch, mark_roots};
use crate::id::{ChunkKey, SnapshotId};
use crate::lease;
use crate::pack::{Location, PackNumber};
use crate::placement::{self, Moved};
use crate::sim::{self, Fault};
use crate::store::Store;

/// Chunks that are entered under one hold of the publish lock: their bases are looked at.
const ENTERED_AT_ONCE: usize = 512;
/// How long is waited for writers that began before the packs were condemned.
const PATIENCE: Duration = Duration::from_secs(60);
const BETWEEN_LOOKS: Duration = Duration::from_millis(20);

/// What has become of the entries.
#[derive(Default)]
pub(super) struct Entered {
    /// The writers that were waited for in vain. What was standalone stays where it was.
    pub waiting_for: Vec<String>,
}

/// Enters what was written.
pub(super) fn enter(
    store: &Store,
    moved: &[Moved],
    emptied: &BTreeSet<PackNumber>,
) -> Result<Entered> {
    let (standalone, deltas): (Vec<Moved>, Vec<Moved>) =
        moved.iter().partition(|chunk| chunk.standalone);
    for chunks in [&standalone, &deltas] {
        for some in chunks.chunks(at_once()) {
            let keys: Vec<ChunkKey> = some.iter().map(|chunk| chunk.key).collect();
            let (_publish, index) = store.publish_lock_to_change(&keys)?;
            placement::enter_rearranged(&store.chunks, &index, some, emptied, |_| false)?;
        }
    }
    let waiting_for = wait_for_writers(store, emptied)?;
    if !waiting_for.is_empty() && !sim::on(Fault::RebasedBesideWriters) {
        return Ok(Entered { waiting_for });
    }
    rebase(store, &deltas, emptied)?;
    Ok(Entered::default())
}

fn at_once() -> usize {
    index_batch().min(ENTERED_AT_ONCE)
}

/// The third step.
fn rebase(store: &Store, deltas: &[Moved], emptied: &BTreeSet<PackNumber>) -> Result<()> {
    let mut left = Vec::new();
    let index = store.chunks.refresh_index()?;
    for chunk in deltas {
        let now = index.get(chunk.key)?;
        if now.is_some_and(|now| emptied.contains(&now.pack)) {
            left.push(*chunk);
        }
    }
    let planned: HashMap<ChunkKey, Location> =
        left.iter().map(|chunk| (chunk.key, chunk.to)).collect();
    if planned.is_empty() {
        return Ok(());
    }
    let mut marked: BTreeSet<SnapshotId> = BTreeSet::new();
    let roots = store.roots()?;
    let mut reach = Reachability::of_store_with(&store.chunks, planned)?;
    mark_roots(&mut reach, &roots, &mut marked, &crate::Silent)?;
    for some in left.chunks(at_once()) {
        store.cancel.check()?;
        let roots = store.roots()?;
        reach.refresh()?;
        mark_roots(&mut reach, &roots, &mut marked, &crate::Silent)?;
        let keys: Vec<ChunkKey> = some.iter().map(|chunk| chunk.key).collect();
        let (_publish, index) = store.publish_lock_to_change(&keys)?;
        // As before a pack is deleted: tags are to be those after a power cut.
        durable::sync_dir(&store.layout.tags())?;
        let roots = store.roots()?;
        reach.refresh()?;
        mark_roots(&mut reach, &roots, &mut marked, &crate::Silent)?;
        let state = CollectorState::read(&store.layout)?;
        if !writers(store, &state, emptied)?.is_empty() && !sim::on(Fault::RebasedBesideWriters) {
            return Ok(());
        }
        let is_no_base = |at: Location| {
            let is_condemned = state.condemned.contains_key(&at.pack);
            let is_needed = reach.marks().has(at) && !sim::on(Fault::NeededBaseRebased);
            is_condemned && !is_needed
        };
        placement::enter_rearranged(&store.chunks, &index, some, emptied, is_no_base)?;
    }
    Ok(())
}

/// Those that may rely on what is in condemned packs, once nobody wants to wait longer.
fn wait_for_writers(store: &Store, emptied: &BTreeSet<PackNumber>) -> Result<Vec<String>> {
    let until = Instant::now() + PATIENCE;
    loop {
        let state = CollectorState::read(&store.layout)?;
        let writers = writers(store, &state, emptied)?;
        // The simulator's writers do not go on while this waits.
        if writers.is_empty() || sim::is_simulated() || Instant::now() >= until {
            return Ok(writers);
        }
        store.cancel.check()?;
        std::thread::sleep(BETWEEN_LOOKS);
    }
}

fn writers(
    store: &Store,
    state: &CollectorState,
    emptied: &BTreeSet<PackNumber>,
) -> Result<Vec<String>> {
    let condemned = state.condemned.iter();
    let condemned = condemned.filter(|(number, _)| emptied.contains(number));
    let latest: Option<Epoch> = condemned.map(|(_, condemned)| condemned.epoch).max();
    let leases = lease::live(&store.layout)?;
    Ok(latest.map_or_else(Vec::new, |epoch| blocking(&leases, epoch)))
}
