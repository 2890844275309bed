//! The layout of a pack file. Numbers are little-endian.
//!
//! ```text
//! header, 32 bytes
//!      0   8  magic "SNAPPACK"
//!      8   4  format version, 1
//!     12   4  pack number
//!     16   4  page size in bytes
//!     20   4  zero
//!     24   8  first 8 bytes of BLAKE3 of bytes 0..24
//! stored chunks, one after the other, without gaps
//! footer, one entry of 24 bytes per chunk, in file order
//!      0  16  first 16 bytes of the chunk's id
//!     16   4  offset of the stored chunk; it ends where the next begins
//!     20   1  chunk kind (low 4 bits) and encoding (high 4 bits)
//!     21   3  first 3 bytes of BLAKE3 of the stored bytes
//! seal, 64 bytes
//!      0   8  offset of the footer
//!      8   4  number of entries
//!     12   4  pack number
//!     16   8  zero
//!     24  32  BLAKE3 of header, footer and the seal's first 24 bytes
//!     56   8  magic "SNAPSEAL"
//! ```
//! A file without a valid seal is no pack: it is read only to be reported.

use crate::id::{ChunkKey, ChunkKind};
use crate::pack::PackNumber;
use crate::pack::codec::Encoding;
use crate::page::PageSize;

pub(crate) const HEADER_LEN: usize = 32;
pub(crate) const ENTRY_LEN: usize = 24;
pub(crate) const SEAL_LEN: usize = 64;
const VERSION: u32 = 1;
const HEADER_MAGIC: &[u8; 8] = b"SNAPPACK";
const SEAL_MAGIC: &[u8; 8] = b"SNAPSEAL";

/// A pack is sealed once it holds this many bytes or entries. Offsets of 32
/// bits leave room for the batch that crosses the limit.
pub(crate) const PACK_SOFT_LIMIT_BYTES: u64 = 256 << 20;
pub(crate) const PACK_SOFT_LIMIT_ENTRIES: usize = 1 << 18;

/// One line of a footer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Entry {
    pub key: ChunkKey,
    pub offset: u32,
    pub encoding: Encoding,
    pub check: [u8; 3],
}

impl Entry {
    pub fn to_bytes(self) -> [u8; ENTRY_LEN] {
        let mut bytes = [0; ENTRY_LEN];
        bytes[..16].copy_from_slice(&self.key.prefix);
        bytes[16..20].copy_from_slice(&self.offset.to_le_bytes());
        bytes[20] = self.key.kind as u8 | (self.encoding as u8) << 4;
        bytes[21..].copy_from_slice(&self.check);
        bytes
    }

    /// `None` if the kind or the encoding is unknown.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        Some(Self {
            key: ChunkKey {
                kind: ChunkKind::from_byte(bytes[20] & 0xf)?,
                prefix: bytes[..16].try_into().ok()?,
            },
            offset: u32::from_le_bytes(bytes[16..20].try_into().ok()?),
            encoding: Encoding::from_byte(bytes[20] >> 4)?,
            check: bytes[21..24].try_into().ok()?,
        })
    }
}

/// The check bytes of a footer entry for these stored bytes.
pub(crate) fn stored_check(stored: &[u8]) -> [u8; 3] {
    let hash = blake3::hash(stored);
    [hash.as_bytes()[0], hash.as_bytes()[1], hash.as_bytes()[2]]
}

