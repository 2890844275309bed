//! The registers with which a kernel begins.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::addresses::{GDT, PAGE_TABLES, START_INFO, ZERO_PAGE};
use crate::memory::DEVICE_HOLE_START;

/// Where, and in which state of the CPU, a loaded kernel begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    address: u64,
    protocol: Protocol,
}

/// How a kernel is entered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Protocol {
    /// As [`Kernel::Flat`](super::Kernel::Flat) says.
    Flat,
    /// 32-bit protected mode, EBX at the start info (Xen, `docs/misc/pvh.pandoc`).
    Pvh,
    /// 64-bit mode, RSI at the zero page (kernel documentation, `arch/x86/boot.rst`,
    /// "64-bit Boot Protocol").
    Linux64,
}

impl Entry {
    pub(super) fn flat(address: u64) -> Self {
        let protocol = Protocol::Flat;
        Self { address, protocol }
    }

    pub(super) fn pvh(address: u64) -> Self {
        let protocol = Protocol::Pvh;
        Self { address, protocol }
    }

    pub(super) fn linux64(address: u64) -> Self {
        let protocol = Protocol::Linux64;
        Self { address, protocol }
    }

    /// Whether the kernel is Linux, which finds the machine as firmware leaves it,
    /// and starts all vCPUs but the first itself.
    #[must_use]
    pub fn is_linux(self) -> bool {
        self.protocol != Protocol::Flat
    }

    /// The address of the first instruction.
    pub(super) fn address(self) -> u64 {
        self.address
    }

    /// Whether the kernel is entered with a start info.
    pub(super) fn is_pvh(self) -> bool {
        self.protocol == Protocol::Pvh
    }

    /// The registers of vCPU `cpu` of `cpus` at the entry; `sregs` are those
    /// after power-on.
    pub(crate) fn registers(
        self,
        sregs: &mut kvm_sregs,
        cpu: u32,
        cpus: u32,
        memory_bytes: u64,
    ) -> kvm_regs {
        let mut regs = kvm_regs {
            rip: self.address,
            rflags: RFLAGS_FIXED,
            ..Default::default()
        };
        match self.protocol {
            Protocol::Flat => {
                set_segments(sregs, flat_segment(0x08, CODE), flat_segment(0x10, DATA));
                sregs.cr0 |= CR0_PROTECTED;
                regs.rax = cpu.into();
                regs.rbx = cpus.into();
                regs.rcx = memory_bytes.min(DEVICE_HOLE_START) >> 20;
            }
            Protocol::Pvh => {
                set_segments(
                    sregs,
                    flat_segment(BOOT_CS, CODE),
                    flat_segment(BOOT_DS, DATA),
                );
                sregs.gdt = descriptor_table();
                sregs.cr0 = CR0_PROTECTED | CR0_EXTENSION;
                sregs.cr4 = 0;
                regs.rbx = START_INFO;
            }
            Protocol::Linux64 => {
                let mut code = flat_segment(BOOT_CS, CODE);
                (code.l, code.db) = (1, 0);
                set_segments(sregs, code, flat_segment(BOOT_DS, DATA));
                sregs.gdt = descriptor_table();
                sregs.cr3 = PAGE_TABLES;
                sregs.cr4 = CR4_PAE;
                sregs.cr0 = CR0_PROTECTED | CR0_EXTENSION | CR0_PAGING;
                sregs.efer = EFER_LONG_ENABLED | EFER_LONG_ACTIVE;
                regs.rsi = ZERO_PAGE;
            }
        }
        regs
    }
}

/// Writes what the registers point to: the descriptor table, and page tables that
/// map the first 4 GiB to themselves.
///
/// # Errors
/// The memory does not reach so far.
pub(super) fn write_cpu_tables(
    ram: &GuestMemoryMmap<()>,
    entry: Entry,
) -> Result<(), GuestMemoryError> {
    let code = match entry.protocol {
        Protocol::Linux64 => CODE_64_DESCRIPTOR,
        Protocol::Flat | Protocol::Pvh => CODE_32_DESCRIPTOR,
    };
    for (index, descriptor) in (0..).zip([0, 0, code, DATA_DESCRIPTOR]) {
        ram.write_obj::<u64>(descriptor, GuestAddress(GDT + index * 8))?;
    }
    let table = |index: u64| PAGE_TABLES + index * 0x1000;
    ram.write_obj(table(1) | PRESENT_WRITABLE, GuestAddress(table(0)))?;
    for gib in 0..4 {
        let directory = table(2 + gib);
        ram.write_obj(
            directory | PRESENT_WRITABLE,
            GuestAddress(table(1) + gib * 8),
        )?;
        for entry in 0..512_u64 {
            let page = gib << 30 | entry << 21;
            let value = page | PRESENT_WRITABLE | LARGE_PAGE;
            ram.write_obj(value, GuestAddress(directory + entry * 8))?;
        }
    }
    Ok(())
}

