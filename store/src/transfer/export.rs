//! Out of a store: a walk over what snapshots need, each chunk once, children first.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::PathBuf;

use rayon::prelude::*;
use serde::Serialize;

use crate::chunks::Chunks;
use crate::error::{Result, readable};
use crate::format::manifest::canonical;
use crate::format::node::{Child, Node};
use crate::format::stream::{BLOCK_LEN, EncodedBlock, Record, StreamWriter, append_page_head};
use crate::gc::mark::Marks;
use crate::id::{ChunkId, SnapshotId};
use crate::manifest::{self, MAX_LEN, Manifest};
use crate::pack::Location;
use crate::pin::Pin;
use crate::progress::Progress;
use crate::store::Store;
use crate::tags;
use crate::tree::read::node_id;
use crate::tree::shape::pages_per_child;

/// Nodes and manifests wait for others until there are as many bytes of them.
const SMALL_BLOCK_LEN: usize = 256 << 10;

/// A snapshot with more tags has several records.
const TAGS_PER_RECORD: usize = 256;

/// What to export.
#[derive(Clone, Debug, Default)]
pub struct ExportRequest {
    /// Tags, or beginnings of ids. What is named by an id goes under the tag it was
    /// first committed as.
    pub snapshots: Vec<String>,
    /// Whether all that they descend from goes along, as far as it has tags.
    pub chain: bool,
    /// What errors call the stream, such as the name of a file.
    pub label: PathBuf,
}

/// What an export has written.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Exported {
    /// The snapshots, ancestors first.
    pub snapshots: Vec<ExportedSnapshot>,
    /// Ancestors that have no tag, which are not in the stream.
    pub left_out: Vec<SnapshotId>,
    /// How many pages, tree nodes and manifests there are.
    pub chunks: u64,
    /// The length of the stream.
    pub stream_bytes: u64,
}

/// A snapshot of a stream.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct ExportedSnapshot {
    /// The tags that it has there.
    pub tags: Vec<String>,
    /// Its id.
    pub id: SnapshotId,
}

impl Store {
    /// Writes snapshots as one stream, which any store with pages of this size can
    /// import. They are pinned while it is written. Memory does not grow with them but
    /// by a bit for each chunk.
    ///
    /// # Errors
    /// As [`Store::resolve`] for names; [`crate::Error::Damaged`] if parts of a snapshot
    /// cannot be read; I/O errors of the stream. What was written is then no whole
    /// stream, and no store imports it.
    pub fn export(
        &self,
        request: &ExportRequest,
        out: impl Write,
        progress: &dyn Progress,
    ) -> Result<Exported> {
        let span = tracing::debug_span!("export", snapshots = ?request.snapshots);
        let _entered = span.enter();
        let chosen = Chosen::of(self, request)?;
        let mut export = Export {
            store: self,
            chunks: &self.chunks,
            out: StreamWriter::new(out, &request.label, self.page_size())?,
            sent: Marks::default(),
            small: Vec::new(),
            sent_chunks: 0,
            sent_snapshots: 0,
        };
        for snapshot in &chosen.snapshots {
            let sent = export.snapshot(snapshot, progress);
            // Whoever was stopped may have closed the stream.
            self.cancel.check()?;
            sent?;
        }
        let (chunks, stream_bytes) = export.finish()?;
        Ok(Exported {
            chunks: chunks + chosen.snapshots.len() as u64,
            snapshots: chosen.snapshots,
            left_out: chosen.left_out,
            stream_bytes,
        })
    }
}

/// The snapshots of a stream, ancestors first, and what keeps them whole.
struct Chosen {
    snapshots: Vec<ExportedSnapshot>,
    left_out: Vec<SnapshotId>,
    _pin: Pin,
}

