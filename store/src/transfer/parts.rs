//! The parts of a snapshot one by one: for who keeps them elsewhere than in a stream,
//! such as in the objects of a bucket.
//!
//! Bytes come out of [`Parts`] checked, and what is put together again is written as a
//! stream ([`PartsWriter`]), which an import trusts as little as any other.

use std::io::{Read, Write};
use std::path::Path;

use crate::chunk_source::read_page;
use crate::commit::chunk_writer::ChunkWriter;
use crate::error::Result;
use crate::format::manifest::canonical;
use crate::format::node::{Child, Node};
use crate::format::stream::{EncodedBlock, Record, StreamWriter};
use crate::id::{ChunkId, ChunkKind, SnapshotId};
use crate::manifest::{MAX_LEN, Manifest};
use crate::pack::codec;
use crate::page::PageSize;
use crate::pin::Pin;
use crate::progress::Progress;
use crate::store::Store;
use crate::transfer::{ImportRequest, Imported};

/// A block of a stream is begun anew at this length.
const BLOCK_LEN: usize = 1 << 20;

/// A snapshot that is pinned while its parts are read.
pub struct Parts<'a> {
    store: &'a Store,
    id: SnapshotId,
    manifest: Manifest,
    canonical: Vec<u8>,
    _pin: Pin,
}

/// A tree of a snapshot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Root {
    /// The id of its root.
    pub id: [u8; 32],
    /// The level of its root: 0 is a leaf, whose children are pages.
    pub level: u8,
}

/// A tree node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NodeParts {
    /// What its id is the hash of.
    pub canonical: Vec<u8>,
    /// The ids of its children that are there, with their slots.
    pub children: Vec<(usize, [u8; 32])>,
}

impl NodeParts {
    /// The node of this level with this canonical part, as its id says.
    #[must_use]
    pub fn parse(canonical: &[u8], level: u8) -> Option<Self> {
        let node = Node::decode(canonical, level).ok()?;
        let again = node.encode_canonical();
        (again == canonical).then(|| Self::of(&node, again))
    }

    fn of(node: &Node, canonical: Vec<u8>) -> Self {
        let children = node.present().map(|(slot, child)| (slot, child.hash));
        Self {
            children: children.collect(),
            canonical,
        }
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> [u8; 32] {
        *ChunkKind::Node.hash(&self.canonical).as_bytes()
    }
}

impl Store {
    /// Opens a snapshot to read its parts. It stays whole meanwhile.
    ///
    /// # Errors
    /// As [`Store::resolve`], and if its manifest cannot be read.
    pub fn parts(&self, name: &str) -> Result<Parts<'_>> {
        let (id, pin) = self.pin(name)?;
        let mut payload = vec![0; MAX_LEN];
        let len = self.chunks.read(id.chunk(), None, &mut payload)?;
        Ok(Parts {
            store: self,
            id,
            manifest: self.manifest(id)?,
            canonical: canonical(&payload[..len]).to_vec(),
            _pin: pin,
        })
    }

    /// Begins to take parts of snapshots.
    ///
    /// # Errors
    /// As [`Store::commit`] before it reads its inputs.
    pub fn receive(&self) -> Result<Receiving<'_>> {
        Ok(Receiving {
            store: self,
            sink: ChunkWriter::new(self)?,
        })
    }
}

/// A store that takes parts of snapshots: what it tells that it has may be left out of the
/// stream that it is given. That stays as long as this lives, whatever is collected
/// meanwhile; a repair may take it away, and then the import says so.
pub struct Receiving<'a> {
    store: &'a Store,
    sink: ChunkWriter<'a>,
}

impl Receiving<'_> {
    /// Whether a page is there, as far as can be told without reading its bytes.
    ///
    /// # Errors
    /// If it cannot be told.
    pub fn has_page(&self, id: &[u8; 32]) -> Result<bool> {
        self.has(ChunkKind::Page, id)
    }

    /// Whether a leaf is there with all its pages. It can outlive them: when no snapshot
    /// needs it, or when a repair has set a damaged pack aside.
    ///
    /// # Errors
    /// If it cannot be told.
    pub fn has_leaf(&self, id: &[u8; 32]) -> Result<bool> {
        let id = ChunkId::from_hash(ChunkKind::Node, *id);
        self.sink.has_leaf(id)
    }

    /// Whether a node above the leaves is there. Nothing is said of what is below it.
    ///
    /// # Errors
    /// If it cannot be told.
    pub fn has_node(&self, id: &[u8; 32]) -> Result<bool> {
        self.has(ChunkKind::Node, id)
    }

    fn has(&self, kind: ChunkKind, id: &[u8; 32]) -> Result<bool> {
        let known = self.sink.known(&[ChunkId::from_hash(kind, *id)])?;
        Ok(known[0].is_some())
    }

    /// Imports a stream that may leave out what is there.
    ///
    /// # Errors
    /// As [`Store::import`].
    pub fn import(
        &self,
        request: &ImportRequest,
        from: impl Read,
        progress: &dyn Progress,
    ) -> Result<Imported> {
        let sink = || self.sink.beside();
        self.store.import_by(request, from, progress, sink)
    }
}

