//! Where a commit's new chunks go: deduplicated, into packs of its own.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use crate::chunks::Chunks;
use crate::error::{Error, Result};
use crate::gc::state::{CollectorState, Epoch};
use crate::id::{ChunkId, ChunkKey, ChunkKind, SnapshotId};
use crate::index::{IndexReader, IndexWriter};
use crate::lease::{Claim, Lease};
use crate::lock::Lock;
use crate::pack::codec::{self, Base, Encoding};
use crate::pack::reader::{delta_head, payload_limit};
use crate::pack::writer::{EncodedChunk, PackWriter, SealedPack};
use crate::pack::{EntryNumber, Location, PackNumber, format};
use crate::store::Store;
use crate::tree::build::NodeSink;
use crate::tree::node::{Child, Node};

/// The new chunks of one commit.
///
/// Deduplication trusts what the index held when the lease was taken, except
/// chunks in packs condemned by then: those are written anew. Packs condemned
/// later stay until the lease ends.
pub(crate) struct Sink<'a> {
    store: &'a Store,
    lease: Lease,
    claim: Claim,
    condemned: BTreeSet<PackNumber>,
    /// The sealed packs there are. None of them goes while the lease lives.
    packs: BTreeSet<PackNumber>,
    index: Arc<IndexReader>,
    writer: Option<PackWriter>,
    /// What this commit has put into the pack being written.
    claimed: HashMap<ChunkKey, Location>,
    pub added_chunks: u64,
    pub added_bytes: u64,
}

/// Stored bytes of some chunks, one after the other, made outside the sink.
#[derive(Default)]
pub(crate) struct EncodedRun {
    pub chunks: Vec<EncodedChunk>,
    pub bytes: Vec<u8>,
}

impl<'a> Sink<'a> {
    pub fn new(store: &'a Store) -> Result<Self> {
        // Lease first, then epoch: a collection between the two sees a lease of
        // epoch 0. The other way round it could see no lease, and condemn and
        // delete under a writer that already relies on what it saw.
        let mut claim = Claim {
            writing_since: Some(Epoch::FIRST),
            pins: Vec::new(),
        };
        let lease = Lease::take(&store.layout, &claim)?;
        let state = CollectorState::read(&store.layout)?;
        claim.writing_since = Some(state.epoch);
        lease.set(&claim)?;
        Ok(Self {
            lease,
            claim,
            condemned: state.condemned.into_keys().collect(),
            packs: store.chunks.packs().sealed()?.into_iter().collect(),
            index: store.chunks.refresh_index()?,
            store,
            writer: None,
            claimed: HashMap::new(),
            added_chunks: 0,
            added_bytes: 0,
        })
    }

    /// Makes a snapshot a root while this commit lives, if it is one already.
    pub fn pin_if(
        &mut self,
        id: SnapshotId,
        is_root: impl FnOnce(&Lock) -> Result<bool>,
    ) -> Result<bool> {
        let claim = Claim {
            pins: vec![id],
            ..self.claim.clone()
        };
        let pinned = self.lease.set_if(&claim, is_root)?;
        if pinned {
            self.claim = claim;
        }
        Ok(pinned)
    }

    /// The lease, which lives on.
    pub fn into_lease(self) -> Lease {
        self.lease
    }

