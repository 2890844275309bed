//! Reading chunks: from an id to bytes that have been checked against it.
//!
//! **The rule for "readable"** stands here and nowhere else. A chunk may be
//! stored in several places: two commits can store it at the same time, and the
//! collector copies it. A reader looks at the place that the reference to it
//! hints at, then where the index leads, then where a fresh view of the index
//! leads, since the collector may have moved the chunk after this one was opened.
//! A place counts if the footer entry there has the chunk's key, and if the chunk
//! is stored standalone there, or as a delta whose base has a place of its own
//! where it is stored standalone. A delta of a node that an older version made
//! counts only with the copy of its base that it decodes with. The first place
//! that counts and whose bytes match the id is what the reader returns.
//!
//! [`Chunks::read`] reads by this rule. [`Chunks::readable`] follows it without
//! reading the bytes, for those who only need to know: `verify`, the collector,
//! and commits that want to rely on what is there.

use std::cell::Cell;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};

use quick_cache::sync::Cache;

use crate::error::{Damage, Error, Result};
use crate::format::config::{Config, StoreFormat};
use crate::format::entry::stored_check;
use crate::format::manifest;
use crate::format::node::{self, Child, Node};
use crate::id::{ChunkId, ChunkKey, ChunkKind, SnapshotId};
use crate::index::{IndexReader, Lookup};
use crate::keys::Keys;
use crate::layout::Layout;
use crate::manifest::Manifest;
use crate::pack::Location;
use crate::pack::codec::{self, Encoding};
use crate::pack::reader::{BaseRef, PackReader, Slot, base_in, payload_limit};
use crate::pack::set::PackSet;
use crate::page::PageSize;
use crate::scratch::Scratch;
use crate::sim::{self, Fault};
use crate::tree::read::node_id;

/// Decoded tree nodes kept, of about 20 KiB each: 20 MiB, the leaves of 2 GiB.
pub(crate) const NODES_CACHED: usize = 1024;
/// Fresh views of the index that a reader looks at for one chunk.
const FRESH_LOOKS: u32 = 8;
/// Chunks remembered that are not where their references hint: 5 MiB.
const MOVED_CACHED: usize = 1 << 17;

/// The chunks of a store.
pub(crate) struct Chunks {
    layout: Layout,
    page_size: PageSize,
    /// In which the store was opened.
    format: StoreFormat,
    keys: Keys,
    packs: PackSet,
    index: RwLock<Option<Arc<IndexReader>>>,
    /// By reference and not by id: copies of one node may hint at different places
    /// of its children, and what a reader returns is not to depend on what it has
    /// read before.
    nodes: Cache<([u8; 32], Option<Location>), Arc<Node>>,
    /// Where chunks are whose hints are stale. After a collection has moved them,
    /// the index is asked once and not once a read.
    moved: Cache<ChunkKey, Location>,
}

/// One place where a chunk is stored.
#[derive(Clone)]
pub(crate) struct Place {
    pub pack: Arc<PackReader>,
    pub slot: Slot,
}

impl Place {
    pub fn location(&self) -> Location {
        Location {
            pack: self.pack.number(),
            entry: self.slot.number,
        }
    }

    /// Whether it is a delta that needs one copy of its base, whatever has the
    /// same id: an older version made such deltas of nodes.
    pub fn needs_one_copy(&self) -> bool {
        let entry = self.slot.entry;
        entry.encoding == Encoding::Delta && entry.key.kind == ChunkKind::Node
    }

    /// Whether what is damaged is the chunk here, and not another one.
    pub fn is_told_by(&self, damage: &Damage) -> bool {
        let Error::Damaged(here) = self.pack.damaged(self.slot.entry, "") else {
            return false;
        };
        match (here, damage) {
            (
                Damage::Chunk {
                    path, offset_bytes, ..
                },
                Damage::Chunk {
                    path: other,
                    offset_bytes: there,
                    ..
                },
            ) => path == *other && offset_bytes == *there,
            (Damage::Chunk { path, .. }, Damage::Pack { path: other, .. }) => path == *other,
            _ => false,
        }
    }

    /// Whether the chunk decodes here without another one.
    pub fn is_standalone(&self) -> bool {
        self.slot.entry.encoding.is_standalone()
    }
}