/// Control register bits, Intel SDM volume 3, section 2.5.
const CR0_PROTECTED: u64 = 1;
const CR0_EXTENSION: u64 = 1 << 4;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LONG_ENABLED: u64 = 1 << 8;
const EFER_LONG_ACTIVE: u64 = 1 << 10;
/// The bit of RFLAGS that is always set.
const RFLAGS_FIXED: u64 = 2;
/// Segment types, Intel SDM volume 3, 3.4.5.1: accessed and readable code,
/// accessed and writable data.
const CODE: u8 = 0xb;
const DATA: u8 = 0x3;
/// The selectors that both protocols of Linux name.
const BOOT_CS: u16 = 0x10;
const BOOT_DS: u16 = 0x18;
/// The same segments as descriptors: base 0, limit 4 GiB.
const CODE_32_DESCRIPTOR: u64 = 0x00cf_9b00_0000_ffff;
const CODE_64_DESCRIPTOR: u64 = 0x00af_9b00_0000_ffff;
const DATA_DESCRIPTOR: u64 = 0x00cf_9300_0000_ffff;
/// Page table bits, Intel SDM volume 3, section 4.5.
const PRESENT_WRITABLE: u64 = 3;
const LARGE_PAGE: u64 = 1 << 7;

fn descriptor_table() -> kvm_dtable {
    kvm_dtable {
        base: GDT,
        limit: 4 * 8 - 1,
        ..Default::default()
    }
}

fn set_segments(sregs: &mut kvm_sregs, code: kvm_segment, data: kvm_segment) {
    sregs.cs = code;
    for segment in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *segment = data;
    }
}

fn flat_segment(selector: u16, kind: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_: kind,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loader::testing::{MIB, memory};

    #[test]
    fn each_address_below_4_gib_is_mapped_to_itself() {
        let memory = memory(16 * MIB);
        let ram = memory.ram();
        write_cpu_tables(ram, Entry::linux64(0)).unwrap();
        let walk = |address: u64| {
            let entry = |table: u64, index: u64| -> u64 {
                let at = (table & 0x000f_ffff_ffff_f000) + index * 8;
                ram.read_obj(GuestAddress(at)).unwrap()
            };
            let pointers = entry(PAGE_TABLES, address >> 39 & 511);
            let directory = entry(pointers, address >> 30 & 511);
            let page = entry(directory, address >> 21 & 511);
            assert_eq!(page & 0xfff, PRESENT_WRITABLE | LARGE_PAGE);
            (page & !0x1f_ffff) | (address & 0x1f_ffff)
        };
        for address in [
            0,
            0x10_0200,
            0x0100_0000,
            0xbfff_ffff,
            0xfee0_0000,
            0xffff_ffff,
        ] {
            assert_eq!(walk(address), address);
        }
    }

    #[test]
    fn descriptors_say_what_the_segments_say() {
        let memory = memory(MIB);
        for (entry, long) in [(Entry::linux64(1), 1), (Entry::pvh(1), 0)] {
            write_cpu_tables(memory.ram(), entry).unwrap();
            let mut sregs = kvm_sregs::default();
            entry.registers(&mut sregs, 0, 1, MIB);
            assert_eq!((sregs.cs.l, sregs.cs.db), (long, 1 - long));
            for segment in [sregs.cs, sregs.ss] {
                let at = GuestAddress(sregs.gdt.base + u64::from(segment.selector));
                let descriptor: u64 = memory.ram().read_obj(at).unwrap();
                assert_eq!(descriptor >> 40 & 0xf, u64::from(segment.type_));
                assert_eq!(descriptor >> 53 & 1, u64::from(segment.l));
                assert_eq!(descriptor >> 54 & 1, u64::from(segment.db));
                assert!(u64::from(segment.selector) + 7 <= u64::from(sregs.gdt.limit));
            }
        }
    }
}
