//! The file of a disk, or the one under its overlay.

use std::fs::File;
use std::sync::Arc;

pub use snapstore_overlay::BLOCK_BYTES as DISK_BLOCK_BYTES;

/// The file under an overlay, or the disk's only one.
pub(super) struct Under {
    pub base: Arc<File>,
    pub size_bytes: u64,
    /// When the file was last changed, in seconds and nanoseconds since 1970; `None`
    /// of what is not a regular file.
    pub modified: Option<(i64, i64)>,
}

impl Under {
    /// As an overlay sees it.
    pub fn bytes(&self) -> snapstore_overlay::Under<'_> {
        snapstore_overlay::Under {
            base: &*self.base,
            size_bytes: self.size_bytes,
        }
    }
}
