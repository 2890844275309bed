//! The tables of fixed form: FADT and MADT (ACPI specification 6.5, sections 5.2.9
//! and 5.2.12).

use acpi_tables::Aml as _;
use acpi_tables::fadt::{FADT, FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::sdt::Sdt;

use super::table::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::addresses::{
    IO_APIC, LOCAL_APIC, RESET_PORT, RESET_VALUE, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT,
};

/// `IAPC_BOOT_ARCH`: no VGA, no clock in CMOS memory. Not set: legacy devices, and
/// a keyboard controller, which is there for its reset line alone.
const NO_VGA: u16 = 1 << 2;
const NO_CMOS_CLOCK: u16 = 1 << 5;

/// The FADT: how to power off and to reset, and what the machine has not.
pub(super) fn fadt(dsdt: u64) -> FADT {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::Wbinvd)
        .flag(Flags::ResetRegSup)
        // No buttons of ACPI's fixed hardware.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless);
    fadt.reset_reg = port(RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = port(SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(SLEEP_STATUS_PORT);
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS_CLOCK).into();
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(OEM_TABLE_ID).into();
    fadt.finalize()
}

fn port(port: u16) -> GAS {
    GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        port.into(),
    )
}

/// The MADT: a local APIC for each vCPU, whose APIC id is its index, and the I/O
/// APIC, as KVM has them.
pub(super) fn madt(cpus: u32) -> Sdt {
    /// There are two 8259 interrupt controllers besides the APICs.
    const PC_COMPATIBLE: u32 = 1;
    const HEADER_BYTES: u32 = 36;
    const REVISION: u8 = 5;
    let mut madt = Sdt::new(
        *b"APIC",
        HEADER_BYTES,
        REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    madt.append_slice(&LOCAL_APIC.to_le_bytes());
    madt.append_slice(&PC_COMPATIBLE.to_le_bytes());
    let mut entries = Vec::new();
    for cpu in 0..cpus {
        let id = u8::try_from(cpu).expect("a machine has at most 64 vCPUs");
        ProcessorLocalApic::new(id, id, EnabledStatus::Enabled).to_aml_bytes(&mut entries);
    }
    IoApic::new(0, IO_APIC, 0).to_aml_bytes(&mut entries);
    entries.extend(LINT1_IS_NMI);
    madt.append_slice(&entries);
    madt
}

/// Local APIC NMI: of every processor, at its pin LINT1.
const LINT1_IS_NMI: [u8; 6] = [4, 6, 0xff, 0, 0, 1];
