//! What the tables tell of.

/// The devices of a machine that its ACPI tables tell of, besides the first serial
/// port, which every machine has.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct AcpiDevices {
    /// How many vCPUs there are.
    pub cpus: u32,
    /// The virtio devices over MMIO.
    pub virtio_mmio: Vec<VirtioWindow>,
    /// Where in guest memory the VM generation identifier is, if there is one.
    pub vm_generation: Option<u64>,
}

/// Where a virtio device over MMIO is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VirtioWindow {
    /// The guest-physical address of its registers.
    pub base: u32,
    /// Their length in bytes.
    pub len: u32,
    /// Its interrupt, a pin of the I/O APIC, edge-triggered.
    pub gsi: u32,
}
