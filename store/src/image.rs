//! Reading an image as a flat file: bytes, data and holes.

use std::cell::RefCell;
use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use crate::chunk_source::{ForeignChunks, Waiting, WaitingFor};
use crate::chunks::{Chunks, NODES_CACHED};
use crate::commit::read_at::ReadAt;
use crate::error::{Error, Result};
use crate::format::node::{Child, FAN_OUT, Node};
use crate::manifest::Image;
use crate::page::PageSize;
use crate::pin::Pin;
use crate::tree::read::{Nodes, Tree};
use crate::tree::shape::slot;

/// Leaves that are read ahead: others in the cache are in use.
const LEAVES_LOADED: usize = NODES_CACHED / 4 * 3;

thread_local! {
    /// Holds a page of which only a part is wanted.
    static PARTIAL: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// One image, read by position. Cheap to clone; any number of threads may read.
/// One of a [`crate::Snapshot`] keeps that whole while it lives.
#[derive(Clone)]
pub struct ImageReader {
    pages: Pages,
    tree: Tree,
    size_bytes: u64,
    /// Keeps the snapshot whole while this lives.
    pin: Option<Arc<Pin>>,
}

/// Where an image's pages are.
#[derive(Clone)]
enum Pages {
    /// In this store.
    Own(Arc<Chunks>),
    /// Elsewhere.
    Foreign(Arc<ForeignChunks>),
}

/// The same for one reading.
enum Reading<'a> {
    Own(&'a Chunks),
    Foreign(WaitingFor<'a>),
}

impl Pages {
    fn page_size(&self) -> PageSize {
        match self {
            Self::Own(chunks) => chunks.page_size(),
            Self::Foreign(chunks) => chunks.page_size(),
        }
    }

    fn reading(&self, waiting: Waiting) -> Reading<'_> {
        match self {
            Self::Own(chunks) => Reading::Own(chunks),
            Self::Foreign(chunks) => Reading::Foreign(chunks.waiting(waiting)),
        }
    }
}

impl Reading<'_> {
    fn page(&self, leaf: Child, slot: usize, page: Child, out: &mut [u8]) -> Result<()> {
        match self {
            Self::Own(chunks) => chunks.page(page, out),
            Self::Foreign(chunks) => chunks.page(&leaf.hash, slot, page, out),
        }
    }
}

impl Nodes for Reading<'_> {
    fn node(&self, child: Child, level: u8) -> Result<Arc<Node>> {
        match self {
            Self::Own(chunks) => chunks.node(child, level),
            Self::Foreign(chunks) => chunks.node(child, level),
        }
    }
}

impl fmt::Debug for ImageReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ImageReader")
            .field("size_bytes", &self.size_bytes)
            .field("pin", &self.pin)
            .finish_non_exhaustive()
    }
}

/// An image of one snapshot can be committed to another store.
impl ReadAt for ImageReader {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read_exact_at(&self, out: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        match self.read_at(out, offset_bytes).map_err(io::Error::other)? {
            read if read == out.len() => Ok(()),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    fn next_data(&self, from_bytes: u64) -> io::Result<Option<Range<u64>>> {
        let seek = |from, region| self.seek(from, region).map_err(io::Error::other);
        let Some(start) = seek(from_bytes, Region::Data)? else {
            return Ok(None);
        };
        let end = seek(start, Region::Hole)?;
        Ok(Some(start..end.unwrap_or(self.size_bytes)))
    }
}

/// Which part of a file to look for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Region {
    /// Bytes that are stored.
    Data,
    /// A run of zero pages, or the end of the file.
    Hole,
}

impl ImageReader {
    pub(crate) fn new(chunks: Arc<Chunks>, image: &Image) -> Self {
        Self::of(Pages::Own(chunks), image)
    }

    pub(crate) fn foreign(chunks: Arc<ForeignChunks>, image: &Image) -> Self {
        Self::of(Pages::Foreign(chunks), image)
    }

