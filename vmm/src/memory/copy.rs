//! A copy of the pages of guest memory that a commit needs, where they are few.
//!
//! A fork costs the guest in proportion to all its private pages: once while it
//! stands still, and again at each of their next writes. Where little was written
//! since the last commit, copying just that costs less of both.

use std::fs::File;
use std::io::{Seek as _, SeekFrom};
use std::ops::Range;

use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::{Bytes as _, GuestAddress};

use super::guest::GuestMemory;
use super::host_slot::HostSlot;
use super::layout::PAGE_BYTES;
use super::ranges;
use crate::error::OsContext as _;
use crate::{Error, Result, proc};

/// Copied by these even if hardly anything is private: what a fork costs at least.
const FEW_PAGES: u64 = 128;
/// A page costs a copy about as much time as it costs a fork to share so many; rounded
/// down, since the guest pays for a fork afterwards, too (docs/BENCHMARKS.md).
const SHARED_PER_COPY: u64 = 64;

/// The most that is copied rather than shared, with so many private pages.
pub(crate) fn limit_bytes(private_pages: u64) -> u64 {
    (FEW_PAGES + private_pages / SHARED_PER_COPY) * PAGE_BYTES
}

/// Some pages of guest memory, copied.
#[derive(Debug)]
pub struct PageCopy {
    /// An unnamed file in memory, sparse; positions are image offsets.
    file: File,
    slots: Vec<HostSlot>,
    pages: Vec<Range<u64>>,
}

/// How much may be copied, and the file to copy to: made before the guest stands still.
#[derive(Debug)]
pub struct CopyRoom {
    file: File,
    limit_bytes: u64,
}

impl CopyRoom {
    /// Room for as much as costs less than a fork would now.
    ///
    /// # Errors
    /// [`Error::Os`] if the kernel has no file for it.
    pub fn new(memory: &GuestMemory) -> Result<Self> {
        let file = memfd_create("snapstore pages", MemfdFlags::CLOEXEC)
            .os("make a file for copied pages")?;
        let file = File::from(file);
        file.set_len(memory.layout().size_bytes())
            .os("make a file for copied pages")?;
        Ok(Self {
            file,
            limit_bytes: limit_bytes(private_pages()?),
        })
    }

    /// The most that may be copied, in bytes.
    #[must_use]
    pub fn limit_bytes(&self) -> u64 {
        self.limit_bytes
    }

    /// Copies these image ranges of the memory, which nobody writes meanwhile.
    ///
    /// # Errors
    /// [`Error::Os`] if there is no memory for the copy.
    pub fn copy(mut self, memory: &GuestMemory, pages: Vec<Range<u64>>) -> Result<PageCopy> {
        let slots = memory.host_slots();
        for piece in ranges::by_slot(&slots, &pages) {
            self.file
                .seek(SeekFrom::Start(piece.image.start))
                .os("copy guest memory")?;
            let length = usize::try_from(piece.image.end - piece.image.start)
                .map_err(|_| Error::MemoryGone)?;
            memory
                .ram()
                .write_all_volatile_to(GuestAddress(piece.guest_address), &mut self.file, length)
                .map_err(std::io::Error::other)
                .os("copy guest memory")?;
        }
        let in_file = |slot: &HostSlot| HostSlot {
            host_address: slot.image_offset,
            ..*slot
        };
        Ok(PageCopy {
            file: self.file,
            slots: slots.iter().map(in_file).collect(),
            pages,
        })
    }
}

impl PageCopy {
    /// What the copy is read by; positions are those of [`PageCopy::slots`].
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where guest memory would lie in the file, if all of it were there.
    #[must_use]
    pub fn slots(&self) -> &[HostSlot] {
        &self.slots
    }

    /// What is there: image ranges in bytes.
    #[must_use]
    pub fn pages(&self) -> &[Range<u64>] {
        &self.pages
    }
}

/// The pages of this process that a fork would have to share, about.
pub(crate) fn private_pages() -> Result<u64> {
    // "size resident shared ...", in pages; shared are those of files.
    let line = proc::read("self/statm").os("read /proc/self/statm")?;
    let mut fields = line
        .split(' ')
        .map(|field| field.parse::<u64>().unwrap_or(0));
    let (resident, shared) = (fields.nth(1).unwrap_or(0), fields.next().unwrap_or(0));
    Ok(resident.saturating_sub(shared))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt as _, MetadataExt as _};

    use super::super::testing::{self, MIB};
    use super::*;

    #[test]
    fn only_the_pages_named_are_copied() {
        let memory = testing::memory(8 * MIB, &[0..MIB]);
        testing::write(&memory, 5, 1);
        testing::write(&memory, 4 * MIB, 2);
        testing::write(&memory, 8 * MIB - 1, 3);
        let pages = vec![0..4096, 4 * MIB..4 * MIB + 8192, 8 * MIB - 4096..8 * MIB];
        let room = CopyRoom::new(&memory).unwrap();
        assert!(room.limit_bytes() >= FEW_PAGES * PAGE_BYTES);
        let copy = room.copy(&memory, pages.clone()).unwrap();
        testing::write(&memory, 5, 9);
        let byte = |at| {
            let mut byte = [0];
            copy.file().read_exact_at(&mut byte, at).unwrap();
            byte[0]
        };
        assert_eq!(
            [5, 6, 4 * MIB, 4 * MIB + 4096, 8 * MIB - 1].map(byte),
            [1, testing::DATA, 2, 0, 3]
        );
        assert_eq!(copy.pages(), pages);
        assert_eq!(copy.file().metadata().unwrap().len(), 8 * MIB);
        // Four pages, and no more.
        assert_eq!(copy.file().metadata().unwrap().blocks() * 512, 4 * 4096);
    }

    #[test]
    fn more_may_be_copied_where_more_is_private() {
        let limit = |memory| CopyRoom::new(memory).unwrap().limit_bytes();
        let memory = testing::memory(64 * MIB, &[]);
        let before = limit(&memory);
        for page in 0..64 * MIB / PAGE_BYTES {
            testing::write(&memory, page * PAGE_BYTES, 1);
        }
        // Other tests of this process come and go.
        assert!(limit(&memory) > before, "{before}");
    }
}
