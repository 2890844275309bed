//! Committing one image: from an input file to a page tree.
//!
//! Leaves are taken in batches, and two batches are under way at a time: while
//! one is compressed, the next one is read and hashed. Pages are read a second
//! time to be compressed, so that no image data is kept in between; a page that
//! is not the same then is an input that changed, which is an error.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use crate::commit::chunk_writer::{ChunkWriter, Claimed, EncodedRun, encode_into};
use crate::commit::source::Source;
use crate::error::Result;
use crate::format::node::{Child, FAN_OUT, Node};
use crate::id::{ChunkId, ChunkKind};
use crate::manifest::Image;
use crate::page::is_zero;
use crate::progress::Progress;
use crate::sim;
use crate::tree::build::{HolePolicy, TreeBuilder};
use crate::tree::read::{Tree, node_id};
use crate::tree::shape::{Shape, slot};

/// Input bytes per batch, which bounds the compressed bytes in memory.
const BATCH_BYTES: u64 = 32 << 20;
/// Bytes that are read and hashed at a time: they fit into a core's own cache.
const PIECE_BYTES: u64 = 256 << 10;
/// Pages that one task compresses.
const PAGES_PER_TASK: usize = 32;

thread_local! {
    static PIECE: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// An image's new tree and what it took.
pub(crate) struct CommittedImage {
    pub tree: Tree,
    pub nonzero_pages: u64,
    pub changed_pages: u64,
}

/// What an image's tree is made from.
#[derive(Clone, Copy, Default)]
pub(crate) struct Before<'a> {
    /// Its predecessor: the parent's image, or what this commit has stored of this one.
    pub image: Option<&'a Image>,
    /// The parent's tree, of which changes are counted, where that is another.
    pub counted_from: Option<Option<Tree>>,
}

/// Pages of the leaves that were taken up, before and now.
#[derive(Default)]
struct Counts {
    old: u64,
    new: u64,
    changed: u64,
    /// Of what the predecessor counts as changed.
    changed_before: u64,
}

/// Stores the input as a page tree. With [`HolePolicy::Inherited`] its holes
/// are the parent's pages, else they are zero.
pub(crate) fn commit_image(
    sink: &mut ChunkWriter<'_>,
    source: &Source<'_>,
    before: Before<'_>,
    holes: HolePolicy,
    progress: &dyn Progress,
) -> Result<CommittedImage> {
    let old = before.image;
    let parent = old.map(Image::tree);
    let page_bytes = sink.chunks().page_size().bytes();
    let shape = Shape::of_pages(source.size_bytes().div_ceil(page_bytes));
    let job = Job {
        source,
        parent,
        counted_from: before.counted_from,
        holes,
        page_bytes,
        pages: shape.pages(),
    };
    let mut builder = TreeBuilder::new(shape, sink.chunks(), parent, holes);
    let mut counts = Counts::default();
    let mut feed = Feed {
        job: &job,
        position: 0,
    };
    let mut batch = feed.next_batch()?;
    identify(sink, &job, &mut batch)?;
    while !batch.is_empty() {
        sink.check_cancelled()?;
        sink.roll_over()?;
        claim_places(sink, &mut batch)?;
        let position = feed.position;
        let mut next = feed.next_batch()?;
        let shared: &ChunkWriter<'_> = sink;
        let (encoded, identified) = rayon::join(
            || encode(shared, &job, &mut batch),
            || identify(shared, &job, &mut next),
        );
        encoded.and(identified)?;
        for work in &mut batch {
            sink.append(std::mem::take(&mut work.run))?;
            work.count(&mut counts);
        }
        for work in &batch {
            builder.put_leaf(work.index, work.result, sink)?;
        }
        progress.advance(position.min(source.size_bytes()));
        batch = next;
    }
    source.check_unchanged()?;
    let tree = builder.finish(sink)?;
    let old_nonzero = old.map_or(0, |image| image.nonzero_pages);
    let elsewhere = old_nonzero.saturating_sub(counts.old);
    // Of the leaves that were not taken up the predecessor has counted what changed.
    let counted = before.counted_from.and(old);
    let counted = counted.map_or(0, |image| image.changed_pages);
    let counted = counted.saturating_sub(counts.changed_before);
    Ok(match holes {
        HolePolicy::Inherited => CommittedImage {
            tree,
            nonzero_pages: elsewhere + counts.new,
            changed_pages: counted + counts.changed,
        },
        // What the parent has elsewhere is zero now.
        HolePolicy::Zero => CommittedImage {
            tree,
            nonzero_pages: counts.new,
            // What could not be read of the parent seems to be elsewhere.
            changed_pages: (counts.changed + elsewhere)
                .min(job.pages.max(old.map_or(0, Image::pages))),
        },
    })
}

