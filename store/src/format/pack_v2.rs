//! The layout of a pack file, version 2. Numbers are little-endian.
//!
//! ```text
//! header, 64 bytes
//!      0   8  magic "SNAPPACK"
//!      8   4  format version, 2
//!     12   4  zero
//!     16   4  page size in bytes
//!     20   4  zero
//!     24   8  first 8 bytes of BLAKE3 of bytes 0..24, as in every version
//!     32  16  random identity of the pack
//!     48   8  key check
//!     56   8  first 8 bytes of BLAKE3 of bytes 0..56
//! stored chunks, one after the other, without gaps
//! seal, 96 bytes
//!      0   8  magic "SNAPSEL2"
//!      8  16  identity
//!     24   8  key check
//!     32   8  offset of the footer
//!     40   4  number of entries
//!     44   4  page size in bytes
//!     48   8  length of the file
//!     56   8  zero
//!     64  32  BLAKE3 of bytes 0..64
//! footer: blocks of 128 entries, the last with as many as are left
//!      0 24n  entries, as in version 1
//!    24n   4  where the stored bytes of the last one end
//!   24n+4 16  first 16 bytes of BLAKE3 of identity, block number (4 bytes) and the
//!             bytes of the block before this field
//! the seal once more
//! ```
//! The number in the file's name is no part of it. The key check is the first 8 bytes
//! of keyed BLAKE3, with the secret of the keys, of "keys of pack " and the identity.
//! Any seal tells all that the header does. The second one is found at the end of the
//! file, the first one by its magic if the end cannot be read.

use crate::format::entry::{ENTRY_LEN, offset_in};
use crate::pack::PackIdentity;
use crate::page::PageSize;

pub(crate) const HEADER_LEN: usize = 64;
pub(crate) const SEAL_LEN: usize = 96;
/// Entries in a block.
pub(crate) const BLOCK_ENTRIES: u32 = 128;
const TRAILER_LEN: usize = 20;
const CHECK_LEN: usize = 16;
/// The length of a whole block.
pub(crate) const BLOCK_LEN: usize = BLOCK_ENTRIES as usize * ENTRY_LEN + TRAILER_LEN;
pub(crate) const VERSION: u32 = 2;
const HEADER_MAGIC: &[u8; 8] = b"SNAPPACK";
pub(crate) const SEAL_MAGIC: &[u8; 8] = b"SNAPSEL2";

/// What header and seals say of a pack.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Description {
    pub identity: PackIdentity,
    pub page_size: PageSize,
    pub key_check: [u8; 8],
}

impl Description {
    pub fn header(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[..8].copy_from_slice(HEADER_MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.page_size.as_u32().to_le_bytes());
        let hash = blake3::hash(&bytes[..24]);
        bytes[24..32].copy_from_slice(&hash.as_bytes()[..8]);
        bytes[32..48].copy_from_slice(&self.identity.0);
        bytes[48..56].copy_from_slice(&self.key_check);
        let hash = blake3::hash(&bytes[..56]);
        bytes[56..].copy_from_slice(&hash.as_bytes()[..8]);
        bytes
    }
}

/// What a seal says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Seal {
    pub pack: Description,
    /// Where the footer begins, and the first seal ends.
    pub footer_offset: u64,
    pub entry_count: u32,
    pub file_len: u64,
}

impl Seal {
    /// That of a pack whose chunks end at `chunks_end`.
    pub fn new(pack: Description, chunks_end: u64, entry_count: u32) -> Self {
        let footer_offset = chunks_end + SEAL_LEN as u64;
        Self {
            pack,
            footer_offset,
            entry_count,
            file_len: footer_offset + footer_len(entry_count) + SEAL_LEN as u64,
        }
    }

    pub fn chunks_end(&self) -> u64 {
        self.footer_offset - SEAL_LEN as u64
    }

    pub fn to_bytes(self) -> [u8; SEAL_LEN] {
        let mut bytes = [0; SEAL_LEN];
        bytes[..8].copy_from_slice(SEAL_MAGIC);
        bytes[8..24].copy_from_slice(&self.pack.identity.0);
        bytes[24..32].copy_from_slice(&self.pack.key_check);
        bytes[32..40].copy_from_slice(&self.footer_offset.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.entry_count.to_le_bytes());
        bytes[44..48].copy_from_slice(&self.pack.page_size.as_u32().to_le_bytes());
        bytes[48..56].copy_from_slice(&self.file_len.to_le_bytes());
        let hash = blake3::hash(&bytes[..64]);
        bytes[64..].copy_from_slice(hash.as_bytes());
        bytes
    }

