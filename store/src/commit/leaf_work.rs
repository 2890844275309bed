//! One leaf of an image on its way into the store: its pages are read and compressed, then it
//! gets its places.

use std::cell::RefCell;
use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use crate::commit::chunk_writer::{ChunkWriter, Claimed, EncodedRun, encode_into};
use crate::commit::encoded_pages::EncodedPages;
use crate::commit::source::Source;
use crate::error::Result;
use crate::format::node::{Child, FAN_OUT, Node};
use crate::id::{ChunkId, ChunkKind};
use crate::page::is_zero;
use crate::page_hashes::page_hashes;
use crate::tree::build::HolePolicy;
use crate::tree::read::{Tree, node_id};
use crate::tree::shape::slot;

/// Bytes that are read, hashed and compressed at a time: they fit into a core's own cache.
const PIECE_BYTES: u64 = 256 << 10;

thread_local! {
    static PIECE: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// What is to be committed, and after what.
pub(super) struct Job<'a> {
    pub source: &'a Source<'a>,
    pub parent: Option<Tree>,
    pub counted_from: Option<Option<Tree>>,
    pub holes: HolePolicy,
    pub page_bytes: u64,
    pub pages: u64,
}

/// Pages of the leaves that were taken up, before and now.
#[derive(Default)]
pub(super) struct Counts {
    pub old: u64,
    pub new: u64,
    pub changed: u64,
    /// Of what the predecessor counts as changed.
    pub changed_before: u64,
}

/// One leaf on its way through a batch.
pub(super) struct LeafWork {
    pub index: u64,
    /// The slots whose pages the input has data for.
    slots: Vec<usize>,
    parent: Option<(Child, Arc<Node>)>,
    /// The leaf that changes are counted from, if that is not the parent's.
    counted_from: Option<Option<Arc<Node>>>,
    node: Node,
    /// The node's id once it is known to be new.
    new_id: Option<ChunkId>,
    /// The pages that nobody had when they were read.
    encoded: EncodedPages,
    /// Whether the leaf itself has a place of its own, which waits for its bytes.
    is_claimed: bool,
    leaf: EncodedRun,
    /// What it became.
    pub result: Option<Child>,
}

/// A piece of a leaf's pages: `None` for zero.
struct Piece {
    children: Vec<Option<Child>>,
    encoded: EncodedPages,
    told: Option<Told>,
}

/// What the pages of a piece that differ from the parent's tell of the others.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Told {
    /// All are in the store: the leaf may be, too.
    Known,
    /// Some are new.
    New,
}

impl LeafWork {
    pub fn new(index: u64) -> Self {
        Self {
            index,
            slots: Vec::new(),
            parent: None,
            counted_from: None,
            node: Node::empty(0),
            new_id: None,
            encoded: EncodedPages::default(),
            is_claimed: false,
            leaf: EncodedRun::default(),
            result: None,
        }
    }

    /// Reads the leaf's pages, finds out what is in the store, and compresses what is not.
    pub fn prepare(&mut self, sink: &ChunkWriter<'_>, job: &Job<'_>) -> Result<()> {
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
        let pieces = self.pieces(job)?;
        let hashed_only = self.read_pages(sink, job, pieces)?;
        if self.is_known(sink)? {
            return Ok(());
        }
        if !hashed_only.is_empty() {
            // They are looked up after all. What the input has now is what counts.
            self.read_all(sink, job, &hashed_only, true)?;
            if self.is_known(sink)? {
                return Ok(());
            }
        }
        self.new_id = Some(self.node.id());
        Ok(())
    }

    /// Whether there is nothing to store: the leaf is zero, its parent's, or in the store.
    fn is_known(&mut self, sink: &ChunkWriter<'_>) -> Result<bool> {
        if self.node.is_zero() {
            return Ok(true);
        }
        let id = self.node.id();
        self.result = match &self.parent {
            Some((parent, leaf)) if node_id(*parent) == id && sink.pages_in_place(leaf)? => {
                Some(*parent)
            }
            _ => sink.known_leaf(id)?,
        };
        Ok(self.result.is_some())
    }

