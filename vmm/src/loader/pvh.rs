//! The start info: what PVH tells the kernel (Xen, `docs/misc/pvh.pandoc` and
//! `xen/include/public/arch-x86/hvm/start_info.h`).

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator as _, BootParams, Error};
use linux_loader::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::image::Given;
use crate::addresses::{COMMAND_LINE, MODULE_LIST, PVH_MEMORY_MAP, START_INFO};

/// Writes the start info, with the initrd as its one module, to its place.
pub(super) fn write(ram: &GuestMemoryMmap<()>, given: &Given) -> Result<(), Error> {
    let modules: Vec<_> = given
        .initrd
        .iter()
        .map(|initrd| hvm_modlist_entry {
            paddr: initrd.start,
            size: initrd.end - initrd.start,
            ..Default::default()
        })
        .collect();
    let map: Vec<_> = given
        .memory_map
        .iter()
        .map(|entry| hvm_memmap_table_entry {
            addr: entry.range.start,
            size: entry.range.end - entry.range.start,
            type_: entry.kind.number(),
            ..Default::default()
        })
        .collect();
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        nr_modules: count(&modules),
        modlist_paddr: if modules.is_empty() { 0 } else { MODULE_LIST },
        cmdline_paddr: COMMAND_LINE,
        rsdp_paddr: given.rsdp,
        memmap_paddr: PVH_MEMORY_MAP,
        memmap_entries: count(&map),
        ..Default::default()
    };
    let mut params = BootParams::new(&info, GuestAddress(START_INFO));
    params.set_sections(&map, GuestAddress(PVH_MEMORY_MAP));
    if !modules.is_empty() {
        params.set_modules(&modules, GuestAddress(MODULE_LIST));
    }
    PvhBootConfigurator::write_bootparams(&params, ram)
}

fn count<T>(list: &[T]) -> u32 {
    u32::try_from(list.len()).expect("a handful")
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes as _;

    use super::*;
    use crate::loader::memory_map::memory_map;
    use crate::loader::testing::{MIB, memory};

    #[test]
    fn it_says_where_everything_is() {
        let memory = memory(16 * MIB);
        let mut given = Given {
            rsdp: 0xe_0000,
            initrd: Some(4 * MIB..4 * MIB + 5),
            cmdline_bytes: 3,
            memory_map: memory_map(memory.layout()),
        };
        write(memory.ram(), &given).unwrap();
        let read =
            || -> hvm_start_info { memory.ram().read_obj(GuestAddress(START_INFO)).unwrap() };
        let info = read();
        assert_eq!(
            (info.magic, info.version, info.nr_modules),
            (0x336e_c578, 1, 1)
        );
        assert_eq!(
            (info.cmdline_paddr, info.rsdp_paddr),
            (COMMAND_LINE, 0xe_0000)
        );
        let module: hvm_modlist_entry = memory
            .ram()
            .read_obj(GuestAddress(info.modlist_paddr))
            .unwrap();
        assert_eq!((module.paddr, module.size), (4 * MIB, 5));
        let last: hvm_memmap_table_entry = memory
            .ram()
            .read_obj(GuestAddress(
                info.memmap_paddr + u64::from(info.memmap_entries - 1) * 24,
            ))
            .unwrap();
        assert_eq!(last.addr + last.size, 4 << 30);

        given.initrd = None;
        write(memory.ram(), &given).unwrap();
        assert_eq!((read().nr_modules, read().modlist_paddr), (0, 0));
    }
}
