//! From a head to a leaf to a page.
//!
//! The head has the inner nodes, and where each leaf's record is. A record says where the
//! leaf's pages are; those that were new with it follow it in the pack. So the first
//! request of a leaf brings its record and what follows, as far as that is little, and a
//! page elsewhere is one more request.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, PoisonError};

use quick_cache::sync::Cache;
use snapstore_store::{ChunkSource, Error, Fits, Result, Traffic, Waiting, WorkingSet};

use crate::head::{PagePlace, decode_leaf};
use crate::lazy::ahead::Ahead;
use crate::lazy::blocks::{Blocks, Read};
use crate::lazy::cache::blocks_of;
use crate::lazy::counts::Cause;
use crate::lazy::failure::Failure;
use crate::lazy::fill::Fill;
use crate::lazy::places::{Pack, Places, nodes_of};
use crate::lazy::recorded::{Recorded, touched};
use crate::opened::Opened;

/// How much of what follows a leaf's record is asked for with it.
const GROUP_BYTES: u64 = 256 << 10;
/// A record or a page that is longer is none.
const LONGEST_BYTES: u32 = 128 << 10;
/// Decoded records kept, of about 8 KiB each.
const LEAVES_CACHED: usize = 1024;

const ODD_PLACE: &str = "it names a place that is longer than any";
const OTHER_PAGE: &str = "a page in it is not the one that its leaf names";
const OTHER_LEAF: &str = "it has no leaf with the id that its head names";
const NO_NODE: &str = "it refers to a node that it does not hold";
const NO_PACK: &str = "it has a leaf that names a pack which its head does not list";

/// Where the page of a slot is.
#[derive(Clone, Copy, Debug)]
struct PageAt {
    slot: u16,
    pack: u32,
    offset: u32,
    len: u32,
    encoding: u8,
}

/// The chunks of one snapshot of a bucket.
#[derive(Debug)]
pub struct Source {
    head_key: String,
    nodes: HashMap<[u8; 32], (u8, Vec<u8>)>,
    places: Arc<Places>,
    pages: Cache<[u8; 32], Arc<Vec<PageAt>>>,
    blocks: Arc<Blocks>,
    ahead: Ahead,
    /// Where it is kept what is touched first, if it is.
    recorded: Option<Recorded>,
}

impl Source {
    /// The chunks of a head. The working set is asked for at once, that of the head and then what
    /// this host has recorded; all the rest, if it is wanted, when there is nothing else to do.
    pub fn new(
        opened: Opened,
        blocks: Arc<Blocks>,
        ahead: Ahead,
        recorded: Option<Recorded>,
        (prefetches, fills): (bool, bool),
    ) -> Self {
        let places = Arc::new(Places::of(&opened.head, &opened.packs, &opened.moved));
        let first = places.first.clone().filter(|_| prefetches);
        if let Some((pack, part)) = first.filter(|_| blocks.keeps()) {
            let blocks = blocks_of(&part);
            ahead.give_working_set(&places.packs[pack].pack, *blocks.start()..*blocks.end() + 1);
        }
        if let Some(recorded) = recorded.as_ref().filter(|_| prefetches && blocks.keeps()) {
            ahead.give_touched(touched(recorded, &opened.head, &places));
        }
        if fills && blocks.keeps() {
            ahead.give_fill(Fill::new(&places));
        }
        Self {
            head_key: opened.key,
            nodes: nodes_of(opened.head.nodes),
            places,
            pages: Cache::new(LEAVES_CACHED),
            blocks,
            ahead,
            recorded,
        }
    }

    /// Whether some of all the rest is still to be read.
    pub fn fills(&self) -> bool {
        self.ahead.fills()
    }

    /// What was read so far.
    pub fn blocks(&self) -> &Blocks {
        &self.blocks
    }

    fn told(&self, failure: Failure) -> Error {
        failure.told(&self.head_key)
    }

    fn damaged(&self, key: &str, reason: &'static str) -> Error {
        let key = key.to_owned();
        self.told(Failure::Damaged { key, reason })
    }

    /// Reads a part of a pack, and looks whether it fits. If not, it is thrown away and read
    /// anew, once.
    fn read<T>(
        &self,
        pack: &Pack,
        (range, wanted): (&Range<u64>, &Range<u64>),
        waiting: Waiting,
        reason: &'static str,
        mut fits: impl FnMut(&[u8]) -> Option<T>,
    ) -> Result<T> {
        let waits = waiting == Waiting::Yes;
        for is_last in [false, true] {
            let read = self.blocks.read(&pack.pack, range, wanted, waits);
            let (bytes, waited) = match read.map_err(|failure| self.told(failure))? {
                Read::Bytes { bytes, waited } => (bytes, waited),
                Read::NotAtHand => return Err(Error::NotAtHand),
            };
            if let Some(found) = fits(&bytes) {
                self.read_ahead(pack, range, waited);
                return Ok(found);
            }
            if !waits {
                // Who waits throws it away.
                return Err(Error::NotAtHand);
            }
            self.blocks.forget(&pack.pack, range);
            self.blocks.counts.thrown_away();
            if !is_last {
                tracing::warn!(pack = pack.pack.key, "read anew: {reason}");
            }
        }
        Err(self.damaged(&pack.pack.key, reason))
    }

