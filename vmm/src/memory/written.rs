//! Which pages of guest memory are private: written since the image was mapped,
//! by whomever.
//!
//! The kernel gives a writer of a privately mapped page a copy, and that copy is
//! no longer a page of the file. So the page tables hold the answer, for writes
//! of the guest, of KVM, of devices and of the monitor alike, and nothing has to
//! be armed beforehand. A page of the image that was only read is not reported.
//! One of anonymous memory is: a read maps the kernel's page of zeros there, and so
//! does the kernel in place of a written page that holds zeros (KSM with
//! `use_zero_pages`, the split of a huge page that is hardly used). The page tables
//! do not tell which it was, and either way it reads as zeros.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;

use rustix::io::Errno;

use super::host_slot::HostSlot;
use super::layout::PAGE_BYTES;
use super::ranges;
use super::uapi::{
    PAGE_IS_FILE, PAGE_IS_PRESENT, PAGE_IS_SWAPPED, PageRegion, ScanRequest, scan_pages,
};
use crate::error::OsContext as _;
use crate::{Error, Result};

/// How the page tables are read.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum ScanMethod {
    /// The scan where the kernel has it, else the entries.
    #[default]
    Automatic,
    /// `ioctl(PAGEMAP_SCAN)`, from Linux 6.7 on.
    PagemapScan,
    /// The entries of `/proc/PID/pagemap`, on any kernel: 8 bytes a page.
    Pagemap,
}

/// Pages in memory or in swap that belong to no file. A page under a migration
/// entry counts as swapped.
pub(super) const PRIVATE_PAGES: ScanRequest = ScanRequest {
    flags: 0,
    all_of: 0,
    none_of: PAGE_IS_FILE,
    any_of: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
};

/// Regions that the kernel returns at once: 96 KiB of them.
pub(super) const SCAN_REGIONS: usize = 4096;

/// The entries read at once.
const CHUNK_ENTRIES: usize = 8192;

const ENTRY_BYTES: usize = 8;
const ENTRY_FILE: u64 = 1 << 61;
const ENTRY_SWAPPED: u64 = 1 << 62;
const ENTRY_PRESENT: u64 = 1 << 63;

/// The private pages of `slots` as ranges of image offsets in bytes: ascending,
/// whole pages, neither overlapping nor touching.
///
/// `pagemap` is `/proc/PID/pagemap`, read-only, of the process that has the
/// slots mapped; it may have been opened by another process. If that process
/// writes meanwhile, pages written meanwhile may or may not be reported.
///
/// # Errors
/// [`Error::MemoryGone`] if the process has ended; [`Error::Os`] if the kernel
/// refuses, with `ENOTTY` for [`ScanMethod::PagemapScan`] before Linux 6.7.
pub fn private_ranges(
    pagemap: &File,
    slots: &[HostSlot],
    method: ScanMethod,
) -> Result<Vec<Range<u64>>> {
    let found = match method {
        ScanMethod::PagemapScan => scan(pagemap, slots),
        ScanMethod::Pagemap => read_entries(pagemap, slots),
        ScanMethod::Automatic => match scan(pagemap, slots) {
            Err(error) if error.raw_os_error() == Some(Errno::NOTTY.raw_os_error()) => {
                read_entries(pagemap, slots)
            }
            done => done,
        },
    };
    // A process that has ended has no pages, and a kernel may say just that. Were
    // it taken for an answer, all that was written would be lost.
    let found = match (has_ended(pagemap, slots), found) {
        (Ok(false), found) => found,
        (Ok(true), _) => return Err(Error::MemoryGone),
        (Err(error), _) => Err(error),
    };
    Ok(ranges::coalesce(found.os("find the written pages")?))
}

/// Whether the process of this pagemap has no memory any more. Some kernels read
/// no entries then, others fail with ESRCH.
fn has_ended(pagemap: &File, slots: &[HostSlot]) -> io::Result<bool> {
    let Some(slot) = slots.first() else {
        return Ok(false);
    };
    let mut entry = [0; ENTRY_BYTES];
    match pagemap.read_at(&mut entry, entry_position(slot.host_address)) {
        Ok(length) => Ok(length == 0),
        Err(error) if error.raw_os_error() == Some(Errno::SRCH.raw_os_error()) => Ok(true),
        Err(error) => Err(error),
    }
}

fn scan(pagemap: &File, slots: &[HostSlot]) -> io::Result<Vec<Range<u64>>> {
    let mut found = Vec::new();
    let mut regions = vec![PageRegion::default(); SCAN_REGIONS];
    for slot in slots {
        scan_slot(pagemap, slot, PRIVATE_PAGES, &mut regions, &mut found)?;
    }
    Ok(found)
}

/// Adds to `found` the image ranges of a slot's pages that a scan reports.
/// After an error, what was reported until then has been added.
pub(super) fn scan_slot(
    pagemap: &File,
    slot: &HostSlot,
    request: ScanRequest,
    regions: &mut [PageRegion],
    found: &mut Vec<Range<u64>>,
) -> io::Result<()> {
    let mut at = slot.host_address;
    while at < slot.host_end() {
        let (filled, walk_end) = scan_pages(pagemap, at..slot.host_end(), request, regions)?;
        for region in &regions[..filled] {
            found.push(slot.image_offset_of(region.start)..slot.image_offset_of(region.end));
        }
        if walk_end <= at {
            return Err(io::Error::other("the kernel's scan does not advance"));
        }
        at = walk_end;
    }
    Ok(())
}

