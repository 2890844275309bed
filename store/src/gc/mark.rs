//! Following references: from snapshots to every chunk they need.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crate::chunks::{Chunks, Place, Readable, first_readable};
use crate::error::Result;
use crate::format::node::Child;
use crate::id::{ChunkId, ChunkKey, SnapshotId};
use crate::index::IndexReader;
use crate::manifest;
use crate::pack::{Location, PackNumber};
use crate::sim::{self, Fault};
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

    /// Whether any entry of the pack is marked. Bits are only ever set.
    pub fn has_any(&self, pack: PackNumber) -> bool {
        self.packs.contains_key(&pack)
    }

    /// The packs with a marked entry, in no order.
    pub fn packs(&self) -> impl Iterator<Item = PackNumber> + '_ {
        self.packs.keys().copied()
    }
}

/// Finds the one place of a chunk that counts for the collector: where the index
/// leads if that is readable, else where the reference hints. A hint that agrees
/// with the index saves the lookup.
pub(crate) struct ChunkLocator<'a> {
    chunks: &'a Chunks,
    index: Arc<IndexReader>,
    /// The entries that the index points at, if they were collected.
    indexed: Option<Marks>,
    /// Places that count before any other: where the index is about to lead.
    planned: HashMap<ChunkKey, Location>,
}

impl<'a> ChunkLocator<'a> {
    /// Looks up every chunk: right for a few snapshots.
    pub fn few(chunks: &'a Chunks) -> Result<Self> {
        Ok(Self {
            index: as_it_is_now(chunks)?,
            chunks,
            indexed: None,
            planned: HashMap::new(),
        })
    }

    /// Reads the index once: right for the whole store.
    pub fn all(chunks: &'a Chunks) -> Result<Self> {
        let index = as_it_is_now(chunks)?;
        let mut indexed = Marks::default();
        for entry in index.entries() {
            indexed.set(entry?.1);
        }
        Ok(Self {
            chunks,
            index,
            indexed: Some(indexed),
            planned: HashMap::new(),
        })
    }

    pub fn chunks(&self) -> &'a Chunks {
        self.chunks
    }

    /// Where the chunk is, and its base if it is a delta there, by the rule of
    /// [`crate::chunks`].
    pub fn find(&self, id: ChunkId, hint: Option<Location>) -> Result<Readable> {
        first_readable(self.chunks.fits(), self.places(id, hint), id, |base| {
            self.places(base.id, Some(base.hint))
        })
    }

    /// Whether the index leads to this place.
    pub fn leads_to(&self, key: ChunkKey, at: Location) -> Result<bool> {
        let indexed = self.indexed.as_ref().is_some_and(|marks| marks.has(at));
        Ok(indexed || self.index.get(key)? == Some(at))
    }

    fn places(
        &self,
        id: ChunkId,
        hint: Option<Location>,
    ) -> impl Iterator<Item = Result<Place>> + '_ {
        // While the store is upgraded the index may lead to two places, and the first
        // counts, whatever the hint says.
        let one_entry = !self.chunks.keys().is_upgrading() || sim::on(Fault::EitherKeyCounts);
        let indexed = |at: &Location| self.indexed.as_ref().is_some_and(|marks| marks.has(*at));
        let agreed = hint.filter(|at| one_entry && indexed(at)).map(Ok);
        let by_index =
            std::iter::once_with(move || self.chunks.indexed(&*self.index, id)).flatten();
        let planned = match self.planned.is_empty() {
            true => None,
            false => self
                .planned
                .get(&self.chunks.keys().of(id))
                .copied()
                .map(Ok),
        };
        let places = planned.into_iter().chain(agreed).chain(by_index);
        let places = places.chain(hint.map(Ok));
        places.filter_map(move |at| at.and_then(|at| self.chunks.at_id(id, at)).transpose())
    }
}

/// The index, and no pack but those that are in their places. A pack that this
/// process holds open may have been deleted by another one: it can be read, but a
/// snapshot that needs it is not whole.
fn as_it_is_now(chunks: &Chunks) -> Result<Arc<IndexReader>> {
    if !sim::on(Fault::DeletedPackTrusted) {
        chunks.packs().reopen_all();
    }
    chunks.refresh_index()
}

