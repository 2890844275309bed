//! Reading chunks: from an id to bytes that have been checked against it.
//!
//! **The rule for "readable"** stands here and nowhere else. A chunk may be
//! stored in several places: two commits can store it at the same time, and the
//! collector copies it. A reader looks at the place that the reference to it
//! hints at, then where the index leads, then where a fresh view of the index
//! leads, since the collector may have moved the chunk after this one was opened.
//! Where the index is not open its newest entries are asked before it is opened.
//! A place counts if the footer entry there has the chunk's key, and if the chunk
//! is stored standalone there, or as a delta whose base has a place of its own
//! where it is stored standalone. A delta of a node that an older version made
//! counts only with the copy of its base that it decodes with. The first place
//! that counts and whose bytes match the id is what the reader returns.
//!
//! [`Chunks::read`] reads by this rule. [`Chunks::readable`] follows it without
//! reading the bytes, for those who only need to know: `verify`, the collector,
//! and commits that want to rely on what is there.

mod decode;
mod many;
mod rule;

use std::path::Path;
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use quick_cache::sync::Cache;

use crate::error::{Damage, Error, Result};
use crate::format::config::{Config, StoreFormat};
use crate::format::node::{self, Child, Node};
use crate::id::{ChunkId, ChunkKey, ChunkKind, SnapshotId};
use crate::index::{IndexReader, LatestRuns, Lookup};
use crate::keys::Keys;
use crate::layout::Layout;
use crate::pack::Location;
use crate::pack::codec;
use crate::pack::reader::payload_limit;
use crate::pack::set::PackSet;
use crate::page::PageSize;
use crate::scratch::Scratch;
use crate::sim::{self, Fault};
use crate::tree::read::node_id;
pub(crate) use decode::identified;
use rule::Failure;
pub(crate) use rule::{Place, Readable, first_readable, missing};

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
    /// What was added to the index last, for who has not opened it.
    latest: OnceLock<Option<LatestRuns>>,
    /// By reference and not by id: copies of one node may hint at different places
    /// of its children, and what a reader returns is not to depend on what it has
    /// read before.
    nodes: Cache<([u8; 32], Option<Location>), Arc<Node>>,
    /// Where chunks are whose hints are stale. After a collection has moved them,
    /// the index is asked once and not once a read.
    moved: Cache<ChunkKey, Location>,
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
            latest: OnceLock::new(),
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
        let mut payload = Scratch::of_len(node::MAX_PAYLOAD_LEN);
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
        let mut payload = Scratch::of_len(node::MAX_PAYLOAD_LEN);
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

    /// Has the disk begin to read what is stored where a reader looks first for a page.
    pub fn ask_for_page(&self, child: Child) {
        let id = ChunkId::from_hash(ChunkKind::Page, child.hash);
        if let Some(Ok(place)) = self.places(id, child.hint).next() {
            place.pack.ask_for(&place.slot);
        }
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
        let is_told = sim::on(Fault::RenamedCalledMissing);
        if self.format != StoreFormat::One || !error.is_damage() || is_told {
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
        first_readable(self.fits(), self.places(id, hint), id, |base| {
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
        let latest = std::iter::once_with(move || self.latest_leads(id)).flatten();
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
        let candidates = hinted.chain(moved).chain(latest).chain(indexed);
        let candidates = candidates.chain(fresh.flatten());
        let candidates = candidates.take(most);
        candidates.filter_map(move |at| at.and_then(|at| self.at_id(id, at)).transpose())
    }

    /// Where the newest entries of the index lead, while it is not open. What they do not
    /// tell, or not any more, the index does.
    fn latest_leads(&self, id: ChunkId) -> Vec<Result<Location>> {
        let index = self.index.read().unwrap_or_else(PoisonError::into_inner);
        if index.is_some() {
            return Vec::new();
        }
        drop(index);
        let read = || LatestRuns::read(&self.layout.index()).ok().flatten();
        let Some(latest) = self.latest.get_or_init(read) else {
            return Vec::new();
        };
        let keys = self.keys.in_index(id);
        keys.filter_map(|key| latest.get(key)).map(Ok).collect()
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
}
