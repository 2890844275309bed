//! Loading Linux, whatever the form of its file.

use std::ops::Range;
use std::path::Path;

use vm_memory::{Bytes as _, GuestAddress};

use super::image::{Given, Image, Source, low_memory_end, open};
use super::memory_map::memory_map;
use super::{Entry, bios, bzimage, elf, entry, pvh, zero_page};
use crate::acpi::{self, AcpiDevices};
use crate::addresses::{COMMAND_LINE, COMMAND_LINE_ROOM};
use crate::error::{Error, Result};
use crate::generation;
use crate::memory::{GuestMemory, PAGE_BYTES};

/// Loads Linux; see [`Kernel::load`](super::Kernel::load).
pub(super) fn load(
    kernel: &Path,
    initrd: Option<&Path>,
    cmdline: &str,
    memory: &GuestMemory,
    devices: &AcpiDevices,
) -> Result<Entry> {
    let mut source = Source::open(kernel)?;
    let image = match magic_of(&source)? {
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

/// What the file is, by its content.
fn magic_of(source: &Source<'_>) -> Result<Magic> {
    /// Where the magic number of a setup header is.
    const HEADER_MAGIC_AT: u64 = 0x202;
    let is_at = |offset, expected: &[u8; 4]| -> Result<bool> {
        let mut found = [0; 4];
        if source.length < offset + 4 {
            return Ok(false);
        }
        source.read_at(&mut found, offset)?;
        Ok(found == *expected)
    };
    if is_at(0, linux_loader::elf::ELFMAG)? {
        Ok(Magic::Elf)
    } else if is_at(HEADER_MAGIC_AT, &zero_page::HEADER_MAGIC.to_le_bytes())? {
        Ok(Magic::BzImage)
    } else {
        Err(Error::NotAKernel {
            path: source.path.to_owned(),
        })
    }
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
