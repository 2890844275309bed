//! Committing one image: from an input file to a page tree.
//!
//! Leaves are taken in batches. Within a batch, reading, hashing, looking up
//! and compressing run on all cores; claiming places and appending run in
//! order. What a batch holds in memory is bounded by `BATCH_BYTES` of input
//! and as much output, whatever the image's length.

use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use crate::commit::sink::{Claimed, EncodedRun, Sink, encode_into};
use crate::commit::source::Source;
use crate::error::Result;
use crate::id::{ChunkId, ChunkKind};
use crate::manifest::Image;
use crate::page::is_zero;
use crate::progress::Progress;
use crate::tree::build::{TreeBuilder, Unmentioned};
use crate::tree::node::{Child, FAN_OUT, Node};
use crate::tree::read::{Tree, node_id};
use crate::tree::shape::{Shape, slot};

/// Input bytes that are in memory at a time.
const BATCH_BYTES: u64 = 32 << 20;
/// Pages that one task hashes.
const PAGES_PER_TASK: usize = 64;

/// An image's new tree and what it took.
pub(crate) struct CommittedImage {
    pub tree: Tree,
    pub nonzero_pages: u64,
    pub changed_pages: u64,
}

/// Pages of the leaves that were taken up, before and now.
#[derive(Default)]
struct Counts {
    old: u64,
    new: u64,
    changed: u64,
}

/// Stores the input as a page tree. With [`Unmentioned::Inherited`] its holes
/// are the parent's pages, else they are zero.
pub(crate) fn commit_image(
    sink: &mut Sink<'_>,
    source: &Source,
    old: Option<&Image>,
    unmentioned: Unmentioned,
    progress: &dyn Progress,
) -> Result<CommittedImage> {
    let parent = old.map(Image::tree);
    let page_bytes = sink.chunks().page_size().bytes();
    let shape = Shape::of_pages(source.size_bytes().div_ceil(page_bytes));
    let job = Job {
        source,
        parent,
        unmentioned,
        page_bytes,
        pages: shape.pages(),
    };
    let mut builder = TreeBuilder::new(shape, sink.chunks(), parent, unmentioned);
    let leaves_per_batch =
        usize::try_from((BATCH_BYTES / (page_bytes * FAN_OUT as u64)).max(1)).expect("small");
    let mut batch: Vec<LeafWork> = (0..leaves_per_batch).map(|_| LeafWork::new()).collect();
    let mut counts = Counts::default();
    let mut position = 0;
    loop {
        let mut used = 0;
        while used < batch.len() {
            let Some(data) = source.next_data(position)? else {
                position = source.size_bytes();
                break;
            };
            let index = data.start / (page_bytes * FAN_OUT as u64);
            batch[used].index = index;
            used += 1;
            position = (index + 1) * page_bytes * FAN_OUT as u64;
        }
        if used == 0 {
            break;
        }
        commit_batch(sink, &job, &mut batch[..used])?;
        for work in &batch[..used] {
            builder.put_leaf(work.index, work.result, sink)?;
            work.count(&mut counts);
        }
        sink.roll_over()?;
        progress.advance(position.min(source.size_bytes()));
    }
    source.check_unchanged()?;
    let tree = builder.finish(sink)?;
    let old_nonzero = old.map_or(0, |image| image.nonzero_pages);
    let elsewhere = old_nonzero.saturating_sub(counts.old);
    Ok(match unmentioned {
        Unmentioned::Inherited => CommittedImage {
            tree,
            nonzero_pages: elsewhere + counts.new,
            changed_pages: counts.changed,
        },
        // What the parent has elsewhere is zero now.
        Unmentioned::Zero => CommittedImage {
            tree,
            nonzero_pages: counts.new,
            changed_pages: counts.changed + elsewhere,
        },
    })
}

struct Job<'a> {
    source: &'a Source,
    parent: Option<Tree>,
    unmentioned: Unmentioned,
    page_bytes: u64,
    pages: u64,
}

/// One leaf on its way through a batch. Buffers are kept from batch to batch.
struct LeafWork {
    index: u64,
    /// The bytes of the pages in `slots`, one after the other.
    bytes: Vec<u8>,
    slots: Vec<usize>,
    parent: Option<(Child, Arc<Node>)>,
    node: Node,
    /// The node's id once it is known to be new.
    new_id: Option<ChunkId>,
    /// Positions in `slots` whose pages this leaf must encode.
    fresh: Vec<usize>,
    encode_leaf: bool,
    run: EncodedRun,
    result: Option<Child>,
}

