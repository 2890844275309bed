//! Where a commit's new chunks go: deduplicated, into packs of its own.

mod notes;
mod reuse;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use crate::chunks::{Chunks, identified};
use crate::error::{Error, Result};
use crate::format::config::StoreFormat;
use crate::format::entry;
use crate::format::node::{Child, Node};
use crate::gc::state::{CollectorState, Condemned, Epoch};
use crate::id::{ChunkId, ChunkKey, ChunkKind, SnapshotId};
use crate::index::IndexReader;
use crate::lease::{Lease, LeaseTerms};
use crate::lock::Lock;
use crate::pack::codec::{self, Base, Encoding, Patched};
use crate::pack::reader::{Stamp, delta_head, payload_limit};
use crate::pack::writer::{EncodedChunk, PackWriter, SealedPack, StoredChunk};
use crate::pack::{EntryNumber, Location, PackNumber};
use crate::placement::{self, LargePack, PREPARED_AT_MOST, entered_at_once};
use crate::scratch::Scratch;
use crate::sim::{self, Fault};
use crate::store::Store;
use crate::tree::build::NodeSink;
use notes::Notes;

/// The new chunks of one commit.
///
/// Deduplication relies on a chunk that is stored only after it has looked
/// ([`ChunkWriter::usable`]): the pack is there and its footer whole, the footer has the
/// chunk, and neither its pack nor that of its base was condemned when the lease
/// was taken. Packs condemned later stay until the lease ends. Whether the packs
/// are still there is looked at once more before the commit is acknowledged, since
/// `repair` may have set one aside.
pub(crate) struct ChunkWriter<'a> {
    store: &'a Store,
    lease: Lease,
    claim: LeaseTerms,
    condemned: BTreeMap<PackNumber, Condemned>,
    index: Arc<IndexReader>,
    /// What this commit has put into the pack being written. Looked at while that is
    /// written.
    claimed: RwLock<HashMap<ChunkKey, Location>>,
    open: Mutex<OpenPack>,
    /// The packs, not of this commit, that hold what the new snapshot needs.
    relied: RwLock<HashMap<PackNumber, Stamp>>,
    notes: RwLock<Notes>,
}

/// The pack being written, and what this commit has added to the store.
#[derive(Default)]
struct OpenPack {
    writer: Option<PackWriter>,
    added: Added,
}

/// What a commit has added to the store.
#[derive(Clone, Copy, Default)]
pub(crate) struct Added {
    pub chunks: u64,
    /// Stored bytes and their entries in footers.
    pub bytes: u64,
}

/// Stored bytes of some chunks, one after the other, made outside the writer.
#[derive(Default)]
pub(crate) struct EncodedRun {
    pub chunks: Vec<EncodedChunk>,
    pub bytes: Vec<u8>,
}

impl<'a> ChunkWriter<'a> {
    pub fn new(store: &'a Store) -> Result<Self> {
        store.check_writable()?;
        // Lease first, then epoch: a collection between the two sees a lease of
        // epoch 0. The other way round it could see no lease, and condemn and
        // delete under a writer that already relies on what it saw.
        let mut claim = LeaseTerms {
            writing_since: Some(Epoch::FIRST),
            pins: Vec::new(),
        };
        let early = sim::on(Fault::LeaseAfterEpoch).then(|| CollectorState::read(&store.layout));
        let lease = Lease::take(&store.layout, &claim)?;
        let state = early.unwrap_or_else(|| CollectorState::read(&store.layout))?;
        claim.writing_since = Some(state.epoch);
        lease.set(&claim)?;
        // From here on nobody upgrades the store.
        store.check_format()?;
        Ok(Self {
            lease,
            claim,
            condemned: state.condemned,
            index: store.chunks.refresh_index()?,
            store,
            claimed: RwLock::default(),
            open: Mutex::default(),
            relied: RwLock::default(),
            notes: RwLock::default(),
        })
    }

    /// Another one that may use what this one may. Its lease has to be taken while this one
    /// lives: then what that keeps is kept without a gap.
    pub fn beside(&self) -> Result<Self> {
        let claim = LeaseTerms {
            pins: Vec::new(),
            ..self.claim.clone()
        };
        let lease = Lease::take(&self.store.layout, &claim)?;
        self.store.check_format()?;
        Ok(Self {
            lease,
            claim,
            condemned: self.condemned.clone(),
            index: self.store.chunks.refresh_index()?,
            store: self.store,
            claimed: RwLock::default(),
            open: Mutex::default(),
            relied: RwLock::default(),
            notes: RwLock::default(),
        })
    }

