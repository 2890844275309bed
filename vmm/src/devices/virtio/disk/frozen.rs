//! A disk at one instant: what a commit reads while the guest goes on writing.

use std::fs::File;
use std::io;
use std::sync::Arc;

use snapstore_overlay::{Base as _, Extent, Frozen, Under};

/// A disk at the instant at which it was frozen. The guest's later writes do not
/// show, as long as this lives.
pub struct FrozenDisk {
    pub(super) name: String,
    pub(super) size_bytes: u64,
    pub(super) base_modified: Option<(i64, i64)>,
    pub(super) number: u64,
    pub(super) base: Arc<File>,
    /// What the overlay holds; of a read-only disk nothing.
    pub(super) overlay: Option<Frozen>,
}

impl FrozenDisk {
    /// The disk's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The disk's size in bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Which of the disk's freezes this is.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.number
    }

    /// The file under the overlay.
    #[must_use]
    pub fn base(&self) -> &File {
        &self.base
    }

    /// When the file under the overlay had last been changed when the machine began,
    /// in seconds and nanoseconds since 1970; `None` of what is not a regular file.
    /// If it has been changed since, the disk is not what the guest has seen.
    #[must_use]
    pub fn base_modified(&self) -> Option<(i64, i64)> {
        self.base_modified
    }

    /// The overlay's file, which extents point into; `None` for a read-only disk.
    /// Its descriptor can also be written through: a process that is handed it
    /// only reads.
    #[must_use]
    pub fn overlay(&self) -> Option<&File> {
        self.overlay.as_ref().map(|overlay| &**overlay.file())
    }

    /// What was written since the last commit that is known to be durable:
    /// ascending, without overlaps, a superset by blocks that hold what they held.
    #[must_use]
    pub fn changed(&self) -> Vec<Extent> {
        self.overlay.as_ref().map_or_else(Vec::new, Frozen::changed)
    }

    /// All that differs from the base, committed or not.
    #[must_use]
    pub fn overlaid(&self) -> Vec<Extent> {
        self.overlay
            .as_ref()
            .map_or_else(Vec::new, Frozen::overlaid)
    }

    /// Reads from the disk as it was.
    ///
    /// # Errors
    /// Past the end, or the files cannot be read.
    pub fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        match &self.overlay {
            None => self.base.read_exact_at(bytes, offset),
            Some(overlay) => {
                let under = Under {
                    base: &*self.base,
                    size_bytes: self.size_bytes,
                };
                overlay.read_at(under, offset, bytes)
            }
        }
    }
}