/// What the snapshots added so far can reach.
pub(crate) struct Reachability<'a> {
    places: ChunkLocator<'a>,
    marks: Marks,
    /// Nodes whose children are marked. A node may be marked without being here:
    /// as the base of another one, which needs the node and not its children.
    entered: Marks,
    /// Chunks at places that the index does not lead to.
    not_indexed: Vec<(ChunkKey, Location)>,
    /// Packs with a copy of a node that a delta of an older version needs, and that
    /// the index does not lead to: it would not be found where it is moved to.
    exact: HashSet<PackNumber>,
    /// Whether there are such deltas at all.
    one_copy: bool,
}

impl<'a> Reachability<'a> {
    /// For checking a snapshot or two.
    pub fn new(chunks: &'a Chunks) -> Result<Self> {
        Ok(Self::over(ChunkLocator::few(chunks)?))
    }

    /// For marking the whole store.
    pub fn of_store(chunks: &'a Chunks) -> Result<Self> {
        Ok(Self::over(ChunkLocator::all(chunks)?))
    }

    fn over(places: ChunkLocator<'a>) -> Self {
        Self {
            places,
            marks: Marks::default(),
            entered: Marks::default(),
            not_indexed: Vec::new(),
            exact: HashSet::new(),
            one_copy: false,
        }
    }

    /// For marking the whole store as it will be once the index leads to these places.
    pub fn of_store_with(chunks: &'a Chunks, planned: HashMap<ChunkKey, Location>) -> Result<Self> {
        let mut places = ChunkLocator::all(chunks)?;
        places.planned = planned;
        Ok(Self::over(places))
    }

    pub fn places(&self) -> &ChunkLocator<'a> {
        &self.places
    }

    pub fn marks(&self) -> &Marks {
        &self.marks
    }

    pub fn into_marks(self) -> Marks {
        self.marks
    }

    /// Packs that must not be repacked.
    pub fn exact(&self) -> &HashSet<PackNumber> {
        &self.exact
    }

    /// Whether a delta of an older version needs the very copy of a node that there is.
    pub fn needs_one_copy(&self) -> bool {
        self.one_copy
    }

    /// Chunks marked at places that the index does not lead to: what a reader
    /// without a hint would miss.
    pub fn not_indexed(&self) -> &[(ChunkKey, Location)] {
        &self.not_indexed
    }

    /// Sees what was published since this began.
    pub fn refresh(&mut self) -> Result<()> {
        self.places.index = as_it_is_now(self.places.chunks)?;
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
        if self.entered.has(at) {
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
        // Only now: a subtree that lacks something is to fail each time.
        self.entered.set(at);
        Ok(())
    }

    /// Marks a chunk and its base; returns where the chunk is.
    ///
    /// Both are marked every time: a chunk that is marked already may have been
    /// marked as a base, for which it needs none itself.
    fn mark(&mut self, id: ChunkId, hint: Option<Location>) -> Result<Location> {
        let found = self.places.find(id, hint)?;
        if sim::on(Fault::BaseOfBaseNotMarked) && self.marks.has(found.place.location()) {
            return Ok(found.place.location());
        }
        if let Some(base) = &found.base
            && !sim::on(Fault::BaseNotMarked)
        {
            let key = base.slot.entry.key;
            self.one_copy |= found.place.needs_one_copy();
            if found.place.needs_one_copy() && !self.places.leads_to(key, base.location())? {
                self.exact.insert(base.location().pack);
            }
            let indexed = sim::bases_by_id().then(|| self.places.index.get(key));
            let at = indexed.transpose()?.flatten();
            self.set(key, at.unwrap_or(base.location()))?;
        }
        let at = found.place.location();
        self.set(found.place.slot.entry.key, at)?;
        Ok(at)
    }

    fn set(&mut self, key: ChunkKey, at: Location) -> Result<()> {
        if self.marks.set(at) && !self.places.leads_to(key, at)? {
            self.not_indexed.push((key, at));
        }
        Ok(())
    }
}
