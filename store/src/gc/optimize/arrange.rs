//! Writing what snapshots need into new packs, in the order in which it is read.
//!
//! Of each snapshot the pages of its working sets come first ([`near`]), then those of its
//! images in their order, each leaf after its pages, each node after its children; what an
//! earlier snapshot in this order has, too, is there already. The newest come first: so what
//! they need is together, most of it stored standalone, and what only older ones need is made
//! small with it as base.
//!
//! A page is stored as a delta if that is much smaller ([`super::encode`]): against a page
//! that is much like it ([`super::similar`]), or against the base that it had. **A base is
//! a chunk that is standalone in one of the new packs, or that the index leads to where it
//! is standalone, in a pack that stays.** So once the index leads to what is standalone in
//! the new packs, it leads from each base to a standalone copy ([`crate::placement`]).
//!
//! Nodes are written with hints to where their children are now. Where a delta of an older
//! version needs the very copy of a node that there is, they stay as they are.
//!
//! Nothing leads to the new packs before they are entered ([`super::enter`]).

mod near;
mod pages;

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};
use std::time::Instant;

use crate::chunks::{Chunks, Place};
use crate::error::{Damage, Error, Result};
use crate::format::node::{Child, Node, node_id};
use crate::format::rewrites::Tier;
use crate::gc::mark::{ChunkLocator, Marks};
use crate::gc::optimize::encode::{Candidate, Job};
use crate::gc::optimize::report::OptimizeStop;
use crate::gc::optimize::similar::{Known, Similar};
use crate::gc::rewrites::Ledger;
use crate::id::{ChunkId, ChunkKey, SnapshotId};
use crate::manifest::{self, Manifest};
use crate::pack::reader::{BaseRef, payload_limit};
use crate::pack::writer::{PackWriter, SealedPack};
use crate::pack::{EntryNumber, Location, PackNumber};
use crate::placement::{self, Moved};
use crate::progress::Progress;
use crate::sim::{self, Fault};
use crate::store::Store;

/// Nodes remembered as bases.
const NODES: usize = 1 << 16;

/// Where a chunk is in the new packs.
#[derive(Clone, Copy)]
pub(super) struct Arranged {
    pub from: Location,
    pub to: Location,
    pub standalone: bool,
}

/// What is being written.
pub(super) struct Arrangement<'a> {
    store: &'a Store,
    places: &'a ChunkLocator<'a>,
    ledger: &'a mut Ledger,
    /// The packs that are to go.
    sources: &'a BTreeSet<PackNumber>,
    /// Whether nodes may get other hints.
    hints: bool,
    limits: Limits,
    progress: &'a dyn Progress,
    similar: &'a mut Similar,
    /// The last node that is standalone at a place of an image.
    nodes: HashMap<(String, u8, u64), Known>,
    /// Nodes under which all is done.
    done: Marks,
    writer: Option<PackWriter>,
    pub sealed: Vec<SealedPack>,
    pub arranged: HashMap<ChunkKey, Arranged>,
    /// What could not be read. It stays where it is.
    pub damaged: Vec<Damage>,
    /// Why not all was done.
    pub stopped_by: Option<OptimizeStop>,
    pub written_bytes: u64,
}

/// What an arrangement is made with.
pub(super) struct Means<'a> {
    pub store: &'a Store,
    pub places: &'a ChunkLocator<'a>,
    pub ledger: &'a mut Ledger,
    pub sources: &'a BTreeSet<PackNumber>,
    pub hints: bool,
    pub limits: Limits,
    pub similar: &'a mut Similar,
    pub progress: &'a dyn Progress,
}

/// When it is to stop.
#[derive(Clone, Copy)]
pub(super) struct Limits {
    pub until: Option<Instant>,
    /// What may be written over the store's life, less what was.
    pub allowance: u64,
    /// What the caller wants at most.
    pub asked_bytes: u64,
}

impl<'a> Arrangement<'a> {
    pub fn new(means: Means<'a>) -> Self {
        Self {
            store: means.store,
            places: means.places,
            ledger: means.ledger,
            sources: means.sources,
            hints: means.hints,
            limits: means.limits,
            similar: means.similar,
            progress: means.progress,
            nodes: HashMap::new(),
            done: Marks::default(),
            writer: None,
            sealed: Vec::new(),
            arranged: HashMap::new(),
            damaged: Vec::new(),
            stopped_by: None,
            written_bytes: 0,
        }
    }

