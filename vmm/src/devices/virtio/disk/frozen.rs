//! A disk at one instant: what a commit reads while the guest goes on writing.

use std::fs::File;
use std::io;
use std::sync::Arc;

use super::map::{Map, Place};
use super::reader;
use super::under::DISK_BLOCK_BYTES;

/// A disk at the instant at which it was frozen. The guest's later writes do not
/// show, as long as this lives.
pub struct FrozenDisk {
    pub(super) name: String,
    pub(super) size_bytes: u64,
    pub(super) base_modified: Option<(i64, i64)>,
    pub(super) number: u64,
    pub(super) base: Arc<File>,
    /// What the overlay holds; of a read-only disk nothing.
    pub(super) overlay: Option<FrozenOverlay>,
}

pub(super) struct FrozenOverlay {
    pub file: Arc<File>,
    /// What commits that are durable contain.
    pub committed: Arc<Map>,
    /// What was written since, the oldest first.
    pub layers: Vec<Arc<Map>>,
    /// Keeps the slots of all of these from being used anew.
    pub _hold: Arc<()>,
}

/// A run of bytes of a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// Where it begins on the disk, in bytes.
    pub image_offset: u64,
    /// How long it is in bytes; a multiple of [`DISK_BLOCK_BYTES`] but at the end
    /// of the disk.
    pub length: u64,
    /// What is there.
    pub content: Content,
}

/// What is in a run of bytes of a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Content {
    /// Zeros, whatever was there before.
    Zeros,
    /// Bytes of the overlay's file.
    Overlay {
        /// Where they begin in the file, in bytes.
        file_offset: u64,
    },
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
        self.overlay.as_ref().map(|overlay| &*overlay.file)
    }

    /// What was written since the last commit that is known to be durable:
    /// ascending, without overlaps, a superset by blocks that hold what they held.
    #[must_use]
    pub fn changed(&self) -> Vec<Extent> {
        let layers = self.overlay.iter().flat_map(|overlay| &overlay.layers);
        self.extents(layers)
    }

    /// All that differs from the base, committed or not.
    #[must_use]
    pub fn overlaid(&self) -> Vec<Extent> {
        let all = self
            .overlay
            .iter()
            .flat_map(|overlay| std::iter::once(&overlay.committed).chain(&overlay.layers));
        self.extents(all)
    }

    /// Reads from the disk as it was.
    ///
    /// # Errors
    /// Past the end, or the files cannot be read.
    pub fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let Some(overlay) = &self.overlay else {
            return reader::read(&self.base, &[], &self.base, self.size_bytes, offset, bytes);
        };
        let newest_first: Vec<&Map> = overlay
            .layers
            .iter()
            .rev()
            .chain([&overlay.committed])
            .map(|map| &**map)
            .collect();
        reader::read(
            &self.base,
            &newest_first,
            &overlay.file,
            self.size_bytes,
            offset,
            bytes,
        )
    }

    fn extents<'a>(&self, oldest_first: impl Iterator<Item = &'a Arc<Map>>) -> Vec<Extent> {
        let mut merged = Map::default();
        for map in oldest_first {
            merged.absorb(map, &mut Vec::new());
        }
        let mut extents: Vec<Extent> = Vec::new();
        for (block, place) in merged.iter() {
            let image_offset = block * DISK_BLOCK_BYTES;
            let next = Extent {
                image_offset,
                length: DISK_BLOCK_BYTES.min(self.size_bytes - image_offset),
                content: match place {
                    Place::Zeros => Content::Zeros,
                    Place::Slot(slot) => Content::Overlay {
                        file_offset: slot.offset(),
                    },
                },
            };
            match extents.last_mut() {
                Some(last) if last.goes_on_with(&next) => last.length += next.length,
                _ => extents.push(next),
            }
        }
        extents
    }
}

impl Extent {
    fn goes_on_with(&self, next: &Self) -> bool {
        let content = match (self.content, next.content) {
            (Content::Zeros, Content::Zeros) => true,
            (Content::Overlay { file_offset: one }, Content::Overlay { file_offset: two }) => {
                one + self.length == two
            }
            _ => false,
        };
        content && self.image_offset + self.length == next.image_offset
    }
}
