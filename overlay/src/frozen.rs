//! An overlay at one instant: what a commit reads while writing goes on.

use std::fs::File;
use std::io;
use std::sync::Arc;

use crate::base::{BLOCK_BYTES, Under};
use crate::map::{Map, Place};
use crate::reader;

/// An overlay at the instant at which it was frozen. Later writes do not show, as
/// long as this lives.
#[derive(Clone)]
pub struct Frozen {
    pub(crate) file: Arc<File>,
    pub(crate) size_bytes: u64,
    /// What commits that are durable contain.
    pub(crate) committed: Arc<Map>,
    /// What was written since, the oldest first.
    pub(crate) layers: Vec<Arc<Map>>,
    /// Keeps the slots of all of these from being used anew.
    pub(crate) _hold: Arc<()>,
}

/// A run of bytes of an image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// Where it begins in the image, in bytes.
    pub image_offset: u64,
    /// How long it is in bytes; a multiple of [`BLOCK_BYTES`] but at the end
    /// of the image.
    pub length: u64,
    /// What is there.
    pub content: Content,
}

/// What is in a run of bytes of an image.
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

impl Frozen {
    /// The overlay's file, which extents point into. Its descriptor can also be written
    /// through: a process that is handed it only reads.
    #[must_use]
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// How many maps hold what is not committed.
    #[must_use]
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// What was written since the last commit that is known to be durable:
    /// ascending, without overlaps, a superset by blocks that hold what they held.
    #[must_use]
    pub fn changed(&self) -> Vec<Extent> {
        self.extents(self.layers.iter())
    }

    /// All that differs from the base, committed or not.
    #[must_use]
    pub fn overlaid(&self) -> Vec<Extent> {
        self.extents(std::iter::once(&self.committed).chain(&self.layers))
    }

    /// Reads from the image as it was.
    ///
    /// # Errors
    /// Past the end, or the files cannot be read.
    pub fn read_at(&self, under: Under<'_>, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let newest_first: Vec<&Map> = self
            .layers
            .iter()
            .rev()
            .chain([&self.committed])
            .map(|map| &**map)
            .collect();
        let mut from_base = |run: &mut [u8], at| under.base.read_exact_at(run, at);
        let size = under.size_bytes;
        reader::read(
            &newest_first,
            &self.file,
            size,
            offset,
            bytes,
            &mut from_base,
        )
    }

    fn extents<'a>(&self, oldest_first: impl Iterator<Item = &'a Arc<Map>>) -> Vec<Extent> {
        let mut merged = Map::default();
        for map in oldest_first {
            merged.absorb(map, &mut Vec::new());
        }
        let mut extents: Vec<Extent> = Vec::new();
        for (block, blocks, place) in merged.runs() {
            let image_offset = block * BLOCK_BYTES;
            let next = Extent {
                image_offset,
                length: (blocks * BLOCK_BYTES).min(self.size_bytes - image_offset),
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