    fn of(pages: Pages, image: &Image) -> Self {
        Self {
            pages,
            tree: image.tree(),
            size_bytes: image.size_bytes,
            pin: None,
        }
    }

    pub(crate) fn keeping(mut self, pin: Arc<Pin>) -> Self {
        self.pin = Some(pin);
        self
    }

    /// The length of the image in bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Reads from `offset_bytes` on until `out` is full or the image ends.
    /// Returns the number of bytes read. Every stored byte has been checked
    /// against its page's id.
    ///
    /// # Errors
    /// [`crate::Error::Damaged`] if a page is missing or damaged; `out` then
    /// holds nothing useful.
    pub fn read_at(&self, out: &mut [u8], offset_bytes: u64) -> Result<usize> {
        self.read(&self.pages.reading(Waiting::Yes), out, offset_bytes)
    }

    /// The same if all of it is at hand: else `None`, and [`ImageReader::read_at`] waits
    /// for whoever has it. Of an image of this store all is at hand.
    ///
    /// # Errors
    /// As [`ImageReader::read_at`].
    pub fn read_at_hand(&self, out: &mut [u8], offset_bytes: u64) -> Result<Option<usize>> {
        match self.read(&self.pages.reading(Waiting::No), out, offset_bytes) {
            Err(Error::NotAtHand) => Ok(None),
            other => other.map(Some),
        }
    }

    /// Whether a read may have to wait for whoever has the pages.
    #[must_use]
    pub fn may_wait(&self) -> bool {
        matches!(self.pages, Pages::Foreign(_))
    }

    fn read(&self, pages: &Reading<'_>, out: &mut [u8], offset_bytes: u64) -> Result<usize> {
        let available = self.size_bytes.saturating_sub(offset_bytes);
        let len = usize::try_from(available).map_or(out.len(), |room| room.min(out.len()));
        let page_len = self.pages.page_size().len();
        let page_bytes = self.pages.page_size().bytes();
        let mut whole = Vec::new();
        let mut leaf = None;
        let mut rest = &mut out[..len];
        let mut done = 0;
        while done < len {
            let at = offset_bytes + done as u64;
            let page = at / page_bytes;
            let skip = usize::try_from(at % page_bytes).expect("a page fits in memory");
            let part = (page_len - skip).min(len - done);
            // Consecutive pages mostly share a leaf: look it up once.
            if leaf.is_none() || slot(page, 0) == 0 {
                leaf = Some(self.tree.node_over(pages, 0, page)?);
            }
            let at_slot = slot(page, 0);
            let child = match &leaf {
                Some(Some((leaf, node))) => node.child(at_slot).map(|child| (*leaf, child)),
                _ => None,
            };
            let (part_out, after) = std::mem::take(&mut rest).split_at_mut(part);
            rest = after;
            match (child, pages) {
                (None, _) => part_out.fill(0),
                (Some((_, child)), Reading::Own(_)) if part == page_len => {
                    whole.push((child, part_out));
                }
                (Some((leaf, child)), _) if part == page_len => {
                    pages.page(leaf, at_slot, child, part_out)?;
                }
                (Some((leaf, child)), _) => PARTIAL.with_borrow_mut(|whole| {
                    whole.resize(page_len, 0);
                    pages.page(leaf, at_slot, child, whole)?;
                    part_out.copy_from_slice(&whole[skip..skip + part]);
                    Ok::<_, crate::Error>(())
                })?,
            }
            done += part;
        }
        if let Reading::Own(chunks) = pages {
            chunks.pages(&mut whole)?;
        }
        Ok(len)
    }

