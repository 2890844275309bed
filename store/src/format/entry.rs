//! A line of a pack's footer. Numbers are little-endian.
//!
//! ```text
//!      0  16  the chunk's key
//!     16   4  offset of the stored chunk; it ends where the next begins
//!     20   1  chunk kind (low 4 bits) and encoding (high 4 bits)
//!     21   3  first 3 bytes of BLAKE3 of the stored bytes
//! ```

use crate::id::{ChunkKey, ChunkKind};
use crate::pack::codec::Encoding;

pub(crate) const ENTRY_LEN: usize = 24;

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
        bytes[20] = self.key.kind as u8 | self.encoding.to_byte() << 4;
        bytes[21..].copy_from_slice(&self.check);
        bytes
    }

    /// `None` if the kind is unknown. An unknown encoding is an entry like any
    /// other: a newer version's chunk, which only decoding it refuses.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        Some(Self {
            key: ChunkKey {
                kind: ChunkKind::from_byte(bytes[20] & 0xf)?,
                prefix: bytes[..16].try_into().ok()?,
            },
            offset: offset_in(bytes),
            encoding: Encoding::from_byte(bytes[20] >> 4),
            check: bytes[21..24].try_into().ok()?,
        })
    }
}

/// The offset that the bytes of a footer entry name.
pub(crate) fn offset_in(entry: &[u8]) -> u32 {
    u32::from_le_bytes(array(&entry[16..20]))
}

/// The check bytes of a footer entry for these stored bytes.
pub(crate) fn stored_check(stored: &[u8]) -> [u8; 3] {
    let hash = blake3::hash(stored);
    [hash.as_bytes()[0], hash.as_bytes()[1], hash.as_bytes()[2]]
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
    }

    #[test]
    fn an_unknown_encoding_is_kept_and_an_unknown_kind_is_none() {
        let entry = Entry {
            key: ChunkKey {
                kind: ChunkKind::Page,
                prefix: [7; 16],
            },
            offset: 32,
            encoding: Encoding::Raw,
            check: [1, 2, 3],
        };
        let mut bytes = entry.to_bytes();
        bytes[20] = 0x90;
        let unknown = Entry::from_bytes(&bytes).unwrap();
        assert_eq!(unknown.encoding, Encoding::Unknown(9));
        assert_eq!(unknown.to_bytes(), bytes);
        bytes[20] = 0x1f;
        assert_eq!(Entry::from_bytes(&bytes), None);
    }
}
