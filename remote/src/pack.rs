//! A pack: groups of a leaf's record and its new pages, and a list of these pages.
//!
//! ```text
//!      0  8  magic SNAPRPAK      8  4  version, 1      12  20  its own name
//!     32  -  groups: a leaf's record, then those of its pages that are new, in order;
//!            of a leaf that was laid apart the pages alone. A working set's pack: its pages in
//!            the order in which they are touched, before the first of a leaf its record
//!      -  -  list of its pages: 4 count, then each, by id, once:
//!            32 id   4 offset   4 length   1 encoding
//!            32 BLAKE3 of the pack's key, the byte 1, and the list before
//!      -  32 BLAKE3 of the pack's key, a zero byte, and all bytes before
//! ```
//! Numbers are little-endian. Who restores a snapshot does not need the list: the records of
//! leaves have the same places. Packs of earlier versions have none. Where it is, is what a
//! run of [`crate::hooks`] says.

use std::collections::BTreeSet;

use crate::head::{LeafPlace, PagePlace, append, record_len, u32_of};
use crate::protocol::Name;
use crate::protocol::sealed::Fields;

const PACK: [u8; 8] = *b"SNAPRPAK";
/// What is in front of a pack's first group.
pub const PACK_HEAD_LEN: usize = 32;
/// What is behind its last one, and its list.
pub const PACK_CHECK_LEN: usize = 32;
/// Groups of a pack that is full are at least so long.
const FULL_BYTES: usize = 64 << 20;
/// A pack is full, too, if its list is so long: whoever looks for pages reads it whole.
const FULL_LIST_BYTES: usize = 4 << 20;
/// The longest list that there is: the last leaf has 512 pages.
pub const LONGEST_LIST_BYTES: u32 = 5 << 20;
const LISTED_LEN: usize = 41;
/// What distinguishes a list's check from that of the pack.
const OF_LIST: u8 = 1;

/// A page that a pack holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Held {
    /// Its id.
    pub id: [u8; 32],
    /// Where it is.
    pub place: PagePlace,
}

/// A page of a leaf: its id, and where it is, or encoding and bytes of one that is new.
pub type LeafPage = ([u8; 32], Result<PagePlace, (u8, Vec<u8>)>);

/// A pack that is being filled.
pub struct PackBytes {
    /// Its name.
    pub name: Name,
    bytes: Vec<u8>,
    held: Vec<Held>,
}

/// A pack that is whole.
pub struct Pack {
    /// Its name.
    pub name: Name,
    /// All of it.
    pub bytes: Vec<u8>,
    /// The ids of its pages.
    pub ids: Vec<[u8; 32]>,
    /// Where their list begins: the groups end there.
    pub list_at: u32,
    /// How long it is.
    pub list_len: u32,
}

impl PackBytes {
    /// An empty one.
    #[must_use]
    pub fn new(name: Name) -> Self {
        let mut bytes = PACK.to_vec();
        bytes.extend_from_slice(&1_u32.to_le_bytes());
        bytes.extend_from_slice(&name.to_bytes());
        Self {
            name,
            bytes,
            held: Vec::new(),
        }
    }

    /// Where its groups end.
    #[must_use]
    pub fn groups_end(&self) -> usize {
        self.bytes.len()
    }