    fn read_ahead(&self, pack: &Pack, range: &Range<u64>, waited: bool) {
        let blocks = blocks_of(range);
        let touched = {
            let mut stream = pack.stream.lock().unwrap_or_else(PoisonError::into_inner);
            stream.touched(*blocks.start(), *blocks.end(), waited)
        };
        let Some(ahead) = touched else {
            return;
        };
        let end = ahead.end.min(blocks_of(&(0..pack.end())).end() + 1);
        if ahead.start < end {
            self.ahead.give(&pack.pack, ahead.start..end);
        }
    }

    /// A leaf's canonical part, and where its pages are.
    fn leaf(&self, id: &[u8; 32], waiting: Waiting) -> Result<(Vec<u8>, Arc<Vec<PageAt>>)> {
        let leaf = self.places.leaves.get(id).copied();
        let leaf = leaf.ok_or_else(|| self.damaged(&self.head_key, NO_NODE))?;
        if leaf.len > LONGEST_BYTES {
            return Err(self.damaged(&self.head_key, ODD_PLACE));
        }
        let pack = &self.places.packs[leaf.pack];
        let start = u64::from(leaf.offset);
        let record = start..start + u64::from(leaf.len);
        let group = start..leaf.next.min(record.end + GROUP_BYTES).max(record.end);
        let decode = |bytes: &[u8]| decode_leaf(id, bytes).ok();
        let (node, places) = self.read(pack, (&record, &group), waiting, OTHER_LEAF, decode)?;
        let pages = node.children.iter().zip(places).map(|((slot, _), place)| {
            let PagePlace {
                pack: name,
                offset,
                len,
                encoding,
            } = place;
            let number = self.places.numbers.get(&name).copied();
            let number = number.ok_or_else(|| self.damaged(&pack.pack.key, NO_PACK))?;
            if len > LONGEST_BYTES {
                return Err(self.damaged(&pack.pack.key, ODD_PLACE));
            }
            self.places.packs[number].reaches(u64::from(offset) + u64::from(len));
            Ok(PageAt {
                slot: u16::try_from(*slot).expect("a slot is below 512"),
                pack: u32::try_from(number).expect("a head lists fewer packs"),
                offset,
                len,
                encoding,
            })
        });
        let pages = Arc::new(pages.collect::<Result<Vec<_>>>()?);
        self.pages.insert(*id, pages.clone());
        Ok((node.canonical, pages))
    }
}

impl ChunkSource for Source {
    fn node(&self, id: &[u8; 32], level: u8, waiting: Waiting) -> Result<Vec<u8>> {
        if level == 0 {
            return Ok(self.leaf(id, waiting)?.0);
        }
        match self.nodes.get(id) {
            Some((of, canonical)) if *of == level => Ok(canonical.clone()),
            _ => Err(self.damaged(&self.head_key, NO_NODE)),
        }
    }

    fn page(
        &self,
        leaf: &[u8; 32],
        slot: usize,
        waiting: Waiting,
        fits: &mut Fits<'_>,
    ) -> Result<()> {
        let pages = match self.pages.get(leaf) {
            Some(pages) => pages,
            None => self.leaf(leaf, waiting)?.1,
        };
        let at = pages.binary_search_by_key(&slot, |page| usize::from(page.slot));
        let page = at.ok().map(|at| pages[at]);
        let page = page.ok_or_else(|| self.damaged(&self.head_key, NO_NODE))?;
        let pack = &self.places.packs[page.pack as usize];
        let start = u64::from(page.offset);
        let range = start..start + u64::from(page.len.max(1));
        self.read(pack, (&range, &range), waiting, OTHER_PAGE, |bytes| {
            fits(page.encoding, bytes).then_some(())
        })
    }

    fn working_set(&self, image: &str) -> Option<WorkingSet> {
        self.recorded.as_ref()?.read(image)
    }

    fn keep_working_set(&self, image: &str, set: &WorkingSet) {
        if let Some(recorded) = &self.recorded
            && let Err(error) = recorded.keep(image, set)
        {
            tracing::debug!(%error, "a working set is not kept");
        }
    }

    fn traffic(&self) -> Vec<Traffic> {
        let sum = self.blocks.counts.sum();
        let all = Cause::ALL.iter().map(|cause| {
            // Nothing else is asked for twice.
            let is_demand = *cause == Cause::Demand;
            let of = self.blocks.counts.of(*cause);
            Traffic {
                cause: cause.name().to_owned(),
                requests: of.requests,
                failed_requests: of.failed,
                bytes: of.bytes,
                hedges: if is_demand { sum.hedges } else { 0 },
                hedges_won: if is_demand { sum.hedges_won } else { 0 },
            }
        });
        all.collect()
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.blocks.end();
    }
}