    pub fn chunks(&self) -> &'a Chunks {
        &self.store.chunks
    }

    /// Where each of these chunks is stored, for those a new snapshot may use.
    pub fn known(&self, keys: &[ChunkKey]) -> Result<Vec<Option<Location>>> {
        let found = self.index.get_many(keys)?;
        Ok(found.into_iter().map(|at| self.usable(at)).collect())
    }

    /// Where this leaf is stored, if it and all its pages may be used as they are.
    pub fn known_leaf(&self, id: ChunkId) -> Result<Option<Child>> {
        let Some(at) = self.usable(self.index.get(id.key())?) else {
            return Ok(None);
        };
        let child = Child {
            hash: *id.as_bytes(),
            hint: Some(at),
        };
        let leaf = self.chunks().node(child, 0)?;
        Ok(self.pages_in_place(&leaf).then_some(child))
    }

    /// Whether the pages of a leaf are where its hints say. A leaf can outlive
    /// its pages: when no snapshot refers to it, or when repair has set a damaged
    /// pack aside.
    pub fn pages_in_place(&self, leaf: &Node) -> bool {
        leaf.present().all(|(_, page)| self.in_place(page.hint))
    }

    /// Whether a hint leads to a pack that a new snapshot may use.
    pub fn in_place(&self, hint: Option<Location>) -> bool {
        hint.is_some_and(|at| self.packs.contains(&at.pack) && !self.condemned.contains(&at.pack))
    }

    /// Claims a place for a chunk that is not [`Sink::known`]. The chunks must
    /// then be encoded and appended in the order of their claims.
    pub fn claim(&mut self, key: ChunkKey, pending: usize) -> Result<Claimed> {
        if let Some(at) = self.claimed.get(&key) {
            return Ok(Claimed::Already(*at));
        }
        let next = self.writer()?.next_location();
        let offset = u32::try_from(pending).expect("a batch is small");
        let at = Location {
            pack: next.pack,
            entry: EntryNumber(next.entry.0 + offset),
        };
        self.claimed.insert(key, at);
        Ok(Claimed::New(at))
    }

    /// Appends claimed chunks, in the order of their claims.
    pub fn append(&mut self, run: EncodedRun) -> Result<()> {
        if run.chunks.is_empty() {
            return Ok(());
        }
        self.added_chunks += run.chunks.len() as u64;
        self.added_bytes += (run.bytes.len() + run.chunks.len() * format::ENTRY_LEN) as u64;
        self.writer()?.append(&run.chunks, run.bytes)
    }

    /// Between batches: starts a new pack if the present one is full. The full
    /// one's chunks go into the index at once, so that memory does not grow with
    /// the commit.
    pub fn roll_over(&mut self) -> Result<()> {
        if !self.writer.as_ref().is_some_and(PackWriter::is_full) {
            return Ok(());
        }
        if let Some(pack) = self.seal()? {
            let _publish = self.store.publish_lock()?;
            self.index_pack(&pack)?;
        }
        self.index = self.store.chunks.refresh_index()?;
        self.packs = self.chunks().packs().sealed()?.into_iter().collect();
        self.claimed.clear();
        Ok(())
    }

    /// Stores one small chunk.
    pub fn put(&mut self, id: ChunkId, payload: &[u8], base: Option<Child>) -> Result<Location> {
        if let Some(at) = self.known(&[id.key()])?[0] {
            return Ok(at);
        }
        let at = match self.claim(id.key(), 0)? {
            Claimed::Already(at) => return Ok(at),
            Claimed::New(at) => at,
        };
        let mut run = EncodedRun::default();
        encode_into(self, id, payload, base, &mut run)?;
        self.append(run)?;
        Ok(at)
    }

    /// Seals the last pack. Expensive, and needs no lock.
    pub fn seal(&mut self) -> Result<Option<SealedPack>> {
        self.writer.take().map(PackWriter::seal).transpose()
    }

    /// Enters a sealed pack's chunks into the index, durably. The caller holds
    /// the publish lock.
    ///
    /// A chunk that another commit has entered meanwhile keeps its place: the
    /// collector may have counted on it.
    pub fn index_pack(&self, pack: &SealedPack) -> Result<()> {
        let condemned = CollectorState::read(&self.store.layout)?.condemned;
        let index = IndexWriter::open(&self.store.layout.index())?;
        let mut entries = Vec::new();
        for (key, at) in pack.locations() {
            let now = index.get(key)?;
            if now.is_none_or(|now| condemned.contains_key(&now.pack)) {
                entries.push((key, at));
            }
        }
        pack.keep();
        index.put(entries)?;
        index.flush()
    }

    fn usable(&self, at: Option<Location>) -> Option<Location> {
        at.filter(|at| !self.condemned.contains(&at.pack))
    }

    fn writer(&mut self) -> Result<&mut PackWriter> {
        if self.writer.is_none() {
            self.writer = Some(self.store.chunks.packs().create()?);
        }
        Ok(self.writer.as_mut().expect("just set"))
    }
}

/// What [`Sink::claim`] found.
pub(crate) enum Claimed {
    /// This commit has the chunk already.
    Already(Location),
    /// The caller must encode and append it.
    New(Location),
}

impl NodeSink for Sink<'_> {
    fn put_node(&mut self, node: &Node, previous: Option<Child>) -> Result<Child> {
        let id = node.id();
        let at = self.put(id, &node.encode(), previous)?;
        Ok(Child {
            hash: *id.as_bytes(),
            hint: Some(at),
        })
    }
}

/// Encodes a chunk at the end of `run`, as a delta against `base` (a chunk of
/// the same kind) or its base if that is worthwhile.
///
/// A parent that is pinned keeps the copies of its chunks that the index leads
/// to, not those at its hints: these may be deltas against others, in packs that
/// were condemned before this commit began. Such a base is not used.
pub(crate) fn encode_into(
    sink: &Sink<'_>,
    id: ChunkId,
    payload: &[u8],
    base: Option<Child>,
    run: &mut EncodedRun,
) -> Result<()> {
    let chunks = sink.chunks();
    let mut buffer = Vec::new();
    let mut found = None;
    if let Some(base) = base.filter(|base| base.hash != *id.as_bytes()) {
        buffer.resize(payload_limit(id.kind(), chunks.page_size()), 0);
        let base_id = ChunkId::from_hash(id.kind(), base.hash);
        found = match chunks.read_base(base_id, base.hint, &mut buffer) {
            // Nothing new is built on what is damaged.
            Err(Error::Damaged(_)) => None,
            other => other?,
        };
    }
    if let Some((base, _)) = &found {
        let place = chunks.find(base.id.key(), Some(base.hint))?;
        let at = place.map(|(pack, entry)| Location {
            pack: pack.number(),
            entry,
        });
        found = found.filter(|_| sink.in_place(at));
    }
    let base = found
        .as_ref()
        .filter(|(base, _)| base.id != id && id.kind() != ChunkKind::Manifest)
        .map(|(base, len)| Base {
            head: delta_head(*base),
            payload: &buffer[..*len],
            max_percent: match id.kind() {
                ChunkKind::Node => codec::NODE_DELTA_MAX_PERCENT,
                ChunkKind::Page | ChunkKind::Manifest => codec::PAGE_DELTA_MAX_PERCENT,
            },
        });
    let start = run.bytes.len();
    let encoding: Encoding = codec::encode(payload, base, &mut run.bytes);
    let stored = &run.bytes[start..];
    run.chunks.push(EncodedChunk {
        key: id.key(),
        encoding,
        check: format::stored_check(stored),
        len: stored.len(),
    });
    Ok(())
}
