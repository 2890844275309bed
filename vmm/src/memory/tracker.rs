//! Which pages were written since it was last asked.
//!
//! A userfaultfd in its asynchronous mode (Linux 6.7) marks pages as
//! write-protected without anybody serving faults: the first write to such a
//! page lifts the mark in the kernel. One scan lists the pages without the mark
//! and marks them. Only pages that are mapped are ever marked. The fault that a
//! private page's first write after a fork takes lifts the mark, too, and so does
//! the one that makes a page of the image private: a mark costs no fault.
//!
//! What tracking does cost: the kernel no longer maps the neighbours of a page of
//! the image that is read (`fault_around_bytes`). So a machine is tracked from
//! its first freeze on; until then all private pages were written.
//!
//! A forked copy of the process has the same private pages and no marks.
//!
//! Deliberately absent: pages that a device writes through a pin (VFIO, buffers
//! registered with io_uring), which no page table tells of, and pages that were
//! discarded.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;

use super::host_slot::HostSlot;
use super::ranges;
use super::uapi::{
    PAGE_IS_WRITTEN, PM_SCAN_CHECK_WPASYNC, PM_SCAN_WP_MATCHING, PageRegion, ScanRequest,
    open_write_tracking, scan_pages, track_writes,
};
use super::written::{PRIVATE_PAGES, SCAN_REGIONS, scan_slot};
use crate::error::OsContext as _;
use crate::{Result, proc};

/// Lists the mapped pages that were written, and marks them as not written.
///
/// Whether a page is a file's is not asked: the kernel would look at what it
/// knows of each page, which makes the scan three to five times as long. So
/// pages that were only read are listed, too, once. The page of zeros is listed
/// like any other: the kernel may have put it there for a page that was written
/// (KSM, the shrinker of huge pages).
const TAKE_WRITTEN: ScanRequest = ScanRequest {
    flags: PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
    all_of: PAGE_IS_WRITTEN,
    none_of: 0,
    ..PRIVATE_PAGES
};

/// Lists them only, also while the guest runs.
const LOOK_WRITTEN: ScanRequest = ScanRequest {
    flags: PM_SCAN_CHECK_WPASYNC,
    ..TAKE_WRITTEN
};

/// What was written to guest memory since the last [`Tracker::take`].
#[derive(Debug)]
pub struct Tracker {
    slots: Vec<HostSlot>,
    pagemap: File,
    /// For the kernel's answers; empty until [`Tracker::prepare`], since most
    /// machines of many are never asked.
    regions: Vec<PageRegion>,
    /// Taken from the kernel by a call that then failed.
    pending: Vec<Range<u64>>,
    /// While it is open the marks work; closing it removes them.
    _userfaultfd: OwnedFd,
}

impl Tracker {
    /// Tracks the writes to memory that this process has mapped. It must stay
    /// mapped as it is while the tracker lives. At first, all private pages
    /// count as written.
    ///
    /// `None` if this kernel cannot; then all private pages have to be taken for
    /// written ([`super::private_ranges`]).
    ///
    /// # Errors
    /// [`crate::Error::Os`] if this process's pagemap cannot be opened.
    pub fn new(slots: &[HostSlot]) -> Result<Option<Self>> {
        let pagemap = proc::open("self/pagemap").os("open /proc/self/pagemap")?;
        match arm(slots, &pagemap) {
            Ok(userfaultfd) => Ok(Some(Self {
                slots: slots.to_vec(),
                pagemap,
                regions: Vec::new(),
                pending: Vec::new(),
                _userfaultfd: userfaultfd,
            })),
            Err(error) => {
                tracing::debug!(%error, "this kernel cannot track writes to guest memory");
                Ok(None)
            }
        }
    }

    /// Makes room for the next answer, so that [`Tracker::take`] need not while
    /// the vCPUs stand still.
    pub fn prepare(&mut self) {
        self.regions.resize(SCAN_REGIONS, PageRegion::default());
    }

