//! The guest's memory as mapped in this process.
//!
//! Memory is either anonymous, or the image mapped privately: a page stays the
//! image's until something writes to it, whoever that is, and the image itself
//! never changes. Larger holes of the image are anonymous memory, so that no
//! touch of them asks the image's filesystem. No Rust reference into guest
//! memory exists: access goes through `vm-memory`, which checks addresses and
//! copies with volatile accesses.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap, GuestRegionMmap, MmapRegion,
};

use super::holes::holes;
use super::host_slot::HostSlot;
use super::layout::{MemoryLayout, PAGE_BYTES, Slot};
use super::mapping::{advise, cannot_be_read, make_anonymous, map_from};
use crate::error::OsContext as _;
use crate::{Error, Result};

/// An image that other machines have mapped, which is nearly the one that is wanted.
#[derive(Debug)]
pub struct Base<'a> {
    /// The other image, of the same length.
    pub image: &'a File,
    /// Where it may differ, in bytes, of whole pages: there the image itself is mapped. Each
    /// is a mapping of its own, of which a process has 65530 (`vm.max_map_count`).
    pub differs: &'a [Range<u64>],
}

/// A guest's memory, mapped readable and writable, one mapping for each slot.
///
/// The mappings last until this and every clone of [`GuestMemory::ram`] are gone.
/// KVM keeps addresses of its own: a VM is dropped before its memory.
#[derive(Debug)]
pub struct GuestMemory {
    layout: MemoryLayout,
    ram: GuestMemoryMmap<()>,
    host_slots: Vec<HostSlot>,
}

impl GuestMemory {
    /// Memory that reads as zeros. Takes host memory as it is written.
    ///
    /// # Errors
    /// [`Error::Os`] if the kernel cannot map it.
    pub fn anonymous(layout: MemoryLayout) -> Result<Self> {
        let regions = layout
            .slots()
            .iter()
            .map(|slot| map(slot, None))
            .collect::<Result<Vec<_>>>()?;
        Self::assemble(layout, regions)
    }

    /// Memory that reads as the image until it is written. Nothing is read from
    /// the image here but where its holes are; that moves the file's position.
    ///
    /// The image must not change nor shrink while it is mapped: pages not yet
    /// read would change under the guest, or touching them end this process with
    /// SIGBUS.
    ///
    /// # Errors
    /// [`Error::ImageLength`] if the image is not exactly as long as the memory;
    /// [`Error::Os`] if it cannot be examined or mapped.
    pub fn from_image(layout: MemoryLayout, image: &File) -> Result<Self> {
        let holes = Self::holes(&layout, image)?;
        Self::from_image_over(layout, image, &holes, None)
    }

    /// Where an image for this memory has holes that are worth being mapped as such, in bytes.
    /// To ask its filesystem takes a while. A server that has not got all of the image may tell
    /// fewer than it does later: what is not mapped as a hole reads as zeros all the same.
    ///
    /// # Errors
    /// As [`GuestMemory::from_image`].
    pub fn holes(layout: &MemoryLayout, image: &File) -> Result<Vec<Range<u64>>> {
        let found = length(image, layout)?;
        let mut all = Vec::new();
        for slot in layout.slots() {
            let within = slot.image_offset..slot.image_offset + slot.length;
            all.extend(holes(image, found, within).os("find the memory image's holes")?);
        }
        Ok(all)
    }