struct Job<'a> {
    source: &'a Source<'a>,
    parent: Option<Tree>,
    counted_from: Option<Option<Tree>>,
    holes: HolePolicy,
    page_bytes: u64,
    pages: u64,
}

/// Finds the leaves that have data, in order.
struct Feed<'a> {
    job: &'a Job<'a>,
    position: u64,
}

impl Feed<'_> {
    fn next_batch(&mut self) -> Result<Vec<LeafWork>> {
        let leaf_bytes = self.job.page_bytes * FAN_OUT as u64;
        let most = usize::try_from((BATCH_BYTES / leaf_bytes).max(1)).expect("small");
        // A pack of a simulated store is full sooner.
        let most = if sim::is_simulated() { 1 } else { most };
        let mut batch = Vec::with_capacity(most);
        while batch.len() < most {
            let Some(data) = self.job.source.next_data(self.position)? else {
                self.position = self.job.source.size_bytes();
                break;
            };
            let index = data.start / leaf_bytes;
            batch.push(LeafWork::new(index));
            self.position = (index + 1) * leaf_bytes;
        }
        Ok(batch)
    }
}

/// One leaf on its way through a batch.
struct LeafWork {
    index: u64,
    /// The slots whose pages the input has data for.
    slots: Vec<usize>,
    parent: Option<(Child, Arc<Node>)>,
    /// The leaf that changes are counted from, if that is not the parent's.
    counted_from: Option<Option<Arc<Node>>>,
    node: Node,
    /// The node's id once it is known to be new.
    new_id: Option<ChunkId>,
    /// The slots whose pages this leaf must encode.
    fresh: Vec<usize>,
    encode_leaf: bool,
    /// Of a live input the pages that may have to be encoded, as they were hashed.
    kept: HashMap<usize, Box<[u8]>>,
    run: EncodedRun,
    result: Option<Child>,
}

/// A page of an input.
struct Hashed {
    /// `None` for zero, the parent's child if it is equal.
    child: Option<Child>,
    /// Its bytes, if it cannot be read again.
    bytes: Option<Box<[u8]>>,
}

/// Reads and hashes a batch, and finds out what is in the store.
fn identify(sink: &ChunkWriter<'_>, job: &Job<'_>, batch: &mut [LeafWork]) -> Result<()> {
    batch
        .par_iter_mut()
        .try_for_each(|work| work.identify(sink, job))
}

/// Compresses what a batch has claimed places for.
fn encode(sink: &ChunkWriter<'_>, job: &Job<'_>, batch: &mut [LeafWork]) -> Result<()> {
    batch
        .par_iter_mut()
        .try_for_each(|work| work.encode(sink, job))
}

/// Gives every page and leaf that is not in the store its place, in order.
fn claim_places(sink: &mut ChunkWriter<'_>, batch: &mut [LeafWork]) -> Result<()> {
    let mut pending = 0;
    for work in batch {
        let Some(leaf_id) = work.new_id else { continue };
        for slot in work.slots.iter().copied() {
            let Some(child) = work.node.child(slot).filter(|child| child.hint.is_none()) else {
                continue;
            };
            let at = match sink.claim(work.node.child_id(child), pending)? {
                Claimed::Already(at) => at,
                Claimed::New(at) => {
                    work.fresh.push(slot);
                    pending += 1;
                    at
                }
            };
            let hint = Some(at);
            work.node.set_child(slot, Some(Child { hint, ..child }));
        }
        let at = match sink.known(&[leaf_id])?[0] {
            Some(at) => at,
            None => match sink.claim(leaf_id, pending)? {
                Claimed::Already(at) => at,
                Claimed::New(at) => {
                    work.encode_leaf = true;
                    pending += 1;
                    at
                }
            },
        };
        work.result = Some(Child {
            hash: *leaf_id.as_bytes(),
            hint: Some(at),
        });
    }
    Ok(())
}

impl LeafWork {
    fn new(index: u64) -> Self {
        Self {
            index,
            slots: Vec::new(),
            parent: None,
            counted_from: None,
            node: Node::empty(0),
            new_id: None,
            fresh: Vec::new(),
            encode_leaf: false,
            kept: HashMap::new(),
            run: EncodedRun::default(),
            result: None,
        }
    }

