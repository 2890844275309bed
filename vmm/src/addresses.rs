//! Where everything has its place in a machine that boots Linux: the one table of
//! guest-physical addresses, ports and interrupts.
//!
//! ```text
//! 0x0000_0500  descriptor table                      } free for the kernel
//! 0x0000_6000  PVH: start info, modules, memory map  } once it has read them
//! 0x0000_7000  zero page                             }
//! 0x0000_9000  page tables, six pages                }
//! 0x0002_0000  command line                          }
//! 0x0009_fc00  extended BIOS data area, empty        reserved
//! 0x000a_0000  nothing a kernel would look for       not in the memory map
//! 0x000e_0000  ACPI: root pointer, then tables       ACPI tables
//! 0x000f_0000  where a BIOS would be, zeros          reserved
//! 0x000f_f000  the VM generation identifier          reserved
//! 0x000f_fff0  the reset vector, FFFF:0000           reserved
//! 0x0010_0000  memory; a bzImage is loaded here, the initrd at the top
//! 0xc000_0000  devices: no memory up to 4 GiB
//! 0xd000_0000  virtio over MMIO
//! 0xfec0_0000  I/O APIC
//! 0xfee0_0000  local APICs
//! 0xfffb_c000  pages that KVM wants for itself       reserved
//! 0x1_0000_0000  memory
//! ```
//!
//! A flat program has all memory for itself: none of the tables is there.

use std::ops::Range;

/// The global descriptor table.
pub(crate) const GDT: u64 = 0x500;
/// The start info of PVH, and behind it what it points to.
pub(crate) const START_INFO: u64 = 0x6000;
/// The one module of the start info, the initrd.
pub(crate) const MODULE_LIST: u64 = START_INFO + 0x100;
/// The memory map of PVH.
pub(crate) const PVH_MEMORY_MAP: u64 = START_INFO + 0x200;
/// The zero page, `struct boot_params`.
pub(crate) const ZERO_PAGE: u64 = 0x7000;
/// Page tables: one PML4, one PDPT, four page directories.
pub(crate) const PAGE_TABLES: u64 = 0x9000;
/// The command line.
pub(crate) const COMMAND_LINE: u64 = 0x2_0000;
/// The longest command line for which there is room, without its final NUL.
pub(crate) const COMMAND_LINE_ROOM: u64 = 0xffff;

/// The extended BIOS data area and the end of conventional memory.
pub(crate) const EBDA: Range<u64> = 0x9_fc00..0xa_0000;
/// ACPI's root pointer, where it is also searched for, and the tables.
pub(crate) const ACPI_TABLES: Range<u64> = 0xe_0000..0xf_0000;
/// The rest of the BIOS's place.
pub(crate) const BIOS: Range<u64> = 0xf_0000..0x10_0000;
/// The VM generation identifier, 16 bytes.
pub(crate) const VM_GENERATION: u64 = 0xf_f000;
/// Where real-mode code jumps to reset the machine.
pub(crate) const RESET_VECTOR: u64 = 0xf_fff0;
/// Where memory beyond the first MiB begins.
pub(crate) const HIGH_MEMORY: u64 = 0x10_0000;

/// The I/O APIC of KVM.
pub(crate) const IO_APIC: u32 = 0xfec0_0000;
/// The local APICs.
pub(crate) const LOCAL_APIC: u32 = 0xfee0_0000;

/// Pages below 4 GiB that KVM wants for itself on Intel processors: the identity
/// map and the TSS (KVM API documentation, `KVM_SET_IDENTITY_MAP_ADDR` and
/// `KVM_SET_TSS_ADDR`).
pub(crate) const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// The three pages after the identity map.
pub(crate) const KVM_TSS: usize = 0xfffb_d000;

/// The sleep control register of ACPI, a port.
pub(crate) const SLEEP_CONTROL_PORT: u16 = 0x600;
/// The sleep status register of ACPI, a port.
pub(crate) const SLEEP_STATUS_PORT: u16 = 0x601;
/// The reset register of ACPI, a port.
pub(crate) const RESET_PORT: u16 = 0x602;
/// What is written to the reset register.
pub(crate) const RESET_VALUE: u8 = 1;
/// The sleep type of S5, soft off.
pub(crate) const SLEEP_TYPE_OFF: u8 = 5;

/// The first of the eight ports of the first serial port.
pub(crate) const COM1_PORT: u16 = 0x3f8;
/// The interrupt of COM1 on every PC.
pub(crate) const COM1_GSI: u32 = 4;
/// The interrupt of ACPI's generic event device: the last pin of the I/O APIC,
/// which no other device has.
pub(crate) const EVENT_GSI: u32 = 23;

/// A byte written to this port says that the guest is ready: for a snapshot, for
/// work, whatever it takes that to mean.
pub(crate) const READY_PORT: u16 = 0x620;