/// A place that counts, and that of the base if the chunk is a delta there.
pub(crate) struct Readable {
    pub place: Place,
    pub base: Option<Place>,
}

impl Chunks {
    pub fn new(layout: Layout, config: &Config) -> Self {
        Self {
            packs: PackSet::new(layout.clone(), config),
            layout,
            page_size: config.page_size,
            format: config.format(),
            keys: Keys::of_store(config),
            index: RwLock::new(None),
            nodes: Cache::new(NODES_CACHED),
            moved: Cache::new(MOVED_CACHED),
        }
    }

    pub fn packs(&self) -> &PackSet {
        &self.packs
    }

    /// The store's directory.
    pub fn path(&self) -> &Path {
        self.layout.root()
    }

    pub fn page_size(&self) -> PageSize {
        self.page_size
    }

    /// What the store's chunks are called.
    pub fn keys(&self) -> &Keys {
        &self.keys
    }

    /// The index as it was when first asked for or last refreshed.
    pub fn index(&self) -> Result<Arc<IndexReader>> {
        let index = self.index.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(index) = &*index {
            return Ok(index.clone());
        }
        drop(index);
        self.refresh_index()
    }

    /// The index as it is now.
    pub fn refresh_index(&self) -> Result<Arc<IndexReader>> {
        self.packs.look_again();
        let fresh = Arc::new(IndexReader::open(&self.layout.index())?);
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        *index = Some(fresh.clone());
        Ok(fresh)
    }

    /// Lets go of files that have been deleted, so that their space is free: of
    /// packs, and of the index's.
    pub fn let_go_of_deleted(&self) {
        self.packs.forget_deleted();
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        if index.as_ref().is_some_and(|index| index.is_outdated()) {
            *index = None;
        }
    }

    /// Reads a tree node.
    pub fn node(&self, child: Child, level: u8) -> Result<Arc<Node>> {
        let reference = (child.hash, child.hint);
        if let Some(node) = self.nodes.get(&reference)
            && node.level() == level
        {
            return Ok(node);
        }
        let mut payload = Scratch::zeroed(node::MAX_PAYLOAD_LEN);
        let len = self.read(node_id(child), child.hint, &mut payload)?;
        let node = Arc::new(self.decode_node(&payload[..len], child, level)?);
        self.nodes.insert(reference, node.clone());
        Ok(node)
    }

    /// Reads a tree node as a reader without a cache would, and tells where it is.
    /// Copies of one node may hint at different places of its children.
    pub fn node_and_place(&self, child: Child, level: u8) -> Result<(Node, Location)> {
        let id = node_id(child);
        let mut failure = Failure::default();
        let mut payload = Scratch::zeroed(node::MAX_PAYLOAD_LEN);
        for place in self.places(id, child.hint) {
            let read = place.and_then(|place| {
                let len = self.read_at(&place, id, &mut payload)?;
                Ok((len, place.location()))
            });
            match read {
                Ok((len, at)) => {
                    let node = self.decode_node(&payload[..len], child, level)?;
                    return Ok((node, at));
                }
                Err(error) => failure.add(error),
            }
        }
        Err(self.explained(failure.or_missing(id)))
    }

    fn decode_node(&self, payload: &[u8], child: Child, level: u8) -> Result<Node> {
        Node::decode(payload, level).map_err(|malformed| match malformed {
            node::Malformed::Newer { version } => Error::newer(
                self.path(),
                format!("{} with version", node_id(child)),
                version,
            ),
            node::Malformed::Wrong => Damage::Missing {
                chunk: format!("{} of level {level}", node_id(child)),
            }
            .into(),
        })
    }

    /// Reads a page into `out`, which has the page's length.
    pub fn page(&self, child: Child, out: &mut [u8]) -> Result<()> {
        let id = ChunkId::from_hash(ChunkKind::Page, child.hash);
        self.read(id, child.hint, out).map(|_| ())
    }

    /// Reads a chunk's payload into the beginning of `out` and checks it against
    /// `id`. Returns the payload's length.
    ///
    /// # Errors
    /// [`Error::Damaged`] if no place counts or their bytes do not match; another
    /// error if that prevented a place from being looked at.
    pub fn read(&self, id: ChunkId, hint: Option<Location>, out: &mut [u8]) -> Result<usize> {
        let mut failure = Failure::default();
        for place in self.places(id, hint) {
            let read = place.and_then(|place| {
                let len = self.read_at(&place, id, out)?;
                self.remember(id, hint, place.location());
                Ok(len)
            });
            match read {
                Ok(len) => return Ok(len),
                Err(error) => failure.add(error),
            }
        }
        Err(self.explained(failure.or_missing(id)))
    }

