//! The DSDT: the devices, and how to power off.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Arg, Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed, Method, Name, Notify, Package,
    Path, ResourceTemplate, Scope,
};
use acpi_tables::sdt::Sdt;

use super::devices::{AcpiDevices, VirtioWindow};
use super::table::{OEM_ID, OEM_REVISION, OEM_TABLE_ID, to_bytes};
use crate::addresses::{COM1_GSI, COM1_PORT, EVENT_GSI, SLEEP_TYPE_OFF};

/// The notification that the VM generation identifier has changed (Microsoft,
/// "Virtual Machine Generation ID").
const GENERATION_CHANGED: u8 = 0x80;

/// The DSDT of a machine.
pub(super) fn dsdt(devices: &AcpiDevices) -> Sdt {
    const HEADER_BYTES: u32 = 36;
    /// From 2 on, integers have 64 bits.
    const REVISION: u8 = 2;
    let mut system_bus = Vec::new();
    for cpu in 0..devices.cpus {
        system_bus.extend(processor(cpu));
    }
    system_bus.extend(serial_port());
    for (index, window) in (0..).zip(&devices.virtio_mmio) {
        system_bus.extend(virtio(index, window));
    }
    if let Some(address) = devices.vm_generation {
        system_bus.extend(vm_generation(address));
        system_bus.extend(event_device());
    }
    let mut dsdt = Sdt::new(
        *b"DSDT",
        HEADER_BYTES,
        REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    dsdt.append_slice(&Scope::raw("\\_SB_".into(), system_bus));
    let off = Package::new(vec![&SLEEP_TYPE_OFF, &0_u8]);
    dsdt.append_slice(&to_bytes(&Name::new("\\_S5_".into(), &off)));
    dsdt
}

fn processor(cpu: u32) -> Vec<u8> {
    device(
        &format!("C{cpu:03X}"),
        &[
            &Name::new("_HID".into(), &"ACPI0007"),
            &Name::new("_UID".into(), &cpu),
        ],
    )
}

/// The first serial port, a 16550.
fn serial_port() -> Vec<u8> {
    let ports = IO::new(COM1_PORT, COM1_PORT, 0, 8);
    let interrupt = edge(COM1_GSI);
    let resources = ResourceTemplate::new(vec![&ports, &interrupt]);
    device(
        "COM1",
        &[
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &0_u8),
            &Name::new("_CRS".into(), &resources),
        ],
    )
}

/// A virtio device over MMIO (Linux, `drivers/virtio/virtio_mmio.c`).
fn virtio(index: u32, window: &VirtioWindow) -> Vec<u8> {
    let registers = Memory32Fixed::new(true, window.base, window.len);
    let interrupt = edge(window.gsi);
    let resources = ResourceTemplate::new(vec![&registers, &interrupt]);
    device(
        &format!("V{index:03X}"),
        &[
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &index),
            // A write of the device to memory is seen by the processor's caches.
            &Name::new("_CCA".into(), &1_u8),
            &Name::new("_CRS".into(), &resources),
        ],
    )
}

/// The VM generation identifier (Microsoft, "Virtual Machine Generation ID").
fn vm_generation(address: u64) -> Vec<u8> {
    let low = u32::try_from(address & u64::from(u32::MAX)).expect("32 bits are left");
    let high = u32::try_from(address >> 32).expect("32 bits are left");
    device(
        "VGEN",
        &[
            &Name::new("_HID".into(), &"SNAP0001"),
            &Name::new("_CID".into(), &"VM_Gen_Counter"),
            &Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &Name::new("ADDR".into(), &Package::new(vec![&low, &high])),
        ],
    )
}

/// The generic event device (ACPI specification 6.5, section 5.6.9): its interrupt
/// says that the VM generation identifier has changed.
fn event_device() -> Vec<u8> {
    let interrupt = edge(EVENT_GSI);
    let resources = ResourceTemplate::new(vec![&interrupt]);
    let generation = Path::new("\\_SB_.VGEN");
    let notify = Notify::new(&generation, &GENERATION_CHANGED);
    let is_it = Equal::new(&Arg(0), &EVENT_GSI);
    let handle = If::new(&is_it, vec![&notify]);
    device(
        "GED_",
        &[
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &0_u8),
            &Name::new("_CRS".into(), &resources),
            &Method::new("_EVT".into(), 1, true, vec![&handle]),
        ],
    )
}

fn device(name: &str, contents: &[&dyn Aml]) -> Vec<u8> {
    to_bytes(&Device::new(Path::new(name), contents.to_vec()))
}

/// An interrupt that is pulsed: edge-triggered, active high, of one device.
fn edge(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}