    /// Makes a snapshot a root while this commit lives, if it is one already.
    pub fn pin_if(
        &mut self,
        id: SnapshotId,
        is_root: impl FnOnce(&Lock) -> Result<bool>,
    ) -> Result<bool> {
        if sim::on(Fault::ParentNotPinned) {
            return Ok(true);
        }
        let claim = LeaseTerms {
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

    pub fn check_cancelled(&self) -> Result<()> {
        self.store.cancel.check()
    }

    pub fn chunks(&self) -> &'a Chunks {
        &self.store.chunks
    }

    /// Claims a place for a chunk that is not [`ChunkWriter::known`], behind `pending` others
    /// that have one and are still to be appended. The chunks must then be encoded and
    /// appended in the order of their claims, by one thread at a time.
    pub fn claim(&self, id: ChunkId, pending: usize) -> Result<Claimed> {
        self.claim_key(self.chunks().keys().of(id), pending)
    }

    /// As [`ChunkWriter::claim`], of a chunk that has this key.
    pub fn claim_key(&self, key: ChunkKey, pending: usize) -> Result<Claimed> {
        let mut claimed = self.claimed.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = claimed.get(&key) {
            return Ok(Claimed::Already(*at));
        }
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let next = open.writer(self.store)?.next_location();
        let offset = u32::try_from(pending).expect("a batch is small");
        let at = Location {
            pack: next.pack,
            entry: EntryNumber(next.entry.0 + offset),
        };
        claimed.insert(key, at);
        Ok(Claimed::New(at))
    }

    /// The place that this commit has claimed for a chunk, if it has.
    pub fn claimed(&self, id: ChunkId) -> Option<Location> {
        let claimed = self.claimed.read().unwrap_or_else(PoisonError::into_inner);
        claimed.get(&self.chunks().keys().of(id)).copied()
    }

    /// The length of the pack being written, so far.
    pub fn open_pack_bytes(&self) -> u64 {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.writer.as_ref().map_or(0, PackWriter::len_bytes)
    }

    /// What was added so far.
    pub fn added(&self) -> Added {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.added
    }

    /// Appends claimed chunks, in the order of their claims. Waits while much is still to be
    /// written.
    pub fn append(&self, run: EncodedRun) -> Result<()> {
        if run.chunks.is_empty() {
            return Ok(());
        }
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.added.chunks += run.chunks.len() as u64;
        open.added.bytes += (run.bytes.len() + run.chunks.len() * entry::ENTRY_LEN) as u64;
        open.writer(self.store)?.append(&run.chunks, run.bytes)
    }

    /// Between batches: starts a new pack if the present one is full. The full
    /// one's chunks go into the index at once, so that memory does not grow with
    /// the commit.
    pub fn roll_over(&mut self) -> Result<()> {
        let open = self.open.get_mut().unwrap_or_else(PoisonError::into_inner);
        match open.writer.as_ref().is_some_and(PackWriter::is_full) {
            true => self.finish_pack(),
            false => Ok(()),
        }
    }

    /// Seals the pack being written and enters its chunks into the index: from then on
    /// they are read like any others. No snapshot needs them yet; this commit's lease
    /// keeps them.
    pub fn finish_pack(&mut self) -> Result<()> {
        let sealed = self.seal()?;
        if let Some(pack) = self.enter_if_large(sealed.as_ref())? {
            let _publish = self.store.publish_lock()?;
            self.publish_pack(Some(pack))?;
        }
        self.index = self.store.chunks.refresh_index()?;
        let claimed = self.claimed.get_mut();
        claimed.unwrap_or_else(PoisonError::into_inner).clear();
        Ok(())
    }

    /// Stores one small chunk.
    pub fn put(&mut self, id: ChunkId, payload: &[u8], base: Option<Child>) -> Result<Location> {
        if let Some(at) = self.known(&[id])?[0] {
            return Ok(at);
        }
        let at = match self.claim(id, 0)? {
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
        let open = self.open.get_mut().unwrap_or_else(PoisonError::into_inner);
        open.writer.take().map(PackWriter::seal).transpose()
    }

    /// Enters the chunks of a pack that has too many for one hold of the publish lock, and
    /// returns any other pack. No snapshot needs them yet, as with a pack that is full.
    pub fn enter_if_large<'p>(
        &self,
        pack: Option<&'p SealedPack>,
    ) -> Result<Option<&'p SealedPack>> {
        let Some(pack) = pack.filter(|pack| pack.chunk_count() > entered_at_once()) else {
            return Ok(pack);
        };
        for _ in 0..PREPARED_AT_MOST {
            let condemned = CollectorState::read(&self.store.layout)?.condemned;
            let large = LargePack::prepare(self.chunks(), condemned, pack)?;
            let _publish = self.store.publish_lock()?;
            let state = self.look_again(true)?;
            if large.enter(&self.store.index_writer()?, &state.condemned)? {
                return Ok(None);
            }
        }
        // Somebody changes the index all the time.
        let all: Vec<StoredChunk> = pack.chunks().collect();
        for few in all.chunks(entered_at_once()) {
            let _publish = self.store.publish_lock()?;
            let state = self.look_again(true)?;
            let index = self.store.index_writer()?;
            placement::enter_new(self.chunks(), &index, &state.condemned, pack, few)?;
        }
        Ok(None)
    }