    /// What is lost to who has opened the store in format 1 may have other keys now: it
    /// has been upgraded since.
    fn explained(&self, error: Error) -> Error {
        if self.format != StoreFormat::One || !error.is_damage() {
            return error;
        }
        let path = self.layout.config();
        match Config::read(&path) {
            Ok(Some(now)) if now.format() != self.format => Error::Upgraded { path },
            _ => error,
        }
    }

    /// The place that a reader would take, found without reading its bytes.
    ///
    /// # Errors
    /// As [`Chunks::read`].
    pub fn readable(&self, id: ChunkId, hint: Option<Location>) -> Result<Readable> {
        first_readable(self, self.places(id, hint), id, |base| {
            self.places(base.id, Some(base.hint))
        })
        .map_err(|error| self.explained(error))
    }

    /// The standalone chunk that a delta against `id` should be made from: the
    /// chunk itself, or its own base.
    ///
    /// # Errors
    /// As [`Chunks::read`].
    pub fn base_id(&self, id: ChunkId, hint: Option<Location>) -> Result<ChunkId> {
        let found = self.readable(id, hint)?;
        if found.base.is_none() {
            return Ok(id);
        }
        let base = found.place.pack.base(&found.place.slot)?;
        base.map(|base| base.id).ok_or_else(|| missing(id))
    }

    /// The id of the manifest stored here; `None` if there is none.
    pub fn manifest_id_at(&self, key: ChunkKey, at: Location) -> Result<Option<SnapshotId>> {
        let Some(place) = self.at(key, at)? else {
            return Ok(None);
        };
        let mut stored = Scratch::take();
        let mut bytes = vec![0; payload_limit(ChunkKind::Manifest, self.page_size)];
        match place.pack.read(&place.slot, &mut stored) {
            Err(Error::Damaged(_)) => return Ok(None),
            other => other?,
        }
        let decoded = codec::decode(&stored, place.slot.entry.encoding, &[], &mut bytes);
        let id = decoded.map(|len| SnapshotId::of_manifest(&bytes[..len]));
        let version = place.pack.version();
        Ok(id.filter(|id| self.keys.in_pack(id.chunk(), version) == key))
    }

    /// What is stored at this place, if it is this chunk.
    pub fn at_id(&self, id: ChunkId, at: Location) -> Result<Option<Place>> {
        let Some(pack) = self.packs.get(at.pack)? else {
            return Ok(None);
        };
        let key = self.keys.in_pack(id, pack.version());
        let slot = pack.slot_of(at.entry, key)?;
        Ok(slot.map(|slot| Place { pack, slot }))
    }

    /// Where the index leads from a chunk. While the store is upgraded it may have
    /// two entries.
    pub fn indexed(
        &self,
        index: &impl Lookup,
        id: ChunkId,
    ) -> impl Iterator<Item = Result<Location>> {
        self.keys
            .in_index(id)
            .filter_map(|key| index.look_up(key).transpose())
    }

    /// What the footer has at this place, if it is the chunk with this key.
    pub fn at(&self, key: ChunkKey, at: Location) -> Result<Option<Place>> {
        let Some(pack) = self.packs.get(at.pack)? else {
            return Ok(None);
        };
        let slot = pack.slot_of(at.entry, key)?;
        Ok(slot.map(|slot| Place { pack, slot }))
    }

