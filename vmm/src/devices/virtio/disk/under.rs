//! The file of a disk, or the one under its overlay.

use std::fs::File;
use std::sync::Arc;

/// The blocks of an overlay, in bytes.
pub const DISK_BLOCK_BYTES: u64 = 4096;

/// The file under an overlay, or the disk's only one.
pub(super) struct Under {
    pub base: Arc<File>,
    pub size_bytes: u64,
    /// When the file was last changed, in seconds and nanoseconds since 1970; `None`
    /// of what is not a regular file.
    pub modified: Option<(i64, i64)>,
}

impl Under {
    /// The length of a block in bytes: the last one may be shorter.
    pub fn block_bytes(&self, block: u64) -> u64 {
        DISK_BLOCK_BYTES.min(self.size_bytes.saturating_sub(block * DISK_BLOCK_BYTES))
    }
}
