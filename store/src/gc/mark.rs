//! Following references: from snapshots to every chunk they need.

use std::collections::HashMap;
use std::sync::Arc;

use crate::chunks::Chunks;
use crate::error::{Damage, Result};
use crate::id::{ChunkId, ChunkKey, SnapshotId};
use crate::index::IndexReader;
use crate::manifest;
use crate::pack::reader::PackReader;
use crate::pack::{EntryNumber, Location, PackNumber};
use crate::tree::node::Child;
use crate::tree::read::node_id;

/// One bit per entry of each pack.
#[derive(Default)]
pub(crate) struct Marks {
    packs: HashMap<PackNumber, Vec<u64>>,
}

impl Marks {
    /// Sets the bit; returns whether it was clear.
    pub fn set(&mut self, at: Location) -> bool {
        let word = at.entry.0 as usize / 64;
        let bit = 1 << (at.entry.0 % 64);
        let words = self.packs.entry(at.pack).or_default();
        if words.len() <= word {
            words.resize(word + 1, 0);
        }
        let was_clear = words[word] & bit == 0;
        words[word] |= bit;
        was_clear
    }

    pub fn has(&self, at: Location) -> bool {
        let word = at.entry.0 as usize / 64;
        self.packs
            .get(&at.pack)
            .and_then(|words| words.get(word))
            .is_some_and(|word| word >> (at.entry.0 % 64) & 1 == 1)
    }

    pub fn has_any(&self, pack: PackNumber) -> bool {
        self.packs
            .get(&pack)
            .is_some_and(|words| words.iter().any(|word| *word != 0))
    }
}

/// Finds the one place of a chunk that counts: where the index says it is. A
/// hint that agrees saves the lookup.
pub(crate) struct Places<'a> {
    chunks: &'a Chunks,
    index: Arc<IndexReader>,
    /// The entries that the index points at, if they were collected.
    indexed: Option<Marks>,
}

/// A chunk's place.
pub(crate) struct Place {
    pub pack: Arc<PackReader>,
    pub entry: EntryNumber,
}

impl Place {
    pub fn location(&self) -> Location {
        Location {
            pack: self.pack.number(),
            entry: self.entry,
        }
    }
}

impl<'a> Places<'a> {
    /// Looks up every chunk: right for a few snapshots.
    pub fn few(chunks: &'a Chunks) -> Result<Self> {
        Ok(Self {
            index: chunks.refresh_index()?,
            chunks,
            indexed: None,
        })
    }

    /// Reads the index once: right for the whole store.
    pub fn all(chunks: &'a Chunks) -> Result<Self> {
        let index = chunks.refresh_index()?;
        let mut indexed = Marks::default();
        for entry in index.entries() {
            indexed.set(entry?.1);
        }
        Ok(Self {
            chunks,
            index,
            indexed: Some(indexed),
        })
    }

    pub fn chunks(&self) -> &'a Chunks {
        self.chunks
    }

    /// Where the chunk is. A chunk that the index has lost is still found by its
    /// hint.
    pub fn find(&self, key: ChunkKey, hint: Option<Location>) -> Result<Place> {
        let indexed = |at: &Location| self.indexed.as_ref().is_some_and(|marks| marks.has(*at));
        if let Some(place) = hint.filter(indexed).and_then(|at| self.at(key, at)) {
            return Ok(place);
        }
        self.index
            .get(key)?
            .and_then(|at| self.at(key, at))
            .or_else(|| self.at(key, hint?))
            .ok_or_else(|| {
                Damage::Missing {
                    chunk: key.to_string(),
                }
                .into()
            })
    }

    fn at(&self, key: ChunkKey, at: Location) -> Option<Place> {
        // A damaged pack counts as missing here; `verify` names it.
        let pack = self.chunks.packs().get(at.pack).ok().flatten()?;
        pack.stored(at.entry, key)?;
        Some(Place {
            pack,
            entry: at.entry,
        })
    }
}

/// What the snapshots added so far can reach.
pub(crate) struct Reach<'a> {
    places: Places<'a>,
    marks: Marks,
    /// Nodes whose children are marked. A node may be marked without being here:
    /// as the base of another one, which needs the node and not its children.
    entered: Marks,
}

impl<'a> Reach<'a> {
    /// For checking a snapshot or two.
    pub fn new(chunks: &'a Chunks) -> Result<Self> {
        Ok(Self {
            places: Places::few(chunks)?,
            marks: Marks::default(),
            entered: Marks::default(),
        })
    }

    /// For marking the whole store.
    pub fn of_store(chunks: &'a Chunks) -> Result<Self> {
        Ok(Self {
            places: Places::all(chunks)?,
            marks: Marks::default(),
            entered: Marks::default(),
        })
    }

    pub fn marks(&self) -> &Marks {
        &self.marks
    }

    /// Sees what was published since this began.
    pub fn refresh(&mut self) -> Result<()> {
        self.places.index = self.places.chunks.refresh_index()?;
        Ok(())
    }

    /// Marks all that a snapshot needs. Fails if anything is missing.
    pub fn add_snapshot(&mut self, id: SnapshotId) -> Result<()> {
        let manifest = manifest::read(self.places.chunks(), id)?;
        self.mark(id.chunk(), None)?;
        for image in &manifest.images {
            if let Some(root) = image.tree().root() {
                self.mark_tree(root, image.tree().shape().root_level())?;
            }
        }
        Ok(())
    }

    fn mark_tree(&mut self, child: Child, level: u8) -> Result<()> {
        let at = self.mark(node_id(child), child.hint)?;
        if !self.entered.set(at) {
            return Ok(());
        }
        let node = self.places.chunks().node(child, level)?;
        for (_, below) in node.present() {
            if level == 0 {
                self.mark(node.child_id(below), below.hint)?;
            } else {
                self.mark_tree(below, level - 1)?;
            }
        }
        Ok(())
    }

    /// Marks a chunk and its base; returns where the chunk is.
    fn mark(&mut self, id: ChunkId, hint: Option<Location>) -> Result<Location> {
        let place = self.places.find(id.key(), hint)?;
        let at = place.location();
        if !self.marks.set(at) {
            return Ok(at);
        }
        let base = place
            .pack
            .stored(place.entry, id.key())
            .and_then(|stored| stored.base());
        if let Some(base) = base {
            let place = self.places.find(base.id.key(), Some(base.hint))?;
            self.marks.set(place.location());
        }
        Ok(at)
    }
}