    /// As [`GuestMemory::from_image`], with what [`GuestMemory::holes`] told of it. Where the
    /// image is equal to one that other machines have mapped, that is mapped: pages that they
    /// have read are not read again, and not held twice.
    ///
    /// # Errors
    /// As [`GuestMemory::from_image`], also of the other image; [`Error::Os`] if a range is
    /// not within the image, or not of whole pages.
    pub fn from_image_over(
        layout: MemoryLayout,
        image: &File,
        holes: &[Range<u64>],
        base: Option<&Base<'_>>,
    ) -> Result<Self> {
        length(image, &layout)?;
        let below = base.map_or(image, |base| base.image);
        length(below, &layout)?;
        let shared = Arc::new(below.try_clone().os("open the memory image again")?);
        let mut regions = Vec::with_capacity(layout.slots().len());
        for slot in layout.slots() {
            let mut region = map(slot, Some(Arc::clone(&shared)))?;
            for own in base.iter().flat_map(|base| base.differs) {
                let within = slot.image_offset..slot.image_offset + slot.length;
                let own = own.start.max(within.start)..own.end.min(within.end);
                if own.is_empty() {
                    continue;
                }
                let part = host_size(own.start - slot.image_offset)
                    ..host_size(own.end - slot.image_offset);
                map_from(&mut region, part, image, own.start)
                    .os("map what differs from the memory image of others")?;
            }
            let within = slot.image_offset..slot.image_offset + slot.length;
            let here = |hole: &&Range<u64>| within.start <= hole.start && hole.end <= within.end;
            for hole in holes.iter().filter(here) {
                let part = host_size(hole.start - slot.image_offset)
                    ..host_size(hole.end - slot.image_offset);
                make_anonymous(&mut region, part).os("map a hole of the memory image")?;
            }
            regions.push(region);
        }
        Self::assemble(layout, regions)
    }

    fn assemble(layout: MemoryLayout, regions: Vec<MmapRegion<()>>) -> Result<Self> {
        let mut host_slots = Vec::with_capacity(regions.len());
        let mut guest_regions = Vec::with_capacity(regions.len());
        for (slot, region) in layout.slots().iter().zip(regions) {
            advise(&region).os("advise on guest memory")?;
            host_slots.push(HostSlot {
                guest_address: slot.guest_address,
                image_offset: slot.image_offset,
                length: slot.length,
                host_address: region.as_ptr() as u64,
            });
            guest_regions.push(
                GuestRegionMmap::new(region, GuestAddress(slot.guest_address))
                    .expect("a slot ends below 2 TiB"),
            );
        }
        let ram =
            GuestMemoryMmap::from_regions(guest_regions).expect("slots ascend and do not overlap");
        Ok(Self {
            layout,
            ram,
            host_slots,
        })
    }

    /// Where the memory lies.
    #[must_use]
    pub fn layout(&self) -> &MemoryLayout {
        &self.layout
    }

    /// Checked access by guest-physical address.
    #[must_use]
    pub fn ram(&self) -> &GuestMemoryMmap<()> {
        &self.ram
    }

    /// The slots with their host addresses, in ascending order: what KVM is
    /// given, and what names memory to the rest of this module.
    #[must_use]
    pub fn host_slots(&self) -> Vec<HostSlot> {
        self.host_slots.clone()
    }

    /// Whether the page at this guest-physical address can no longer be read: its image's
    /// server or file went away, or its data is damaged. Waits for a server that hangs.
    #[must_use]
    pub fn is_lost(&self, guest_address: u64) -> bool {
        let page = guest_address & !(PAGE_BYTES - 1);
        let host = self.ram.get_host_address(GuestAddress(page));
        host.is_ok_and(|host| cannot_be_read(host, host_size(PAGE_BYTES)))
    }

    /// Whether an address of this process lies in guest memory: tells a fault on
    /// the guest's memory from one on the monitor's own.
    #[must_use]
    pub fn contains_host_address(&self, address: usize) -> bool {
        let address = address as u64;
        self.host_slots
            .iter()
            .any(|slot| (slot.host_address..slot.host_end()).contains(&address))
    }
}

/// The image's length, which is that of the memory.
fn length(image: &File, layout: &MemoryLayout) -> Result<u64> {
    let found = image.metadata().os("examine the memory image")?.len();
    if found != layout.size_bytes() {
        return Err(Error::ImageLength {
            found,
            expected: layout.size_bytes(),
        });
    }
    Ok(found)
}

/// Maps a slot privately from the image, or anonymously.
fn map(slot: &Slot, image: Option<Arc<File>>) -> Result<MmapRegion<()>> {
    let backing = image.as_ref().map_or(libc::MAP_ANONYMOUS, |_| 0);
    let mut builder = MmapRegionBuilder::new(host_size(slot.length))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_NORESERVE | backing);
    if let Some(image) = image {
        builder = builder.with_file_offset(FileOffset::from_arc(image, slot.image_offset));
    }
    builder.build().map_err(|error| Error::Os {
        action: "map guest memory",
        source: match error {
            MmapRegionError::Mmap(source) => source,
            other => io::Error::other(other),
        },
    })
}