    fn chunks(&self) -> &'a Chunks {
        &self.store.chunks
    }

    /// Writes what a snapshot needs that is not written yet, as far as there is time.
    pub fn add_snapshot(&mut self, id: SnapshotId) -> Result<()> {
        let mut manifest = manifest::read(self.chunks(), id)?;
        for image in &manifest.images {
            self.add_working_set(id, image)?;
            if self.stopped_by.is_some() {
                return Ok(());
            }
        }
        for image in &mut manifest.images {
            let tree = image.tree();
            if let Some(root) = tree.root() {
                let level = tree.shape().root_level();
                let at = self.add_tree(&image.name, root, level, 0)?;
                image.root = Some(Child {
                    hint: Some(at),
                    ..root
                });
            }
            if self.stopped_by.is_some() {
                return Ok(());
            }
        }
        self.add_manifest(id, &manifest)
    }

    /// Seals what is open, durably.
    pub fn finish(&mut self) -> Result<()> {
        let Some(writer) = self.writer.take() else {
            return Ok(());
        };
        self.ledger.charge(&writer, Tier::Kept)?;
        if sim::on(Fault::RearrangedBeforeSealed) {
            self.enter_too_early()?;
        }
        let sealed = writer.seal()?;
        self.written_bytes += sealed.file_len;
        self.sealed.push(sealed);
        self.chunks().packs().look_again();
        Ok(())
    }

    fn enter_too_early(&self) -> Result<()> {
        let _publish = self.store.publish_lock()?;
        let index = self.store.index_writer()?;
        let standalone = self.arranged.iter().filter(|(_, chunk)| chunk.standalone);
        let moved: Vec<Moved> = standalone.map(|(key, chunk)| chunk.moved(*key)).collect();
        placement::enter_rearranged(self.chunks(), &index, &moved, self.sources, |_| false)
    }

    /// Returns where the node is.
    fn add_tree(&mut self, image: &str, child: Child, level: u8, index: u64) -> Result<Location> {
        let id = node_id(child);
        let place = self.places.find(id, child.hint)?.place;
        if let Some(arranged) = self.arranged.get(&place.slot.entry.key) {
            return Ok(arranged.to);
        }
        if self.done.has(place.location()) {
            return Ok(place.location());
        }
        let mut node = (*self.chunks().node(child, level)?).clone();
        if level == 0 {
            self.add_pages(&mut node)?;
        } else {
            let present: Vec<(usize, Child)> = node.present().collect();
            for (slot, below) in present {
                let under = index * crate::format::node::FAN_OUT as u64 + slot as u64;
                let hint = Some(self.add_tree(image, below, level - 1, under)?);
                node.set_child(slot, Some(Child { hint, ..below }));
                if self.stopped_by.is_some() {
                    return Ok(place.location());
                }
            }
        }
        self.store.cancel.check()?;
        if self.is_to_stop() {
            return Ok(place.location());
        }
        self.done.set(place.location());
        if self.hints && self.sources.contains(&place.location().pack) {
            return self.add_node(id, place, &node, (image.to_owned(), level, index));
        }
        Ok(place.location())
    }

    fn is_to_stop(&mut self) -> bool {
        let open = self.writer.as_ref().map_or(0, PackWriter::sealed_len_bytes);
        let written = self.written_bytes + open;
        let limits = self.limits;
        if limits.until.is_some_and(|until| Instant::now() >= until) {
            self.stopped_by = Some(OptimizeStop::Time);
        } else if written >= limits.asked_bytes {
            self.stopped_by = Some(OptimizeStop::Bytes);
        } else if written >= limits.allowance {
            self.stopped_by = Some(OptimizeStop::Allowance);
        }
        self.stopped_by.is_some()
    }

    /// What is stored there: the new packs cannot be read before they are sealed.
    fn payload_of(&self, known: Known) -> Result<Option<Vec<u8>>> {
        let mut payload = vec![0; payload_limit(known.id.kind(), self.chunks().page_size())];
        for at in [known.from, known.to] {
            let read = self
                .chunks()
                .at_id(known.id, at)
                .and_then(|place| match place {
                    Some(place) => self
                        .chunks()
                        .read_at(&place, known.id, &mut payload)
                        .map(Some),
                    None => Ok(None),
                });
            match read {
                Err(Error::Damaged(_)) | Ok(None) => {}
                Ok(Some(len)) => {
                    payload.truncate(len);
                    return Ok(Some(payload));
                }
                Err(other) => return Err(other),
            }
        }
        Ok(None)
    }

    fn add_node(
        &mut self,
        id: ChunkId,
        place: Place,
        node: &Node,
        stands: (String, u8, u64),
    ) -> Result<Location> {
        let payload = node.encode();
        let mut bases = Vec::new();
        if let Some(known) = self.nodes.get(&stands).copied()
            && let Some(payload) = self.payload_of(known)?
        {
            bases.push(Candidate {
                base: known.base(),
                payload: Cow::Owned(payload),
            });
        }
        let arranged = self.add_chunk(id, &place, &payload, bases)?;
        if arranged.standalone {
            let Arranged { from, to, .. } = arranged;
            if self.nodes.len() >= NODES {
                self.nodes.clear();
            }
            self.nodes.insert(stands, Known { id, from, to });
        }
        Ok(arranged.to)
    }

    fn add_manifest(&mut self, id: SnapshotId, manifest: &Manifest) -> Result<()> {
        let place = self.places.find(id.chunk(), None)?.place;
        let is_there = self.arranged.contains_key(&place.slot.entry.key);
        if is_there || !self.sources.contains(&place.location().pack) {
            return Ok(());
        }
        let mut payload = manifest.encode(self.store.format());
        // One of an older version has no place for hints.
        if !self.hints || SnapshotId::of_manifest(&payload) != id {
            payload = vec![0; manifest::MAX_LEN];
            let len = self.chunks().read_at(&place, id.chunk(), &mut payload)?;
            payload.truncate(len);
        }
        self.add_chunk(id.chunk(), &place, &payload, Vec::new())?;
        Ok(())
    }

    /// Writes one chunk that stands alone in its batch.
    fn add_chunk(
        &mut self,
        id: ChunkId,
        place: &Place,
        payload: &[u8],
        bases: Vec<Candidate<'_>>,
    ) -> Result<Arranged> {
        let key = place.slot.entry.key;
        let (chunk, stored) = Job {
            id,
            key,
            payload,
            bases,
        }
        .encode();
        let arranged = Arranged {
            from: place.location(),
            to: self.next_location(0)?,
            standalone: chunk.encoding.is_standalone(),
        };
        self.arranged.insert(key, arranged);
        self.writer()?.append(&[chunk], stored)?;
        self.roll_over()?;
        Ok(arranged)
    }

    fn next_location(&mut self, pending: usize) -> Result<Location> {
        let mut at = self.writer()?.next_location();
        let pending = u32::try_from(pending).expect("a batch is small");
        at.entry = EntryNumber(at.entry.0 + pending);
        Ok(at)
    }

    fn writer(&mut self) -> Result<&mut PackWriter> {
        if self.writer.is_none() {
            self.writer = Some(self.store.chunks.packs().create()?);
        }
        Ok(self.writer.as_mut().expect("just set"))
    }

    fn roll_over(&mut self) -> Result<()> {
        match self.writer.as_ref().is_some_and(PackWriter::is_full) {
            true => self.finish(),
            false => Ok(()),
        }
    }
}

