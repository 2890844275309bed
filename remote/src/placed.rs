//! Where pages are that a push or a repack has placed, by their ids.
//!
//! A page is found by 128 bits of a hash of its id, under a key that is drawn each time: nobody
//! can make two ids that are taken for one. With all else it takes 36 bytes or so. What was not
//! asked for among the last two million others is forgotten, so however much is placed, this
//! takes no more than [`MOST`] says. A page that is forgotten is stored once more, which costs
//! its bytes and nothing else.

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher as _;
use std::mem;

use crate::head::PagePlace;
use crate::protocol::Name;

/// Pages that are remembered for sure; twice as many at most, in 150 MB.
const MOST: usize = 1 << 21;
/// Entries are kept in pieces, so that none is moved when there are more.
const PIECE: usize = 1 << 12;

/// Places of pages.
#[derive(Debug)]
pub struct Placed {
    key: [u8; 32],
    packs: Vec<Name>,
    numbers: HashMap<Name, u32>,
    young: Table,
    /// What was young before. What is asked for of it becomes young again.
    old: Table,
    most: usize,
}

/// Some of them. A slot has the number of an entry, counted from 1, or 0.
#[derive(Debug, Default)]
struct Table {
    slots: Vec<u32>,
    pieces: Vec<Vec<Entry>>,
    len: usize,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    hash: [u8; 16],
    pack: u32,
    offset: u32,
    len: u32,
    encoding: u8,
}

impl Default for Placed {
    fn default() -> Self {
        let random = RandomState::new();
        let mut key = [0; 32];
        for (number, part) in key.chunks_exact_mut(8).enumerate() {
            part.copy_from_slice(&random.hash_one(number).to_le_bytes());
        }
        Self {
            key,
            packs: Vec::new(),
            numbers: HashMap::new(),
            young: Table::default(),
            old: Table::default(),
            most: MOST,
        }
    }
}

impl Placed {
    /// Where this page is, as far as that is remembered.
    pub fn get(&mut self, id: &[u8; 32]) -> Option<PagePlace> {
        let hash = self.hash(id);
        let entry = match self.young.get(&hash) {
            Some(young) => *young,
            None => {
                let old = *self.old.get(&hash)?;
                self.add(old);
                old
            }
        };
        Some(PagePlace {
            pack: self.packs[entry.pack as usize],
            offset: entry.offset,
            len: entry.len,
            encoding: entry.encoding,
        })
    }

    /// It is there, or where it was before.
    pub fn insert(&mut self, id: &[u8; 32], place: PagePlace) {
        let hash = self.hash(id);
        if self.young.get(&hash).is_some() {
            return;
        }
        let pack = *self.numbers.entry(place.pack).or_insert_with(|| {
            self.packs.push(place.pack);
            u32::try_from(self.packs.len() - 1).expect("far fewer packs")
        });
        self.add(Entry {
            hash,
            pack,
            offset: place.offset,
            len: place.len,
            encoding: place.encoding,
        });
    }

    fn hash(&self, id: &[u8; 32]) -> [u8; 16] {
        let hash = blake3::keyed_hash(&self.key, id);
        *hash.as_bytes().first_chunk().expect("it is longer")
    }

    fn add(&mut self, entry: Entry) {
        if self.young.len >= self.most {
            self.old = mem::take(&mut self.young);
        }
        self.young.add(entry);
    }
}

impl Table {
    fn entry(&self, number: u32) -> Option<&Entry> {
        let at = (number as usize).checked_sub(1)?;
        self.pieces.get(at / PIECE)?.get(at % PIECE)
    }

    /// The slot of this hash, or the free one where it would be. There are free ones.
    fn slot(&self, hash: &[u8; 16]) -> usize {
        let first = u64::from_le_bytes(*hash.first_chunk().expect("it is longer"));
        let last = self.slots.len() - 1;
        let mut at = usize::try_from(first).expect("64 bits") & last;
        while let Some(entry) = self.entry(self.slots[at]) {
            if entry.hash == *hash {
                break;
            }
            at = (at + 1) & last;
        }
        at
    }

    fn get(&self, hash: &[u8; 16]) -> Option<&Entry> {
        match self.slots.is_empty() {
            true => None,
            false => self.entry(self.slots[self.slot(hash)]),
        }
    }

    /// Adds one that is not there.
    fn add(&mut self, entry: Entry) {
        if (self.len + 1) * 4 > self.slots.len() * 3 {
            self.slots = vec![0; (self.slots.len() * 2).max(PIECE)];
            for number in 1..=u32::try_from(self.len).expect("bounded") {
                let hash = self.entry(number).expect("it is one of them").hash;
                let at = self.slot(&hash);
                self.slots[at] = number;
            }
        }
        if self.len.is_multiple_of(PIECE) {
            self.pieces.push(Vec::with_capacity(PIECE));
        }
        let piece = self.pieces.last_mut().expect("there is one");
        piece.push(entry);
        self.len += 1;
        let at = self.slot(&entry.hash);
        self.slots[at] = u32::try_from(self.len).expect("bounded");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::Session;

    fn id(number: u32) -> [u8; 32] {
        *blake3::hash(&number.to_le_bytes()).as_bytes()
    }

    fn place(number: u32) -> PagePlace {
        let session = Session(u128::from(number % 7));
        let pack = Name { session, number: 1 };
        PagePlace::new(pack, number as usize, 5, (number % 3) as u8)
    }

    #[test]
    fn each_page_is_where_it_was_placed_first() {
        let mut placed = Placed::default();
        for number in 0..30_000 {
            assert_eq!(placed.get(&id(number)), None);
            placed.insert(&id(number), place(number));
            placed.insert(&id(number / 2), place(number + 1));
        }
        for number in 0..30_000 {
            assert_eq!(placed.get(&id(number)), Some(place(number)));
        }
    }

    #[test]
    fn what_nobody_asked_for_is_forgotten_and_the_others_stay() {
        let mut placed = Placed {
            most: 1000,
            ..Placed::default()
        };
        for number in 0..10_000 {
            placed.insert(&id(number), place(number));
            assert_eq!(placed.get(&id(0)), Some(place(0)), "asked for at {number}");
            assert!(placed.young.len + placed.old.len <= 2000);
        }
        for number in 9000..10_000 {
            assert_eq!(placed.get(&id(number)), Some(place(number)));
        }
        assert_eq!(placed.get(&id(5000)), None);
    }
}
