//! The kernel interfaces that tell which pages were written, and that no crate
//! in use wraps: `PAGEMAP_SCAN` (linux/fs.h, Linux 6.7; admin-guide/mm/pagemap)
//! and userfaultfd's write protection (linux/userfaultfd.h).

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// The page was written since its write protection was last armed.
pub(super) const PAGE_IS_WRITTEN: u64 = 1 << 1;
/// The page belongs to a file or to shared memory.
pub(super) const PAGE_IS_FILE: u64 = 1 << 2;
/// The page is in memory.
pub(super) const PAGE_IS_PRESENT: u64 = 1 << 3;
/// The page is in swap.
pub(super) const PAGE_IS_SWAPPED: u64 = 1 << 4;

/// Write-protect the pages that are reported.
pub(super) const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
/// Fail with `EPERM` where asynchronous write protection is not armed.
pub(super) const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;

const UFFD_API: u64 = 0xaa;
const UFFD_USER_MODE_ONLY: libc::c_int = 1;
const UFFD_FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const UFFD_FEATURE_WP_ASYNC: u64 = 1 << 15;
const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;

const PAGEMAP_SCAN: libc::c_ulong = read_write_request(b'f', 16, size_of::<ScanArg>());
const UFFDIO_API: libc::c_ulong = read_write_request(0xaa, 0x3f, size_of::<UffdApi>());
const UFFDIO_REGISTER: libc::c_ulong = read_write_request(0xaa, 0x00, size_of::<UffdRegister>());

/// `_IOWR` of asm-generic/ioctl.h.
const fn read_write_request(kind: u8, number: u8, size: usize) -> libc::c_ulong {
    (3 << 30) | ((size as libc::c_ulong) << 16) | ((kind as libc::c_ulong) << 8) | number as u64
}

/// `struct page_region`: a run of pages of the same categories.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct PageRegion {
    /// The host address of the first byte.
    pub start: u64,
    /// The host address after the last byte.
    pub end: u64,
    categories: u64,
}

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct uffdio_api`.
#[repr(C)]
struct UffdApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct UffdRegister {
    start: u64,
    length: u64,
    mode: u64,
    ioctls: u64,
}

/// Which pages a scan reports, and what it does to them.
#[derive(Clone, Copy)]
pub(super) struct ScanRequest {
    /// `PM_SCAN_` flags.
    pub flags: u64,
    /// Categories that a page must be in.
    pub all_of: u64,
    /// Categories that a page must not be in.
    pub none_of: u64,
    /// Categories of which a page must be in one.
    pub any_of: u64,
}

/// Scans host addresses of the process whose pagemap this is, until they end or
/// `regions` is full. Returns how many regions were filled and where to go on.
pub(super) fn scan_pages(
    pagemap: &File,
    addresses: Range<u64>,
    request: ScanRequest,
    regions: &mut [PageRegion],
) -> io::Result<(usize, u64)> {
    let mut arg = ScanArg {
        size: size_of::<ScanArg>() as u64,
        flags: request.flags,
        start: addresses.start,
        end: addresses.end,
        vec: regions.as_mut_ptr() as u64,
        vec_len: regions.len() as u64,
        category_inverted: request.none_of,
        category_mask: request.all_of | request.none_of,
        category_anyof_mask: request.any_of,
        // One has to be asked for; this one costs nothing to find out.
        return_mask: PAGE_IS_PRESENT,
        ..ScanArg::default()
    };
    // SAFETY: the argument is the structure that this request takes; the kernel
    // writes to it, and at most `vec_len` regions to `vec`, which is borrowed
    // uniquely. Write protection by way of userfaultfd changes no memory.
    let filled = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
    let filled = usize::try_from(filled).map_err(|_| io::Error::last_os_error())?;
    Ok((filled, arg.walk_end))
}

/// Opens a userfaultfd whose write protection the kernel lifts by itself when a
/// page is written: no fault is ever delivered, and so it needs no privilege.
pub(super) fn open_write_tracking() -> io::Result<OwnedFd> {
    // SAFETY: the call takes flags only.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | UFFD_USER_MODE_ONLY) };
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for this caller.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut api = UffdApi {
        api: UFFD_API,
        features: UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED,
        ioctls: 0,
    };
    // SAFETY: the argument is the structure that this request takes.
    let done = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut api) };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(fd)
}

/// Lets pages at these addresses of this process be write-protected.
pub(super) fn track_writes(userfaultfd: &OwnedFd, addresses: Range<u64>) -> io::Result<()> {
    let mut register = UffdRegister {
        start: addresses.start,
        length: addresses.end - addresses.start,
        mode: UFFDIO_REGISTER_MODE_WP,
        ioctls: 0,
    };
    // SAFETY: the argument is the structure that this request takes. Faults in
    // the range are resolved by the kernel, so that no access to it can hang.
    let done = unsafe { libc::ioctl(userfaultfd.as_raw_fd(), UFFDIO_REGISTER, &raw mut register) };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_the_kernels() {
        assert_eq!(PAGEMAP_SCAN, 0xc060_6610);
        assert_eq!(UFFDIO_API, 0xc018_aa3f);
        assert_eq!(UFFDIO_REGISTER, 0xc020_aa00);
    }
}
