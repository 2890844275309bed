//! Pages: sizes, counts, and the test for an all-zero page.

use crate::error::{Error, Result};

/// The size of a page, fixed when a store is created: 4, 16 or 64 KiB.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageSize(u32);

impl PageSize {
    /// 4 KiB, the default.
    pub const KIB_4: Self = Self(4 << 10);
    /// 16 KiB.
    pub const KIB_16: Self = Self(16 << 10);
    /// 64 KiB.
    pub const KIB_64: Self = Self(64 << 10);

    /// Accepts 4096, 16384 and 65536.
    ///
    /// # Errors
    /// [`Error::PageSize`] for any other number of bytes.
    pub fn from_bytes(bytes: u64) -> Result<Self> {
        [Self::KIB_4, Self::KIB_16, Self::KIB_64]
            .into_iter()
            .find(|size| u64::from(size.0) == bytes)
            .ok_or(Error::PageSize { bytes })
    }

    /// The size in bytes.
    #[must_use]
    pub fn bytes(self) -> u64 {
        u64::from(self.0)
    }

    pub(crate) fn len(self) -> usize {
        usize::try_from(self.0).expect("a page size fits every usize this crate builds for")
    }

    pub(crate) fn as_u32(self) -> u32 {
        self.0
    }
}

impl Default for PageSize {
    fn default() -> Self {
        Self::KIB_4
    }
}

/// Whether every byte is zero. Reads 64 bytes at a time and stops at the first
/// block that is not.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    let mut blocks = bytes.chunks_exact(64);
    blocks
        .by_ref()
        .all(|block| block.iter().fold(0, |acc, byte| acc | byte) == 0)
        && blocks.remainder().iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_three_sizes() {
        for bytes in [0, 1, 4095, 8192, 32768, 1 << 20] {
            assert!(PageSize::from_bytes(bytes).is_err(), "{bytes}");
        }
        assert_eq!(PageSize::from_bytes(65536).unwrap(), PageSize::KIB_64);
    }

    #[test]
    fn one_set_bit_anywhere_is_seen() {
        let mut page = vec![0; 4096 + 7];
        assert!(is_zero(&page));
        for at in [0, 63, 64, 2048, 4095, 4096, 4102] {
            page[at] = 0x80;
            assert!(!is_zero(&page), "{at}");
            page[at] = 0;
        }
    }
}