    /// The seal that these bytes are. Of which file it is, and where it is to stand in
    /// it, it says itself.
    pub fn from_bytes(bytes: &[u8; SEAL_LEN]) -> Option<Self> {
        if bytes[..8] != *SEAL_MAGIC || bytes[64..] != *blake3::hash(&bytes[..64]).as_bytes() {
            return None;
        }
        let page_size = u32::from_le_bytes(array(&bytes[44..48]));
        let pack = Description {
            identity: PackIdentity(array(&bytes[8..24])),
            page_size: PageSize::from_bytes(u64::from(page_size)).ok()?,
            key_check: array(&bytes[24..32]),
        };
        let footer_offset = u64::from_le_bytes(array(&bytes[32..40]));
        let chunks_end = footer_offset.checked_sub(SEAL_LEN as u64)?;
        if footer_offset > u64::from(u32::MAX) {
            return None;
        }
        let seal = Self::new(pack, chunks_end, u32::from_le_bytes(array(&bytes[40..44])));
        let fits = chunks_end >= HEADER_LEN as u64 && seal.to_bytes() == *bytes;
        fits.then_some(seal)
    }

    /// Where a block of the footer is, and how many entries it has.
    pub fn block(&self, number: u32) -> (u64, u32) {
        let offset = self.footer_offset + u64::from(number) * BLOCK_LEN as u64;
        let left = self.entry_count - number * BLOCK_ENTRIES;
        (offset, left.min(BLOCK_ENTRIES))
    }

    pub fn block_count(&self) -> u32 {
        self.entry_count.div_ceil(BLOCK_ENTRIES)
    }
}

fn footer_len(entry_count: u32) -> u64 {
    let blocks = u64::from(entry_count.div_ceil(BLOCK_ENTRIES));
    u64::from(entry_count) * ENTRY_LEN as u64 + blocks * TRAILER_LEN as u64
}

/// The length of a block with so many entries.
pub(crate) fn block_len(entries: u32) -> usize {
    entries as usize * ENTRY_LEN + TRAILER_LEN
}

/// The footer with these entries, of chunks that end at `chunks_end`.
pub(crate) fn footer(entries: &[u8], chunks_end: u64, identity: PackIdentity) -> Vec<u8> {
    let mut out = Vec::with_capacity(entries.len() + entries.len() / 64 + TRAILER_LEN);
    let blocks = entries.chunks(BLOCK_ENTRIES as usize * ENTRY_LEN);
    let mut rest = entries;
    for (number, block) in (0..).zip(blocks) {
        rest = &rest[block.len()..];
        let end = match rest.get(..ENTRY_LEN) {
            Some(next) => offset_in(next),
            None => u32::try_from(chunks_end).expect("packs are sealed far below 4 GiB"),
        };
        let start = out.len();
        out.extend_from_slice(block);
        out.extend_from_slice(&end.to_le_bytes());
        let check = block_check(identity, number, &out[start..]);
        out.extend_from_slice(&check);
    }
    out
}

/// Turns the bytes of a block into its entries and one more, which says where the
/// last one's bytes end. `None` if they are not what was written.
pub(crate) fn open_block(
    mut bytes: Vec<u8>,
    number: u32,
    identity: PackIdentity,
) -> Option<Vec<u8>> {
    let body = bytes.len().checked_sub(CHECK_LEN)?;
    if bytes[body..] != block_check(identity, number, &bytes[..body]) {
        return None;
    }
    let entries = body.checked_sub(4)?;
    let end: [u8; 4] = array(&bytes[entries..body]);
    bytes.truncate(entries);
    bytes.resize(entries + ENTRY_LEN, 0);
    bytes[entries + 16..entries + 20].copy_from_slice(&end);
    Some(bytes)
}

fn block_check(identity: PackIdentity, number: u32, bytes: &[u8]) -> [u8; CHECK_LEN] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&identity.0).update(&number.to_le_bytes());
    hasher.update(bytes);
    array(&hasher.finalize().as_bytes()[..CHECK_LEN])
}