/// A size in bytes within guest memory, as the host counts them.
fn host_size(bytes: u64) -> usize {
    usize::try_from(bytes).expect("x86-64 addresses have 64 bits")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::super::testing::{self, DATA, GIB, MIB};
    use super::super::{ScanMethod, private_ranges};
    use super::*;

    #[test]
    fn an_image_of_another_length_is_refused() {
        let image = testing::image(2 * MIB, &[]);
        for size in [MIB, 2 * MIB + 4096] {
            let layout = MemoryLayout::new(size).unwrap();
            assert!(matches!(
                GuestMemory::from_image(layout, &image),
                Err(Error::ImageLength { found, expected }) if found == 2 * MIB && expected == size
            ));
        }
    }

    #[test]
    fn memory_reads_as_the_image() {
        let memory = testing::memory(4 * MIB, &[4096..8192, 2 * MIB..3 * MIB]);
        for (address, byte) in [
            (0, 0),
            (4096, DATA),
            (8191, DATA),
            (8192, 0),
            (2 * MIB - 1, 0),
            (2 * MIB, DATA),
            (3 * MIB, 0),
        ] {
            assert_eq!(testing::read(&memory, address), byte, "at {address:#x}");
        }
    }

    #[test]
    fn large_holes_are_anonymous() {
        let memory = testing::memory(4 * MIB, &[0..MIB, 2 * MIB..3 * MIB]);
        let begin = memory.host_slots()[0].host_address;
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let file_parts: Vec<_> = maps
            .lines()
            .filter_map(|line| {
                let mut fields = line.split_ascii_whitespace();
                let (start, end) = fields.next()?.split_once('-')?;
                let start = u64::from_str_radix(start, 16).ok()?.checked_sub(begin)?;
                let end = u64::from_str_radix(end, 16).ok()? - begin;
                (end <= 4 * MIB && fields.nth(3)? != "0").then_some(start..end)
            })
            .collect();
        assert_eq!(file_parts, [0..MIB, 2 * MIB..3 * MIB]);
    }

    #[test]
    fn what_is_equal_is_mapped_from_the_image_of_others() {
        let base = testing::image(6 * GIB, &[0..2 * MIB, 5 * GIB..5 * GIB + MIB]);
        let image = testing::image(6 * GIB, &[0..2 * MIB, 5 * GIB..5 * GIB + MIB]);
        // In the image alone; in both; across the slots' border; and a hole of the image's.
        let other = [1; 8192];
        image.write_all_at(&other, 4096).unwrap();
        image.write_all_at(&other, 3 * GIB - 4096).unwrap();
        base.write_all_at(&other, 16 * MIB).unwrap();
        let differs = [
            4096..3 * 4096,
            16 * MIB..16 * MIB + 8192,
            3 * GIB - 4096..3 * GIB + 4096,
        ];
        let layout = MemoryLayout::new(6 * GIB).unwrap();
        let below = Base {
            image: &base,
            differs: &differs,
        };
        let holes = GuestMemory::holes(&layout, &image).unwrap();
        let memory = GuestMemory::from_image_over(layout, &image, &holes, Some(&below)).unwrap();
        // What the other image says now is what an equal page reads as: it is that one's.
        base.write_all_at(&[2], MIB).unwrap();
        image.write_all_at(&[3], MIB).unwrap();
        for (address, byte) in [
            (0, DATA),
            (4096, 1),
            (3 * 4096 - 1, 1),
            (3 * 4096, DATA),
            (MIB, 2),
            (16 * MIB, 0),
            (3 * GIB - 1, 1),
            (4 * GIB, 1),
            (4 * GIB + 4095, 1),
            (4 * GIB + 4096, 0),
            (6 * GIB, DATA),
        ] {
            assert_eq!(testing::read(&memory, address), byte, "at {address:#x}");
        }
        // And writes go to neither.
        testing::write(&memory, 4096, 9);
        testing::write(&memory, 0, 9);
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let written = private_ranges(&pagemap, &memory.host_slots(), ScanMethod::Automatic);
        // In a hole, which is no file's, a page that was read counts, too.
        assert_eq!(written.unwrap(), [0..8192, 16 * MIB..16 * MIB + 4096]);
        for file in [&base, &image] {
            let mut byte = [0];
            file.read_exact_at(&mut byte, 0).unwrap();
            assert_eq!(byte, [DATA]);
        }
    }

    #[test]
    fn a_base_that_does_not_fit_is_refused() {
        let layout = || MemoryLayout::new(2 * MIB).unwrap();
        let image = testing::image(2 * MIB, &[]);
        let short = testing::image(MIB, &[]);
        let over = |base, differs: &[Range<u64>]| {
            let below = Base {
                image: base,
                differs,
            };
            GuestMemory::from_image_over(layout(), &image, &[], Some(&below)).map(drop)
        };
        assert!(matches!(
            over(&short, &[]),
            Err(Error::ImageLength { found, .. }) if found == MIB
        ));
        assert!(over(&image, &[100..4096]).is_err());
        over(&image, &[MIB..4 * MIB]).unwrap();
    }

    #[test]
    fn writes_above_the_devices_stay_out_of_the_image() {
        let image = testing::image(5 * GIB, &[0..4096, 4 * GIB..4 * GIB + 8192]);
        let memory = GuestMemory::from_image(MemoryLayout::new(5 * GIB).unwrap(), &image).unwrap();
        assert_eq!(memory.host_slots().len(), 2);
        // Offset 4 GiB of the image is at 5 GiB in the guest.
        assert_eq!(testing::read(&memory, 5 * GIB + 4096), DATA);
        testing::write(&memory, 5 * GIB + 4096, 1);
        testing::write(&memory, 4 * GIB, 2);
        testing::write(&memory, 3 * GIB - 1, 3);
        testing::write(&memory, 6 * GIB - 1, 4);
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        for method in [ScanMethod::Automatic, ScanMethod::Pagemap] {
            assert_eq!(
                private_ranges(&pagemap, &memory.host_slots(), method).unwrap(),
                [
                    3 * GIB - 4096..3 * GIB + 4096,
                    4 * GIB + 4096..4 * GIB + 8192,
                    5 * GIB - 4096..5 * GIB
                ]
            );
        }
        let mut bytes = [0; 4096];
        image.read_exact_at(&mut bytes, 4 * GIB + 4096).unwrap();
        assert_eq!(bytes, [DATA; 4096]);
        image.read_exact_at(&mut bytes, 3 * GIB).unwrap();
        assert_eq!(bytes, [0; 4096]);
    }

    #[test]
    fn there_is_no_memory_between_the_slots() {
        use vm_memory::Bytes as _;
        let memory = GuestMemory::anonymous(MemoryLayout::new(5 * GIB).unwrap()).unwrap();
        for address in [3 * GIB, 4 * GIB - 1, 6 * GIB] {
            assert!(memory.ram().write_obj(1_u8, GuestAddress(address)).is_err());
        }
        // A write across the end of memory writes up to it and fails.
        assert!(
            memory
                .ram()
                .write_obj(1_u64, GuestAddress(3 * GIB - 4))
                .is_err()
        );
        let slot = memory.host_slots()[1];
        let address = usize::try_from(slot.host_address).unwrap();
        assert!(memory.contains_host_address(address));
        assert!(memory.contains_host_address(address + usize::try_from(slot.length).unwrap() - 1));
        assert!(!memory.contains_host_address(std::ptr::from_ref(&slot).addr()));
    }

    #[test]
    fn nothing_stays_mapped() {
        let memory = testing::memory(4 * MIB, &[0..MIB, 2 * MIB..3 * MIB]);
        let begin = memory.host_slots()[0].host_address;
        let mapped = || {
            let pagemap = File::open("/proc/self/smaps").unwrap();
            std::io::read_to_string(pagemap)
                .unwrap()
                .contains(&format!("{begin:x}-"))
        };
        assert!(mapped());
        drop(memory);
        assert!(!mapped());
    }

    #[test]
    fn memory_outlives_its_owner_through_a_clone() {
        use vm_memory::Bytes as _;
        let memory = testing::memory(MIB, &[0..4096]);
        let ram = memory.ram().clone();
        drop(memory);
        assert_eq!(ram.read_obj::<u8>(GuestAddress(0)).unwrap(), DATA);
    }
}
