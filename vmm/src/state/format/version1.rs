//! The content of version 1, which was written until devices became payloads: one
//! structure in postcard's wire format. Another device would have been another version.
//! What is here never changes.

use kvm_bindings::{kvm_irqchip, kvm_pit_state2};
use serde::{Deserialize, Serialize};

use super::super::{
    DeviceState, MAX_CPUS, MAX_VIRTIO_DEVICES, MAX_VIRTIO_QUEUES, MachineState, SerialState,
    StateError, VcpuState, VirtioDeviceState, VirtioQueueState, VirtioState, VmState, bounded,
};
use super::wire::wire;

/// `vcpus` comes last: a list with nothing behind it can be left unread beyond
/// its limit.
#[derive(Serialize, Deserialize)]
struct Content {
    memory_bytes: u64,
    vm: Vm,
    devices: Devices,
    vm_generation: Option<u64>,
    #[serde(deserialize_with = "bounded::last_list::<_, _, { MAX_CPUS as usize }>")]
    vcpus: Vec<VcpuState>,
}

#[derive(Serialize, Deserialize)]
struct Vm {
    pic_master: kvm_irqchip,
    pic_slave: kvm_irqchip,
    ioapic: kvm_irqchip,
    pit: kvm_pit_state2,
    clock_nanos: u64,
}

#[derive(Serialize, Deserialize)]
struct Devices {
    serial: SerialState,
    #[serde(deserialize_with = "bounded::list::<_, _, { MAX_VIRTIO_DEVICES }>")]
    virtio: Vec<Virtio>,
}

#[derive(Serialize, Deserialize)]
struct Virtio {
    device: Device,
    status: u8,
    driver_features: u64,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u32,
    interrupt_status: u8,
    config_generation: u32,
    #[serde(deserialize_with = "bounded::list::<_, _, { MAX_VIRTIO_QUEUES }>")]
    queues: Vec<VirtioQueueState>,
}

/// The order of these is their number in the bytes.
#[derive(Serialize, Deserialize)]
enum Device {
    Block {
        capacity_sectors: u64,
        read_only: bool,
    },
    Entropy,
    Vsock {
        guest_cid: u64,
    },
    Net {
        mac: [u8; 6],
    },
}

/// The state of this content. Its sizes and counts are the caller's to check.
pub(super) fn decode(content: &[u8]) -> crate::Result<MachineState> {
    let (read, rest) = postcard::take_from_bytes::<Content>(content)
        .map_err(|source| StateError::Malformed { source })?;
    // A list of vCPUs that is too long is not read to its end, and is told as such.
    let again = wire(&read);
    let state = MachineState::from(read);
    state.validate()?;
    if !rest.is_empty() {
        return Err(StateError::TrailingBytes {
            extra: rest.len() as u64,
        }
        .into());
    }
    if again != content {
        return Err(StateError::NotCanonical.into());
    }
    Ok(state)
}

impl From<Content> for MachineState {
    fn from(content: Content) -> Self {
        let virtio = content.devices.virtio.into_iter();
        Self {
            memory_bytes: content.memory_bytes,
            vm: VmState {
                pic_master: content.vm.pic_master,
                pic_slave: content.vm.pic_slave,
                ioapic: content.vm.ioapic,
                pit: content.vm.pit,
                clock_nanos: content.vm.clock_nanos,
            },
            devices: DeviceState {
                serial: content.devices.serial,
                virtio: virtio.map(VirtioState::from).collect(),
            },
            vm_generation: content.vm_generation,
            vcpus: content.vcpus,
        }
    }
}

impl From<Virtio> for VirtioState {
    fn from(virtio: Virtio) -> Self {
        Self {
            device: match virtio.device {
                Device::Block {
                    capacity_sectors,
                    read_only,
                } => VirtioDeviceState::Block {
                    capacity_sectors,
                    read_only,
                },
                Device::Entropy => VirtioDeviceState::Entropy,
                Device::Vsock { guest_cid } => VirtioDeviceState::Vsock { guest_cid },
                Device::Net { mac } => VirtioDeviceState::Net { mac },
            },
            status: virtio.status,
            driver_features: virtio.driver_features,
            device_features_select: virtio.device_features_select,
            driver_features_select: virtio.driver_features_select,
            queue_select: virtio.queue_select,
            interrupt_status: virtio.interrupt_status,
            config_generation: virtio.config_generation,
            queues: virtio.queues,
        }
    }
}

#[cfg(test)]
mod tests;