fn read_entries(pagemap: &File, slots: &[HostSlot]) -> io::Result<Vec<Range<u64>>> {
    let mut found = Vec::new();
    let mut buffer = vec![0; CHUNK_ENTRIES * ENTRY_BYTES];
    for slot in slots {
        let mut at = slot.host_address;
        while at < slot.host_end() {
            let wanted = (slot.host_end() - at) / PAGE_BYTES * ENTRY_BYTES as u64;
            let wanted = usize::try_from(wanted).map_or(buffer.len(), |w| w.min(buffer.len()));
            let read = pagemap.read_at(&mut buffer[..wanted], entry_position(at))?;
            let (entries, _) = buffer[..read].as_chunks::<ENTRY_BYTES>();
            if entries.is_empty() {
                // The process has ended; the caller finds that out for all methods.
                return Ok(found);
            }
            for entry in entries {
                if is_private(u64::from_ne_bytes(*entry)) {
                    let offset = slot.image_offset_of(at);
                    ranges::push(&mut found, offset..offset + PAGE_BYTES);
                }
                at += PAGE_BYTES;
            }
        }
    }
    Ok(found)
}

fn is_private(entry: u64) -> bool {
    entry & (ENTRY_PRESENT | ENTRY_SWAPPED) != 0 && entry & ENTRY_FILE == 0
}

/// Where in a pagemap the entry of a page is.
fn entry_position(host_address: u64) -> u64 {
    host_address / PAGE_BYTES * ENTRY_BYTES as u64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testing::{self, MIB, Touch};
    use super::*;

    fn pagemap() -> File {
        File::open("/proc/self/pagemap").unwrap()
    }

    /// A kernel before 6.7 has no scan to test.
    fn no_scan() -> bool {
        let memory = testing::memory(MIB, &[]);
        match private_ranges(&pagemap(), &memory.host_slots(), ScanMethod::PagemapScan) {
            Err(Error::Os { source, .. }) if source.raw_os_error() == Some(libc::ENOTTY) => {
                // A test's thread has its name.
                let test = std::thread::current();
                println!(
                    "SKIPPED {}: this kernel has no PAGEMAP_SCAN",
                    test.name().unwrap_or("vmm")
                );
                true
            }
            other => {
                other.unwrap();
                false
            }
        }
    }

    #[test]
    fn a_scan_goes_on_when_its_vector_is_full() {
        if no_scan() {
            return;
        }
        let memory = testing::memory(4 * MIB, &[0..MIB]);
        for page in (0..1024).step_by(2) {
            testing::write(&memory, page * PAGE_BYTES, 1);
        }
        let slot = memory.host_slots()[0];
        let all = private_ranges(&pagemap(), &[slot], ScanMethod::PagemapScan).unwrap();
        assert_eq!(all.len(), 512);
        for length in [1, 2, 511, 512, 513] {
            let mut regions = vec![PageRegion::default(); length];
            let mut found = Vec::new();
            scan_slot(&pagemap(), &slot, PRIVATE_PAGES, &mut regions, &mut found).unwrap();
            assert_eq!(ranges::coalesce(found), all);
        }
    }

    #[test]
    fn slots_that_touch_in_the_image_give_one_range() {
        let memory = testing::memory(2 * MIB, &[]);
        let slot = memory.host_slots()[0];
        let halves = [
            HostSlot {
                length: MIB,
                ..slot
            },
            HostSlot {
                guest_address: 64 * MIB,
                image_offset: MIB,
                length: MIB,
                host_address: slot.host_address + MIB,
            },
        ];
        testing::write(&memory, MIB - 1, 1);
        testing::write(&memory, MIB, 1);
        for method in [ScanMethod::Automatic, ScanMethod::Pagemap] {
            assert_eq!(
                private_ranges(&pagemap(), &halves, method).unwrap(),
                [MIB - 4096..MIB + 4096]
            );
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn both_methods_find_what_was_written(touches in testing::touches(512, 120)) {
            let data = [0..4096, 256 << 10..512 << 10];
            let memory = testing::memory(2 * MIB, &data);
            let (mut written, mut read) = (Vec::new(), Vec::new());
            for touch in touches {
                testing::touch(&memory, touch);
                let page = touch.page() * PAGE_BYTES..(touch.page() + 1) * PAGE_BYTES;
                match touch {
                    Touch::Read(_) => read.push(page),
                    _ => written.push(page),
                }
            }
            let (written, read) = (ranges::coalesce(written), ranges::coalesce(read));
            let slots = memory.host_slots();
            // A read of an anonymous page looks like a write of zeros.
            let holes = [64 << 10..256 << 10, 512 << 10..2 * MIB];
            let either = ranges::union(&written, &ranges::intersect(&read, &holes));
            if !no_scan() {
                let scan = private_ranges(&pagemap(), &slots, ScanMethod::PagemapScan).unwrap();
                prop_assert_eq!(&scan, &either);
            }
            let entries = private_ranges(&pagemap(), &slots, ScanMethod::Pagemap).unwrap();
            prop_assert_eq!(entries, either);
        }
    }
}
