//! Loading Linux, whatever the form of its file.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use linux_loader::bootparam::setup_header;
use vm_memory::{Bytes as _, GuestAddress};

use super::memory_map::{self, memory_map};
use super::{Entry, bios, bzimage, elf, entry, pvh, zero_page};
use crate::acpi::{self, AcpiDevices};
use crate::addresses::{COMMAND_LINE, COMMAND_LINE_ROOM};
use crate::error::{Error, Result};
use crate::generation;
use crate::memory::{GuestMemory, PAGE_BYTES};

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

/// Loads Linux; see [`Kernel::load`](super::Kernel::load).
pub(super) fn load(
    kernel: &Path,
    initrd: Option<&Path>,
    cmdline: &str,
    memory: &GuestMemory,
    devices: &AcpiDevices,
) -> Result<Entry> {
    let mut source = Source::open(kernel)?;
    let image = match source.magic()? {
        Magic::BzImage => bzimage::load(&mut source, memory)?,
        Magic::Elf => elf::load(&mut source, memory)?,
    };
    let cmdline_bytes = write_cmdline(cmdline, image.cmdline_limit, memory)?;
    let initrd = match initrd {
        Some(path) => Some(load_initrd(path, &image, memory)?),
        None => None,
    };
    if let Some(address) = devices.vm_generation {
        generation::renew(address, memory)?;
    }
    let given = Given {
        rsdp: acpi::write(memory.ram(), devices)?,
        initrd,
        cmdline_bytes,
        memory_map: memory_map(memory.layout()),
    };
    let ram = memory.ram();
    if image.entry.is_pvh() {
        pvh::write(ram, &given).expect(FIRST_MIB);
    } else {
        zero_page::write(ram, image.header, &given).expect(FIRST_MIB);
    }
    entry::write_cpu_tables(ram, image.entry).expect(FIRST_MIB);
    bios::write(ram).expect(FIRST_MIB);
    Ok(image.entry)
}

/// Why tables can be written there.
const FIRST_MIB: &str = "every machine has its first MiB of memory";

enum Magic {
    BzImage,
    Elf,
}

impl<'a> Source<'a> {
    pub fn open(path: &'a Path) -> Result<Self> {
        let (file, length) = open(path)?;
        Ok(Self { path, file, length })
    }

    /// What the file is, by its content.
    fn magic(&self) -> Result<Magic> {
        /// Where the magic number of a setup header is.
        const HEADER_MAGIC_AT: u64 = 0x202;
        let is_at = |offset, expected: &[u8; 4]| -> Result<bool> {
            let mut found = [0; 4];
            if self.length < offset + 4 {
                return Ok(false);
            }
            self.read_at(&mut found, offset)?;
            Ok(found == *expected)
        };
        if is_at(0, linux_loader::elf::ELFMAG)? {
            Ok(Magic::Elf)
        } else if is_at(HEADER_MAGIC_AT, &zero_page::HEADER_MAGIC.to_le_bytes())? {
            Ok(Magic::BzImage)
        } else {
            Err(Error::NotAKernel {
                path: self.path.to_owned(),
            })
        }
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

fn open(path: &Path) -> Result<(File, u64)> {
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

fn write_cmdline(cmdline: &str, limit: u64, memory: &GuestMemory) -> Result<u32> {
    let bytes = cmdline.len() as u64;
    let limit = limit.min(COMMAND_LINE_ROOM);
    if bytes > limit {
        return Err(Error::CommandLine { bytes, limit });
    }
    if cmdline.contains('\0') {
        return Err(Error::CommandLineNul);
    }
    let at = GuestAddress(COMMAND_LINE);
    memory
        .ram()
        .write_slice(&[cmdline.as_bytes(), &[0]].concat(), at)
        .expect(FIRST_MIB);
    Ok(u32::try_from(bytes).expect("it has room"))
}

/// Reads the initrd to the top of the memory that it may have.
fn load_initrd(path: &Path, image: &Image, memory: &GuestMemory) -> Result<Range<u64>> {
    let (mut file, length) = open(path)?;
    let limit = image.initrd_limit.min(low_memory_end(memory));
    let begin = limit
        .checked_sub(length)
        .map(|begin| begin - begin % PAGE_BYTES)
        .filter(|begin| *begin >= image.end && length > 0)
        .ok_or_else(|| Error::KernelSize {
            path: path.to_owned(),
            room_bytes: limit.saturating_sub(image.end),
        })?;
    memory
        .ram()
        .read_exact_volatile_from(
            GuestAddress(begin),
            &mut file,
            usize::try_from(length).expect("it fits into memory"),
        )
        .map_err(|error| Error::File {
            action: "read",
            path: path.to_owned(),
            source: std::io::Error::other(error),
        })?;
    Ok(begin..begin + length)
}