pub(crate) fn header(number: PackNumber, page_size: PageSize) -> [u8; HEADER_LEN] {
    let mut bytes = [0; HEADER_LEN];
    bytes[..8].copy_from_slice(HEADER_MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[12..16].copy_from_slice(&number.0.to_le_bytes());
    bytes[16..20].copy_from_slice(&page_size.as_u32().to_le_bytes());
    let hash = blake3::hash(&bytes[..24]);
    bytes[24..].copy_from_slice(&hash.as_bytes()[..8]);
    bytes
}

/// The page size a pack's header names, if the header is whole.
pub(crate) fn page_size_in_header(header: &[u8; HEADER_LEN]) -> Option<PageSize> {
    let number = PackNumber(u32::from_le_bytes(array(&header[12..16])));
    let bytes = u32::from_le_bytes(array(&header[16..20]));
    let page_size = PageSize::from_bytes(u64::from(bytes)).ok()?;
    (*header == self::header(number, page_size)).then_some(page_size)
}

pub(crate) fn seal(
    header: &[u8; HEADER_LEN],
    footer: &[u8],
    footer_offset: u64,
    number: PackNumber,
) -> [u8; SEAL_LEN] {
    let entries = u32::try_from(footer.len() / ENTRY_LEN).expect("entries are counted in 32 bits");
    let mut bytes = [0; SEAL_LEN];
    bytes[..8].copy_from_slice(&footer_offset.to_le_bytes());
    bytes[8..12].copy_from_slice(&entries.to_le_bytes());
    bytes[12..16].copy_from_slice(&number.0.to_le_bytes());
    let hash = seal_hash(header, footer, &bytes[..24]);
    bytes[24..56].copy_from_slice(hash.as_bytes());
    bytes[56..].copy_from_slice(SEAL_MAGIC);
    bytes
}

fn seal_hash(header: &[u8], footer: &[u8], seal_start: &[u8]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(header).update(footer).update(seal_start);
    hasher.finalize()
}

/// What a sealed pack's frame says: where its footer is.
#[derive(Debug)]
pub(crate) struct Frame {
    pub footer_offset: usize,
    pub entry_count: usize,
}

/// Checks header, footer and seal of a whole pack file.
pub(crate) fn check_frame(
    file: &[u8],
    number: PackNumber,
    page_size: PageSize,
) -> Result<Frame, &'static str> {
    if file.len() < HEADER_LEN + SEAL_LEN {
        return Err("too short for a pack");
    }
    let (body, seal) = file.split_at(file.len() - SEAL_LEN);
    if &seal[56..] != SEAL_MAGIC {
        return Err("it has no seal");
    }
    let footer_offset = usize::try_from(u64::from_le_bytes(array(&seal[..8])))
        .map_err(|_| "its footer lies outside the file")?;
    let entry_count = u32::from_le_bytes(array(&seal[8..12])) as usize;
    let footer_len = entry_count * ENTRY_LEN;
    if footer_offset < HEADER_LEN || footer_offset.checked_add(footer_len) != Some(body.len()) {
        return Err("its seal does not fit its length");
    }
    let footer = &body[footer_offset..];
    if seal_hash(&file[..HEADER_LEN], footer, &seal[..24]).as_bytes() != &seal[24..56] {
        return Err("header, footer or seal has a wrong checksum");
    }
    if file[..HEADER_LEN] != header(number, page_size)
        || seal[12..16] != number.0.to_le_bytes()
        || seal[16..24] != [0; 8]
    {
        return Err("it belongs to another number, page size or format version");
    }
    check_entries(footer, footer_offset)?;
    Ok(Frame {
        footer_offset,
        entry_count,
    })
}

/// Every entry parses and the offsets rise from the header to the footer.
fn check_entries(footer: &[u8], footer_offset: usize) -> Result<(), &'static str> {
    let mut expected_at_least = HEADER_LEN;
    for (position, bytes) in footer.chunks_exact(ENTRY_LEN).enumerate() {
        let entry = Entry::from_bytes(bytes).ok_or("an entry has an unknown kind or encoding")?;
        let offset = entry.offset as usize;
        let misplaced = position == 0 && offset != HEADER_LEN;
        if misplaced || offset < expected_at_least || offset >= footer_offset {
            return Err("an entry lies outside the chunks");
        }
        expected_at_least = offset + 1;
    }
    Ok(())
}

fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.try_into().expect("the caller slices exactly")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_survive_the_round_trip() {
        let entry = Entry {
            key: ChunkKey {
                kind: ChunkKind::Node,
                prefix: [7; 16],
            },
            offset: 0xdead_beef,
            encoding: Encoding::Delta,
            check: [1, 2, 3],
        };
        assert_eq!(Entry::from_bytes(&entry.to_bytes()), Some(entry));
        let mut unknown = entry.to_bytes();
        unknown[20] = 0xf1;
        assert_eq!(Entry::from_bytes(&unknown), None);
    }
}
