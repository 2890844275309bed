//! Where the index leads: the only code that changes its entries. (`repair` makes
//! an index anew, from packs alone: standalone copies first.)
//!
//! A chunk may be stored in several places, standalone in one and as a delta in
//! another. The index leads to one of them. **The invariant of bases:**
//!
//! > A delta is made only against a chunk that the index leads to where it is
//! > stored standalone, and an entry of the index that leads to a standalone copy
//! > is never made to lead to a delta.
//!
//! So as long as a delta is needed, the index leads from its base to a standalone
//! copy, wherever the collector has moved that. Of the second half there is one exception,
//! for what is no base and cannot become one ([`rearranged`]). It is kept by these rules,
//! one a function below:
//!
//! - [`enter_new`]: a commit's copy takes the place of none, of one that is gone,
//!   of one that is condemned or unreadable; a delta never that of a standalone
//!   copy. A second standalone copy waits: the collector may have counted on the
//!   first. For a large pack this is worked out before the lock is taken ([`large`]).
//! - [`enter_copies`]: the collector's copy takes the place of what it was copied
//!   from, of a copy in another pack that is to go, and of any delta, which may be of
//!   a commit that never ends well. A
//!   standalone copy of a node always does: a delta of an older version may need
//!   that very copy ([`Place::needs_one_copy`]). Those of a large pack are worked out
//!   before the lock is taken ([`ManyCopies`]).
//! - [`enter_rearranged`]: what an optimisation has written takes the place of what was in
//!   packs that it has emptied.
//! - [`enter_found`]: a place that only a hint led to takes the place of none, of
//!   one that is gone, and of a delta if it is standalone.
//! - [`remove`], [`ManyGone`] and [`remove_strays`]: an entry is removed only if its pack
//!   is gone, or if what is at its place has another key.
//!
//! While a store is upgraded a chunk can have an entry for each of its keys. Each of
//! them is kept by these rules, and one that leads to a standalone copy is enough.
//!
//! All run under the publish lock. An entry that leads nowhere is harmless:
//! readers and commits look whether the chunk is there. docs/ARCHITECTURE.md has
//! the argument why nothing is lost.

mod large;
mod rearranged;
mod worked_out;

use std::collections::{BTreeMap, BTreeSet};

use crate::chunks::{Chunks, Place};
use crate::error::{Error, Result};
use crate::gc::state::Condemned;
use crate::id::{ChunkKey, ChunkKind};
use crate::index::{IndexWriter, Lookup};
use crate::pack::writer::{SealedPack, StoredChunk};
use crate::pack::{Location, PackNumber};
use crate::sim::{self, Fault};
pub(crate) use large::LargePack;
pub(crate) use rearranged::enter_rearranged;
pub(crate) use worked_out::{ManyCopies, ManyGone, PREPARED_AT_MOST};

/// Entries of the index that are changed under one hold of the publish lock.
pub(crate) const INDEX_BATCH: usize = 4096;

/// A chunk that the collector has copied.
#[derive(Clone, Copy)]
pub(crate) struct Moved {
    pub key: ChunkKey,
    pub from: Location,
    pub to: Location,
    /// Whether the copy decodes without another chunk.
    pub standalone: bool,
}

/// What the collector has copied, by key, each once.
pub(crate) struct Copies<'a> {
    moved: Vec<Moved>,
    /// The packs that the collection deletes next.
    going: &'a BTreeSet<PackNumber>,
}

impl<'a> Copies<'a> {
    /// Of two copies of a chunk a standalone one counts.
    pub fn new(mut moved: Vec<Moved>, going: &'a BTreeSet<PackNumber>) -> Self {
        moved.sort_by_key(|chunk| (chunk.key, !chunk.standalone));
        moved.dedup_by_key(|chunk| chunk.key);
        Self { moved, going }
    }

    pub fn moved(&self) -> &[Moved] {
        &self.moved
    }

    fn of(&self, key: ChunkKey) -> Option<&Moved> {
        let at = self.moved.binary_search_by_key(&key, |chunk| chunk.key);
        at.ok().map(|at| &self.moved[at])
    }
}

/// Enters chunks of a commit's pack, durably: at most [`entered_at_once`] of them, for a
/// larger pack has [`LargePack`].
pub(crate) fn enter_new(
    chunks: &Chunks,
    index: &IndexWriter,
    condemned: &BTreeMap<PackNumber, Condemned>,
    pack: &SealedPack,
    which: &[StoredChunk],
) -> Result<()> {
    let mut entries = Vec::new();
    for chunk in which {
        let now = index.get(chunk.key)?;
        if replaces(chunks, index, condemned, chunk, now)? {
            entries.push((chunk.key, chunk.at));
        }
    }
    let was_kept = pack.is_kept();
    pack.keep();
    let entered = index
        .put(entries.iter().copied())
        .and_then(|()| index.flush());
    let is_full = entered.as_ref().is_err_and(Error::is_full_disk);
    if is_full && !was_kept && !leads_to_any(chunks, &entries)? {
        pack.give_up();
    }
    entered
}