    /// The pages written since the last call (at first: all private pages), as
    /// ranges of image offsets in bytes, normal in the sense of [`ranges`]; and
    /// pages of the image that were read, which [`super::private_ranges`] tells
    /// from them.
    /// Each page is listed and marked in one step, so that a write is never
    /// lost, but for an answer of one moment the vCPUs have to stand still. While they
    /// run, each page that is written after its step is in the next answer; so what is
    /// read after this call is what a page holds until then.
    ///
    /// No later answer has a page again that is not written again: the caller
    /// keeps what it was told until that is durable.
    ///
    /// # Errors
    /// [`crate::Error::Os`] if the kernel refuses. Nothing is lost then: the
    /// next call returns what this one had found.
    pub fn take(&mut self) -> Result<Vec<Range<u64>>> {
        let (scanned, found) = self.scan(TAKE_WRITTEN);
        self.pending = ranges::union(&self.pending, &found);
        scanned?;
        Ok(std::mem::take(&mut self.pending))
    }

    /// What [`Tracker::take`] would return now. Nothing is marked, so it costs the guest
    /// nothing.
    ///
    /// # Errors
    /// [`crate::Error::Os`] if the kernel refuses.
    pub fn look(&mut self) -> Result<Vec<Range<u64>>> {
        let (scanned, found) = self.scan(LOOK_WRITTEN);
        scanned?;
        Ok(ranges::union(&self.pending, &found))
    }

    /// All private pages, as [`super::private_ranges`] finds them.
    ///
    /// # Errors
    /// [`crate::Error::Os`] if the kernel refuses.
    pub fn private(&mut self) -> Result<Vec<Range<u64>>> {
        let (scanned, found) = self.scan(PRIVATE_PAGES);
        scanned?;
        Ok(found)
    }

    /// What a scan of all slots reports, also if it then fails.
    fn scan(&mut self, request: ScanRequest) -> (Result<()>, Vec<Range<u64>>) {
        self.prepare();
        let mut found = Vec::new();
        let scanned = self.slots.iter().try_for_each(|slot| {
            scan_slot(&self.pagemap, slot, request, &mut self.regions, &mut found)
        });
        let scanned = scanned.os("track writes to guest memory");
        (scanned, ranges::coalesce(found))
    }

    /// Which pages of a list of image ranges are private; others of it were only read.
    ///
    /// # Errors
    /// [`crate::Error::Os`] if the kernel refuses.
    pub fn private_of(&mut self, list: &[Range<u64>]) -> Result<Vec<Range<u64>>> {
        self.prepare();
        let mut found = Vec::new();
        for piece in ranges::by_slot(&self.slots, list) {
            let part = HostSlot {
                guest_address: piece.guest_address,
                host_address: piece.host_address,
                length: piece.image.end - piece.image.start,
                image_offset: piece.image.start,
            };
            scan_slot(
                &self.pagemap,
                &part,
                PRIVATE_PAGES,
                &mut self.regions,
                &mut found,
            )
            .os("find the written pages")?;
        }
        Ok(ranges::coalesce(found))
    }
}

/// Makes the slots trackable, and sees whether a scan of them works.
fn arm(slots: &[HostSlot], pagemap: &File) -> io::Result<OwnedFd> {
    let userfaultfd = open_write_tracking()?;
    let mut region = [PageRegion::default()];
    for slot in slots {
        let addresses = slot.host_address..slot.host_end();
        track_writes(&userfaultfd, addresses.clone())?;
        scan_pages(pagemap, addresses, LOOK_WRITTEN, &mut region)?;
    }
    Ok(userfaultfd)
}

#[cfg(test)]
mod tests {
    use std::io::Seek as _;

    use proptest::prelude::*;
    use vm_memory::{Bytes as _, GuestAddress};

    use super::super::testing::{self, MIB, Touch};
    use super::super::{Frozen, GuestMemory, ScanMethod, private_ranges};
    use super::*;

    /// What was taken without what was only read.
    fn taken(tracker: &mut Tracker) -> Vec<Range<u64>> {
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let private = private_ranges(&pagemap, &tracker.slots, ScanMethod::Automatic).unwrap();
        ranges::intersect(&tracker.take().unwrap(), &private)
    }

    fn tracker(memory: &GuestMemory) -> Option<Tracker> {
        let tracker = Tracker::new(&memory.host_slots()).unwrap();
        if tracker.is_none() {
            // A test's thread has its name.
            let test = std::thread::current();
            println!(
                "SKIPPED {}: this kernel cannot track writes",
                test.name().unwrap_or("vmm")
            );
        }
        tracker
    }

