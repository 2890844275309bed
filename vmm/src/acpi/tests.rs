//! The tables as a kernel reads them: from the root pointer on, out of memory.

use vm_memory::{Bytes as _, GuestAddress};

use super::*;
use crate::addresses::{EVENT_GSI, IO_APIC, RESET_PORT, SLEEP_CONTROL_PORT, VM_GENERATION};
use crate::memory::{GuestMemory, MemoryLayout};

fn devices(cpus: u32, virtio: u32) -> AcpiDevices {
    AcpiDevices {
        cpus,
        virtio_mmio: (0..virtio)
            .map(|index| VirtioWindow {
                base: 0xd000_0000 + 0x1000 * index,
                len: 0x1000,
                gsi: 5 + index,
            })
            .collect(),
        vm_generation: Some(VM_GENERATION),
    }
}

struct Reader(GuestMemory);

impl Reader {
    fn new(devices: &AcpiDevices) -> Self {
        let memory = GuestMemory::anonymous(MemoryLayout::new(1 << 20).unwrap()).unwrap();
        assert_eq!(write(memory.ram(), devices).unwrap(), 0xe_0000);
        Self(memory)
    }

    fn bytes(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.0
            .ram()
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }

    /// A table, with its length and checksum verified.
    fn table(&self, address: u64, signature: &[u8; 4]) -> Vec<u8> {
        let length = number(&self.bytes(address + 4, 4));
        assert!(ACPI_TABLES.contains(&(address + length - 1)));
        let table = self.bytes(address, usize::try_from(length).unwrap());
        assert_eq!(&table[..4], signature);
        assert_eq!(sum(&table), 0, "checksum of {signature:?}");
        table
    }

    fn listed(&self) -> Vec<u64> {
        let root = self.bytes(0xe_0000, 36);
        assert_eq!(&root[..8], b"RSD PTR ");
        assert_eq!((sum(&root[..20]), sum(&root), root[15]), (0, 0, 2));
        let xsdt = self.table(number(&root[24..32]), b"XSDT");
        xsdt[36..].chunks(8).map(number).collect()
    }
}

fn number(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .rev()
        .fold(0, |value, &byte| value << 8 | u64::from(byte))
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, &byte| sum.wrapping_add(byte))
}

#[test]
fn fadt_leads_to_the_dsdt_and_to_the_ports() {
    let reader = Reader::new(&devices(2, 3));
    let fadt = reader.table(reader.listed()[0], b"FACP");
    let flags = number(&fadt[112..116]);
    assert_eq!(flags & (1 << 20 | 1 << 10), 1 << 20 | 1 << 10);
    let port = |at: usize| (fadt[at], number(&fadt[at + 4..at + 12]));
    assert_eq!(port(116), (1, RESET_PORT.into()));
    assert_eq!(fadt[128], 1);
    assert_eq!(port(244), (1, SLEEP_CONTROL_PORT.into()));
    let dsdt = reader.table(number(&fadt[140..148]), b"DSDT");
    for id in [
        "LNRO0005",
        "SNAP0001",
        "VM_Gen_Counter",
        "ACPI0013",
        "ACPI0007",
    ] {
        assert!(
            dsdt.windows(id.len()).any(|part| part == id.as_bytes()),
            "{id}"
        );
    }
}

#[test]
fn madt_lists_every_vcpu_and_the_io_apic() {
    for cpus in [1, 2, 64] {
        let reader = Reader::new(&devices(cpus, 0));
        let madt = reader.table(reader.listed()[1], b"APIC");
        assert_eq!(number(&madt[36..40]), 0xfee0_0000);
        let mut left = &madt[44..];
        let (mut local, mut io) = (Vec::new(), 0);
        while let [kind, length, ..] = *left {
            let entry = &left[..usize::from(length)];
            match kind {
                0 => {
                    assert_eq!((entry[2], number(&entry[4..8])), (entry[3], 1));
                    local.push(u32::from(entry[3]));
                }
                1 => {
                    assert_eq!(number(&entry[4..8]), u64::from(IO_APIC));
                    io += 1;
                }
                4 => assert_eq!((entry[2], entry[5]), (0xff, 1)),
                other => panic!("an entry of type {other}"),
            }
            left = &left[usize::from(length)..];
        }
        assert_eq!(local, (0..cpus).collect::<Vec<_>>());
        assert_eq!(io, 1);
    }
}

#[test]
fn a_machine_without_generation_has_no_event_device() {
    let without = AcpiDevices {
        vm_generation: None,
        ..devices(1, 1)
    };
    let tables = tables(&without);
    assert!(!tables.windows(8).any(|part| part == b"ACPI0013"));
}

#[test]
fn tables_that_do_not_fit_are_refused() {
    let memory = GuestMemory::anonymous(MemoryLayout::new(1 << 20).unwrap()).unwrap();
    let refused = write(memory.ram(), &devices(1, 2000));
    assert!(matches!(
        refused,
        Err(Error::AcpiTables {
            limit: 0x1_0000,
            ..
        })
    ));
    assert!(write(memory.ram(), &devices(64, 19)).is_ok());
}

/// For a disassembler: `iasl -d` reads the file.
#[test]
fn the_dsdt_can_be_written_for_a_disassembler() {
    let table = dsdt::dsdt(&devices(2, 3));
    if let Some(path) = std::env::var_os("SNAPSTORE_WRITE_DSDT") {
        std::fs::write(path, table.as_slice()).unwrap();
    }
    assert_eq!(EVENT_GSI, 23);
    assert_eq!(sum(table.as_slice()), 0);
}
