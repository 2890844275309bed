//! An ELF kernel (`vmlinux`), as a kernel build leaves it: not compressed, at
//! fixed addresses.
//!
//! It is entered by PVH if it has the note for it, and by the 64-bit boot protocol
//! otherwise.

use std::ops::Range;

use linux_loader::elf::{
    EI_CLASS, ELFCLASS64, EM_X86_64, Elf64_Ehdr, Elf64_Phdr, PT_LOAD, PT_NOTE,
};
use linux_loader::loader::{Elf, KernelLoader as _, PvhBootCapability};
use vm_memory::{ByteValued as _, GuestAddress};

use super::image::{Image, Source, low_memory_end};
use super::{Entry, zero_page};
use crate::addresses::HIGH_MEMORY;
use crate::error::Result;
use crate::memory::GuestMemory;

/// The longest command line of a kernel that does not tell, without its final NUL:
/// `COMMAND_LINE_SIZE` on x86 is 2048.
const COMMAND_LINE_LIMIT: u64 = 2047;
/// The longest notes, in bytes; those of a kernel take some hundred.
const MAX_NOTES_BYTES: u64 = 1 << 20;

/// Loads an ELF kernel.
pub(super) fn load(source: &mut Source<'_>, memory: &GuestMemory) -> Result<Image> {
    let segments = check_segments(source, low_memory_end(memory))?;
    let high = GuestAddress(HIGH_MEMORY);
    let loaded = Elf::load(memory.ram(), None, &mut source.file, Some(high))
        .map_err(|error| source.malformed(error))?;
    let entry = match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(address) => Entry::pvh(address.0),
        PvhBootCapability::PvhEntryNotPresent | PvhBootCapability::PvhEntryIgnored => {
            Entry::linux64(loaded.kernel_load.0)
        }
    };
    if !segments
        .iter()
        .any(|range| range.contains(&entry.address()))
    {
        return Err(source.unsupported("its entry point is outside of it"));
    }
    let end = segments.iter().map(|range| range.end).max();
    Ok(Image {
        entry,
        end: end.unwrap_or(HIGH_MEMORY),
        header: zero_page::plain_header(),
        initrd_limit: u64::MAX,
        cmdline_limit: COMMAND_LINE_LIMIT,
    })
}

/// Checks that the file is a whole x86-64 ELF file whose segments go to the memory
/// from 1 MiB to `limit`; returns where they go.
fn check_segments(source: &Source<'_>, limit: u64) -> Result<Vec<Range<u64>>> {
    let mut header = Elf64_Ehdr::default();
    source.read_at(header.as_mut_slice(), 0)?;
    if header.e_ident[EI_CLASS] != ELFCLASS64 || header.e_machine != EM_X86_64 {
        return Err(source.unsupported("it is ELF, but not for x86-64"));
    }
    let mut segments = Vec::new();
    let stride = size_of::<Elf64_Phdr>() as u64;
    for index in 0..u64::from(header.e_phnum) {
        let mut segment = Elf64_Phdr::default();
        let at = header.e_phoff.saturating_add(index * stride);
        source.read_at(segment.as_mut_slice(), at)?;
        let (in_file, in_memory) = (segment.p_filesz, segment.p_memsz);
        match segment.p_type {
            PT_NOTE if in_file > MAX_NOTES_BYTES => {
                return Err(source.unsupported("its notes are longer than 1 MiB"));
            }
            PT_NOTE => source.needs(segment.p_offset.saturating_add(in_file))?,
            PT_LOAD if in_memory > 0 || in_file > 0 => {
                source.needs(segment.p_offset.saturating_add(in_file))?;
                let end = segment.p_paddr.saturating_add(in_memory.max(in_file));
                if segment.p_paddr < HIGH_MEMORY {
                    return Err(source.unsupported("it wants to be loaded below 1 MiB"));
                }
                source.fits(end, limit)?;
                segments.push(segment.p_paddr..end);
            }
            _ => {}
        }
    }
    if segments.is_empty() {
        return Err(source.unsupported("it has nothing to load"));
    }
    Ok(segments)
}