    /// The places to look for a chunk, each only computed when asked for.
    fn places(
        &self,
        id: ChunkId,
        hint: Option<Location>,
    ) -> impl Iterator<Item = Result<Place>> + '_ {
        let hinted = std::iter::once_with(move || hint.map(Ok)).flatten();
        let moved = std::iter::once_with(move || self.moved.get(&id.plain_key()).map(Ok)).flatten();
        let indexed = std::iter::once_with(move || self.index_leads(self.index(), id)).flatten();
        // Again while it leads elsewhere: a collection may move the chunk, and delete
        // the pack, between a look at the index and one at the pack.
        let (mut looks, mut last) = (0, Vec::new());
        let fresh = std::iter::from_fn(move || {
            looks += 1;
            let found: Result<Vec<Location>> = self
                .index_leads(self.refresh_index(), id)
                .into_iter()
                .collect();
            match found {
                Ok(at) if at.is_empty() || at == last || looks > FRESH_LOOKS => None,
                Ok(at) => {
                    last.clone_from(&at);
                    Some(at.into_iter().map(Ok).collect())
                }
                Err(error) if looks == 1 => Some(vec![Err(error)]),
                Err(_) => None,
            }
        });
        let trusts_hint = sim::on(Fault::StaleHintTrusted) && hint.is_some();
        let most = if trusts_hint { 1 } else { usize::MAX };
        let candidates = hinted.chain(moved).chain(indexed).chain(fresh.flatten());
        let candidates = candidates.take(most);
        candidates.filter_map(move |at| at.and_then(|at| self.at_id(id, at)).transpose())
    }

    fn index_leads(&self, index: Result<Arc<IndexReader>>, id: ChunkId) -> Vec<Result<Location>> {
        match index {
            Ok(index) => self.indexed(&*index, id).collect(),
            Err(error) => vec![Err(error)],
        }
    }

    /// Saves the index lookup of a chunk that is not where it was hinted at.
    fn remember(&self, id: ChunkId, hint: Option<Location>, at: Location) {
        let key = id.plain_key();
        if hint.is_some_and(|hint| hint != at) && self.moved.get(&key) != Some(at) {
            self.moved.insert(key, at);
        }
    }

    /// Reads the chunk `id` at one place, and checks it. See [`Chunks::read`].
    pub fn read_at(&self, place: &Place, id: ChunkId, out: &mut [u8]) -> Result<usize> {
        let mut stored = Scratch::take();
        place.pack.read(&place.slot, &mut stored)?;
        self.decode(place, &stored, |found| found == id, out)
    }

    /// Checks the stored bytes of a place against the footer's check, and its
    /// payload against the key; returns the chunk's id. Without the base of a delta
    /// nothing is known of its payload: [`Damage::Missing`] names the base then.
    pub fn check_at(&self, place: &Place) -> Result<ChunkId> {
        let kind = place.slot.entry.key.kind;
        let mut payload = Scratch::zeroed(payload_limit(kind, self.page_size));
        let (id, _) = self.read_checked(place, &mut Scratch::take(), &mut payload)?;
        Ok(id)
    }

    /// Reads the stored bytes of a place into `stored` and its payload into `payload`,
    /// checked as [`Chunks::check_at`] does. Returns the id and the payload's length.
    pub fn read_checked(
        &self,
        place: &Place,
        stored: &mut Vec<u8>,
        payload: &mut [u8],
    ) -> Result<(ChunkId, usize)> {
        let entry = place.slot.entry;
        let version = place.pack.version();
        let seen = Cell::new(None);
        self.read_stored(place, stored)?;
        let is_right = |found| {
            seen.set(Some(found));
            self.keys.in_pack(found, version) == entry.key
        };
        let len = self.decode(place, stored, is_right, payload)?;
        Ok((seen.get().expect("what is right was seen"), len))
    }

    /// The same for a chunk whose id is known.
    pub fn check_id_at(&self, place: &Place, id: ChunkId) -> Result<()> {
        let mut stored = Scratch::take();
        self.read_stored(place, &mut stored)?;
        let kind = place.slot.entry.key.kind;
        let mut payload = Scratch::zeroed(payload_limit(kind, self.page_size));
        self.decode(place, &stored, |found| found == id, &mut payload)
            .map(|_| ())
    }

    /// Reads the stored bytes of a place, and checks them against the footer.
    fn read_stored(&self, place: &Place, stored: &mut Vec<u8>) -> Result<()> {
        place.pack.read(&place.slot, stored)?;
        if stored_check(stored) == place.slot.entry.check {
            return Ok(());
        }
        let reason = "its stored bytes do not match the footer";
        Err(place.pack.damaged(place.slot.entry, reason))
    }

    /// What is damaged of the stored bytes of a chunk, at the place where a reader looks
    /// first.
    pub fn damage_of(&self, id: ChunkId, hint: Option<Location>) -> Option<Damage> {
        let place = self.places(id, hint).next()?.ok()?;
        match self.read_stored(&place, &mut Scratch::take()) {
            Err(Error::Damaged(damage)) => Some(damage),
            _ => None,
        }
    }

    /// Whether a delta that needs one copy of its base decodes with this one.
    fn fits(&self, delta: &Place, base: &Place, base_id: ChunkId) -> bool {
        let entry = delta.slot.entry;
        let mut stored = Scratch::take();
        let mut out = Scratch::zeroed(payload_limit(entry.key.kind, self.page_size));
        let Ok(payload) = self.base_payload(base, base_id) else {
            return false;
        };
        delta.pack.read(&delta.slot, &mut stored).is_ok()
            && codec::decode(&stored, entry.encoding, &payload, &mut out)
                .and_then(|len| payload_id(entry.key.kind, &out[..len], self.page_size))
                .is_some_and(|id| self.keys.in_pack(id, delta.pack.version()) == entry.key)
    }

    /// What decodes from these stored bytes, as the place's entry tells to.
    pub fn id_at(&self, place: &Place, stored: &[u8]) -> Result<ChunkId> {
        let kind = place.slot.entry.key.kind;
        let mut payload = Scratch::zeroed(payload_limit(kind, self.page_size));
        let seen = Cell::new(None);
        self.decode(
            place,
            stored,
            |found| {
                seen.set(Some(found));
                true
            },
            &mut payload,
        )?;
        Ok(seen.get().expect("what was decoded was seen"))
    }

    /// The same, and `None` unless that is well-formed.
    pub fn id_of_well_formed(&self, place: &Place, stored: &[u8]) -> Result<Option<ChunkId>> {
        let kind = place.slot.entry.key.kind;
        let mut payload = Scratch::zeroed(payload_limit(kind, self.page_size));
        let seen = Cell::new(None);
        let see = |found| {
            seen.set(Some(found));
            true
        };
        let len = self.decode(place, stored, see, &mut payload)?;
        let payload = &payload[..len];
        let is_well_formed = match kind {
            ChunkKind::Page => true,
            ChunkKind::Node => node::len_of(payload) == Some(len),
            ChunkKind::Manifest => Manifest::decode(payload, self.page_size).is_ok(),
        };
        Ok(seen.get().filter(|_| is_well_formed))
    }

    /// Decodes what is stored at a place, and asks whether that `is_right`.
    fn decode(
        &self,
        place: &Place,
        stored: &[u8],
        is_right: impl Fn(ChunkId) -> bool,
        out: &mut [u8],
    ) -> Result<usize> {
        let entry = place.slot.entry;
        let undecodable = || place.pack.damaged(entry, "it does not decode");
        let decode = |base: &[u8], out: &mut [u8]| {
            let len = codec::decode(stored, entry.encoding, base, out).ok_or_else(undecodable)?;
            let id = payload_id(entry.key.kind, &out[..len], self.page_size);
            if id.is_some_and(&is_right) {
                return Ok(len);
            }
            Err(place.pack.damaged(entry, "its bytes do not match its id"))
        };
        match entry.encoding {
            Encoding::Raw | Encoding::Zstd => return decode(&[], out),
            Encoding::Unknown(encoding) => {
                return Err(place.pack.newer(place.slot.entry, encoding));
            }
            Encoding::Absent => return Err(undecodable()),
            Encoding::Delta | Encoding::IdDelta => {}
        }
        let base = base_in(entry, stored).ok_or_else(undecodable)?;
        let mut failure = Failure::default();
        for base_place in self.places(base.id, Some(base.hint)) {
            let read = base_place.and_then(|base_place| {
                let payload = self.base_payload(&base_place, base.id)?;
                let dictionary = match entry.encoding {
                    Encoding::IdDelta => identified(entry.key.kind, &payload),
                    _ => &payload,
                };
                let len = decode(dictionary, out).map_err(|error| {
                    // It may be another copy that is needed.
                    if place.needs_one_copy() {
                        missing(base.id)
                    } else {
                        error
                    }
                })?;
                self.remember(base.id, Some(base.hint), base_place.location());
                Ok(len)
            });
            match read {
                Ok(len) => return Ok(len),
                Err(error) => failure.add(error),
            }
        }
        Err(failure.or_missing(base.id))
    }

    /// Decodes a delta's base without checking it: the delta's own id vouches
    /// for the result.
    fn base_payload(&self, place: &Place, id: ChunkId) -> Result<Scratch> {
        let entry = place.slot.entry;
        if !place.is_standalone() {
            return Err(no_base(place, id));
        }
        let mut stored = Scratch::take();
        place.pack.read(&place.slot, &mut stored)?;
        let mut payload = Scratch::zeroed(payload_limit(entry.key.kind, self.page_size));
        let len = codec::decode(&stored, entry.encoding, &[], &mut payload)
            .ok_or_else(|| place.pack.damaged(entry, "it does not decode"))?;
        payload.truncate(len);
        Ok(payload)
    }
}