/// What a header says of itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Header {
    /// It is whole, and of this version.
    Whole(Description),
    /// It is of this version, but for some of its bytes.
    Torn,
    /// It is none of this version.
    Other,
}

pub(crate) fn read_header(bytes: &[u8; HEADER_LEN]) -> Header {
    let hash = blake3::hash(&bytes[..24]);
    let begins = bytes[..8] == *HEADER_MAGIC
        && bytes[8..12] == VERSION.to_le_bytes()
        && bytes[24..32] == hash.as_bytes()[..8];
    if !begins {
        return Header::Other;
    }
    let page_size = u32::from_le_bytes(array(&bytes[16..20]));
    let Ok(page_size) = PageSize::from_bytes(u64::from(page_size)) else {
        return Header::Torn;
    };
    let found = Description {
        identity: PackIdentity(array(&bytes[32..48])),
        page_size,
        key_check: array(&bytes[48..56]),
    };
    if found.header() == *bytes {
        Header::Whole(found)
    } else {
        Header::Torn
    }
}

fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.try_into().expect("the caller slices exactly")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn description() -> Description {
        Description {
            identity: PackIdentity([7; 16]),
            page_size: PageSize::KIB_4,
            key_check: [3; 8],
        }
    }

    /// So many entries, each of a chunk of 10 bytes.
    fn entries(count: u32) -> (Vec<u8>, u64) {
        let mut bytes = Vec::new();
        for number in 0..count {
            let mut entry = [0; ENTRY_LEN];
            entry[..4].copy_from_slice(&number.to_le_bytes());
            entry[16..20].copy_from_slice(&(64 + 10 * number).to_le_bytes());
            bytes.extend_from_slice(&entry);
        }
        (bytes, u64::from(64 + 10 * count))
    }

    #[test]
    fn a_header_is_read_back_and_a_flipped_bit_is_seen() {
        let whole = description().header();
        assert_eq!(read_header(&whole), Header::Whole(description()));
        for at in 0..HEADER_LEN {
            let mut bytes = whole;
            bytes[at] ^= 4;
            assert_ne!(read_header(&bytes), Header::Whole(description()), "{at}");
        }
    }

    #[test]
    fn a_seal_is_read_back_and_a_flipped_bit_is_seen() {
        let seal = Seal::new(description(), 5000, 300);
        let bytes = seal.to_bytes();
        assert_eq!(Seal::from_bytes(&bytes), Some(seal));
        for at in 0..SEAL_LEN {
            let mut bytes = bytes;
            bytes[at] ^= 1;
            assert_eq!(Seal::from_bytes(&bytes), None, "{at}");
        }
    }

    #[test]
    fn blocks_hold_their_entries_and_know_their_pack_and_place() {
        for count in [0, 1, 127, 128, 129, 300] {
            let (entries, end) = entries(count);
            let bytes = footer(&entries, end, PackIdentity([7; 16]));
            let seal = Seal::new(description(), end, count);
            let len = seal.file_len - seal.footer_offset - SEAL_LEN as u64;
            assert_eq!(bytes.len() as u64, len, "{count}");
            let mut found = Vec::new();
            for number in 0..seal.block_count() {
                let (offset, inside) = seal.block(number);
                let at = usize::try_from(offset - seal.footer_offset).unwrap();
                let block = bytes[at..at + block_len(inside)].to_vec();
                let other = PackIdentity([8; 16]);
                assert_eq!(open_block(block.clone(), number, other), None);
                assert_eq!(
                    open_block(block.clone(), number + 1, seal.pack.identity),
                    None
                );
                let mut flipped = block.clone();
                flipped[at % 24] ^= 1;
                assert_eq!(open_block(flipped, number, seal.pack.identity), None);
                let opened = open_block(block, number, seal.pack.identity).unwrap();
                let (inside, more) = opened.split_at(opened.len() - ENTRY_LEN);
                found.extend_from_slice(inside);
                let next = entries.get(found.len()..found.len() + ENTRY_LEN);
                let next = next.map_or(u32::try_from(end).unwrap(), offset_in);
                assert_eq!(offset_in(more), next);
            }
            assert_eq!(found, entries);
        }
    }
}
