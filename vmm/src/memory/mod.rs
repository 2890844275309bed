//! Guest memory: where it is, what backs it, what was written to it.
//!
//! - [`MemoryLayout`]: guest-physical addresses against offsets in the image.
//! - [`GuestMemory`]: the mappings, private over an image or anonymous.
//! - [`private_ranges`]: all pages that are not the image's any more.
//! - [`Tracker`]: pages written since it was last asked.
//! - [`Frozen`]: a copy-on-write copy of the memory that stands still.
//! - [`PageCopy`]: a copy of a few of its pages.
//! - [`resident_bytes`]: how much of a file is in memory.
//!
//! The vCPUs are stopped while a [`Frozen`] is made, and while a [`Tracker`] is asked for
//! the answer of one instant; nothing else here needs that. Nothing here takes pages away from the
//! guest: a page that is discarded looks as if it had never been written.

#![cfg_attr(
    test,
    allow(
        clippy::single_range_in_vec_init,
        reason = "tests state lists of ranges, some of one"
    )
)]

mod copy;
mod fork;
mod freeze;
mod guest;
mod holes;
mod host_slot;
mod layout;
mod mapping;
pub mod ranges;
mod resident;
#[cfg(test)]
mod testing;
mod tracker;
mod uapi;
mod written;

pub use copy::{CopyRoom, PageCopy};
pub(crate) use copy::{limit_bytes, private_pages};
pub use freeze::{Frozen, FrozenFiles};
pub use guest::{Base, GuestMemory};
pub use host_slot::HostSlot;
pub use layout::{
    DEVICE_HOLE_END, DEVICE_HOLE_START, MAX_SIZE_BYTES, MIN_SIZE_BYTES, MemoryLayout, PAGE_BYTES,
    Slot,
};
pub use resident::resident_bytes;
pub use tracker::Tracker;
pub use written::{ScanMethod, private_ranges};
