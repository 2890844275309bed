//! Where a commit's new chunks go: deduplicated, into packs of its own.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, PoisonError, RwLock};

use crate::chunks::{Chunks, Place, identified};
use crate::error::{Error, Result};
use crate::format::config::StoreFormat;
use crate::format::entry;
use crate::format::node::{Child, Node};
use crate::gc::state::{CollectorState, Condemned, Epoch};
use crate::id::{ChunkId, ChunkKey, ChunkKind, SnapshotId};
use crate::index::IndexReader;
use crate::lease::{Lease, LeaseTerms};
use crate::lock::Lock;
use crate::pack::codec::{self, Base, Encoding};
use crate::pack::reader::{BaseRef, PackReader, Stamp, delta_head, payload_limit};
use crate::pack::writer::{EncodedChunk, PackWriter, SealedPack, StoredChunk};
use crate::pack::{EntryNumber, Location, PackNumber};
use crate::placement::{self, LargePack, PREPARED_AT_MOST, entered_at_once};
use crate::scratch::Scratch;
use crate::sim::{self, Fault};
use crate::store::Store;
use crate::tree::build::NodeSink;

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
    writer: Option<PackWriter>,
    /// What this commit has put into the pack being written.
    claimed: HashMap<ChunkKey, Location>,
    /// The packs, not of this commit, that hold what the new snapshot needs.
    relied: RwLock<HashMap<PackNumber, Stamp>>,
    notes: RwLock<Notes>,
    pub added_chunks: u64,
    pub added_bytes: u64,
}

/// How many things that cannot be read are told.
const MAX_NOTES: usize = 16;

/// What a commit has met that cannot be read.
#[derive(Default)]
struct Notes {
    packs: BTreeSet<PackNumber>,
    errors: Vec<Error>,
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
            writer: None,
            claimed: HashMap::new(),
            relied: RwLock::default(),
            notes: RwLock::default(),
            added_chunks: 0,
            added_bytes: 0,
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
            writer: None,
            claimed: HashMap::new(),
            relied: RwLock::default(),
            notes: RwLock::default(),
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

    /// Where each of these chunks is stored, for those a new snapshot may use.
    pub fn known(&self, ids: &[ChunkId]) -> Result<Vec<Option<Location>>> {
        let names = self.chunks().keys();
        let mut order: Vec<(ChunkKey, usize)> = (ids.iter().zip(0..))
            .map(|(id, position)| (names.of(*id), position))
            .collect();
        // Neighbours in the index are looked up one after the other.
        order.sort_unstable();
        let keys: Vec<ChunkKey> = order.iter().map(|(key, _)| *key).collect();
        let mut known = vec![None; ids.len()];
        for ((_, position), at) in order.into_iter().zip(self.index.get_many(&keys)?) {
            let id = ids[position];
            known[position] = match at {
                Some(at) if sim::on(Fault::PackNotLookedFor) => Some(at),
                Some(at) => self.usable(id, at)?.map(|place| place.location()),
                None => None,
            };
            if known[position].is_none() && names.is_upgrading() {
                known[position] = self.known_as_before(id)?;
            }
        }
        Ok(known)
    }

    /// Where a pack of format 1 has the chunk.
    fn known_as_before(&self, id: ChunkId) -> Result<Option<Location>> {
        match self.index.get(id.plain_key())? {
            Some(at) => Ok(self.usable(id, at)?.map(|place| place.location())),
            None => Ok(None),
        }
    }

    /// Where this leaf is stored, if it and all its pages may be used as they are.
    pub fn known_leaf(&self, id: ChunkId) -> Result<Option<Child>> {
        let Some((child, leaf)) = self.read_leaf(id)? else {
            return Ok(None);
        };
        let in_place = sim::on(Fault::StaleLeafTrusted) || self.pages_in_place(&leaf)?;
        Ok(in_place.then_some(child))
    }

    /// A leaf that may be used, with where it is; `None` if there is none, or it is lost:
    /// nothing new is built on what is damaged.
    fn read_leaf(&self, id: ChunkId) -> Result<Option<(Child, Arc<Node>)>> {
        let Some(at) = self.known(&[id])?[0] else {
            return Ok(None);
        };
        let child = Child {
            hash: *id.as_bytes(),
            hint: Some(at),
        };
        match self.chunks().node(child, 0) {
            Err(error) if error.is_lost() => Ok(None),
            leaf => Ok(Some((child, leaf?))),
        }
    }