fn commit_batch(sink: &mut Sink<'_>, job: &Job<'_>, batch: &mut [LeafWork]) -> Result<()> {
    let shared: &Sink<'_> = sink;
    batch
        .par_iter_mut()
        .try_for_each(|work| work.identify(shared, job))?;
    claim_places(sink, batch)?;
    let shared: &Sink<'_> = sink;
    batch
        .par_iter_mut()
        .try_for_each(|work| work.encode(shared, job))?;
    batch
        .iter_mut()
        .try_for_each(|work| sink.append(std::mem::take(&mut work.run)))
}

/// Gives every page and leaf that is not in the store its place, in order.
fn claim_places(sink: &mut Sink<'_>, batch: &mut [LeafWork]) -> Result<()> {
    let mut pending = 0;
    for work in batch {
        let Some(leaf_id) = work.new_id else { continue };
        for position in 0..work.slots.len() {
            let slot = work.slots[position];
            let Some(child) = work.node.child(slot).filter(|child| child.hint.is_none()) else {
                continue;
            };
            let at = match sink.claim(work.node.child_id(child).key(), pending)? {
                Claimed::Already(at) => at,
                Claimed::New(at) => {
                    work.fresh.push(position);
                    pending += 1;
                    at
                }
            };
            let hint = Some(at);
            work.node.set_child(slot, Some(Child { hint, ..child }));
        }
        let at = match sink.known(&[leaf_id.key()])?[0] {
            Some(at) => at,
            None => match sink.claim(leaf_id.key(), pending)? {
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
    fn new() -> Self {
        Self {
            index: 0,
            bytes: Vec::new(),
            slots: Vec::new(),
            parent: None,
            node: Node::empty(0),
            new_id: None,
            fresh: Vec::new(),
            encode_leaf: false,
            run: EncodedRun::default(),
            result: None,
        }
    }

    /// Reads the leaf's data, hashes it, and finds out what is in the store.
    fn identify(&mut self, sink: &Sink<'_>, job: &Job<'_>) -> Result<()> {
        let first_page = self.index * FAN_OUT as u64;
        self.new_id = None;
        self.fresh.clear();
        self.encode_leaf = false;
        self.result = None;
        self.parent = match job.parent {
            Some(tree) if first_page < tree.shape().pages() => {
                tree.node_over(sink.chunks(), 0, first_page)?
            }
            _ => None,
        };
        self.node = match (&self.parent, job.unmentioned) {
            (Some((_, node)), Unmentioned::Inherited) => (**node).clone(),
            _ => Node::empty(0),
        };
        self.load(sink, job)?;
        self.hash(job);
        if self.node.is_zero() {
            return Ok(());
        }
        let id = self.node.id();
        if let Some((parent, _)) = self.parent.as_ref().filter(|(p, _)| node_id(*p) == id) {
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

    fn count(&self, counts: &mut Counts) {
        let old = self.parent.as_ref().map(|(_, node)| node);
        for slot in 0..FAN_OUT {
            let before = old
                .and_then(|node| node.child(slot))
                .map(|child| child.hash);
            let now = self.node.child(slot).map(|child| child.hash);
            counts.old += u64::from(before.is_some());
            counts.new += u64::from(now.is_some());
            counts.changed += u64::from(before != now);
        }
    }

    /// Reads the pages that have data.
    fn load(&mut self, sink: &Sink<'_>, job: &Job<'_>) -> Result<()> {
        let start = self.index * FAN_OUT as u64 * job.page_bytes;
        let end = (start + FAN_OUT as u64 * job.page_bytes).min(job.pages * job.page_bytes);
        self.slots.clear();
        let mut filled = 0;
        let mut position = start;
        while let Some(data) = job.source.next_data(position)?.filter(|d| d.start < end) {
            let data = data.start.max(position)..data.end.min(end);
            let whole = data.start / job.page_bytes * job.page_bytes
                ..data.end.next_multiple_of(job.page_bytes);
            let pages = whole.start / job.page_bytes..whole.end / job.page_bytes;
            let len = usize::try_from(whole.end - whole.start).expect("within one leaf");
            if self.bytes.len() < filled + len {
                self.bytes.resize(filled + len, 0);
            }
            self.slots.extend(pages.map(|page| slot(page, 0)));
            job.source
                .read_exact_at(&mut self.bytes[filled..filled + len], whole.start)?;
            if job.unmentioned == Unmentioned::Inherited {
                self.restore_holes(sink, job, &whole, filled)?;
            }
            filled += len;
            position = whole.end;
        }
        Ok(())
    }

    /// In a diff, the parts of the first and last page that are holes keep the
    /// parent's bytes. (Extents end at filesystem blocks, which may be smaller
    /// than a page.)
    fn restore_holes(
        &mut self,
        sink: &Sink<'_>,
        job: &Job<'_>,
        pages: &Range<u64>,
        at: usize,
    ) -> Result<()> {
        let page_len = sink.chunks().page_size().len();
        let mut position = pages.start;
        while position < pages.end {
            let data = job.source.next_data(position)?;
            let hole_end = data.map_or(pages.end, |data| data.start.min(pages.end));
            let mut hole = position;
            while hole < hole_end {
                let page = hole / job.page_bytes;
                let part_end = ((page + 1) * job.page_bytes).min(hole_end);
                let mut old = vec![0; page_len];
                if let Some((_, leaf)) = &self.parent {
                    if let Some(child) = leaf.child(slot(page, 0)) {
                        sink.chunks().page(child, &mut old)?;
                    }
                }
                let offset = |from: u64| usize::try_from(from).expect("within one leaf");
                let in_page = offset(hole % job.page_bytes);
                let len = offset(part_end - hole);
                let out = at + offset(hole - pages.start);
                self.bytes[out..out + len].copy_from_slice(&old[in_page..in_page + len]);
                hole = part_end;
            }
            position = match job.source.next_data(hole_end)? {
                Some(data) if hole_end < pages.end => data.end,
                _ => pages.end,
            };
        }
        Ok(())
    }

    fn hash(&mut self, job: &Job<'_>) {
        let page_len = usize::try_from(job.page_bytes).expect("a page fits in memory");
        let parent = self.parent.as_ref().map(|(_, node)| node);
        let hashed: Vec<(usize, Option<Child>)> = self
            .slots
            .par_chunks(PAGES_PER_TASK)
            .zip(self.bytes.par_chunks(PAGES_PER_TASK * page_len))
            .flat_map_iter(|(slots, bytes)| {
                slots
                    .iter()
                    .zip(bytes.chunks(page_len))
                    .map(|(slot, page)| {
                        if is_zero(page) {
                            return (*slot, None);
                        }
                        let hash = *ChunkKind::Page.hash(page).as_bytes();
                        let same = parent
                            .and_then(|node| node.child(*slot))
                            .filter(|old| old.hash == hash);
                        (*slot, Some(same.unwrap_or(Child { hash, hint: None })))
                    })
            })
            .collect();
        for (slot, child) in hashed {
            self.node.set_child(slot, child);
        }
    }

    /// Asks the index for the pages that differ from the parent's.
    fn look_up(&mut self, sink: &Sink<'_>) -> Result<()> {
        let mut unknown: Vec<_> = self
            .slots
            .iter()
            .filter_map(|slot| {
                let child = self.node.child(*slot).filter(|c| c.hint.is_none())?;
                Some((self.node.child_id(child).key(), *slot))
            })
            .collect();
        unknown.sort_unstable();
        let keys: Vec<_> = unknown.iter().map(|(key, _)| *key).collect();
        for ((_, slot), hint) in unknown.into_iter().zip(sink.known(&keys)?) {
            let child = self.node.child(slot).map(|child| Child { hint, ..child });
            self.node.set_child(slot, child);
        }
        Ok(())
    }

    fn encode(&mut self, sink: &Sink<'_>, job: &Job<'_>) -> Result<()> {
        let page_len = usize::try_from(job.page_bytes).expect("a page fits in memory");
        let old = self.parent.as_ref();
        self.run = self
            .fresh
            .par_chunks(PAGES_PER_TASK)
            .map(|positions| {
                let mut run = EncodedRun::default();
                for position in positions {
                    let slot = self.slots[*position];
                    let child = self.node.child(slot).expect("a fresh page is not zero");
                    let page = &self.bytes[position * page_len..(position + 1) * page_len];
                    let base = old.and_then(|(_, node)| node.child(slot));
                    let id = self.node.child_id(child);
                    encode_into(sink.chunks(), id, page, base, &mut run)?;
                }
                Ok(run)
            })
            .try_reduce(EncodedRun::default, |mut all, run| {
                all.chunks.extend(run.chunks);
                all.bytes.extend_from_slice(&run.bytes);
                Ok::<_, crate::Error>(all)
            })?;
        if let Some(id) = self.new_id.filter(|_| self.encode_leaf) {
            let base = old.map(|(child, _)| *child);
            encode_into(sink.chunks(), id, &self.node.encode(), base, &mut self.run)?;
        }
        Ok(())
    }
}
