//! What a machine state is made of, and which lengths it can have.

use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use super::{
    HostFacts, MAX_VIRTIO_DEVICES, StateError, VcpuState, VirtioState, VmState, check_host,
    feature_msrs,
};
use crate::memory::MemoryLayout;
use crate::{Error, Result, generation};

/// The most vCPUs a machine can have.
pub const MAX_CPUS: u32 = 64;
/// The most CPUID entries of a vCPU, KVM's `KVM_MAX_CPUID_ENTRIES`.
pub const MAX_CPUID_ENTRIES: usize = 256;
/// The most MSRs of a vCPU's state.
pub const MAX_MSRS: usize = 1024;
/// The longest XSAVE area of a vCPU, in bytes; with AMX it is about 11 KiB.
pub const MAX_XSAVE_BYTES: usize = 64 << 10;
/// The shortest XSAVE area, in bytes: `struct kvm_xsave` without its extension.
pub(super) const MIN_XSAVE_BYTES: usize = 4096;
/// The most input in a serial port's own buffer, in bytes.
pub const MAX_SERIAL_FIFO_BYTES: usize = 64;
/// The most input that waits for room in a serial port's buffer, in bytes.
pub const MAX_PENDING_INPUT_BYTES: usize = 64 << 10;

/// Everything of a stopped machine but the content of its memory.
#[derive(Clone, Debug)]
pub struct MachineState {
    /// The size of the guest's memory in bytes.
    pub memory_bytes: u64,
    /// Interrupt controllers, timer and clock.
    pub vm: VmState,
    /// The devices that the monitor plays.
    pub devices: DeviceState,
    /// The guest-physical address of the 16 bytes of the VM generation identifier,
    /// for a guest that was told of one. A restored machine gets another identifier.
    pub vm_generation: Option<u64>,
    /// The vCPUs in the order of their indices.
    pub vcpus: Vec<VcpuState>,
}

/// The devices that the monitor plays.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct DeviceState {
    /// The first serial port.
    pub serial: SerialState,
    /// The virtio devices in the order of their windows, at most
    /// [`MAX_VIRTIO_DEVICES`].
    pub virtio: Vec<VirtioState>,
}

/// A 16550 serial port, by the names of its registers. Its layout is that of the format's
/// version 1 and of the payload `serial` 1, and stays.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct SerialState {
    /// Divisor latch, low byte.
    pub baud_divisor_low: u8,
    /// Divisor latch, high byte.
    pub baud_divisor_high: u8,
    /// Interrupt enable register.
    pub interrupt_enable: u8,
    /// Interrupt identification register.
    pub interrupt_identification: u8,
    /// Line control register.
    pub line_control: u8,
    /// Line status register.
    pub line_status: u8,
    /// Modem control register.
    pub modem_control: u8,
    /// Modem status register.
    pub modem_status: u8,
    /// Scratch register.
    pub scratch: u8,
    /// Input in the port's own buffer, at most [`MAX_SERIAL_FIFO_BYTES`].
    pub in_buffer: Vec<u8>,
    /// Input that waits for room in it, at most [`MAX_PENDING_INPUT_BYTES`].
    pub pending_input: Vec<u8>,
}

impl MachineState {
    /// Refuses a host that lacks what the guest's vCPUs were told they have.
    /// `vcpu` is one that has never run, to be restored afterwards.
    ///
    /// # Errors
    /// As [`check_host`], or KVM refuses to be asked.
    pub fn check_host(&self, host: &HostFacts, vcpu: &VcpuFd) -> Result<()> {
        let check = |offered: &[kvm_cpuid_entry2]| {
            let mut vcpus = self.vcpus.iter();
            vcpus.try_for_each(|vcpu| check_host(&vcpu.cpuid, offered))
        };
        let told = self.vcpus.iter();
        let mut missing = told
            .map(|vcpu| feature_msrs::missing(&vcpu.cpuid, &vcpu.msrs, host.feature_msrs()))
            .filter(|missing| !missing.is_empty());
        if let Some(features) = missing.next() {
            return Err(StateError::HostLacks { features }.into());
        }
        match check(host.supported_cpuid()) {
            Err(Error::State(StateError::HostLacks { .. })) => check(&host.given_cpuid(vcpu)?),
            checked => checked,
        }
    }

    /// Checks what KVM cannot: every size and count.
    pub(super) fn validate(&self) -> Result<()> {
        let layout = MemoryLayout::new(self.memory_bytes)?;
        if let Some(address) = self.vm_generation
            && !generation::fits(address, &layout)
        {
            return Err(StateError::VmGeneration { address }.into());
        }
        let cpus = u32::try_from(self.vcpus.len()).unwrap_or(u32::MAX);
        if !(1..=MAX_CPUS).contains(&cpus) {
            return Err(Error::Cpus {
                cpus,
                limit: MAX_CPUS,
            });
        }
        for (cpu, vcpu) in self.vcpus.iter().enumerate() {
            vcpu.validate(cpu)?;
        }
        self.vm.validate()?;
        self.devices.validate()?;
        Ok(())
    }
}

impl DeviceState {
    fn validate(&self) -> Result<(), StateError> {
        self.serial.validate()?;
        if self.virtio.len() > MAX_VIRTIO_DEVICES {
            return Err(StateError::VirtioDevices {
                limit: MAX_VIRTIO_DEVICES,
            });
        }
        let mut devices = self.virtio.iter().enumerate();
        devices.try_for_each(|(device, state)| state.validate(device))
    }
}

impl SerialState {
    fn validate(&self) -> Result<(), StateError> {
        let caps = [
            (self.in_buffer.len(), MAX_SERIAL_FIFO_BYTES),
            (self.pending_input.len(), MAX_PENDING_INPUT_BYTES),
        ];
        match caps.into_iter().find(|(bytes, limit)| bytes > limit) {
            Some((bytes, limit)) => Err(StateError::SerialInput { bytes, limit }),
            None => Ok(()),
        }
    }
}

impl VcpuState {
    pub(super) fn validate(&self, cpu: usize) -> Result<(), StateError> {
        let lists = [
            (self.cpuid.len(), MAX_CPUID_ENTRIES, "CPUID entries"),
            (self.msrs.len(), MAX_MSRS, "MSRs"),
        ];
        if let Some((_, limit, what)) = lists.into_iter().find(|(count, limit, _)| count > limit) {
            return Err(StateError::TooMany { cpu, what, limit });
        }
        let bytes = self.xsave.len();
        if !(MIN_XSAVE_BYTES..=MAX_XSAVE_BYTES).contains(&bytes) || !bytes.is_multiple_of(4) {
            return Err(StateError::XsaveLength {
                cpu,
                bytes,
                limit: MAX_XSAVE_BYTES,
            });
        }
        Ok(())
    }
}