/// Whether a commit's chunk takes the entry that leads to `now`.
fn replaces(
    chunks: &Chunks,
    index: &impl Lookup,
    condemned: &BTreeMap<PackNumber, Condemned>,
    chunk: &StoredChunk,
    now: Option<Location>,
) -> Result<bool> {
    let Some(now) = now else { return Ok(true) };
    let Some(place) = present(chunks, chunk.key, now)? else {
        return Ok(true);
    };
    let going = condemned.contains_key(&now.pack);
    if place.is_standalone() {
        Ok(going && chunk.standalone)
    } else if sim::bases_by_id() {
        Ok(false)
    } else {
        Ok(chunk.standalone || going || !has_base(chunks, index, &place)?)
    }
}

/// Chunks of a commit that are looked up and entered under one hold of the publish lock.
pub(crate) fn entered_at_once() -> usize {
    match sim::is_simulated() {
        true if sim::on(Fault::LookedUpUnderLock) => usize::MAX,
        true => 3,
        false => INDEX_BATCH,
    }
}

/// Whether the index, as anybody sees it now, leads to one of these places.
fn leads_to_any(chunks: &Chunks, entries: &[(ChunkKey, Location)]) -> Result<bool> {
    let index = chunks.refresh_index()?;
    for (key, at) in entries {
        if index.get(*key)? == Some(*at) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Points the index at some of the copies, which are durable, durably.
pub(crate) fn enter_copies(
    chunks: &Chunks,
    index: &IndexWriter,
    copies: &Copies<'_>,
    some: &[Moved],
) -> Result<()> {
    let mut entries = Vec::new();
    for chunk in some {
        if copy_replaces(chunks, chunk, copies.going, index.get(chunk.key)?)? {
            entries.push((chunk.key, chunk.to));
        }
    }
    index.put(entries)?;
    index.flush()
}

/// Whether a copy takes the entry that leads to `now`.
fn copy_replaces(
    chunks: &Chunks,
    chunk: &Moved,
    going: &BTreeSet<PackNumber>,
    now: Option<Location>,
) -> Result<bool> {
    Ok(match now {
        None => true,
        Some(now) if now == chunk.from => true,
        // Another copy, which nothing was found to need: it goes with its pack. An entry
        // that stayed would lead nowhere then, which is worse than to a delta that is needed.
        Some(now) if going.contains(&now.pack) && !sim::on(Fault::CopyOfGoingPackKept) => true,
        // A delta of an older version may need this very copy of a node. To all
        // others any standalone copy is as good.
        Some(_) if chunk.key.kind == ChunkKind::Node && chunk.standalone => true,
        Some(now) => present(chunks, chunk.key, now)?.is_none_or(|place| !place.is_standalone()),
    })
}

/// Points the index at places that a reader without a hint would miss, durably.
pub(crate) fn enter_found(
    chunks: &Chunks,
    index: &IndexWriter,
    found: &[(ChunkKey, Location)],
) -> Result<()> {
    let mut entries = Vec::new();
    for (key, at) in found {
        let Some(here) = present(chunks, *key, *at)? else {
            continue;
        };
        let now = index.get(*key)?;
        let now = now.map(|now| present(chunks, *key, now)).transpose()?;
        let replaces = match now.flatten() {
            None => true,
            Some(now) => here.is_standalone() && !now.is_standalone(),
        };
        if replaces {
            entries.push((*key, *at));
        }
    }
    index.put(entries)?;
    index.flush()
}

/// Removes those of `keys` whose entries lead to a pack that `is_gone`, durably.
pub(crate) fn remove(
    index: &IndexWriter,
    keys: &[ChunkKey],
    mut is_gone: impl FnMut(PackNumber) -> bool,
) -> Result<()> {
    index.remove_if(keys.iter().copied(), |at| is_gone(at.pack))?;
    index.flush()
}

/// Removes those of `keys` whose entries lead to a chunk of another key, or to none,
/// durably.
pub(crate) fn remove_strays(chunks: &Chunks, index: &IndexWriter, keys: &[ChunkKey]) -> Result<()> {
    let mut strays = Vec::new();
    for key in keys {
        let astray = match index.get(*key)? {
            Some(at) => chunks.at(*key, at)?.is_none(),
            None => false,
        };
        if astray {
            strays.push(*key);
        }
    }
    index.remove_if(strays, |_| true)?;
    index.flush()
}

/// The chunk at a place; `None` if it is not there, or cannot be read.
fn present(chunks: &Chunks, key: ChunkKey, at: Location) -> Result<Option<Place>> {
    match chunks.at(key, at) {
        Err(Error::Damaged(_)) => Ok(None),
        other => other,
    }
}

/// Whether the index leads from a delta to a standalone copy of its base.
fn has_base(chunks: &Chunks, index: &impl Lookup, delta: &Place) -> Result<bool> {
    if delta.needs_one_copy() {
        return Ok(false);
    }
    let base = match delta.pack.base(&delta.slot) {
        Ok(Some(base)) => base,
        Ok(None) | Err(Error::Damaged(_)) => return Ok(false),
        Err(other) => return Err(other),
    };
    for at in chunks.indexed(index, base.id) {
        let place = match chunks.at_id(base.id, at?) {
            Err(Error::Damaged(_)) => None,
            other => other?,
        };
        if place.is_some_and(|place| place.is_standalone()) {
            return Ok(true);
        }
    }
    Ok(false)
}