impl Chosen {
    fn of(store: &Store, request: &ExportRequest) -> Result<Self> {
        let mut pin = store.empty_pin()?;
        let mut chosen: Vec<ExportedSnapshot> = Vec::new();
        let mut left_out = BTreeSet::new();
        let mut tagged = None;
        for name in &request.snapshots {
            let id = pin.add(store, name)?;
            let manifest = store.manifest(id)?;
            let tag = match store.tag(name)? {
                Some(_) => name.clone(),
                None => manifest.first_tag.clone(),
            };
            // Each descendant before what it descends from; turned round at the end.
            let mut chain = vec![(id, tag)];
            let mut next = manifest.parent.filter(|_| request.chain);
            while let Some(parent) = next {
                let tagged = match &tagged {
                    Some(tagged) => tagged,
                    None => tagged.insert(tags_by_snapshot(store)?),
                };
                let tag = tagged.get(&parent).map(|tags| tags[0].clone());
                let pinned = match &tag {
                    // It may have lost the tag by now.
                    Some(tag) => store.tag(tag)? == Some(parent) && pin.add(store, tag)? == parent,
                    None => false,
                };
                let manifest = match tag.filter(|_| pinned) {
                    Some(tag) => {
                        let manifest = store.manifest(parent)?;
                        let first = &manifest.first_tag;
                        let tag = match tagged[&parent].contains(first) {
                            true => first.clone(),
                            false => tag,
                        };
                        chain.push((parent, tag));
                        Some(manifest)
                    }
                    None => {
                        left_out.insert(parent);
                        readable(store.manifest(parent))?
                    }
                };
                next = manifest.and_then(|manifest| manifest.parent);
            }
            for (id, tag) in chain.into_iter().rev() {
                match chosen.iter_mut().find(|other| other.id == id) {
                    Some(other) if other.tags.contains(&tag) => {}
                    Some(other) => other.tags.push(tag),
                    None => chosen.push(ExportedSnapshot {
                        tags: vec![tag],
                        id,
                    }),
                }
            }
        }
        Ok(Self {
            snapshots: chosen,
            left_out: left_out.into_iter().collect(),
            _pin: pin,
        })
    }
}

/// All tags that can be read, sorted, by what they name.
fn tags_by_snapshot(store: &Store) -> Result<BTreeMap<SnapshotId, Vec<String>>> {
    let mut tagged: BTreeMap<_, Vec<_>> = BTreeMap::new();
    let mut each = tags::each(&store.layout)?;
    each.sort_by(|(one, _), (other, _)| one.cmp(other));
    for (tag, id) in each {
        if let Ok(id) = id {
            tagged.entry(id).or_default().push(tag);
        }
    }
    Ok(tagged)
}

struct Export<'a, W> {
    store: &'a Store,
    chunks: &'a Chunks,
    out: StreamWriter<W>,
    /// The chunks that were sent, by their places.
    sent: Marks,
    /// Records of nodes and manifests that were not written yet. Pages are before them.
    small: Vec<u8>,
    sent_chunks: u64,
    sent_snapshots: u32,
}

/// A page that has not been sent.
struct Fresh {
    child: Child,
    base: Option<[u8; 32]>,
}

