//! Where guest memory lies, in the guest and in its image.
//!
//! ```text
//! guest-physical   0 ........ 3 GiB | devices | 4 GiB ........ 1 GiB + size
//! image offset     0 ........ 3 GiB           | 3 GiB ........ size
//! ```
//!
//! The image is flat: it has no gap where the devices are, so that from 3 GiB on
//! an image offset is not a guest address. Whatever names a place in memory says
//! which of the two it means.

use crate::{Error, Result};

/// The bytes of a page: of the guest, of the host and of every range here.
pub const PAGE_BYTES: u64 = 4096;

/// The least memory a guest can have, in bytes.
pub const MIN_SIZE_BYTES: u64 = 1 << 20;

/// The most memory a guest can have, in bytes.
pub const MAX_SIZE_BYTES: u64 = 1 << 40;

/// The guest-physical address where the devices' addresses begin.
pub const DEVICE_HOLE_START: u64 = 3 << 30;

/// The guest-physical address where memory goes on after the devices.
pub const DEVICE_HOLE_END: u64 = 4 << 30;

/// A run of memory without gaps in the guest and in the image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Slot {
    /// Where it begins in the guest's physical address space, in bytes.
    pub guest_address: u64,
    /// Where it begins in the image, in bytes.
    pub image_offset: u64,
    /// How long it is in bytes, a multiple of [`PAGE_BYTES`].
    pub length: u64,
}

/// The slots of a guest's memory, in ascending order.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MemoryLayout {
    size_bytes: u64,
    slots: Vec<Slot>,
}

impl MemoryLayout {
    /// Lays out `size_bytes` of memory.
    ///
    /// # Errors
    /// [`Error::MemorySize`] unless it is a multiple of [`PAGE_BYTES`] from
    /// [`MIN_SIZE_BYTES`] to [`MAX_SIZE_BYTES`].
    pub fn new(size_bytes: u64) -> Result<Self> {
        if !(MIN_SIZE_BYTES..=MAX_SIZE_BYTES).contains(&size_bytes)
            || !size_bytes.is_multiple_of(PAGE_BYTES)
        {
            return Err(Error::MemorySize { bytes: size_bytes });
        }
        let low = size_bytes.min(DEVICE_HOLE_START);
        let mut slots = vec![Slot {
            guest_address: 0,
            image_offset: 0,
            length: low,
        }];
        if size_bytes > low {
            slots.push(Slot {
                guest_address: DEVICE_HOLE_END,
                image_offset: low,
                length: size_bytes - low,
            });
        }
        Ok(Self { size_bytes, slots })
    }

    /// The guest's memory in bytes; also the length of its image.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The slots, one or two, in ascending order.
    #[must_use]
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// Where in the image the byte at a guest-physical address is; `None` if
    /// there is no memory at that address.
    #[must_use]
    pub fn image_offset(&self, guest_address: u64) -> Option<u64> {
        self.slots.iter().find_map(|slot| {
            let within = guest_address.checked_sub(slot.guest_address)?;
            (within < slot.length).then(|| slot.image_offset + within)
        })
    }

    /// The guest-physical address of the byte at an offset in the image; `None`
    /// past the image's end.
    #[must_use]
    pub fn guest_address(&self, image_offset: u64) -> Option<u64> {
        self.slots.iter().find_map(|slot| {
            let within = image_offset.checked_sub(slot.image_offset)?;
            (within < slot.length).then(|| slot.guest_address + within)
        })
    }

    /// Whether there is memory at a guest-physical address.
    #[must_use]
    pub fn is_ram(&self, guest_address: u64) -> bool {
        self.image_offset(guest_address).is_some()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn smallest_memory_is_one_slot() {
        let layout = MemoryLayout::new(1 << 20).unwrap();
        assert_eq!(layout.slots().len(), 1);
        assert_eq!(layout.image_offset(0), Some(0));
        assert_eq!(layout.image_offset((1 << 20) - 1), Some((1 << 20) - 1));
        assert_eq!(layout.image_offset(1 << 20), None);
        assert_eq!(layout.guest_address(1 << 20), None);
    }

    #[test]
    fn three_gib_end_where_the_devices_begin() {
        let layout = MemoryLayout::new(3 * GIB).unwrap();
        assert_eq!(layout.slots().len(), 1);
        assert!(layout.is_ram(DEVICE_HOLE_START - 1));
        assert!(!layout.is_ram(DEVICE_HOLE_START));
        assert!(!layout.is_ram(DEVICE_HOLE_END));
    }

    #[test]
    fn one_page_more_lies_above_the_devices() {
        let layout = MemoryLayout::new(3 * GIB + PAGE_BYTES).unwrap();
        assert_eq!(
            layout.slots()[1],
            Slot {
                guest_address: 4 * GIB,
                image_offset: 3 * GIB,
                length: PAGE_BYTES
            }
        );
        assert_eq!(layout.guest_address(3 * GIB), Some(4 * GIB));
        assert_eq!(layout.image_offset(4 * GIB), Some(3 * GIB));
        assert_eq!(layout.image_offset(4 * GIB + PAGE_BYTES), None);
    }

    #[test]
    fn five_gib_leave_the_devices_free() {
        let layout = MemoryLayout::new(5 * GIB).unwrap();
        assert!(!layout.is_ram(3 * GIB));
        assert!(!layout.is_ram(4 * GIB - 1));
        assert!(layout.is_ram(6 * GIB - 1));
        assert!(!layout.is_ram(6 * GIB));
        assert_eq!(layout.image_offset(u64::MAX), None);
        assert_eq!(layout.guest_address(u64::MAX), None);
    }

    #[test]
    fn impossible_sizes_are_refused() {
        for bytes in [
            0,
            PAGE_BYTES,
            MIN_SIZE_BYTES - PAGE_BYTES,
            MIN_SIZE_BYTES + 1,
            MAX_SIZE_BYTES + PAGE_BYTES,
            u64::MAX,
        ] {
            assert!(
                matches!(MemoryLayout::new(bytes), Err(Error::MemorySize { bytes: b }) if b == bytes)
            );
        }
        assert!(MemoryLayout::new(MAX_SIZE_BYTES).is_ok());
    }

    proptest! {
        #[test]
        fn offsets_and_addresses_are_inverse(pages in 256_u64..4_000_000, at in any::<u64>()) {
            let layout = MemoryLayout::new(pages * PAGE_BYTES).unwrap();
            let offset = at % (layout.size_bytes() + GIB);
            match layout.guest_address(offset) {
                Some(address) => {
                    prop_assert!(offset < layout.size_bytes());
                    prop_assert!(!(DEVICE_HOLE_START..DEVICE_HOLE_END).contains(&address));
                    prop_assert_eq!(layout.image_offset(address), Some(offset));
                }
                None => prop_assert!(offset >= layout.size_bytes()),
            }
        }
    }
}
