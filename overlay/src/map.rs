//! Which blocks of an image an overlay holds, and where.

use std::collections::BTreeMap;

/// Blocks of one table.
pub(crate) const TABLE_BLOCKS: u64 = 512;

/// A place for one block in the overlay's file, by its number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Slot(pub(crate) u32);

/// The last slot there can be: two values of a table's entry mean other things.
pub(crate) const LAST_SLOT: u32 = u32::MAX - FIRST_SLOT;

/// What an overlay knows of a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Place {
    /// It is zeros.
    Zeros,
    /// It is in the overlay's file.
    Slot(Slot),
}

/// Blocks and their places, in tables of 2 KiB for 2 MiB of image.
#[derive(Clone, Default)]
pub(crate) struct Map {
    tables: BTreeMap<u64, Table>,
}

#[derive(Clone)]
enum Table {
    /// All of its blocks are: what a guest discards is often large.
    Zeros,
    Mixed(Box<Entries>),
}

/// [`NOTHING`], [`ZEROS`], or a slot's number plus [`FIRST_SLOT`].
type Entries = [u32; TABLE_BLOCKS as usize];
const NOTHING: u32 = 0;
const ZEROS: u32 = 1;
const FIRST_SLOT: u32 = 2;

fn decode(entry: u32) -> Option<Place> {
    match entry {
        NOTHING => None,
        ZEROS => Some(Place::Zeros),
        slot => Some(Place::Slot(Slot(slot - FIRST_SLOT))),
    }
}

fn encode(place: Place) -> u32 {
    match place {
        Place::Zeros => ZEROS,
        Place::Slot(Slot(number)) => number + FIRST_SLOT,
    }
}

/// The table of a block, and its entry there.
fn position(block: u64) -> (u64, usize) {
    let entry = usize::try_from(block % TABLE_BLOCKS).expect("a table is small");
    (block / TABLE_BLOCKS, entry)
}

impl Table {
    fn entry(&self, entry: usize) -> u32 {
        match self {
            Self::Zeros => ZEROS,
            Self::Mixed(entries) => entries[entry],
        }
    }

    /// Its entries, to be changed one by one.
    fn entries(&mut self) -> &mut Entries {
        if let Self::Zeros = self {
            *self = Self::Mixed(Box::new([ZEROS; TABLE_BLOCKS as usize]));
        }
        match self {
            Self::Mixed(entries) => entries,
            Self::Zeros => unreachable!("it was just changed"),
        }
    }

    fn slots(&self) -> impl Iterator<Item = Slot> {
        let entries: &[u32] = match self {
            Self::Zeros => &[],
            Self::Mixed(entries) => &entries[..],
        };
        entries.iter().filter_map(|entry| match decode(*entry) {
            Some(Place::Slot(slot)) => Some(slot),
            _ => None,
        })
    }
}

impl Map {
    pub fn get(&self, block: u64) -> Option<Place> {
        let (table, entry) = position(block);
        decode(self.tables.get(&table)?.entry(entry))
    }

    /// Sets a block's place; returns the one it had.
    pub fn set(&mut self, block: u64, place: Place) -> Option<Place> {
        let (table, entry) = position(block);
        let table = self
            .tables
            .entry(table)
            .or_insert_with(|| Table::Mixed(Box::new([NOTHING; TABLE_BLOCKS as usize])));
        if table.entry(entry) == encode(place) {
            return Some(place);
        }
        decode(std::mem::replace(
            &mut table.entries()[entry],
            encode(place),
        ))
    }

    /// Makes all blocks of a table zeros, the one that begins with `block`; the slots
    /// that they had go to `replaced`.
    pub fn zero_table(&mut self, block: u64, replaced: &mut Vec<Slot>) {
        let (table, _) = position(block);
        if let Some(before) = self.tables.insert(table, Table::Zeros) {
            replaced.extend(before.slots());
        }
    }

    /// Whether anything may be known of the blocks of this one's table.
    pub fn has_table(&self, block: u64) -> bool {
        self.tables.contains_key(&position(block).0)
    }

    pub fn is_empty(&self) -> bool {
        self.tables.is_empty()
    }