    fn identify(&mut self, sink: &ChunkWriter<'_>, job: &Job<'_>) -> Result<()> {
        let first_page = self.first_page();
        self.parent = match job.parent {
            Some(tree) if first_page < tree.shape().pages() => {
                match tree.node_over(sink.chunks(), 0, first_page) {
                    Err(error) if error.is_lost() && job.holes == HolePolicy::Zero => {
                        sink.note(error);
                        None
                    }
                    other => other?,
                }
            }
            _ => None,
        };
        if let (Some((_, node)), HolePolicy::Inherited) = (&self.parent, job.holes) {
            self.node = (**node).clone();
        }
        if let Some(tree) = job.counted_from {
            let tree = tree.filter(|tree| first_page < tree.shape().pages());
            let leaf = tree.map(|tree| tree.node_over(sink.chunks(), 0, first_page));
            self.counted_from = Some(leaf.transpose()?.flatten().map(|(_, leaf)| leaf));
        }
        self.hash(sink, job)?;
        if self.node.is_zero() {
            return Ok(());
        }
        let id = self.node.id();
        if let Some((parent, leaf)) = &self.parent
            && node_id(*parent) == id
            && sink.pages_in_place(leaf)?
        {
            self.result = Some(*parent);
            return Ok(());
        }
        if let Some(known) = sink.known_leaf(id)? {
            self.result = Some(known);
            return Ok(());
        }
        self.new_id = Some(id);
        self.look_up(sink)
    }

    fn first_page(&self) -> u64 {
        self.index * FAN_OUT as u64
    }

    fn count(&self, counts: &mut Counts) {
        let old = self.parent.as_ref().map(|(_, node)| node);
        let from = self.counted_from.as_ref().map(Option::as_ref);
        let page = |leaf: Option<&Arc<Node>>, slot| {
            let child = leaf.and_then(|node| node.child(slot));
            child.map(|child| child.hash)
        };
        for slot in 0..FAN_OUT {
            let before = page(old, slot);
            let now = self.node.child(slot).map(|child| child.hash);
            let from = from.map_or(before, |leaf| page(leaf, slot));
            counts.old += u64::from(before.is_some());
            counts.new += u64::from(now.is_some());
            counts.changed += u64::from(from != now);
            counts.changed_before += u64::from(from != before);
        }
    }

    /// Hashes the pages that have data.
    fn hash(&mut self, sink: &ChunkWriter<'_>, job: &Job<'_>) -> Result<()> {
        let pieces = self.pieces(job)?;
        let this: &Self = self;
        let hashed: Vec<Vec<Hashed>> = pieces
            .par_iter()
            .map(|pages| this.hash_piece(sink, job, pages))
            .collect::<Result<_>>()?;
        for (pages, children) in pieces.into_iter().zip(hashed) {
            for (page, hashed) in pages.zip(children) {
                let slot = slot(page, 0);
                self.slots.push(slot);
                self.node.set_child(slot, hashed.child);
                self.kept.extend(hashed.bytes.map(|bytes| (slot, bytes)));
            }
        }
        Ok(())
    }

    /// The runs of pages that the input has data for, cut to pieces.
    fn pieces(&self, job: &Job<'_>) -> Result<Vec<Range<u64>>> {
        let end = (self.first_page() + FAN_OUT as u64).min(job.pages);
        let most = (PIECE_BYTES / job.page_bytes).max(1);
        let mut pieces: Vec<Range<u64>> = Vec::new();
        let mut next = self.first_page();
        while let Some(data) = job.source.next_data(next * job.page_bytes)? {
            next = next.max(data.start / job.page_bytes);
            let data_end = data.end.div_ceil(job.page_bytes).min(end);
            if next >= end {
                break;
            }
            // Extents that touch make one run of pages.
            if let Some(last) = pieces.last_mut().filter(|last| last.end == next) {
                last.end = (last.start + most).min(data_end).max(last.end);
                next = last.end;
            }
            while next < data_end {
                let piece = next..(next + most).min(data_end);
                next = piece.end;
                pieces.push(piece);
            }
        }
        Ok(pieces)
    }

    fn hash_piece(
        &self,
        sink: &ChunkWriter<'_>,
        job: &Job<'_>,
        pages: &Range<u64>,
    ) -> Result<Vec<Hashed>> {
        let is_live = job.source.is_live();
        let known = |child| Hashed { child, bytes: None };
        PIECE.with_borrow_mut(|bytes| {
            self.read(sink, job, pages, bytes)?;
            let page_len = sink.chunks().page_size().len();
            let children = pages
                .clone()
                .zip(bytes.chunks(page_len))
                .map(|(page, bytes)| {
                    if is_zero(bytes) {
                        return Ok(known(None));
                    }
                    let id = ChunkKind::Page.hash(bytes);
                    let hash = *id.as_bytes();
                    if let Some(old) = self.old_page(page)
                        && old.hash == hash
                        && sink.in_place(id, old.hint)?
                    {
                        return Ok(known(Some(old)));
                    }
                    Ok(Hashed {
                        child: Some(Child { hash, hint: None }),
                        bytes: is_live.then(|| bytes.into()),
                    })
                });
            children.collect()
        })
    }