    /// Whether this leaf and all its pages may be used, wherever they are.
    pub fn has_leaf(&self, id: ChunkId) -> Result<bool> {
        let Some((_, leaf)) = self.read_leaf(id)? else {
            return Ok(false);
        };
        let mut elsewhere = Vec::new();
        for (_, page) in leaf.present() {
            let id = leaf.child_id(page);
            if !self.in_place(id, page.hint)? {
                elsewhere.push(id);
            }
        }
        Ok(self.known(&elsewhere)?.iter().all(Option::is_some))
    }

    /// Whether the pages of a leaf are where its hints say. A leaf can outlive
    /// its pages: when no snapshot refers to it, or when repair has set a damaged
    /// pack aside.
    pub fn pages_in_place(&self, leaf: &Node) -> Result<bool> {
        for (_, page) in leaf.present() {
            if !self.in_place(leaf.child_id(page), page.hint)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether a hint leads to a chunk that a new snapshot may use.
    pub fn in_place(&self, id: ChunkId, hint: Option<Location>) -> Result<bool> {
        match hint {
            Some(at) => Ok(self.usable(id, at)?.is_some()),
            None => Ok(false),
        }
    }

    /// Claims a place for a chunk that is not [`ChunkWriter::known`]. The chunks must
    /// then be encoded and appended in the order of their claims.
    pub fn claim(&mut self, id: ChunkId, pending: usize) -> Result<Claimed> {
        let key = self.chunks().keys().of(id);
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

    /// The place that this commit has claimed for a chunk, if it has.
    pub fn claimed(&self, id: ChunkId) -> Option<Location> {
        self.claimed.get(&self.chunks().keys().of(id)).copied()
    }

    /// The length of the pack being written, so far.
    pub fn open_pack_bytes(&self) -> u64 {
        self.writer.as_ref().map_or(0, PackWriter::len_bytes)
    }

    /// Appends claimed chunks, in the order of their claims.
    pub fn append(&mut self, run: EncodedRun) -> Result<()> {
        if run.chunks.is_empty() {
            return Ok(());
        }
        self.added_chunks += run.chunks.len() as u64;
        self.added_bytes += (run.bytes.len() + run.chunks.len() * entry::ENTRY_LEN) as u64;
        self.writer()?.append(&run.chunks, run.bytes)
    }

    /// Between batches: starts a new pack if the present one is full. The full
    /// one's chunks go into the index at once, so that memory does not grow with
    /// the commit.
    pub fn roll_over(&mut self) -> Result<()> {
        if !self.writer.as_ref().is_some_and(PackWriter::is_full) {
            return Ok(());
        }
        self.finish_pack()
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
        self.claimed.clear();
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
        self.writer.take().map(PackWriter::seal).transpose()
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

    /// The standalone chunk that a delta against `id` may be made from, if there
    /// is one: the chunk itself, or its base. Reads its payload into `out`.
    ///
    /// It is where the index leads: the invariant of bases (`placement`).
    fn base_for(
        &self,
        id: ChunkId,
        hint: Option<Location>,
        out: &mut [u8],
    ) -> Result<Option<(BaseRef, usize)>> {
        let base = match self.chunks().base_id(id, hint) {
            // Nothing new is built on what is damaged.
            Err(error) if error.is_lost() => return Ok(None),
            other => other?,
        };
        let indexed: Vec<Location> = if sim::bases_by_id() {
            let found = self.chunks().readable(id, hint)?;
            vec![found.base.unwrap_or(found.place).location()]
        } else {
            let indexed = self.chunks().indexed(&*self.index, base);
            indexed.collect::<Result<_>>()?
        };
        for at in indexed {
            let place = self.usable(base, at)?;
            let Some(place) = place.filter(Place::is_standalone) else {
                continue;
            };
            match self.chunks().read_at(&place, base, out) {
                Err(Error::Damaged(_)) => {}
                read => return Ok(Some((BaseRef { id: base, hint: at }, read?))),
            }
        }
        Ok(None)
    }

    /// The chunk at a place, if a new snapshot may rely on it being there.
    fn usable(&self, id: ChunkId, at: Location) -> Result<Option<Place>> {
        let Some(place) = self.sound_place(id, at)? else {
            return Ok(None);
        };
        let looks_for_base = !sim::on(Fault::DeadDeltaTrusted);
        // Which copy of its base such a delta needs is not looked into.
        if place.needs_one_copy() {
            return Ok(None);
        }
        if looks_for_base && place.slot.entry.encoding.is_delta() {
            let base = match place.pack.base(&place.slot) {
                Ok(Some(base)) => base,
                Ok(None) | Err(Error::Damaged(_)) => return Ok(None),
                Err(other) => return Err(other),
            };
            let standalone = |at| {
                let place = self.sound_place(base.id, at)?;
                Ok::<_, Error>(place.filter(Place::is_standalone))
            };
            let mut found = standalone(base.hint)?;
            if found.is_none() {
                for at in self.chunks().indexed(&*self.index, base.id) {
                    found = standalone(at?)?;
                    if found.is_some() {
                        break;
                    }
                }
            }
            let Some(found) = found else {
                return Ok(None);
            };
            self.rely_on(&found.pack);
        }
        self.rely_on(&place.pack);
        Ok(Some(place))
    }

    /// The chunk at a place, if its pack may be used and its footer is whole.
    fn sound_place(&self, id: ChunkId, at: Location) -> Result<Option<Place>> {
        let condemned = self.condemned.get(&at.pack);
        let going = |pack: &PackReader| condemned.is_some_and(|it| it.is(pack.identity()));
        let found = self.chunks().at_id(id, at).and_then(|place| match place {
            Some(place) if going(&place.pack) && !sim::on(Fault::CondemnedReused) => Ok(None),
            Some(place) if place.pack.is_sound()? => Ok(Some(place)),
            Some(_) => {
                self.distrust(at.pack);
                Ok(None)
            }
            None => Ok(None),
        });
        match found {
            Err(error) if error.is_lost() => {
                self.distrust(at.pack);
                Ok(None)
            }
            Ok(Some(place)) if matches!(place.slot.entry.encoding, Encoding::Unknown(_)) => {
                Ok(None)
            }
            other => other,
        }
    }

    /// Notes a pack that holds what this commit could use, and is damaged.
    fn distrust(&self, pack: PackNumber) {
        let known = self.notes.read().unwrap_or_else(PoisonError::into_inner);
        if known.packs.contains(&pack) || known.packs.len() >= MAX_NOTES {
            return;
        }
        drop(known);
        let mut notes = self.notes.write().unwrap_or_else(PoisonError::into_inner);
        notes.packs.insert(pack);
    }

    /// Notes what could not be read and is not needed.
    pub fn note(&self, error: Error) {
        let mut notes = self.notes.write().unwrap_or_else(PoisonError::into_inner);
        let message = error.to_string();
        let known = notes
            .errors
            .iter()
            .any(|other| other.to_string() == message);
        if !known && notes.errors.len() < MAX_NOTES {
            notes.errors.push(error);
        }
    }

    /// What was noted.
    pub fn take_notes(&self) -> Vec<Error> {
        let mut notes = self.notes.write().unwrap_or_else(PoisonError::into_inner);
        let Notes { packs, mut errors } = std::mem::take(&mut *notes);
        for number in packs {
            let pack = self.chunks().packs().get(number);
            match pack.and_then(|pack| pack.map_or(Ok(Vec::new()), |pack| pack.problems())) {
                Ok(problems) => errors.extend(problems.into_iter().map(Error::from)),
                Err(error) => errors.push(error),
            }
        }
        errors.truncate(MAX_NOTES);
        errors
    }

    fn rely_on(&self, pack: &PackReader) {
        let relied = self.relied.read().unwrap_or_else(PoisonError::into_inner);
        if relied.contains_key(&pack.number()) {
            return;
        }
        drop(relied);
        let mut relied = self.relied.write().unwrap_or_else(PoisonError::into_inner);
        relied.insert(pack.number(), pack.stamp());
    }

    fn writer(&mut self) -> Result<&mut PackWriter> {
        if self.writer.is_none() {
            self.writer = Some(self.store.chunks.packs().create()?);
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
        // The first programs cannot read the encoding, and share stores of format 1.
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
        .filter(|(base, _)| base.id != id)
        .map(|(base, len)| Base {
            head: delta_head(*base),
            payload: identified(id.kind(), &buffer[..*len]),
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
