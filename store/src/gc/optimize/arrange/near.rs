//! The pages of a working set, next to each other.
//!
//! A restore reads them before any other. Where a set lies scattered over an image it reads
//! a little in many places of a pack, so the set is written first, and what else the snapshot
//! has after it, both in the order of the image: who reads all of it in order goes through
//! both from one end to the other.
//!
//! A set is a guess from a file that may say anything. Nothing depends on it but the order:
//! pages that it does not name, or that are not there, are written as without it.

use super::Arrangement;
use crate::error::Result;
use crate::format::node::{Child, node_id};
use crate::id::{ChunkId, SnapshotId};
use crate::manifest::Image;
use crate::pack::Location;
use crate::tree::shape::slot;

/// What is laid together of an image at most: else who reads it in order would find little of it so.
const LAID_BYTES: u64 = 128 << 20;

/// A page of a set that is stored.
type Found = (ChunkId, Option<Location>);

impl Arrangement<'_> {
    /// Writes the pages of an image's working set that are not written yet, as far as there
    /// is time.
    pub(super) fn add_working_set(&mut self, snapshot: SnapshotId, image: &Image) -> Result<()> {
        let wanted = self.wanted(snapshot, image);
        let tree = image.tree();
        let Some(root) = tree.root().filter(|_| !wanted.is_empty()) else {
            return Ok(());
        };
        let mut found = Vec::with_capacity(wanted.len());
        self.find_pages(root, tree.shape().root_level(), &wanted, &mut found)?;
        if self.stopped_by.is_some() {
            return Ok(());
        }
        for batch in found.chunks(self.batch_pages()) {
            self.add_batch(batch.iter().copied())?;
            self.store.cancel.check()?;
            if self.is_to_stop() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// The pages that the set names, ascending, each once. None if there is no set, or none
    /// that would be pushed.
    fn wanted(&self, snapshot: SnapshotId, image: &Image) -> Vec<u64> {
        let set = match self.store.working_set(snapshot, &image.name) {
            Ok(set) => set.filter(|set| set.is_trusted()),
            Err(error) => {
                tracing::debug!(%error, "a working set is not laid together");
                None
            }
        };
        let pages = set.iter().flat_map(|set| set.pages()).map(u64::from);
        let pages = pages.filter(|page| *page < image.pages());
        let most = LAID_BYTES / self.chunks().page_size().bytes();
        let most = usize::try_from(most).expect("a number of pages");
        let mut wanted: Vec<u64> = pages.take(most).collect();
        wanted.sort_unstable();
        wanted.dedup();
        wanted
    }

    /// Finds pages under a node, unless all under it is written.
    fn find_pages(
        &mut self,
        child: Child,
        level: u8,
        wanted: &[u64],
        found: &mut Vec<Found>,
    ) -> Result<()> {
        let place = self.places.find(node_id(child), child.hint)?.place;
        let is_written = self.arranged.contains_key(&place.slot.entry.key);
        if is_written || self.done.has(place.location()) {
            return Ok(());
        }
        // A set may name a page of each leaf of a long image.
        self.store.cancel.check()?;
        if self.is_to_stop() {
            return Ok(());
        }
        let node = self.chunks().node(child, level)?;
        let slot_of = |page: &u64| slot(*page, level);
        for wanted in wanted.chunk_by(|one, other| slot_of(one) == slot_of(other)) {
            let Some(below) = node.child(slot_of(&wanted[0])) else {
                continue;
            };
            if level > 0 {
                self.find_pages(below, level - 1, wanted, found)?;
                continue;
            }
            found.push((node.child_id(below), below.hint));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
