//! A file that is mapped and shared, as monitors map a guest's memory.

use std::fs::File;
use std::io;
use std::ptr::NonNull;

use rustix::mm::{MapFlags, MsyncFlags, ProtFlags, mmap, msync, munmap};

/// A mapping of a whole file, by which it is read and written.
#[derive(Debug)]
pub struct SharedMap {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: The mapping is this value's alone, and is only copied from and to.
unsafe impl Send for SharedMap {}
// SAFETY: As above. Two who write to the same bytes at once get some of both.
unsafe impl Sync for SharedMap {}

impl SharedMap {
    /// Maps the first bytes of a file that is open for reading and writing.
    ///
    /// # Errors
    /// The operating system's.
    pub fn new(file: &File, len: usize) -> io::Result<Self> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: The kernel chooses a place that nothing else is at.
        let start = unsafe { mmap(std::ptr::null_mut(), len, access, MapFlags::SHARED, file, 0) }?;
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, len })
    }

    /// Stores bytes.
    ///
    /// # Panics
    /// If they are not all inside.
    pub fn store(&self, at: usize, bytes: &[u8]) {
        assert!(at <= self.len && bytes.len() <= self.len - at);
        // SAFETY: All of it is inside of the mapping, which no reference leads to.
        unsafe {
            let to = self.start.as_ptr().add(at);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
        }
    }

    /// Loads bytes.
    ///
    /// # Panics
    /// If they are not all inside.
    #[must_use]
    pub fn load(&self, at: usize, len: usize) -> Vec<u8> {
        assert!(at <= self.len && len <= self.len - at);
        let mut bytes = vec![0; len];
        // SAFETY: As in `store`.
        unsafe {
            let from = self.start.as_ptr().add(at);
            std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), len);
        }
        bytes
    }

    /// Has all that was stored given to the filesystem.
    ///
    /// # Errors
    /// The operating system's.
    pub fn sync(&self) -> io::Result<()> {
        // SAFETY: It is this mapping.
        unsafe { msync(self.start.as_ptr().cast(), self.len, MsyncFlags::SYNC) }?;
        Ok(())
    }
}

impl Drop for SharedMap {
    fn drop(&mut self) {
        // SAFETY: Nobody has the mapping any more.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.len) };
    }
}