impl<W: Write> Export<'_, W> {
    fn snapshot(&mut self, snapshot: &ExportedSnapshot, progress: &dyn Progress) -> Result<()> {
        let mut payload = vec![0; MAX_LEN];
        let len = self.chunks.read(snapshot.id.chunk(), None, &mut payload)?;
        let manifest: Manifest = manifest::read(self.chunks, snapshot.id)?;
        let bytes = |pages: u64| pages * self.store.page_size().bytes();
        let total = manifest.images.iter().map(|image| image.pages()).sum();
        progress.begin(&snapshot.tags[0], bytes(total));
        let mut pages_before = 0;
        for image in &manifest.images {
            if let Some(root) = image.root {
                let level = image.tree().shape().root_level();
                self.tree(root, level, pages_before, &mut |pages| {
                    progress.advance(bytes(pages.min(total)));
                })?;
            }
            pages_before += image.pages();
        }
        for tags in snapshot.tags.chunks(TAGS_PER_RECORD) {
            self.sent_snapshots += 1;
            self.small_record(&Record::Snapshot {
                tags: tags.iter().map(String::as_str).collect(),
                manifest: canonical(&payload[..len]),
            })?;
        }
        // Before the pages of the next one, which may be like these.
        self.flush_small()
    }

    /// Sends what was not sent of a node, its children first.
    fn tree(
        &mut self,
        child: Child,
        level: u8,
        first_page: u64,
        advance: &mut dyn FnMut(u64),
    ) -> Result<()> {
        self.store.cancel.check()?;
        let (at, base) = place(self.chunks, node_id(child), child.hint)?;
        if self.sent.has(at) {
            return Ok(());
        }
        let node = self.chunks.node(child, level)?;
        if level == 0 {
            self.pages(&node)?;
        } else {
            for (slot, below) in node.present() {
                let first_page = first_page + slot as u64 * pages_per_child(level);
                self.tree(below, level - 1, first_page, advance)?;
            }
        }
        self.sent.set(at);
        self.sent_chunks += 1;
        advance(first_page);
        self.small_record(&Record::Node {
            base,
            canonical: &node.encode_canonical(),
        })
    }

    /// Sends the pages of a leaf that were not sent.
    fn pages(&mut self, leaf: &Node) -> Result<()> {
        let children: Vec<Child> = leaf.present().map(|(_, child)| child).collect();
        let chunks = self.chunks;
        let places: Vec<_> = self.store.in_pool(|| {
            let places = children.par_iter().with_min_len(32);
            places
                .map(|child| place(chunks, leaf.child_id(*child), child.hint))
                .collect::<Result<_>>()
        })?;
        let mut fresh = Vec::new();
        for (child, (at, base)) in children.into_iter().zip(places) {
            if self.sent.set(at) {
                fresh.push(Fresh { child, base });
            }
        }
        self.sent_chunks += fresh.len() as u64;
        let blocks: Vec<EncodedBlock> = self.store.in_pool(|| {
            let blocks = fresh.par_chunks(BLOCK_LEN / chunks.page_size().len());
            blocks
                .map(|pages| block_of(chunks, pages))
                .collect::<Result<_>>()
        })?;
        let mut blocks = blocks.iter();
        blocks.try_for_each(|block| self.out.write_block(block))
    }

    fn small_record(&mut self, record: &Record<'_>) -> Result<()> {
        record.append_to(&mut self.small);
        match self.small.len() >= SMALL_BLOCK_LEN {
            true => self.flush_small(),
            false => Ok(()),
        }
    }

    fn flush_small(&mut self) -> Result<()> {
        let block = EncodedBlock::new(&self.small);
        self.small.clear();
        self.out.write_block(&block)
    }

    /// Writes the end; returns how much there was.
    fn finish(mut self) -> Result<(u64, u64)> {
        let end = Record::End {
            snapshots: self.sent_snapshots,
            chunks: self.sent_chunks,
        };
        end.append_to(&mut self.small);
        self.flush_small()?;
        self.out.flush()?;
        Ok((self.sent_chunks, self.out.len_bytes))
    }
}

/// Where a chunk is, and what it is a delta against there.
fn place(
    chunks: &Chunks,
    id: ChunkId,
    hint: Option<Location>,
) -> Result<(Location, Option<[u8; 32]>)> {
    let found = chunks.readable(id, hint)?;
    let base = match found.base {
        Some(_) => found.place.pack.base(&found.place.slot)?,
        None => None,
    };
    let at = found.place.location();
    Ok((at, base.map(|base| *base.id.as_bytes())))
}

fn block_of(chunks: &Chunks, pages: &[Fresh]) -> Result<EncodedBlock> {
    let page_len = chunks.page_size().len();
    let mut content = Vec::with_capacity(pages.len() * (page_len + 34));
    for page in pages {
        append_page_head(&mut content, page.base);
        let start = content.len();
        content.resize(start + page_len, 0);
        chunks.page(page.child, &mut content[start..])?;
    }
    Ok(EncodedBlock::new(&content))
}