/// The part of a payload that its id is the hash of.
pub(crate) fn identified(kind: ChunkKind, payload: &[u8]) -> &[u8] {
    match kind {
        ChunkKind::Page => payload,
        ChunkKind::Node => &payload[..node::canonical_len(payload).unwrap_or(payload.len())],
        ChunkKind::Manifest => manifest::canonical(payload),
    }
}

/// What a payload is; `None` if it cannot be a chunk of this kind.
fn payload_id(kind: ChunkKind, payload: &[u8], page_size: PageSize) -> Option<ChunkId> {
    let hashed = match kind {
        ChunkKind::Page => (payload.len() == page_size.len()).then_some(payload.len())?,
        ChunkKind::Node => node::canonical_len(payload)?,
        ChunkKind::Manifest => manifest::canonical(payload).len(),
    };
    Some(kind.hash(&payload[..hashed]))
}

/// The first of `places` that counts.
pub(crate) fn first_readable<P, B>(
    chunks: &Chunks,
    places: P,
    id: ChunkId,
    bases: impl Fn(BaseRef) -> B,
) -> Result<Readable>
where
    P: Iterator<Item = Result<Place>>,
    B: Iterator<Item = Result<Place>>,
{
    let mut failure = Failure::default();
    for place in places {
        let found = place.and_then(|place| match place.slot.entry.encoding {
            Encoding::Raw | Encoding::Zstd => Ok(Readable { place, base: None }),
            Encoding::Unknown(encoding) => Err(place.pack.newer(place.slot.entry, encoding)),
            Encoding::Absent => Err(missing(id)),
            Encoding::Delta | Encoding::IdDelta => {
                let base = place.pack.base(&place.slot)?;
                let base = base.ok_or_else(|| {
                    place
                        .pack
                        .damaged(place.slot.entry, "its footer entry is damaged")
                })?;
                let base_id = base.id;
                let fitting = bases(base).filter(|candidate| match candidate {
                    Ok(candidate) if place.needs_one_copy() => {
                        chunks.fits(&place, candidate, base_id)
                    }
                    _ => true,
                });
                let base = first_standalone(fitting, base_id)?;
                Ok(Readable {
                    place,
                    base: Some(base),
                })
            }
        });
        match found {
            Ok(found) => return Ok(found),
            Err(error) => failure.add(error),
        }
    }
    Err(failure.or_missing(id))
}