    /// Gives the pages that are not in the store their places, and appends them.
    pub fn store_pages(&mut self, sink: &ChunkWriter<'_>) -> Result<()> {
        let encoded = std::mem::take(&mut self.encoded);
        if self.new_id.is_none() {
            return Ok(());
        }
        let mut fresh = Vec::with_capacity(encoded.slots.len());
        let mut at_hand = encoded.slots.iter().zip(&encoded.run.chunks).peekable();
        for slot in self.slots.iter().copied() {
            let Some(child) = self.node.child(slot).filter(|child| child.hint.is_none()) else {
                continue;
            };
            let at = match at_hand.next_if(|(its, _)| **its == slot) {
                Some((_, chunk)) => match sink.claim_key(chunk.key, fresh.len())? {
                    Claimed::Already(at) => at,
                    Claimed::New(at) => {
                        fresh.push(slot);
                        at
                    }
                },
                // It had a place when it was read, maybe in a pack that is full by now.
                None => sink.place_of(self.node.child_id(child))?,
            };
            let hint = Some(at);
            self.node.set_child(slot, Some(Child { hint, ..child }));
        }
        sink.append(encoded.only(&fresh))
    }

    /// Gives a leaf that is not in the store its place, after `pending` others.
    pub fn claim_leaf(&mut self, sink: &ChunkWriter<'_>, pending: &mut usize) -> Result<()> {
        let Some(id) = self.new_id else {
            return Ok(());
        };
        let at = match sink.known(&[id])?[0] {
            Some(at) => at,
            None => match sink.claim(id, *pending)? {
                Claimed::Already(at) => at,
                Claimed::New(at) => {
                    self.is_claimed = true;
                    *pending += 1;
                    at
                }
            },
        };
        self.result = Some(Child {
            hash: *id.as_bytes(),
            hint: Some(at),
        });
        Ok(())
    }

    /// Compresses a leaf that has got a place.
    pub fn encode_leaf(&mut self, sink: &ChunkWriter<'_>) -> Result<()> {
        let Some(id) = self.new_id.filter(|_| self.is_claimed) else {
            return Ok(());
        };
        let base = self.parent.as_ref().map(|(child, _)| *child);
        encode_into(sink, id, &self.node.encode(), base, &mut self.leaf)
    }

    /// Appends it.
    pub fn append_leaf(&mut self, sink: &ChunkWriter<'_>) -> Result<()> {
        sink.append(std::mem::take(&mut self.leaf))
    }

    fn first_page(&self) -> u64 {
        self.index * FAN_OUT as u64
    }