    /// Reads pages by number, each into its own part of `out`, which has room for just that many.
    /// What is beyond the end of the image is zero.
    ///
    /// # Errors
    /// As [`ImageReader::read_at`].
    ///
    /// # Panics
    /// If `out` has another length.
    pub fn read_pages(&self, pages: &[u64], out: &mut [u8]) -> Result<()> {
        let page_len = self.pages.page_size().len();
        assert_eq!(out.len(), pages.len() * page_len, "room for each page");
        let reading = self.pages.reading(Waiting::Yes);
        let mut whole = Vec::with_capacity(pages.len());
        for (page, out) in pages.iter().zip(out.chunks_exact_mut(page_len)) {
            let leaf = match *page < self.tree.shape().pages() {
                true => self.tree.node_over(&reading, 0, *page)?,
                false => None,
            };
            let at_slot = slot(*page, 0);
            let child = leaf.and_then(|(leaf, node)| Some((leaf, node.child(at_slot)?)));
            match (child, &reading) {
                (None, _) => out.fill(0),
                (Some((_, child)), Reading::Own(_)) => whole.push((child, out)),
                (Some((leaf, child)), _) => reading.page(leaf, at_slot, child, out)?,
            }
        }
        match &reading {
            Reading::Own(chunks) => chunks.pages(&mut whole),
            Reading::Foreign(_) => Ok(()),
        }
    }

    /// Reads the leaves of the image's tree, as many as are kept, so that no reading has to
    /// wait for one. Ends early once `goes_on` says so.
    ///
    /// # Errors
    /// [`crate::Error::Damaged`] if a leaf is missing or damaged.
    pub fn load_leaves(&self, goes_on: &dyn Fn() -> bool) -> Result<()> {
        let pages = self.tree.shape().pages();
        let reading = self.pages.reading(Waiting::Yes);
        let mut loaded = 0;
        for first in (0..pages).step_by(FAN_OUT) {
            if loaded == LEAVES_LOADED || !goes_on() {
                break;
            }
            loaded += usize::from(self.tree.node_over(&reading, 0, first)?.is_some());
        }
        Ok(())
    }

    /// Has the disk begin to read these pages, by number, so that reading them soon need not wait for it. What
    /// a page is a delta of is not asked for, nor what is elsewhere; of what cannot be found nothing is
    /// said: whoever reads it is told.
    pub fn ask_for(&self, pages: impl Iterator<Item = u64>) {
        let Pages::Own(chunks) = &self.pages else {
            return;
        };
        let reading = self.pages.reading(Waiting::No);
        for page in pages.filter(|page| *page < self.tree.shape().pages()) {
            if let Ok(Some((_, leaf))) = self.tree.node_over(&reading, 0, page)
                && let Some(child) = leaf.child(slot(page, 0))
            {
                chunks.ask_for_page(child);
            }
        }
    }

    /// The first position from `offset_bytes` on that lies in data or in a hole,
    /// in the manner of lseek(2). The end of the file is a hole. `None` if there
    /// is no such position before the end.
    ///
    /// # Errors
    /// [`crate::Error::Damaged`] if a tree node is missing or damaged.
    pub fn seek(&self, offset_bytes: u64, region: Region) -> Result<Option<u64>> {
        self.seek_waiting(offset_bytes, region, Waiting::Yes)
    }

    /// The same by what is at hand, so that nobody waits: where a leaf of the tree is elsewhere, all
    /// that it covers counts as data, be it zero or not. Of an image of this store all is at hand.
    ///
    /// # Errors
    /// As [`ImageReader::seek`].
    pub fn seek_at_hand(&self, offset_bytes: u64, region: Region) -> Result<Option<u64>> {
        self.seek_waiting(offset_bytes, region, Waiting::No)
    }

    fn seek_waiting(
        &self,
        offset_bytes: u64,
        region: Region,
        waiting: Waiting,
    ) -> Result<Option<u64>> {
        if offset_bytes >= self.size_bytes {
            return Ok(None);
        }
        let page_bytes = self.pages.page_size().bytes();
        let page = offset_bytes / page_bytes;
        let reading = self.pages.reading(waiting);
        let found = self.tree.next(&reading, page, region == Region::Data)?;
        let position = found.map(|page| (page * page_bytes).max(offset_bytes));
        Ok(match region {
            Region::Data => position,
            Region::Hole => Some(position.unwrap_or(self.size_bytes).min(self.size_bytes)),
        })
    }
}
