//! Changing what backs a mapping of guest memory.

use std::fs::File;
use std::io;
use std::ops::Range;

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous};
use vm_memory::MmapRegion;

/// Puts anonymous memory, reading as zeros, in place of a part of a mapping.
///
/// `part` is in bytes from the mapping's beginning, both ends multiples of the
/// page size. What was written there is gone.
///
/// # Errors
/// The kernel's, in which case the part is as it was; `InvalidInput` if the part
/// is not within the mapping.
pub(super) fn make_anonymous(region: &mut MmapRegion<()>, part: Range<usize>) -> io::Result<()> {
    if part.start >= part.end || part.end > region.size() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let length = part.end - part.start;
    // SAFETY: the part is not empty and lies within the region's own mapping,
    // which stays mapped while the region is borrowed. Nothing holds a pointer
    // into it, since the borrow is unique.
    unsafe {
        mmap_anonymous(
            region.as_ptr().add(part.start).cast(),
            length,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED,
        )?;
    }
    Ok(())
}

/// Puts a private mapping of a file in place of a part of a mapping, from the offset
/// `from_bytes` of the file on, a multiple of the page size.
///
/// # Errors
/// As [`make_anonymous`].
pub(super) fn map_from(
    region: &mut MmapRegion<()>,
    part: Range<usize>,
    file: &File,
    from_bytes: u64,
) -> io::Result<()> {
    if part.start >= part.end || part.end > region.size() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let length = part.end - part.start;
    // SAFETY: as in `make_anonymous`.
    unsafe {
        mmap(
            region.as_ptr().add(part.start).cast(),
            length,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED,
            file,
            from_bytes,
        )?;
    }
    Ok(())
}

/// Whether nothing can be read at an address of this process that is mapped: what the
/// page was to come from is gone. A kernel before 5.14 does not tell, and then it is not.
pub(super) fn cannot_be_read(page: *mut u8, len: usize) -> bool {
    // SAFETY: it reads the pages into the mapping if they can be had, and changes nothing.
    let populated = unsafe { madvise(page.cast(), len, Advice::LinuxPopulateRead) };
    matches!(populated, Err(Errno::FAULT | Errno::HWPOISON))
}

/// Advises the kernel on a whole mapping of guest memory:
/// - left out of core dumps, which would else hold the guest's secrets and take
///   minutes;
/// - no huge pages, so that the first write to a hole is one page reported and not 512,
///   and a guest is charged only for what it touches (docs/decisions/069). A kernel
///   without huge pages refuses that advice, which is as good;
/// - not merged with equal pages of other machines (KSM), whatever this process
///   inherited (`PR_SET_MEMORY_MERGE`): how long a write takes would tell a guest
///   what its neighbours hold. A kernel without KSM refuses that, too.
///
/// Deliberately absent: `MADV_DONTFORK`, since the memory is forked on purpose,
/// and `MADV_RANDOM`, since the kernel's reading around a fault is what makes a
/// guest's first touches of neighbouring pages cheap.
///
/// # Errors
/// The kernel's, for advice that every kernel knows.
pub(super) fn advise(region: &MmapRegion<()>) -> io::Result<()> {
    // SAFETY: the range is the region's own mapping, and no advice changes
    // what the memory holds.
    unsafe {
        madvise(region.as_ptr().cast(), region.size(), Advice::LinuxDontDump)?;
        for maybe_unsupported in [Advice::LinuxNoHugepage, Advice::LinuxUnmergeable] {
            let _ = madvise(region.as_ptr().cast(), region.size(), maybe_unsupported);
        }
    }
    Ok(())
}