    fn old_page(&self, page: u64) -> Option<Child> {
        let (_, node) = self.parent.as_ref()?;
        node.child(slot(page, 0))
    }

    /// Reads pages of this leaf as they will be stored.
    fn read(
        &self,
        sink: &ChunkWriter<'_>,
        job: &Job<'_>,
        pages: &Range<u64>,
        out: &mut Vec<u8>,
    ) -> Result<()> {
        let len = (pages.end - pages.start) * job.page_bytes;
        out.resize(usize::try_from(len).expect("a piece is small"), 0);
        let start = pages.start * job.page_bytes;
        job.source.read_exact_at(out, start)?;
        if job.holes == HolePolicy::Inherited {
            self.fill_holes(sink, job, start, out)?;
        }
        Ok(())
    }

    /// In a diff, the parts of a page that are holes keep the parent's bytes.
    /// (Data begins and ends at filesystem blocks, or at multiples of 4 KiB, which
    /// may be smaller than a page.)
    fn fill_holes(
        &self,
        sink: &ChunkWriter<'_>,
        job: &Job<'_>,
        start: u64,
        out: &mut [u8],
    ) -> Result<()> {
        let end = start + out.len() as u64;
        let mut old = Vec::new();
        let mut old_is = None;
        let mut position = start;
        while position < end {
            let data = job.source.next_data(position)?;
            let data = data.filter(|data| data.start < end).unwrap_or(end..end);
            while position < data.start {
                let page = position / job.page_bytes;
                let part_end = ((page + 1) * job.page_bytes).min(data.start);
                if old_is.replace(page) != Some(page) {
                    old.clear();
                    old.resize(sink.chunks().page_size().len(), 0);
                    if let Some(child) = self.old_page(page) {
                        sink.chunks().page(child, &mut old)?;
                    }
                }
                let at = |byte: u64| usize::try_from(byte).expect("a piece is small");
                let in_page = at(position % job.page_bytes);
                let len = at(part_end - position);
                out[at(position - start)..][..len].copy_from_slice(&old[in_page..in_page + len]);
                position = part_end;
            }
            position = data.end;
        }
        Ok(())
    }

    /// Asks the index for the pages that differ from the parent's.
    fn look_up(&mut self, sink: &ChunkWriter<'_>) -> Result<()> {
        let unknown: Vec<_> = self
            .slots
            .iter()
            .filter_map(|slot| {
                let child = self.node.child(*slot).filter(|c| c.hint.is_none())?;
                Some((self.node.child_id(child), *slot))
            })
            .collect();
        let ids: Vec<_> = unknown.iter().map(|(id, _)| *id).collect();
        for ((_, slot), hint) in unknown.into_iter().zip(sink.known(&ids)?) {
            let child = self.node.child(slot).map(|child| Child { hint, ..child });
            self.node.set_child(slot, child);
        }
        Ok(())
    }

    fn encode(&mut self, sink: &ChunkWriter<'_>, job: &Job<'_>) -> Result<()> {
        let this: &Self = self;
        let runs: Vec<EncodedRun> = self
            .fresh
            .par_chunks(PAGES_PER_TASK)
            .map(|slots| this.encode_pages(sink, job, slots))
            .collect::<Result<_>>()?;
        for run in runs {
            self.run.chunks.extend(run.chunks);
            self.run.bytes.extend_from_slice(&run.bytes);
        }
        if let Some(id) = self.new_id.filter(|_| self.encode_leaf) {
            let base = self.parent.as_ref().map(|(child, _)| *child);
            encode_into(sink, id, &self.node.encode(), base, &mut self.run)?;
        }
        Ok(())
    }

    fn encode_pages(
        &self,
        sink: &ChunkWriter<'_>,
        job: &Job<'_>,
        slots: &[usize],
    ) -> Result<EncodedRun> {
        let mut run = EncodedRun::default();
        PIECE.with_borrow_mut(|bytes| {
            for slot in slots {
                let page = self.first_page() + *slot as u64;
                match self.kept.get(slot) {
                    Some(kept) => {
                        bytes.clear();
                        bytes.extend_from_slice(kept);
                    }
                    None => self.read(sink, job, &(page..page + 1), bytes)?,
                }
                let child = self.node.child(*slot).expect("a fresh page is not zero");
                let id = self.node.child_id(child);
                if ChunkKind::Page.hash(bytes) != id {
                    return Err(job.source.changed());
                }
                encode_into(sink, id, bytes, self.old_page(page), &mut run)?;
            }
            Ok(run)
        })
    }
}
