//! The ACPI tables of a machine: how a distribution's kernel finds its devices.
//!
//! ```text
//! root pointer -> XSDT -> FADT -> DSDT     power off, reset; the devices
//!                      -> MADT             interrupt controllers
//! ```
//!
//! The machine is "hardware-reduced" (ACPI specification 6.5, section 4.1): it has
//! none of ACPI's fixed hardware, whose registers would be state to keep. Power off
//! and reset are single writes to ports. A kernel then leaves the timer and the
//! interrupt controllers of the PC alone and takes the local APIC's timer, by the
//! TSC deadline, and kvmclock.
//!
//! Linux of its own choice does not use the reset register of such a machine, but
//! the BIOS's reset vector, which therefore leads to the register.

mod devices;
mod dsdt;
mod fixed;
mod table;
#[cfg(test)]
mod tests;

use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

use crate::addresses::ACPI_TABLES;
use crate::error::{Error, Result};
pub use devices::{AcpiDevices, VirtioWindow};
use table::{OEM_ID, OEM_REVISION, OEM_TABLE_ID, to_bytes};

/// Writes the tables to their place in memory and returns the address of the root
/// pointer.
///
/// # Errors
/// [`Error::AcpiTables`] for more devices than there is room for.
pub(crate) fn write(ram: &GuestMemoryMmap<()>, devices: &AcpiDevices) -> Result<u64> {
    let bytes = tables(devices);
    let limit = ACPI_TABLES.end - ACPI_TABLES.start;
    if bytes.len() as u64 > limit {
        return Err(Error::AcpiTables {
            bytes: bytes.len() as u64,
            limit,
        });
    }
    ram.write_slice(&bytes, GuestAddress(ACPI_TABLES.start))
        .expect("every machine has its first MiB of memory");
    Ok(ACPI_TABLES.start)
}

/// All tables as they lie in memory from [`ACPI_TABLES`] on, the root pointer first.
fn tables(devices: &AcpiDevices) -> Vec<u8> {
    let mut area = Area {
        bytes: vec![0; Rsdp::len()],
    };
    let dsdt = area.add(dsdt::dsdt(devices).as_slice());
    let fadt = area.add(&to_bytes(&fixed::fadt(dsdt)));
    let madt = area.add(fixed::madt(devices.cpus).as_slice());
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = area.add(&to_bytes(&xsdt));
    let root = to_bytes(&Rsdp::new(OEM_ID, xsdt));
    area.bytes[..root.len()].copy_from_slice(&root);
    area.bytes
}

struct Area {
    bytes: Vec<u8>,
}

impl Area {
    /// Adds a table and returns its guest-physical address.
    fn add(&mut self, table: &[u8]) -> u64 {
        const ALIGNMENT: usize = 16;
        let offset = self.bytes.len().next_multiple_of(ALIGNMENT);
        self.bytes.resize(offset, 0);
        self.bytes.extend_from_slice(table);
        ACPI_TABLES.start + offset as u64
    }
}
