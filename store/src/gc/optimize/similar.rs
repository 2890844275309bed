//! Finding pages that are much like one that was seen before.
//!
//! Each window of four words of a page has a hash; the smallest of them under each of
//! some orders are its features (min-hashing: A. Broder, "On the resemblance and
//! containment of documents", 1997). Two pages share a feature about as often as they
//! share windows, wherever in the pages these stand. The memory is of a fixed size: what
//! is seen later takes the place of what was seen before.

use crate::id::ChunkId;
use crate::pack::Location;
use crate::sim;

/// Orders of the windows.
const FEATURES: usize = 6;
/// Words of 8 bytes in a window.
const WINDOW: usize = 4;
/// Features remembered: 12 MiB.
const SLOTS: usize = 1 << 20;
/// Pages remembered: 14 MiB.
const PAGES: usize = 1 << 18;
/// The first odd numbers that make each order another one.
const ORDERS: [u64; FEATURES] = [
    0x9e37_79b9_7f4a_7c15,
    0xc2b2_ae3d_27d4_eb4f,
    0x1656_67b1_9e37_79f9,
    0xd6e8_feb8_6659_fd93,
    0xa076_1d64_78bd_642f,
    0xe703_7ed1_a0b4_28db,
];

/// What a page is known by. A page without any window that is not zero has none.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Features([u64; FEATURES]);

impl Features {
    pub fn of(page: &[u8]) -> Option<Self> {
        let words: Vec<u64> = page
            .chunks_exact(8)
            .map(|word| u64::from_le_bytes(word.try_into().expect("words of 8 bytes")))
            .collect();
        let mut least = [u64::MAX; FEATURES];
        let windows = words.windows(WINDOW);
        for window in windows.filter(|window| window.iter().any(|word| *word != 0)) {
            let hash = window.iter().fold(0_u64, |hash, word| {
                let mixed = (hash ^ word).wrapping_mul(0x9fb2_1c65_1e98_df25);
                mixed ^ mixed >> 31
            });
            for (least, order) in least.iter_mut().zip(ORDERS) {
                let ordered = hash.wrapping_mul(order);
                *least = (*least).min(ordered ^ ordered >> 32);
            }
        }
        (least[0] != u64::MAX).then_some(Self(least))
    }
}

/// A page that others may be like.
#[derive(Clone, Copy, Debug)]
pub(super) struct Known {
    pub id: ChunkId,
    /// Where it was before it was rewritten.
    pub from: Location,
    /// Where it is then.
    pub to: Location,
}

/// Pages that were seen, the last of them.
pub(super) struct Similar {
    features: Vec<u64>,
    /// One more than the position in `pages`, for each feature.
    of: Vec<u32>,
    pages: Vec<Known>,
    next: usize,
    most_pages: usize,
}

impl Similar {
    pub fn new() -> Self {
        let (slots, most_pages) = match sim::is_simulated() {
            true => (1 << 8, 1 << 6),
            false => (SLOTS, PAGES),
        };
        Self {
            features: vec![0; slots],
            of: vec![0; slots],
            pages: Vec::new(),
            next: 0,
            most_pages,
        }
    }

    /// The pages that share most features with this one, the best first.
    pub fn like(&self, features: &Features, most: usize) -> Vec<Known> {
        let mut found: Vec<(usize, Known)> = Vec::new();
        for feature in features.0 {
            let slot = self.slot(feature);
            let Some(position) = self.of[slot].checked_sub(1) else {
                continue;
            };
            if self.features[slot] != feature {
                continue;
            }
            let known = self.pages[position as usize];
            match found.iter_mut().find(|(_, it)| it.to == known.to) {
                Some((shared, _)) => *shared += 1,
                None => found.push((1, known)),
            }
        }
        found.sort_by_key(|(shared, _)| std::cmp::Reverse(*shared));
        found
            .into_iter()
            .map(|(_, known)| known)
            .take(most)
            .collect()
    }

    pub fn add(&mut self, features: &Features, known: Known) {
        let position = self.next;
        match self.pages.get_mut(position) {
            Some(page) => *page = known,
            None => self.pages.push(known),
        }
        self.next = (position + 1) % self.most_pages;
        for feature in features.0 {
            let slot = self.slot(feature);
            self.features[slot] = feature;
            self.of[slot] = u32::try_from(position + 1).expect("a bounded number of pages");
        }
    }

    fn slot(&self, feature: u64) -> usize {
        let most = self.features.len() as u64;
        usize::try_from(feature % most).expect("below a length")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::ChunkKind;
    use crate::pack::{EntryNumber, PackNumber};

    fn page(seed: u8) -> Vec<u8> {
        let mut page = vec![0; 4096];
        blake3::Hasher::new()
            .update(&[seed])
            .finalize_xof()
            .fill(&mut page);
        page
    }

    fn known(seed: u8) -> Known {
        let at = Location {
            pack: PackNumber(1),
            entry: EntryNumber(seed.into()),
        };
        Known {
            id: ChunkKind::Page.hash(&[seed]),
            from: at,
            to: at,
        }
    }

    #[test]
    fn a_page_is_found_by_most_of_its_bytes_wherever_they_stand() {
        let mut similar = Similar::new();
        for seed in 0..200 {
            similar.add(&Features::of(&page(seed)).unwrap(), known(seed));
        }
        let mut changed = page(77);
        changed[1000..1400].fill(9);
        let mut moved = page(78);
        moved.rotate_left(256);
        for (like, expected) in [(changed, 77), (moved, 78)] {
            let found = similar.like(&Features::of(&like).unwrap(), 2);
            assert_eq!(found[0].to, known(expected).to);
        }
        assert!(
            similar
                .like(&Features::of(&page(201)).unwrap(), 2)
                .is_empty()
        );
        assert_eq!(Features::of(&[0; 4096]), None);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut similar = Similar::new();
        similar.most_pages = 4;
        for seed in 0..100 {
            similar.add(&Features::of(&page(seed)).unwrap(), known(seed));
        }
        assert_eq!(similar.pages.len(), 4);
        assert_eq!(
            similar.like(&Features::of(&page(99)).unwrap(), 1)[0].to,
            known(99).to
        );
    }
}
