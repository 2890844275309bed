//! Which snapshots have parts in which packs.

use std::collections::{BTreeSet, HashMap};

use crate::chunks::{Chunks, Readable};
use crate::error::Result;
use crate::format::node::Child;
use crate::id::{ChunkId, SnapshotId};
use crate::manifest;
use crate::pack::{Location, PackNumber};
use crate::tree::read::node_id;

/// Looks for parts of snapshots in some packs.
///
/// Each node is looked into once, whatever number of snapshots has it. Memory: a
/// line for each node.
pub(crate) struct Users<'a> {
    chunks: &'a Chunks,
    packs: &'a BTreeSet<PackNumber>,
    below: HashMap<([u8; 32], Option<Location>), BTreeSet<PackNumber>>,
}

impl<'a> Users<'a> {
    pub fn new(chunks: &'a Chunks, packs: &'a BTreeSet<PackNumber>) -> Self {
        Self {
            chunks,
            packs,
            below: HashMap::new(),
        }
    }

    /// Those of the packs that a reader of this snapshot would read, as far as it can
    /// be read.
    pub fn snapshot(&mut self, id: SnapshotId) -> Result<BTreeSet<PackNumber>> {
        let mut found = BTreeSet::new();
        let Some(manifest) = lost_is_none(manifest::read(self.chunks, id))? else {
            return Ok(found);
        };
        self.chunk(id.chunk(), None, &mut found)?;
        for image in &manifest.images {
            if let Some(root) = image.tree().root() {
                found.extend(self.node(root, image.tree().shape().root_level())?);
            }
        }
        Ok(found)
    }

    fn node(&mut self, child: Child, level: u8) -> Result<BTreeSet<PackNumber>> {
        let reference = (child.hash, child.hint);
        if let Some(known) = self.below.get(&reference) {
            return Ok(known.clone());
        }
        let mut found = BTreeSet::new();
        if let Some(node) = lost_is_none(self.chunks.node(child, level))? {
            self.chunk(node_id(child), child.hint, &mut found)?;
            for (_, below) in node.present() {
                if found.len() == self.packs.len() {
                    break;
                }
                if level == 0 {
                    self.chunk(node.child_id(below), below.hint, &mut found)?;
                } else {
                    found.extend(self.node(below, level - 1)?);
                }
            }
        }
        self.below.insert(reference, found.clone());
        Ok(found)
    }

    fn chunk(
        &self,
        id: ChunkId,
        hint: Option<Location>,
        found: &mut BTreeSet<PackNumber>,
    ) -> Result<()> {
        let Some(Readable { place, base }) = lost_is_none(self.chunks.readable(id, hint))? else {
            return Ok(());
        };
        for place in std::iter::once(place).chain(base) {
            let pack = place.location().pack;
            if self.packs.contains(&pack) {
                found.insert(pack);
            }
        }
        Ok(())
    }
}

/// What cannot be read is nobody's part of a pack; it has findings of its own.
fn lost_is_none<T>(found: Result<T>) -> Result<Option<T>> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.is_lost() => Ok(None),
        Err(other) => Err(other),
    }
}
