//! What the loader's tests share: memories, and kernels made by hand.

use std::io::Write as _;

use linux_loader::bootparam::{LOADED_HIGH, XLF_KERNEL_64, setup_header};
use linux_loader::elf::{EM_X86_64, Elf64_Ehdr, Elf64_Phdr, PT_LOAD, PT_NOTE};
use vm_memory::ByteValued as _;

use crate::memory::{GuestMemory, MemoryLayout};

pub(super) const MIB: u64 = 1 << 20;

pub(super) fn memory(size: u64) -> GuestMemory {
    GuestMemory::anonymous(MemoryLayout::new(size).unwrap()).unwrap()
}

pub(super) fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// Where the kernel is in [`bzimage`].
pub(super) const SETUP_BYTES: usize = 1024;
/// How long it is.
pub(super) const CODE_BYTES: usize = 8192;

/// The header of a bzImage with one more sector of setup.
pub(super) fn header() -> setup_header {
    setup_header {
        setup_sects: 1,
        syssize: u32::try_from(CODE_BYTES / 16).unwrap(),
        boot_flag: 0xaa55,
        jump: u16::from_le_bytes([0xeb, 0x6a]),
        header: 0x5372_6448,
        version: 0x020f,
        loadflags: LOADED_HIGH,
        initrd_addr_max: 0x7fff_ffff,
        kernel_alignment: 0x0020_0000,
        relocatable_kernel: 1,
        xloadflags: XLF_KERNEL_64,
        cmdline_size: 2047,
        pref_address: 16 * MIB,
        init_size: 4 << 20,
        ..Default::default()
    }
}

/// A bzImage of [`header`]'s form, its kernel all ones.
pub(super) fn bzimage(header: setup_header) -> Vec<u8> {
    let mut bytes = vec![0; SETUP_BYTES];
    bytes[0x1f1..][..header.as_slice().len()].copy_from_slice(header.as_slice());
    bytes.resize(SETUP_BYTES + CODE_BYTES, 0xff);
    bytes
}

/// Where the segment of [`elf`] goes.
pub(super) const ELF_ADDRESS: u64 = 16 * MIB;

/// An ELF kernel of one segment, entered at its first byte; with a note for PVH that
/// names its seventeenth.
pub(super) fn elf(with_pvh: bool) -> Vec<u8> {
    let mut header = Elf64_Ehdr {
        e_machine: EM_X86_64,
        e_entry: ELF_ADDRESS,
        e_phoff: 64,
        e_phentsize: 56,
        e_phnum: 1 + u16::from(with_pvh),
        ..Default::default()
    };
    header.e_ident[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    let load = Elf64_Phdr {
        p_type: PT_LOAD,
        p_offset: 256,
        p_paddr: ELF_ADDRESS,
        p_filesz: 4096,
        p_memsz: MIB,
        ..Default::default()
    };
    let note = Elf64_Phdr {
        p_type: PT_NOTE,
        p_offset: 192,
        p_filesz: 20,
        ..Default::default()
    };
    let mut bytes = header.as_slice().to_vec();
    bytes.extend(load.as_slice());
    bytes.extend(note.as_slice());
    bytes.resize(192, 0);
    for word in [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), 0x0100_0010] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.resize(256 + 4096, 0xee);
    bytes
}
