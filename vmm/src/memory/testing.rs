//! Images and memory for the tests of this module.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;

use proptest::prelude::*;
use vm_memory::{Bytes as _, GuestAddress};

use super::{GuestMemory, MemoryLayout, PAGE_BYTES};

pub(super) const MIB: u64 = 1 << 20;
pub(super) const GIB: u64 = 1 << 30;

/// What an image's data consists of.
pub(super) const DATA: u8 = 0xda;

/// An image with holes but for `data`, in bytes.
pub(super) fn image(size_bytes: u64, data: &[Range<u64>]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(size_bytes).unwrap();
    for range in data {
        let length = usize::try_from(range.end - range.start).unwrap();
        file.write_all_at(&vec![DATA; length], range.start).unwrap();
    }
    file
}

/// Memory over such an image.
pub(super) fn memory(size_bytes: u64, data: &[Range<u64>]) -> GuestMemory {
    let layout = MemoryLayout::new(size_bytes).unwrap();
    GuestMemory::from_image(layout, &image(size_bytes, data)).unwrap()
}

/// Writes one byte at a guest-physical address.
pub(super) fn write(memory: &GuestMemory, address: u64, byte: u8) {
    memory.ram().write_obj(byte, GuestAddress(address)).unwrap();
}

/// Reads one byte at a guest-physical address.
pub(super) fn read(memory: &GuestMemory, address: u64) -> u8 {
    memory.ram().read_obj(GuestAddress(address)).unwrap()
}

/// Something done to a page of the given number.
#[derive(Clone, Copy, Debug)]
pub(super) enum Touch {
    Read(u64),
    Write(u64, u8),
    /// The whole page, with zeros.
    Clear(u64),
}

impl Touch {
    pub(super) fn page(self) -> u64 {
        match self {
            Self::Read(page) | Self::Write(page, _) | Self::Clear(page) => page,
        }
    }
}

/// Does it.
pub(super) fn touch(memory: &GuestMemory, touch: Touch) {
    let address = touch.page() * PAGE_BYTES;
    match touch {
        Touch::Read(_) => _ = read(memory, address),
        Touch::Write(_, byte) => write(memory, address, byte),
        Touch::Clear(_) => {
            let zeros = [0; PAGE_BYTES as usize];
            memory
                .ram()
                .write_slice(&zeros, GuestAddress(address))
                .unwrap();
        }
    }
}

/// Up to `most` touches of a memory of `pages` pages.
pub(super) fn touches(pages: u64, most: usize) -> impl Strategy<Value = Vec<Touch>> {
    let one = (0..pages, 0..3_u8, any::<u8>()).prop_map(|(page, kind, byte)| match kind {
        0 => Touch::Read(page),
        1 => Touch::Write(page, byte),
        _ => Touch::Clear(page),
    });
    proptest::collection::vec(one, 0..most)
}