    /// Whether it holds nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.groups_end() == PACK_HEAD_LEN
    }

    /// Whether it is to be finished.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.groups_end() >= FULL_BYTES || self.held.len() * LISTED_LEN >= FULL_LIST_BYTES
    }

    /// Adds a leaf and those of its pages that are new: encoding and bytes of each, or
    /// where it is.
    pub fn add(&mut self, canonical: &[u8], pages: &[LeafPage]) -> (LeafPlace, Vec<PagePlace>) {
        let mut packs: BTreeSet<Name> = BTreeSet::new();
        for (_, page) in pages {
            packs.insert(page.as_ref().map_or(self.name, |place| place.pack));
        }
        let names: Vec<Name> = packs.iter().copied().collect();
        let start = self.bytes.len();
        let len = record_len(canonical.len(), names.len(), pages.len());
        let mut offset = start + len;
        let mut places = Vec::with_capacity(pages.len());
        append(&mut self.bytes, canonical);
        let count = u16::try_from(names.len()).expect("at most 512 pages");
        self.bytes.extend_from_slice(&count.to_le_bytes());
        for name in &names {
            self.bytes.extend_from_slice(&name.to_bytes());
        }
        for (id, page) in pages {
            let place = match page {
                Ok(place) => *place,
                Err((encoding, bytes)) => {
                    let place = PagePlace::new(self.name, offset, bytes.len(), *encoding);
                    offset += bytes.len();
                    self.held.push(Held { id: *id, place });
                    place
                }
            };
            let number = names.binary_search(&place.pack).expect("all are there");
            let number = u16::try_from(number).expect("at most 512 pages");
            self.bytes.extend_from_slice(&number.to_le_bytes());
            self.bytes.extend_from_slice(&place.offset.to_le_bytes());
            self.bytes.extend_from_slice(&place.len.to_le_bytes());
            self.bytes.push(place.encoding);
            places.push(place);
        }
        for (_, page) in pages {
            if let Err((_, bytes)) = page {
                self.bytes.extend_from_slice(bytes);
            }
        }
        let leaf = LeafPlace {
            pack: self.name,
            offset: u32_of(start),
            len: u32_of(len),
            packs: names.into(),
        };
        (leaf, places)
    }

    /// Adds a page alone.
    pub fn add_page(&mut self, id: [u8; 32], encoding: u8, bytes: &[u8]) -> PagePlace {
        let place = PagePlace::new(self.name, self.bytes.len(), bytes.len(), encoding);
        self.bytes.extend_from_slice(bytes);
        self.held.push(Held { id, place });
        place
    }

    /// All of it.
    #[must_use]
    pub fn finish(mut self) -> Pack {
        self.held.sort_by_key(|held| (held.id, held.place.offset));
        self.held.dedup_by_key(|held| held.id);
        let list_at = self.bytes.len();
        self.bytes
            .extend_from_slice(&u32_of(self.held.len()).to_le_bytes());
        for Held { id, place } in &self.held {
            self.bytes.extend_from_slice(id);
            self.bytes.extend_from_slice(&place.offset.to_le_bytes());
            self.bytes.extend_from_slice(&place.len.to_le_bytes());
            self.bytes.push(place.encoding);
        }
        let check = check_of(self.name, OF_LIST, &self.bytes[list_at..]);
        self.bytes.extend_from_slice(&check);
        let list_len = self.bytes.len() - list_at;
        let check = pack_check(self.name, &self.bytes);
        self.bytes.extend_from_slice(&check);
        Pack {
            name: self.name,
            bytes: self.bytes,
            ids: self.held.iter().map(|held| held.id).collect(),
            list_at: u32_of(list_at),
            list_len: u32_of(list_len),
        }
    }
}

/// The last bytes of a pack.
#[must_use]
pub fn pack_check(name: Name, bytes: &[u8]) -> [u8; PACK_CHECK_LEN] {
    check_of(name, 0, bytes)
}

fn check_of(name: Name, of: u8, bytes: &[u8]) -> [u8; PACK_CHECK_LEN] {
    let mut hasher = blake3::Hasher::new();
    hasher
        .update(name.pack_key().as_bytes())
        .update(&[of])
        .update(bytes);
    hasher.finalize().into()
}

/// The pages of this pack by its list, in order; `None` if that is not the list which its
/// writer made.
#[must_use]
pub fn decode_list(name: Name, bytes: &[u8]) -> Option<Vec<Held>> {
    let (list, check) = bytes.split_at_checked(bytes.len().checked_sub(PACK_CHECK_LEN)?)?;
    if check_of(name, OF_LIST, list) != check {
        return None;
    }
    let mut fields = Fields(list);
    let count = fields.count(LISTED_LEN).ok()?;
    let mut held: Vec<Held> = Vec::with_capacity(count);
    for _ in 0..count {
        let id = fields.array().ok()?;
        let (offset, len) = (fields.u32().ok()?, fields.u32().ok()?);
        let place = PagePlace {
            pack: name,
            offset,
            len,
            encoding: fields.array::<1>().ok()?[0],
        };
        if held.last().is_some_and(|last| last.id >= id) {
            return None;
        }
        held.push(Held { id, place });
    }
    fields.end().ok()?;
    Some(held)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::Session;

    fn name(number: u32) -> Name {
        Name {
            session: Session(7),
            number,
        }
    }

    #[test]
    fn the_list_of_a_pack_has_each_page_once_and_no_other_bytes_are_it() {
        let mut pack = PackBytes::new(name(1));
        let elsewhere = PagePlace::new(name(9), 5, 6, 0);
        let pages = [
            ([3; 32], Err((1, vec![8; 10]))),
            ([2; 32], Ok(elsewhere)),
            ([1; 32], Err((0, vec![9; 20]))),
            ([3; 32], Err((1, vec![8; 10]))),
        ];
        let (_, places) = pack.add(b"leaf", &pages);
        let alone = pack.add_page([0; 32], 2, b"alone");
        let pack = pack.finish();
        let list = &pack.bytes[pack.list_at as usize..][..pack.list_len as usize];
        let held = decode_list(name(1), list).expect("it is its list");
        let found: Vec<_> = held.iter().map(|held| (held.id, held.place)).collect();
        assert_eq!(
            found,
            [([0; 32], alone), ([1; 32], places[2]), ([3; 32], places[0])]
        );
        assert_eq!(pack.ids, [[0; 32], [1; 32], [3; 32]]);
        assert_eq!(decode_list(name(2), list), None);
        for len in 0..list.len() {
            assert_eq!(decode_list(name(1), &list[..len]), None);
        }
        for at in 0..list.len() {
            let mut flipped = list.to_vec();
            flipped[at] ^= 1;
            assert_eq!(decode_list(name(1), &flipped), None);
        }
    }
}