    /// Makes sure that what this commit relies on is there and stays, and enters
    /// a sealed pack's chunks into the index, durably. The caller holds the publish
    /// lock.
    pub fn publish_pack(&self, pack: Option<&SealedPack>) -> Result<()> {
        let state = self.look_again(pack.is_some())?;
        if let Some(pack) = pack {
            let index = self.store.index_writer()?;
            let all: Vec<StoredChunk> = pack.chunks().collect();
            placement::enter_new(self.chunks(), &index, &state.condemned, pack, &all)?;
        }
        Ok(())
    }

    /// Relies on these packs: what is to be acknowledged is in them. Those that were
    /// condemned before the lease was taken are revived; from then on the lease keeps them
    /// as it keeps all others. Returns whether there were any: whatever was found out by
    /// means of them may have changed until then, and has to be found out anew.
    pub fn keep(&mut self, packs: impl Iterator<Item = PackNumber>) -> Result<bool> {
        let mut revived = Vec::new();
        for number in packs {
            let pack = self.chunks().packs().get(number)?;
            let pack = pack.ok_or_else(|| Error::Overtaken {
                path: self.store.layout.pack(number),
            })?;
            self.rely_on(&pack);
            let condemned = self.condemned.get(&number);
            if condemned.is_some_and(|it| it.is(pack.identity())) {
                revived.push(number);
            }
        }
        if revived.is_empty() {
            return Ok(false);
        }
        let _publish = self.store.publish_lock()?;
        self.publish_pack(None)?;
        for number in revived {
            self.condemned.remove(&number);
        }
        Ok(true)
    }

    /// The first half of [`ChunkWriter::publish_pack`].
    fn look_again(&self, enters: bool) -> Result<CollectorState> {
        let mut state = CollectorState::read(&self.store.layout)?;
        let relied = self.relied.read().unwrap_or_else(PoisonError::into_inner);
        let mut revived = false;
        for (number, stamp) in relied.iter() {
            if sim::no_second_look() || sim::on(Fault::RevivedWithoutLock) && enters {
                continue;
            }
            if !self.chunks().packs().is_in_place(*number, *stamp)? {
                return Err(Error::Overtaken {
                    path: self.store.layout.pack(*number),
                });
            }
            // A collection has condemned it since; it deletes under this lock,
            // and only what it then finds condemned.
            revived |= !sim::on(Fault::NotRevived) && state.condemned.remove(number).is_some();
        }
        if revived {
            state.write(&self.store.layout, self.store.format())?;
        }
        Ok(state)
    }
}

impl OpenPack {
    fn writer(&mut self, store: &Store) -> Result<&mut PackWriter> {
        if self.writer.is_none() {
            self.writer = Some(store.chunks.packs().create()?);
        }
        Ok(self.writer.as_mut().expect("just set"))
    }
}

/// What [`ChunkWriter::claim`] found.
pub(crate) enum Claimed {
    /// This commit has the chunk already.
    Already(Location),
    /// The caller must encode and append it.
    New(Location),
}

impl NodeSink for ChunkWriter<'_> {
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
pub(crate) fn encode_into(
    sink: &ChunkWriter<'_>,
    id: ChunkId,
    payload: &[u8],
    base: Option<Child>,
    run: &mut EncodedRun,
) -> Result<()> {
    let mut buffer = Scratch::take();
    let mut found = None;
    let may_be_delta = match id.kind() {
        ChunkKind::Page => true,
        // The first programs cannot read the encoding, nor patches, and share stores of format 1.
        ChunkKind::Node => sink.store.format() != StoreFormat::One,
        ChunkKind::Manifest => false,
    };
    let base = base.filter(|base| base.hash != *id.as_bytes() && may_be_delta);
    if let Some(base) = base {
        buffer.resize(payload_limit(id.kind(), sink.chunks().page_size()), 0);
        let base_id = ChunkId::from_hash(id.kind(), base.hash);
        found = sink.base_for(base_id, base.hint, &mut buffer)?;
    }
    let base = found
        .as_ref()
        .filter(|(base, ..)| base.id != id)
        .map(|(base, len, stored_len)| Base {
            head: delta_head(*base),
            payload: identified(id.kind(), &buffer[..*len]),
            patched: match id.kind() {
                ChunkKind::Page if sink.store.format() != StoreFormat::One => Patched::AtOnce {
                    base_stored_len: *stored_len,
                },
                _ => Patched::Never,
            },
            encoding: match id.kind() {
                ChunkKind::Node => Encoding::IdDelta,
                ChunkKind::Page | ChunkKind::Manifest => Encoding::Delta,
            },
            max_percent: match id.kind() {
                ChunkKind::Node => codec::NODE_DELTA_MAX_PERCENT,
                ChunkKind::Page | ChunkKind::Manifest => codec::PAGE_DELTA_MAX_PERCENT,
            },
        });
    let start = run.bytes.len();
    let encoding: Encoding = codec::encode(payload, base, &mut run.bytes);
    let stored = &run.bytes[start..];
    run.chunks.push(EncodedChunk {
        key: sink.chunks().keys().of(id),
        encoding,
        check: entry::stored_check(stored),
        len: stored.len(),
    });
    Ok(())
}
