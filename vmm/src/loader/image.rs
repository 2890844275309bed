//! A kernel, as a file and in memory, and what it is given.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use linux_loader::bootparam::setup_header;

use super::entry::Entry;
use super::memory_map;
use crate::error::{Error, Result};
use crate::memory::GuestMemory;

/// What a kernel is given besides the memory it lies in.
pub(super) struct Given {
    /// Where ACPI's root pointer is.
    pub rsdp: u64,
    /// Where the initrd is.
    pub initrd: Option<Range<u64>>,
    /// The length of the command line, without its final NUL.
    pub cmdline_bytes: u32,
    pub memory_map: Vec<memory_map::Entry>,
}

/// A kernel that is in memory.
pub(super) struct Image {
    pub entry: Entry,
    /// The address behind all memory that the kernel uses before it knows which
    /// there is.
    pub end: u64,
    /// The setup header for the zero page.
    pub header: setup_header,
    /// The address behind the last byte that an initrd may have.
    pub initrd_limit: u64,
    /// The longest command line, without its final NUL.
    pub cmdline_limit: u64,
}

/// A kernel's file.
pub(super) struct Source<'a> {
    pub path: &'a Path,
    pub file: File,
    pub length: u64,
}

impl<'a> Source<'a> {
    pub fn open(path: &'a Path) -> Result<Self> {
        let (file, length) = open(path)?;
        Ok(Self { path, file, length })
    }

    /// Reads all of `bytes` from an offset.
    pub fn read_at(&self, bytes: &mut [u8], offset: u64) -> Result<()> {
        self.needs(offset.saturating_add(bytes.len() as u64))?;
        self.file
            .read_exact_at(bytes, offset)
            .map_err(|source| Error::File {
                action: "read",
                path: self.path.to_owned(),
                source,
            })
    }

    /// Refuses a file that is shorter than its own headers say.
    pub fn needs(&self, bytes: u64) -> Result<()> {
        if self.length < bytes {
            return Err(Error::KernelTruncated {
                path: self.path.to_owned(),
                found_bytes: self.length,
                expected_bytes: bytes,
            });
        }
        Ok(())
    }

    /// Refuses a kernel that needs memory up to an address behind `limit`.
    pub fn fits(&self, end: u64, limit: u64) -> Result<()> {
        if end > limit {
            return Err(Error::KernelRoom {
                path: self.path.to_owned(),
                needed_bytes: end,
                room_bytes: limit,
            });
        }
        Ok(())
    }

    /// The error for a kernel that cannot be booted.
    pub fn unsupported(&self, cause: &'static str) -> Error {
        Error::KernelUnsupported {
            path: self.path.to_owned(),
            cause,
        }
    }

    /// The error for what the loader's library found.
    pub fn malformed(&self, source: linux_loader::loader::Error) -> Error {
        Error::KernelMalformed {
            path: self.path.to_owned(),
            source,
        }
    }
}

/// The address behind the last byte of memory below the devices.
pub(super) fn low_memory_end(memory: &GuestMemory) -> u64 {
    memory.layout().slots()[0].length
}

/// A file, and its length in bytes.
pub(super) fn open(path: &Path) -> Result<(File, u64)> {
    let file_error = |action| {
        move |source| Error::File {
            action,
            path: path.to_owned(),
            source,
        }
    };
    let file = File::open(path).map_err(file_error("open"))?;
    let length = file.metadata().map_err(file_error("examine"))?.len();
    Ok((file, length))
}
