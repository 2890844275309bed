//! From a head to a leaf to a page.
//!
//! The head has the inner nodes, and where each leaf's record is. A record says where the
//! leaf's pages are; those that were new with it follow it in the pack. So the first
//! request of a leaf brings its record and what follows, as far as that is little, and a
//! page elsewhere is one more request.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use quick_cache::sync::Cache;
use snapstore_store::{ChunkSource, Error, Fits, NodeParts, Result, Waiting};

use crate::head::{PACK_HEAD_LEN, PagePlace, decode_leaf};
use crate::lazy::ahead::Ahead;
use crate::lazy::blocks::{Blocks, PackRef, Read};
use crate::lazy::cache::blocks_of;
use crate::lazy::failure::Failure;
use crate::lazy::stream::Stream;
use crate::opened::Opened;
use crate::protocol::Name;

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

/// A pack, and who reads it in order.
#[derive(Debug)]
struct Pack {
    pack: Arc<PackRef>,
    /// As far as the head tells, it is at least so long.
    end: u64,
    stream: Mutex<Stream>,
}

/// Where a leaf's record is.
#[derive(Clone, Copy, Debug)]
struct LeafAt {
    pack: usize,
    offset: u32,
    len: u32,
    /// Where the next record begins that the head knows of.
    next: u64,
}

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
    leaves: HashMap<[u8; 32], LeafAt>,
    packs: Vec<Pack>,
    /// Where in that list a pack is that a record names.
    numbers: HashMap<Name, usize>,
    pages: Cache<[u8; 32], Arc<Vec<PageAt>>>,
    blocks: Arc<Blocks>,
    ahead: Ahead,
}

impl Source {
    /// The chunks of a head.
    pub fn new(opened: Opened, blocks: Arc<Blocks>, ahead: Ahead) -> Self {
        let Opened {
            key,
            head,
            packs: listed,
            moved,
            ..
        } = opened;
        let mut source = Self {
            head_key: key,
            nodes: HashMap::new(),
            leaves: HashMap::new(),
            packs: Vec::new(),
            numbers: HashMap::new(),
            pages: Cache::new(LEAVES_CACHED),
            blocks,
            ahead,
        };
        let named = head.packs();
        for name in listed.iter().chain(moved.keys()).chain(&named) {
            source.add_pack(*name, *moved.get(name).unwrap_or(name));
        }
        let mut places = BTreeMap::new();
        for (id, leaf) in &head.leaves {
            places.insert((source.numbers[&leaf.pack], leaf.offset), (*id, leaf.len));
        }
        let mut after: Option<(usize, u32)> = None;
        for ((pack, offset), (id, len)) in places.into_iter().rev() {
            let next = match after {
                Some((of, next)) if of == pack => u64::from(next),
                _ => u64::MAX,
            };
            after = Some((pack, offset));
            let end = u64::from(offset) + u64::from(len);
            source.packs[pack].end = source.packs[pack].end.max(end);
            let leaf = LeafAt {
                pack,
                offset,
                len,
                next,
            };
            source.leaves.insert(id, leaf);
        }
        for (level, canonical) in head.nodes {
            if let Some(node) = NodeParts::parse(&canonical, level) {
                source.nodes.insert(node.id(), (level, canonical));
            }
        }
        source
    }

    /// What was read so far.
    pub fn blocks(&self) -> &Blocks {
        &self.blocks
    }

    fn add_pack(&mut self, name: Name, at: Name) {
        if self.numbers.contains_key(&name) {
            return;
        }
        let known = self.numbers.get(&at).copied();
        let number = known.unwrap_or_else(|| {
            self.packs.push(Pack {
                pack: Arc::new(PackRef {
                    name: at,
                    key: at.pack_key(),
                }),
                end: PACK_HEAD_LEN as u64,
                stream: Mutex::default(),
            });
            self.packs.len() - 1
        });
        self.numbers.insert(name, number);
        self.numbers.insert(at, number);
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
            self.blocks.count_thrown_away();
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
        let end = ahead.end.min(blocks_of(&(0..pack.end)).end() + 1);
        if ahead.start < end {
            self.ahead.give(&pack.pack, ahead.start..end);
        }
    }

    /// A leaf's canonical part, and where its pages are.
    fn leaf(&self, id: &[u8; 32], waiting: Waiting) -> Result<(Vec<u8>, Arc<Vec<PageAt>>)> {
        let leaf = self.leaves.get(id).copied();
        let leaf = leaf.ok_or_else(|| self.damaged(&self.head_key, NO_NODE))?;
        if leaf.len > LONGEST_BYTES {
            return Err(self.damaged(&self.head_key, ODD_PLACE));
        }
        let pack = &self.packs[leaf.pack];
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
            let number = self.numbers.get(&name).copied();
            let number = number.ok_or_else(|| self.damaged(&pack.pack.key, NO_PACK))?;
            if len > LONGEST_BYTES {
                return Err(self.damaged(&pack.pack.key, ODD_PLACE));
            }
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
        let pack = &self.packs[page.pack as usize];
        let start = u64::from(page.offset);
        let range = start..start + u64::from(page.len.max(1));
        self.read(pack, (&range, &range), waiting, OTHER_PAGE, |bytes| {
            fits(page.encoding, bytes).then_some(())
        })
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.blocks.end();
    }
}
