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

use crate::format::entry::ENTRY_LEN;
use crate::pack::PackNumber;
use crate::page::PageSize;

pub(crate) const HEADER_LEN: usize = 32;
pub(crate) const SEAL_LEN: usize = 64;
const VERSION: u32 = 1;
const HEADER_MAGIC: &[u8; 8] = b"SNAPPACK";
const SEAL_MAGIC: &[u8; 8] = b"SNAPSEAL";

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

/// What a header says of its pack.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Header {
    /// It is what this version writes for this pack.
    Right,
    /// It is whole, and of a format that this version does not know.
    Newer(u32),
    /// It is whole, and of another pack or page size.
    Foreign,
    /// Its checksum is wrong.
    Damaged,
}

pub(crate) fn check_header(
    bytes: &[u8; HEADER_LEN],
    number: PackNumber,
    page_size: PageSize,
) -> Header {
    let hash = blake3::hash(&bytes[..24]);
    if &bytes[..8] != HEADER_MAGIC || bytes[24..] != hash.as_bytes()[..8] {
        return Header::Damaged;
    }
    let version = u32::from_le_bytes(array(&bytes[8..12]));
    if version != VERSION {
        return Header::Newer(version);
    }
    if *bytes == header(number, page_size) {
        Header::Right
    } else {
        Header::Foreign
    }
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

/// Where a pack's footer is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Frame {
    pub footer_offset: u64,
    pub entry_count: u32,
}

impl Frame {
    /// The places where the footer may be, by the seal of a file of this length:
    /// one if the seal's two numbers agree, else one for each of them, since one
    /// flipped bit leaves the other right.
    pub fn candidates(seal: &[u8; SEAL_LEN], file_len: u64) -> Vec<Self> {
        let offset = u64::from_le_bytes(array(&seal[..8]));
        let count = u32::from_le_bytes(array(&seal[8..12]));
        let Some(body) = file_len.checked_sub(SEAL_LEN as u64) else {
            return Vec::new();
        };
        let by_count = body.checked_sub(u64::from(count) * ENTRY_LEN as u64);
        let by_offset = body
            .checked_sub(offset)
            .filter(|len| len % ENTRY_LEN as u64 == 0);
        let by_offset = by_offset.and_then(|len| u32::try_from(len / ENTRY_LEN as u64).ok());
        let frames = [
            by_count.map(|footer_offset| Self {
                footer_offset,
                entry_count: count,
            }),
            by_offset.map(|entry_count| Self {
                footer_offset: offset,
                entry_count,
            }),
        ];
        let mut found: Vec<Self> = frames
            .into_iter()
            .flatten()
            .filter(|frame| match frame.entry_count {
                0 => frame.footer_offset == HEADER_LEN as u64,
                _ => frame.footer_offset > HEADER_LEN as u64,
            })
            .collect();
        found.dedup();
        found
    }
}

/// Whether a seal ends as one does.
pub(crate) fn has_seal_magic(seal: &[u8; SEAL_LEN]) -> bool {
    seal[56..] == *SEAL_MAGIC
}

/// Hashes header, footer and the seal's beginning, as the seal's checksum does.
pub(crate) struct FrameHasher(blake3::Hasher);

impl FrameHasher {
    pub fn new(header: &[u8; HEADER_LEN]) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(header);
        Self(hasher)
    }

    pub fn footer(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// Whether `seal` is what was written for this header and footer.
    pub fn fits(mut self, seal: &[u8; SEAL_LEN], number: PackNumber, frame: Frame) -> bool {
        self.0.update(&seal[..24]);
        seal[56..] == *SEAL_MAGIC
            && seal[..8] == frame.footer_offset.to_le_bytes()
            && seal[8..12] == frame.entry_count.to_le_bytes()
            && seal[12..16] == number.0.to_le_bytes()
            && seal[16..24] == [0; 8]
            && self.0.finalize().as_bytes() == &seal[24..56]
    }
}

fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.try_into().expect("the caller slices exactly")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seal_with_one_wrong_number_still_tells_where_the_footer_is() {
        let frame = Frame {
            footer_offset: 5000,
            entry_count: 3,
        };
        let header = header(PackNumber(1), PageSize::default());
        let footer = [1; 3 * ENTRY_LEN];
        let whole = seal(&header, &footer, 5000, PackNumber(1));
        let len = 5000 + 3 * ENTRY_LEN as u64 + SEAL_LEN as u64;
        assert_eq!(Frame::candidates(&whole, len), [frame]);
        for byte in [0, 8] {
            let mut flipped = whole;
            flipped[byte] ^= 4;
            assert!(Frame::candidates(&flipped, len).contains(&frame), "{byte}");
        }
        let mut hasher = FrameHasher::new(&header);
        hasher.footer(&footer);
        assert!(hasher.fits(&whole, PackNumber(1), frame));
    }

    #[test]
    fn headers_of_other_versions_and_packs_are_told_from_damage() {
        let whole = header(PackNumber(1), PageSize::default());
        let check =
            |bytes: &[u8; HEADER_LEN]| check_header(bytes, PackNumber(1), PageSize::default());
        assert_eq!(check(&whole), Header::Right);
        let other = header(PackNumber(2), PageSize::default());
        assert_eq!(check(&other), Header::Foreign);
        let mut flipped = whole;
        flipped[9] ^= 1;
        assert_eq!(check(&flipped), Header::Damaged);
        let hash = blake3::hash(&flipped[..24]);
        flipped[24..].copy_from_slice(&hash.as_bytes()[..8]);
        assert_eq!(check(&flipped), Header::Newer(257));
    }
}