impl Arranged {
    pub fn moved(&self, key: ChunkKey) -> Moved {
        Moved {
            key,
            from: self.from,
            to: self.to,
            standalone: self.standalone,
        }
    }
}

impl Known {
    fn base(&self) -> BaseRef {
        BaseRef {
            id: self.id,
            hint: self.to,
        }
    }
}

/// The snapshots in the order in which they are written: the newest first, and each before
/// those that it comes from.
pub(super) fn in_order(chunks: &Chunks, roots: &BTreeSet<SnapshotId>) -> Result<Vec<SnapshotId>> {
    let mut parents: HashMap<SnapshotId, (u64, Option<SnapshotId>)> = HashMap::new();
    for id in roots {
        let manifest = manifest::read(chunks, *id)?;
        let parent = manifest.parent.filter(|parent| roots.contains(parent));
        parents.insert(*id, (manifest.created_unix_seconds, parent));
    }
    let mut depths: HashMap<SnapshotId, usize> = HashMap::new();
    for id in roots {
        let mut way = Vec::new();
        let mut at = Some(*id);
        while let Some(id) = at.filter(|id| !depths.contains_key(id)) {
            way.push(id);
            at = parents.get(&id).and_then(|(_, parent)| *parent);
        }
        let mut depth = at.and_then(|id| depths.get(&id).copied()).unwrap_or(0);
        for id in way.into_iter().rev() {
            depth += 1;
            depths.insert(id, depth);
        }
    }
    let mut order: Vec<_> = parents
        .iter()
        .map(|(id, (created, _))| (*created, depths[id], *id))
        .collect();
    order.sort_unstable_by(|one, other| other.cmp(one));
    Ok(order.into_iter().map(|(.., id)| id).collect())
}
