//! The rule for what an optimisation has written anew.
//!
//! A standalone copy takes the entry that leads to a pack which was emptied, or to a delta.
//! A delta does if the index leads from its base to a standalone copy, and takes no entry
//! but one that leads to a pack which was emptied.
//!
//! **Where an entry leads to a standalone copy, a delta takes it only if that copy is no
//! base and cannot become one.** The caller has to know three things, under the publish
//! lock under which the entry changes:
//!
//! 1. The pack of that copy is condemned: no writer that begins takes it for a base, nor
//!    relies on a delta that has it as base.
//! 2. No writer lives that began before it was condemned, and might have done so.
//! 3. No chunk that a root needs has it as base, at the place where that chunk counts.
//!
//! Then the copy is in the same state as one that is deleted with its pack, and what is
//! argued for that (docs/ARCHITECTURE.md) holds for it.

use std::collections::BTreeSet;

use super::{Moved, has_base, present};
use crate::chunks::Chunks;
use crate::error::Result;
use crate::index::IndexWriter;
use crate::pack::{Location, PackNumber};

/// Points the index at some of what was written, which is durable, durably. `emptied` are
/// the packs that it was taken from. `is_no_base` says whether what is said above is known
/// of a standalone copy.
pub(crate) fn enter_rearranged(
    chunks: &Chunks,
    index: &IndexWriter,
    some: &[Moved],
    emptied: &BTreeSet<PackNumber>,
    is_no_base: impl Fn(Location) -> bool,
) -> Result<()> {
    let mut entries = Vec::new();
    for chunk in some {
        if takes_entry(chunks, index, chunk, emptied, &is_no_base)? {
            entries.push((chunk.key, chunk.to));
        }
    }
    index.put(entries)?;
    index.flush()
}

fn takes_entry(
    chunks: &Chunks,
    index: &IndexWriter,
    chunk: &Moved,
    emptied: &BTreeSet<PackNumber>,
    is_no_base: &impl Fn(Location) -> bool,
) -> Result<bool> {
    let now = index.get(chunk.key)?;
    let there = match now {
        Some(now) => present(chunks, chunk.key, now)?,
        None => None,
    };
    let is_emptied = now.is_some_and(|now| emptied.contains(&now.pack));
    if chunk.standalone {
        return Ok(is_emptied || there.is_none_or(|place| !place.is_standalone()));
    }
    let Some(here) = present(chunks, chunk.key, chunk.to)? else {
        return Ok(false);
    };
    if !has_base(chunks, index, &here)? {
        return Ok(false);
    }
    Ok(match there {
        None => true,
        Some(_) if !is_emptied => false,
        Some(place) => !place.is_standalone() || is_no_base(place.location()),
    })
}
