//! Reading chunks: from an id to bytes that have been checked against it.
//!
//! The way is: hint -> pack footer; if there is no hint or it is stale, index
//! -> pack footer; if that fails too, a fresh view of the index, since the
//! collector may have moved the chunk after this one was opened.

use std::cell::RefCell;
use std::sync::{Arc, PoisonError, RwLock};

use quick_cache::sync::Cache;

use crate::error::{Damage, Result};
use crate::id::{ChunkId, ChunkKey, ChunkKind, SnapshotId};
use crate::index::IndexReader;
use crate::layout::Layout;
use crate::pack::reader::{BaseRef, PackReader, payload_limit};
use crate::pack::set::PackSet;
use crate::pack::{EntryNumber, Location};
use crate::page::PageSize;
use crate::tree::node::{self, Child, Node};
use crate::tree::read::node_id;

/// Decoded tree nodes kept, of about 20 KiB each: 20 MiB, the leaves of 2 GiB.
const NODES_CACHED: usize = 1024;

thread_local! {
    /// Holds the base while a delta is decoded.
    static BASE: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    /// Holds a node's payload while it is decoded.
    static NODE: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// The chunks of a store.
pub(crate) struct Chunks {
    layout: Layout,
    page_size: PageSize,
    packs: PackSet,
    index: RwLock<Option<Arc<IndexReader>>>,
    nodes: Cache<[u8; 32], Arc<Node>>,
}

impl Chunks {
    pub fn new(layout: Layout, page_size: PageSize) -> Self {
        Self {
            packs: PackSet::new(layout.clone(), page_size),
            layout,
            page_size,
            index: RwLock::new(None),
            nodes: Cache::new(NODES_CACHED),
        }
    }

    pub fn packs(&self) -> &PackSet {
        &self.packs
    }

    pub fn page_size(&self) -> PageSize {
        self.page_size
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
        let fresh = Arc::new(IndexReader::open(&self.layout.index())?);
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        *index = Some(fresh.clone());
        Ok(fresh)
    }

    /// Reads a tree node.
    pub fn node(&self, child: Child, level: u8) -> Result<Arc<Node>> {
        if let Some(node) = self.nodes.get(&child.hash)
            && node.level() == level
        {
            return Ok(node);
        }
        let node = NODE.with_borrow_mut(|payload| {
            payload.resize(node::MAX_PAYLOAD_LEN, 0);
            let len = self.read(node_id(child), child.hint, payload)?;
            Ok::<_, crate::error::Error>(Node::decode(&payload[..len], level).map(Arc::new))
        })?;
        let node = node.ok_or_else(|| Damage::Missing {
            chunk: format!("{} of level {level}", node_id(child)),
        })?;
        self.nodes.insert(child.hash, node.clone());
        Ok(node)
    }

    /// Reads a page into `out`, which has the page's length.
    pub fn page(&self, child: Child, out: &mut [u8]) -> Result<()> {
        let id = ChunkId::from_hash(ChunkKind::Page, child.hash);
        self.read(id, child.hint, out).map(|_| ())
    }

    /// Reads a chunk's payload into the beginning of `out` and checks it against
    /// `id`. Returns the payload's length.
    pub fn read(&self, id: ChunkId, hint: Option<Location>, out: &mut [u8]) -> Result<usize> {
        let mut first_error = None;
        for attempt in self.places(id.key(), hint) {
            match attempt.and_then(|(pack, entry)| self.read_at(&pack, entry, id, out)) {
                Ok(len) => return Ok(len),
                Err(error) => first_error = first_error.or(Some(error)),
            }
        }
        Err(first_error.unwrap_or_else(|| missing(id)))
    }

    /// Where a chunk is stored, if it is.
    pub fn find(
        &self,
        key: ChunkKey,
        hint: Option<Location>,
    ) -> Result<Option<(Arc<PackReader>, EntryNumber)>> {
        self.places(key, hint).next().transpose()
    }

    /// The standalone chunk that a delta against `child` should be made from:
    /// the chunk itself, or its own base. Reads its payload into `out`.
    pub fn read_base(
        &self,
        id: ChunkId,
        hint: Option<Location>,
        out: &mut [u8],
    ) -> Result<Option<(BaseRef, usize)>> {
        let Some((pack, entry)) = self.find(id.key(), hint)? else {
            return Ok(None);
        };
        let of_chunk = BaseRef {
            id,
            hint: Location {
                pack: pack.number(),
                entry,
            },
        };
        let base = pack
            .stored(entry, id.key())
            .and_then(|stored| stored.base())
            .unwrap_or(of_chunk);
        let len = self.read(base.id, Some(base.hint), out)?;
        Ok(Some((base, len)))
    }

    /// The id of the manifest stored here; `None` if there is none.
    pub fn manifest_id_at(&self, key: ChunkKey, at: Location) -> Result<Option<SnapshotId>> {
        let Some((pack, entry)) = self.at(key, Some(at))? else {
            return Ok(None);
        };
        let mut bytes = vec![0; payload_limit(ChunkKind::Manifest, self.page_size)];
        let decoded = pack
            .stored(entry, key)
            .and_then(|stored| stored.decode(&[], &mut bytes));
        let id = decoded.map(|len| SnapshotId::of_manifest(&bytes[..len]));
        Ok(id.filter(|id| id.chunk().key() == key))
    }

    /// The places to look for a chunk, each only computed when asked for.
    fn places(
        &self,
        key: ChunkKey,
        hint: Option<Location>,
    ) -> impl Iterator<Item = Result<(Arc<PackReader>, EntryNumber)>> + '_ {
        let hinted = hint.and_then(move |at| self.at(key, Some(at)).transpose());
        let in_index = std::iter::once_with(move || {
            self.index()
                .and_then(|index| index.get(key))
                .and_then(|at| self.at(key, at))
                .transpose()
        })
        .flatten();
        let in_fresh_index = std::iter::once_with(move || {
            self.refresh_index()
                .and_then(|index| index.get(key))
                .and_then(|at| self.at(key, at))
                .transpose()
        })
        .flatten();
        hinted.into_iter().chain(in_index).chain(in_fresh_index)
    }

    fn at(
        &self,
        key: ChunkKey,
        at: Option<Location>,
    ) -> Result<Option<(Arc<PackReader>, EntryNumber)>> {
        let Some(at) = at else { return Ok(None) };
        let Some(pack) = self.packs.get(at.pack)? else {
            return Ok(None);
        };
        let fits = pack.stored(at.entry, key).is_some();
        Ok(fits.then_some((pack, at.entry)))
    }

    fn read_at(
        &self,
        pack: &PackReader,
        entry: EntryNumber,
        id: ChunkId,
        out: &mut [u8],
    ) -> Result<usize> {
        let stored = pack.stored(entry, id.key()).ok_or_else(|| missing(id))?;
        let decoded = match stored.base() {
            None => stored.decode(&[], out),
            Some(base) => BASE.with_borrow_mut(|buffer| {
                buffer.resize(payload_limit(id.kind(), self.page_size), 0);
                let len = self.decode_base(base, buffer)?;
                Ok::<_, crate::error::Error>(stored.decode(&buffer[..len], out))
            })?,
        };
        let len = decoded.ok_or_else(|| pack.damaged(stored.entry, "it does not decode"))?;
        let valid = match id.kind() {
            ChunkKind::Page => len == self.page_size.len() && id.kind().hash(&out[..len]) == id,
            ChunkKind::Node => node::canonical_len(&out[..len])
                .is_some_and(|canonical| id.kind().hash(&out[..canonical]) == id),
            ChunkKind::Manifest => id.kind().hash(&out[..len]) == id,
        };
        if !valid {
            return Err(pack.damaged(stored.entry, "its bytes do not match its id"));
        }
        Ok(len)
    }

    /// Decodes a delta's base without checking it: the delta's own id vouches
    /// for the result.
    fn decode_base(&self, base: BaseRef, out: &mut [u8]) -> Result<usize> {
        let mut first_error = None;
        for place in self.places(base.id.key(), Some(base.hint)) {
            let decoded = place.and_then(|(pack, entry)| {
                let stored = pack
                    .stored(entry, base.id.key())
                    .ok_or_else(|| missing(base.id))?;
                if stored.base().is_some() {
                    return Err(pack.damaged(stored.entry, "a delta is based on a delta"));
                }
                stored
                    .decode(&[], out)
                    .ok_or_else(|| pack.damaged(stored.entry, "it does not decode"))
            });
            match decoded {
                Ok(len) => return Ok(len),
                Err(error) => first_error = first_error.or(Some(error)),
            }
        }
        Err(first_error.unwrap_or_else(|| missing(base.id)))
    }
}

fn missing(id: ChunkId) -> crate::error::Error {
    Damage::Missing {
        chunk: id.to_string(),
    }
    .into()
}
