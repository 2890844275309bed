//! How much of a file is in memory, without reading it.

use std::fs::File;
use std::io;
use std::ptr;

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::PAGE_BYTES;

/// How much of a file is looked at at once.
const WINDOW_BYTES: u64 = 1 << 30;

/// How many of the first `size_bytes` of a file are in the page cache, in whole pages. Nothing
/// is read. Of a file that this user neither owns nor may write to the kernel says that all
/// are (mincore(2)).
///
/// # Errors
/// The file cannot be mapped.
pub fn resident_bytes(file: &File, size_bytes: u64) -> io::Result<u64> {
    let mut pages = 0;
    let mut at = 0;
    while at < size_bytes {
        let length =
            usize::try_from((size_bytes - at).min(WINDOW_BYTES)).map_err(io::Error::other)?;
        pages += resident_pages(file, at, length)?;
        at += length as u64;
    }
    Ok(pages * PAGE_BYTES)
}

fn resident_pages(file: &File, offset: u64, length: usize) -> io::Result<u64> {
    let page = usize::try_from(PAGE_BYTES).map_err(io::Error::other)?;
    let mut states = vec![0_u8; length.div_ceil(page)];
    let (none, private) = (ProtFlags::empty(), MapFlags::PRIVATE);
    // SAFETY: the kernel chooses where; nothing is read or written through the mapping.
    let start = unsafe { mmap(ptr::null_mut(), length, none, private, file, offset) }?;
    // SAFETY: the mapping is there, and there is a byte for each of its pages.
    let told = unsafe { libc::mincore(start, length, states.as_mut_ptr()) };
    let error = io::Error::last_os_error();
    // SAFETY: it was made above, and nobody else knows of it.
    unsafe { munmap(start, length) }?;
    if told != 0 {
        return Err(error);
    }
    // The other bits mean nothing.
    Ok(states.iter().map(|state| u64::from(state & 1)).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_just_written_is_in_memory_and_a_hole_is_not() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(10 * PAGE_BYTES + 1).unwrap();
        assert_eq!(resident_bytes(&file, 10 * PAGE_BYTES + 1).unwrap(), 0);
        std::os::unix::fs::FileExt::write_all_at(&file, &[1; 8192], 4 * PAGE_BYTES).unwrap();
        let found = resident_bytes(&file, 10 * PAGE_BYTES + 1).unwrap();
        assert!(found >= 2 * PAGE_BYTES, "{found}");
        assert_eq!(resident_bytes(&file, 0).unwrap(), 0);
    }
}
