//! The zero page: what the 64-bit boot protocol tells the kernel (kernel
//! documentation, `arch/x86/zero-page.rst` and `arch/x86/boot.rst`).

use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::image::Given;
use crate::addresses::{COMMAND_LINE, ZERO_PAGE};

/// "HdrS", the magic number of a setup header.
pub(super) const HEADER_MAGIC: u32 = 0x5372_6448;
/// The magic number of a boot sector.
const BOOT_FLAG: u16 = 0xaa55;
/// A loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
/// The protocol version whose header says all that is said here: 2.12.
pub(super) const PROTOCOL_2_12: u16 = 0x020c;

/// The setup header for a kernel that has none in its file.
pub(super) fn plain_header() -> setup_header {
    setup_header {
        boot_flag: BOOT_FLAG,
        header: HEADER_MAGIC,
        version: PROTOCOL_2_12,
        kernel_alignment: 0x0100_0000,
        ..Default::default()
    }
}

/// Fills in the zero page.
pub(super) fn zero_page(header: setup_header, given: &Given) -> boot_params {
    let low = |address: u64| u32::try_from(address).expect("boot data lies below 3 GiB");
    let mut page = boot_params {
        hdr: header,
        acpi_rsdp_addr: given.rsdp,
        ..Default::default()
    };
    page.hdr.type_of_loader = LOADER_UNDEFINED;
    page.hdr.cmd_line_ptr = low(COMMAND_LINE);
    page.hdr.cmdline_size = given.cmdline_bytes;
    if let Some(initrd) = &given.initrd {
        page.hdr.ramdisk_image = low(initrd.start);
        page.hdr.ramdisk_size = low(initrd.end - initrd.start);
    }
    let mut entries = 0;
    let mut table = page.e820_table;
    for (place, entry) in table.iter_mut().zip(&given.memory_map) {
        *place = boot_e820_entry {
            addr: entry.range.start,
            size: entry.range.end - entry.range.start,
            r#type: entry.kind.number(),
        };
        entries += 1;
    }
    page.e820_table = table;
    page.e820_entries = entries;
    page
}

/// Writes the zero page to its place.
pub(super) fn write(
    ram: &GuestMemoryMmap<()>,
    header: setup_header,
    given: &Given,
) -> Result<(), GuestMemoryError> {
    ram.write_obj(zero_page(header, given), GuestAddress(ZERO_PAGE))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loader::memory_map::memory_map;
    use crate::memory::MemoryLayout;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    fn page(size: u64) -> boot_params {
        let given = Given {
            rsdp: 0xe_0000,
            initrd: Some(64 * MIB..65 * MIB + 1),
            cmdline_bytes: 12,
            memory_map: memory_map(&MemoryLayout::new(size).unwrap()),
        };
        zero_page(plain_header(), &given)
    }

    #[test]
    fn it_says_where_everything_is() {
        let page = page(256 * MIB);
        let header = page.hdr;
        assert_eq!({ header.header }, HEADER_MAGIC);
        assert_eq!({ header.boot_flag }, BOOT_FLAG);
        assert_eq!(header.type_of_loader, LOADER_UNDEFINED);
        assert_eq!({ header.cmd_line_ptr }, 0x2_0000);
        assert_eq!({ header.cmdline_size }, 12);
        assert_eq!({ header.ramdisk_image }, 64 << 20);
        assert_eq!({ header.ramdisk_size }, (1 << 20) + 1);
        assert_eq!({ page.acpi_rsdp_addr }, 0xe_0000);
        assert_eq!(page.sentinel, 0);
    }

    #[test]
    fn it_tells_of_all_memory() {
        for size in [256 * MIB, 512 * MIB, 3 * GIB, 5 * GIB] {
            let page = page(size);
            let entries = usize::from(page.e820_entries);
            let table = page.e820_table;
            let told: u64 = table[..entries]
                .iter()
                .filter(|entry| { entry.r#type } == 1)
                .map(|entry| entry.size)
                .sum();
            // All but the KiB of the EBDA and the 384 KiB up to 1 MiB.
            assert_eq!(told, size - (385 << 10));
            assert!(
                table[entries..]
                    .iter()
                    .all(|entry| *entry == boot_e820_entry::default())
            );
        }
    }
}
