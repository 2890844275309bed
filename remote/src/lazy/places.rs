//! Where the leaves of a head are, and which packs they need.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use snapstore_store::NodeParts;

use crate::head::{Head, PagePlace};
use crate::lazy::blocks::PackRef;
use crate::lazy::cache::blocks_of;
use crate::lazy::stream::Stream;
use crate::pack::{PACK_CHECK_LEN, PACK_HEAD_LEN};
use crate::protocol::Name;

/// A pack, and who reads it in order.
#[derive(Debug)]
pub struct Pack {
    pub pack: Arc<PackRef>,
    /// As far as is known, it is at least so long.
    end: AtomicU64,
    pub stream: Mutex<Stream>,
}

/// Where a leaf's record is.
#[derive(Clone, Copy, Debug)]
pub struct LeafAt {
    pub pack: usize,
    pub offset: u32,
    pub len: u32,
    /// Where the next record begins that the head knows of.
    pub next: u64,
}

/// All places of a head.
#[derive(Debug, Default)]
pub struct Places {
    pub leaves: HashMap<[u8; 32], LeafAt>,
    pub packs: Vec<Pack>,
    /// Where in that list a pack is that a record names.
    pub numbers: HashMap<Name, usize>,
    /// What is to be read first: a part of a pack.
    pub first: Option<(usize, Range<u64>)>,
}

impl Pack {
    pub fn end(&self) -> u64 {
        self.end.load(Ordering::Relaxed)
    }

    /// Something of it ends there.
    pub fn reaches(&self, end: u64) {
        self.end.fetch_max(end, Ordering::Relaxed);
    }
}

impl Places {
    /// Those of a head, which lists these packs; some were copied.
    pub fn of(head: &Head, listed: &[Name], moved: &BTreeMap<Name, Name>) -> Self {
        let mut places = Self::default();
        let named = head.packs();
        for name in listed.iter().chain(moved.keys()).chain(&named) {
            places.add_pack(*name, *moved.get(name).unwrap_or(name));
        }
        let mut records = BTreeMap::new();
        for (id, leaf) in &head.leaves {
            records.insert((places.numbers[&leaf.pack], leaf.offset), (*id, leaf.len));
        }
        let mut after: Option<(usize, u32)> = None;
        for ((pack, offset), (id, len)) in records.into_iter().rev() {
            let next = match after {
                Some((of, next)) if of == pack => u64::from(next),
                _ => u64::MAX,
            };
            after = Some((pack, offset));
            places.packs[pack].reaches(u64::from(offset) + u64::from(len));
            let leaf = LeafAt {
                pack,
                offset,
                len,
                next,
            };
            places.leaves.insert(id, leaf);
        }
        if let Some(first) = &head.first {
            let end = |len: u32| u64::from(len).saturating_sub(PACK_CHECK_LEN as u64);
            for (name, len) in &first.lengths {
                if let Some(number) = places.numbers.get(name) {
                    places.packs[*number].reaches(end(*len));
                }
            }
            let pack = places.numbers.get(&first.pack);
            places.first = pack.map(|pack| (*pack, PACK_HEAD_LEN as u64..u64::from(first.end)));
        }
        places
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
                end: AtomicU64::new(PACK_HEAD_LEN as u64),
                stream: Mutex::default(),
            });
            self.packs.len() - 1
        });
        self.numbers.insert(name, number);
        self.numbers.insert(at, number);
    }

    /// Where a leaf's record is: in which pack, and where there.
    pub fn record(&self, id: &[u8; 32]) -> Option<(usize, Range<u64>)> {
        let leaf = self.leaves.get(id)?;
        let start = u64::from(leaf.offset);
        Some((leaf.pack, start..start + u64::from(leaf.len)))
    }

    /// The blocks with these pages, those beside each other together.
    pub fn parts_of(&self, pages: impl Iterator<Item = PagePlace>) -> Vec<(usize, Range<u64>)> {
        let parts = pages.filter_map(|page| {
            let pack = *self.numbers.get(&page.pack)?;
            let start = u64::from(page.offset);
            let blocks = blocks_of(&(start..start + u64::from(page.len.max(1))));
            Some((pack, *blocks.start()..*blocks.end() + 1))
        });
        let mut parts: Vec<(usize, Range<u64>)> = parts.collect();
        parts.sort_by_key(|(pack, blocks)| (*pack, blocks.start));
        let mut joined: Vec<(usize, Range<u64>)> = Vec::new();
        for (pack, blocks) in parts {
            match joined.last_mut() {
                Some((of, last)) if *of == pack && blocks.start <= last.end => {
                    last.end = last.end.max(blocks.end);
                }
                _ => joined.push((pack, blocks)),
            }
        }
        joined
    }

    /// The leaves as they lie in the packs.
    pub fn leaves_in_order(&self) -> Vec<[u8; 32]> {
        let mut leaves: Vec<_> = self.leaves.iter().collect();
        leaves.sort_by_key(|(_, leaf)| (leaf.pack, leaf.offset));
        leaves.into_iter().map(|(id, _)| *id).collect()
    }
}

/// The nodes above the leaves, by their ids.
pub fn nodes_of(head: Vec<(u8, Vec<u8>)>) -> HashMap<[u8; 32], (u8, Vec<u8>)> {
    let known = head.into_iter().filter_map(|(level, canonical)| {
        let id = NodeParts::parse(&canonical, level)?.id();
        Some((id, (level, canonical)))
    });
    known.collect()
}