    /// Adds what it was before, and what it is now.
    pub fn count(&self, counts: &mut Counts) {
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

    /// Reads the pages that have data. Where the first of them that the parent does not have are in
    /// the store, so may be the whole leaf, which is found by its own id: then the others are
    /// hashed and not looked up, and those pieces of them are returned that may have to be.
    fn read_pages(
        &mut self,
        sink: &ChunkWriter<'_>,
        job: &Job<'_>,
        pieces: Vec<Range<u64>>,
    ) -> Result<Vec<Range<u64>>> {
        let mut pieces = pieces.into_iter();
        let mut told = None;
        while told.is_none()
            && let Some(pages) = pieces.next()
        {
            told = self.read_all(sink, job, &[pages], true)?;
        }
        let others: Vec<Range<u64>> = pieces.collect();
        let looks_up = told != Some(Told::Known);
        self.read_all(sink, job, &others, looks_up)?;
        if looks_up {
            return Ok(Vec::new());
        }
        let is_left = |pages: &Range<u64>| {
            pages.clone().any(|page| {
                let child = self.node.child(slot(page, 0));
                child.is_some_and(|child| child.hint.is_none())
            })
        };
        Ok(others.into_iter().filter(is_left).collect())
    }

    /// Reads pieces, side by side. Returns what the first one told.
    fn read_all(
        &mut self,
        sink: &ChunkWriter<'_>,
        job: &Job<'_>,
        pieces: &[Range<u64>],
        looks_up: bool,
    ) -> Result<Option<Told>> {
        let this: &Self = self;
        let read: Vec<Piece> = pieces
            .par_iter()
            .map(|pages| this.read_piece(sink, job, pages, looks_up))
            .collect::<Result<_>>()?;
        let told = read.first().and_then(|piece| piece.told);
        for (pages, piece) in pieces.iter().zip(read) {
            for (page, child) in pages.clone().zip(piece.children) {
                let slot = slot(page, 0);
                if self.slots.last().is_none_or(|last| *last < slot) {
                    self.slots.push(slot);
                }
                self.node.set_child(slot, child);
            }
            self.encoded.add(piece.encoded);
        }
        Ok(told)
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

    fn read_piece(
        &self,
        sink: &ChunkWriter<'_>,
        job: &Job<'_>,
        pages: &Range<u64>,
        looks_up: bool,
    ) -> Result<Piece> {
        PIECE.with_borrow_mut(|bytes| {
            self.read(sink, job, pages, bytes)?;
            let page_len = sink.chunks().page_size().len();
            let bytes: Vec<&[u8]> = bytes.chunks(page_len).collect();
            let data = (0..).zip(bytes.iter().copied());
            let data = data.filter(|(_, page)| !is_zero(page));
            let (numbers, data): (Vec<usize>, Vec<&[u8]>) = data.unzip();
            let mut children = vec![None; bytes.len()];
            for (number, hash) in numbers.into_iter().zip(page_hashes(&data)) {
                let page = pages.start + number as u64;
                children[number] = Some(self.child(sink, page, hash)?);
            }
            let mut piece = Piece {
                children,
                encoded: EncodedPages::default(),
                told: None,
            };
            if looks_up {
                piece.told = self.look_up(sink, &mut piece.children)?;
                piece.encoded = self.encode_unknown(sink, pages.start, &bytes, &piece.children)?;
            }
            Ok(piece)
        })
    }

    /// The parent's child if the page is equal, and may be used; else one that is nowhere yet.
    fn child(&self, sink: &ChunkWriter<'_>, page: u64, hash: [u8; 32]) -> Result<Child> {
        let id = ChunkId::from_hash(ChunkKind::Page, hash);
        match self.old_page(page).filter(|old| old.hash == hash) {
            Some(old) if sink.in_place(id, old.hint)? => Ok(old),
            _ => Ok(Child { hash, hint: None }),
        }
    }

    /// Asks the index for the pages that differ from the parent's.
    fn look_up(
        &self,
        sink: &ChunkWriter<'_>,
        children: &mut [Option<Child>],
    ) -> Result<Option<Told>> {
        let unknown: Vec<&mut Child> = children
            .iter_mut()
            .flatten()
            .filter(|child| child.hint.is_none())
            .collect();
        if unknown.is_empty() {
            return Ok(None);
        }
        let ids: Vec<_> = unknown
            .iter()
            .map(|child| self.node.child_id(**child))
            .collect();
        let known = sink.known(&ids)?;
        let told = match known.iter().all(Option::is_some) {
            true => Told::Known,
            false => Told::New,
        };
        for (child, hint) in unknown.into_iter().zip(known) {
            child.hint = hint;
        }
        Ok(Some(told))
    }

    /// Compresses the pages that are nowhere yet: once, what a piece has more than once.
    fn encode_unknown(
        &self,
        sink: &ChunkWriter<'_>,
        first_page: u64,
        pages: &[&[u8]],
        children: &[Option<Child>],
    ) -> Result<EncodedPages> {
        let mut encoded = EncodedPages::default();
        let mut seen = HashSet::new();
        for (page, (bytes, child)) in (first_page..).zip(pages.iter().zip(children)) {
            let Some(child) = child.filter(|child| child.hint.is_none()) else {
                continue;
            };
            let id = self.node.child_id(child);
            if seen.insert(child.hash) && sink.claimed(id).is_none() {
                encode_into(sink, id, bytes, self.old_page(page), &mut encoded.run)?;
                encoded.slots.push(slot(page, 0));
            }
        }
        Ok(encoded)
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
}