impl Parts<'_> {
    /// The snapshot's id.
    #[must_use]
    pub fn id(&self) -> SnapshotId {
        self.id
    }

    /// What it holds.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The part of its manifest that its id is the hash of.
    #[must_use]
    pub fn canonical_manifest(&self) -> &[u8] {
        &self.canonical
    }

    /// The trees of its images, by the images' names. An image of zeros has none.
    pub fn roots(&self) -> impl Iterator<Item = (&str, Root)> {
        self.manifest.images.iter().filter_map(|image| {
            let root = Root {
                id: image.root?.hash,
                level: image.tree().shape().root_level(),
            };
            Some((image.name.as_str(), root))
        })
    }

    /// A node of a tree.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn node(&self, root: Root) -> Result<NodeParts> {
        self.store.cancel.check()?;
        let child = Child {
            hash: root.id,
            hint: None,
        };
        let node = self.store.chunks.node(child, root.level)?;
        let canonical = node.encode_canonical();
        Ok(NodeParts::of(&node, canonical))
    }

    /// Appends the bytes of a page, encoded without any other page, and tells how.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn encoded_page(&self, id: &[u8; 32], out: &mut Vec<u8>) -> Result<u8> {
        let mut page = vec![0; self.store.page_size().len()];
        let child = Child {
            hash: *id,
            hint: None,
        };
        self.store.chunks.page(child, &mut page)?;
        Ok(codec::encode(&page, None, out).to_byte())
    }
}

/// Decodes a page that [`Parts::encoded_page`] encoded, and compares it with its id.
#[must_use]
pub fn decode_page(
    id: &[u8; 32],
    encoding: u8,
    stored: &[u8],
    page_size: PageSize,
) -> Option<Vec<u8>> {
    let mut page = vec![0; page_size.len()];
    read_page(id, encoding, stored, &mut page).then_some(page)
}

/// The id of the snapshot with this canonical manifest.
#[must_use]
pub fn snapshot_of_manifest(canonical: &[u8]) -> [u8; 32] {
    *SnapshotId::of_manifest(canonical).as_bytes()
}

/// The size of the pages of the snapshot with this canonical manifest; none if no version
/// that is known wrote it so.
#[must_use]
pub fn page_size_of_manifest(canonical: &[u8]) -> Option<PageSize> {
    let sizes = [PageSize::KIB_4, PageSize::KIB_16, PageSize::KIB_64];
    let mut sizes = sizes.into_iter();
    sizes.find(|size| Manifest::decode(canonical, *size).is_ok())
}

/// Writes parts as a stream that [`Store::import`] reads.
pub struct PartsWriter<W> {
    out: StreamWriter<W>,
    content: Vec<u8>,
    chunks: u64,
}

impl<W: Write> PartsWriter<W> {
    /// Begins a stream.
    ///
    /// # Errors
    /// I/O errors of the stream, as of all its functions.
    pub fn new(out: W, label: &Path, page_size: PageSize) -> Result<Self> {
        Ok(Self {
            out: StreamWriter::new(out, label, page_size)?,
            content: Vec::new(),
            chunks: 0,
        })
    }

    /// A page.
    ///
    /// # Errors
    /// As [`PartsWriter::new`].
    pub fn page(&mut self, bytes: &[u8]) -> Result<()> {
        self.chunks += 1;
        self.record(&Record::Page { base: None, bytes })
    }

    /// A node, whose children were written before or are in the store.
    ///
    /// # Errors
    /// As [`PartsWriter::new`].
    pub fn node(&mut self, canonical: &[u8]) -> Result<()> {
        self.chunks += 1;
        self.record(&Record::Node {
            base: None,
            canonical,
        })
    }

    /// The manifest, whose trees were written before or are in the store, and the end.
    ///
    /// # Errors
    /// As [`PartsWriter::new`].
    pub fn finish(mut self, tag: &str, manifest: &[u8]) -> Result<()> {
        self.record(&Record::Snapshot {
            tags: vec![tag],
            manifest,
        })?;
        self.flush()?;
        let chunks = self.chunks;
        self.record(&Record::End {
            snapshots: 1,
            chunks,
        })?;
        self.flush()?;
        self.out.flush()
    }

    fn record(&mut self, record: &Record<'_>) -> Result<()> {
        if self.content.len() >= BLOCK_LEN {
            self.flush()?;
        }
        record.append_to(&mut self.content);
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        let block = EncodedBlock::new(&self.content);
        self.content.clear();
        self.out.write_block(&block)
    }
}