/// The first of `places` where the chunk is stored standalone.
fn first_standalone(places: impl Iterator<Item = Result<Place>>, id: ChunkId) -> Result<Place> {
    let mut failure = Failure::default();
    for place in places {
        match place {
            Ok(place) if place.is_standalone() => return Ok(place),
            Ok(place) => failure.add(no_base(&place, id)),
            Err(error) => failure.add(error),
        }
    }
    Err(failure.or_missing(id))
}

/// Why a place that is not standalone cannot be a base: a delta there is as good
/// as nothing.
fn no_base(place: &Place, id: ChunkId) -> Error {
    match place.slot.entry.encoding {
        Encoding::Unknown(encoding) => place.pack.newer(place.slot.entry, encoding),
        _ => missing(id),
    }
}

/// Why no place has served: damage only if nothing else stood in the way.
#[derive(Default)]
struct Failure(Option<Error>);

impl Failure {
    fn add(&mut self, error: Error) {
        let replaces = match &self.0 {
            None => true,
            Some(first) => first.is_damage() && !error.is_damage(),
        };
        if replaces {
            self.0 = Some(error);
        }
    }

    fn or_missing(self, id: ChunkId) -> Error {
        self.0.unwrap_or_else(|| missing(id))
    }
}

pub(crate) fn missing(id: ChunkId) -> Error {
    Damage::Missing {
        chunk: id.to_string(),
    }
    .into()
}