    #[test]
    fn a_page_is_taken_once_for_each_time_it_is_written() {
        let memory = testing::memory(4 * MIB, &[0..MIB]);
        testing::write(&memory, 4096, 1);
        let Some(mut tracker) = tracker(&memory) else {
            return;
        };
        testing::read(&memory, 8192);
        // Of a hole: the kernel's page of zeros, which a written page may have become, too.
        testing::read(&memory, 2 * MIB);
        assert_eq!(taken(&mut tracker), [4096..8192, 2 * MIB..2 * MIB + 4096]);
        assert!(taken(&mut tracker).is_empty());
        testing::write(&memory, 4097, 1);
        testing::write(&memory, 2 * MIB, 0);
        assert_eq!(taken(&mut tracker), [4096..8192, 2 * MIB..2 * MIB + 4096]);
        assert!(taken(&mut tracker).is_empty());
    }

    #[test]
    fn the_kernels_own_writes_are_taken() {
        let memory = testing::memory(MIB, &[0..MIB]);
        testing::write(&memory, 4096, 1);
        let Some(mut tracker) = tracker(&memory) else {
            return;
        };
        taken(&mut tracker);
        let mut file = testing::image(8192, &[0..8192]);
        file.rewind().unwrap();
        memory
            .ram()
            .read_exact_volatile_from(GuestAddress(4096), &mut file, 8192)
            .unwrap();
        assert_eq!(taken(&mut tracker), [4096..12288]);
    }

    #[test]
    fn many_pieces_are_taken_whole() {
        let memory = testing::memory(64 * MIB, &[]);
        let Some(mut tracker) = tracker(&memory) else {
            return;
        };
        // More pieces than fit into one answer of the kernel.
        for round in 0..2 {
            for page in (0..16384).step_by(2) {
                testing::write(&memory, page * 4096, 1);
            }
            assert_eq!(taken(&mut tracker).len(), 8192, "round {round}");
        }
        assert!(taken(&mut tracker).is_empty());
    }

    #[test]
    fn what_a_failed_call_had_found_is_not_lost() {
        let memory = testing::memory(2 * MIB, &[]);
        let Some(mut tracker) = tracker(&memory) else {
            return;
        };
        let slot = tracker.slots[0];
        tracker.slots.push(HostSlot {
            host_address: slot.host_address + 1,
            ..slot
        });
        testing::write(&memory, 4096, 1);
        assert!(tracker.take().is_err());
        tracker.slots.pop();
        testing::write(&memory, MIB, 1);
        assert_eq!(taken(&mut tracker), [4096..8192, MIB..MIB + 4096]);
        assert!(taken(&mut tracker).is_empty());
    }

    #[test]
    fn memory_is_plain_again_after_the_tracker() {
        let memory = testing::memory(MIB, &[]);
        for _ in 0..2 {
            testing::write(&memory, 0, 1);
            let Some(mut tracker) = tracker(&memory) else {
                return;
            };
            assert_eq!(taken(&mut tracker), [0..4096]);
            drop(tracker);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn rounds_follow_the_model(
            rounds in proptest::collection::vec((testing::touches(512, 40), any::<bool>()), 1..8)
        ) {
            let memory = testing::memory(2 * MIB, &[0..4096, 256 << 10..512 << 10]);
            let Some(mut tracker) = tracker(&memory) else {
                return Ok(());
            };
            for (touches, frozen) in rounds {
                let _frozen = frozen.then(|| Frozen::fork(memory.host_slots()).unwrap());
                let (mut written, mut read) = (Vec::new(), Vec::new());
                for touch in touches {
                    testing::touch(&memory, touch);
                    let page = touch.page() * 4096..(touch.page() + 1) * 4096;
                    match touch {
                        Touch::Read(_) => read.push(page),
                        _ => written.push(page),
                    }
                }
                let (written, read) = (ranges::coalesce(written), ranges::coalesce(read));
                let found = taken(&mut tracker);
                prop_assert_eq!(&ranges::intersect(&found, &written), &written);
                // Beyond that only pages of zeros that were read, each time they are mapped.
                let holes = [64 << 10..256 << 10, 512 << 10..2 * MIB];
                let may = ranges::union(&written, &ranges::intersect(&read, &holes));
                prop_assert_eq!(&ranges::intersect(&found, &may), &found);
            }
        }
    }
}
