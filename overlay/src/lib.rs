//! What was written over an image that does not change.
//!
//! Blocks of 4 KiB are kept in slots of one file, and known one by one. A freeze takes a
//! time that does not depend on how much was written: later writes go beside what was
//! frozen. A machine's disks lie under such overlays, and so do the images of a writable
//! mount.
//!
//! With a [`Journal`] the overlay can be found again after its process has ended, and
//! after a power cut as of the last [`Overlay::sync_point`] that came to its end.
//! Absent on purpose: image formats, and any knowledge of stores.

#![forbid(unsafe_code)]

mod base;
mod budget;
mod disk;
mod frozen;
mod journal;
mod layers;
mod map;
mod reader;
mod slots;
mod step;
mod sync;
#[cfg(test)]
mod tests;

pub use base::{BLOCK_BYTES, Base, Under};
pub use budget::Budget;
pub use disk::sync_file;
pub use frozen::{Content, Extent, Frozen};
pub use journal::{Journal, Replayed, SegmentPath, Survived};
pub use layers::{MAX_IMAGE_BYTES, MOST_LAYERS, Overlay};
pub use step::step;
pub use sync::SyncPoint;
