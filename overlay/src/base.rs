//! What an overlay lies over.

use std::fs::File;
use std::io;

/// The blocks of an overlay, in bytes.
pub const BLOCK_BYTES: u64 = 4096;

/// Bytes that do not change while an overlay lies over them.
pub trait Base {
    /// Fills `bytes` with what is there from `offset` on.
    ///
    /// # Errors
    /// It cannot be read, or ends before.
    fn read_exact_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()>;
}

impl Base for File {
    fn read_exact_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(self, bytes, offset)
    }
}

/// The image under an overlay.
#[derive(Clone, Copy)]
pub struct Under<'a> {
    /// Its bytes.
    pub base: &'a dyn Base,
    /// Its length in bytes.
    pub size_bytes: u64,
}

impl Under<'_> {
    /// The length of a block in bytes: the last one may be shorter.
    pub(crate) fn block_bytes(&self, block: u64) -> u64 {
        BLOCK_BYTES.min(self.size_bytes.saturating_sub(block * BLOCK_BYTES))
    }
}