    /// All blocks as runs, ascending, of which neighbours may go on with each other: the first
    /// block, how many, and where the first one is. What was discarded as a whole is not
    /// looked at block by block.
    pub fn runs(&self) -> impl Iterator<Item = (u64, u64, Place)> {
        self.tables.iter().flat_map(|(number, table)| {
            let first = number * TABLE_BLOCKS;
            let (zeros, mixed) = match table {
                Table::Zeros => (Some((first, TABLE_BLOCKS, Place::Zeros)), None),
                Table::Mixed(entries) => (None, Some(entries)),
            };
            let mixed = mixed.into_iter().flat_map(move |entries| {
                let placed = (first..).zip(entries.iter());
                placed.filter_map(|(block, entry)| Some((block, 1, decode(*entry)?)))
            });
            zeros.into_iter().chain(mixed)
        })
    }

    /// How many runs of zeros there are.
    pub fn zero_runs(&self) -> u64 {
        let (mut count, mut end) = (0, None);
        for (block, blocks, place) in self.runs() {
            if place == Place::Zeros {
                count += u64::from(end != Some(block));
                end = Some(block + blocks);
            }
        }
        count
    }

    /// All blocks with their places, ascending.
    pub fn iter(&self) -> impl Iterator<Item = (u64, Place)> {
        self.tables.iter().flat_map(|(number, table)| {
            let entries = 0..TABLE_BLOCKS as usize;
            let blocks = number * TABLE_BLOCKS..;
            blocks
                .zip(entries)
                .filter_map(|(block, entry)| Some((block, decode(table.entry(entry))?)))
        })
    }

    /// All slots that it names.
    pub fn slots(&self) -> impl Iterator<Item = Slot> {
        self.tables.values().flat_map(Table::slots)
    }

    /// Takes over a newer map; the slots that it replaced go to `replaced`.
    pub fn absorb(&mut self, newer: &Self, replaced: &mut Vec<Slot>) {
        for (number, table) in &newer.tables {
            let Some(own) = self.tables.get_mut(number) else {
                self.tables.insert(*number, table.clone());
                continue;
            };
            let new = match table {
                Table::Mixed(new) => new,
                Table::Zeros => {
                    replaced.extend(own.slots());
                    *own = Table::Zeros;
                    continue;
                }
            };
            for (entry, new) in own.entries().iter_mut().zip(new.iter()) {
                if *new == NOTHING {
                    continue;
                }
                if let Some(Place::Slot(slot)) = decode(std::mem::replace(entry, *new)) {
                    replaced.push(slot);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_of_zeros_is_as_many_blocks_of_zeros() {
        let mut map = Map::default();
        map.set(512, Place::Slot(Slot(1)));
        map.set(1024, Place::Slot(Slot(2)));
        let mut replaced = Vec::new();
        map.zero_table(512, &mut replaced);
        assert_eq!(replaced, [Slot(1)]);
        assert_eq!(map.get(1023), Some(Place::Zeros));
        assert_eq!(map.iter().count(), 513);
        // And one of them can be something else again.
        assert_eq!(map.set(600, Place::Zeros), Some(Place::Zeros));
        assert_eq!(map.set(600, Place::Slot(Slot(3))), Some(Place::Zeros));
        assert_eq!(map.get(601), Some(Place::Zeros));

        let mut older = Map::default();
        older.zero_table(0, &mut replaced);
        older.set(700, Place::Slot(Slot(4)));
        let mut newer = Map::default();
        newer.set(5, Place::Slot(Slot(5)));
        newer.zero_table(512, &mut replaced);
        replaced.clear();
        older.absorb(&newer, &mut replaced);
        assert_eq!(replaced, [Slot(4)]);
        assert_eq!(older.get(5), Some(Place::Slot(Slot(5))));
        assert_eq!(older.get(6), Some(Place::Zeros));
        assert_eq!(older.get(700), Some(Place::Zeros));
        assert_eq!(older.iter().count(), 1024);
    }

    #[test]
    fn a_newer_map_replaces_what_it_names() {
        let mut map = Map::default();
        assert!(map.is_empty());
        assert_eq!(map.set(3, Place::Slot(Slot(0))), None);
        assert_eq!(map.set(5000, Place::Slot(Slot(LAST_SLOT))), None);
        let mut newer = Map::default();
        newer.set(3, Place::Zeros);
        newer.set(4, Place::Slot(Slot(9)));
        let mut replaced = Vec::new();
        map.absorb(&newer, &mut replaced);
        assert_eq!(replaced, [Slot(0)]);
        let all: Vec<_> = map.iter().collect();
        let last = Place::Slot(Slot(LAST_SLOT));
        assert_eq!(
            all,
            [(3, Place::Zeros), (4, Place::Slot(Slot(9))), (5000, last)]
        );
        assert_eq!(map.get(5000), Some(last));
        assert_eq!((map.get(2), map.get(1 << 40)), (None, None));
    }
}
