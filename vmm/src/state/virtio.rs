//! The virtio devices of a machine state.
//!
//! What is checked here needs no device: whether any transport could be in such
//! a state. That it fits the device that is attached, and that its queues lie in
//! guest memory, is checked when it is restored.

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};

use super::StateError;

/// The most virtio devices a machine can have.
pub const MAX_VIRTIO_DEVICES: usize = 16;
/// The most queues a virtio device can have.
pub const MAX_VIRTIO_QUEUES: usize = 8;

/// A virtio device and its transport, by the names of the registers of virtio
/// 1.2, section 4.2.2.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VirtioState {
    /// Which kind of device it is, and what only this kind has.
    pub device: VirtioDeviceState,
    /// Status.
    pub status: u8,
    /// The features that the driver took.
    pub driver_features: u64,
    /// DeviceFeaturesSel.
    pub device_features_select: u32,
    /// DriverFeaturesSel.
    pub driver_features_select: u32,
    /// QueueSel.
    pub queue_select: u32,
    /// InterruptStatus.
    pub interrupt_status: u8,
    /// ConfigGeneration.
    pub config_generation: u32,
    /// The queues by their numbers, at most [`MAX_VIRTIO_QUEUES`].
    pub queues: Vec<VirtioQueueState>,
}

/// What only one kind of virtio device has.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum VirtioDeviceState {
    /// A disk.
    Block {
        /// Its size in sectors of 512 bytes.
        capacity_sectors: u64,
        /// Whether the guest was told that it cannot write to it.
        read_only: bool,
    },
    /// A source of entropy.
    Entropy,
    /// Sockets.
    Vsock {
        /// The guest's context id.
        guest_cid: u64,
    },
    /// A network interface.
    Net {
        /// The address that the driver was told.
        mac: [u8; 6],
    },
}

/// A split virtqueue, virtio 1.2, section 2.7. Its layout is that of the format's version 1
/// and of the payloads `virtio-*` 1, and stays.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct VirtioQueueState {
    /// QueueNumMax.
    pub max_size: u16,
    /// QueueNum.
    pub size: u16,
    /// QueueReady.
    pub ready: bool,
    /// QueueDesc, a guest-physical address.
    pub descriptor_table: u64,
    /// QueueDriver, a guest-physical address.
    pub available_ring: u64,
    /// QueueDevice, a guest-physical address.
    pub used_ring: u64,
    /// The index of the next available buffer.
    pub next_available: u16,
    /// The index of the next used buffer.
    pub next_used: u16,
}

const STATUS_BITS: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE
    | VIRTIO_CONFIG_S_DRIVER
    | VIRTIO_CONFIG_S_DRIVER_OK
    | VIRTIO_CONFIG_S_FEATURES_OK
    | VIRTIO_CONFIG_S_NEEDS_RESET
    | VIRTIO_CONFIG_S_FAILED;
const INTERRUPT_BITS: u32 = VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG;
/// Virtio 1.2, section 2.7.
const MAX_QUEUE_SIZE: u16 = 32768;

impl VirtioState {
    /// Refuses what no transport can be in.
    pub(super) fn validate(&self, device: usize) -> Result<(), StateError> {
        let refused = |what| Err(StateError::Virtio { device, what });
        let status = u32::from(self.status);
        let has = |bit| status & bit != 0;
        if status & !STATUS_BITS != 0 {
            return refused("an unknown status");
        }
        if has(VIRTIO_CONFIG_S_DRIVER_OK) && !has(VIRTIO_CONFIG_S_FEATURES_OK) {
            return refused("a driver that runs without features");
        }
        let modern = self.driver_features & (1 << VIRTIO_F_VERSION_1) != 0;
        if has(VIRTIO_CONFIG_S_FEATURES_OK) && !modern {
            return refused("a driver of an older virtio");
        }
        if u32::from(self.interrupt_status) & !INTERRUPT_BITS != 0 {
            return refused("an unknown interrupt");
        }
        if self.queues.is_empty() || self.queues.len() > MAX_VIRTIO_QUEUES {
            return refused("an impossible number of queues");
        }
        for queue in &self.queues {
            if let Err(what) = queue.validate() {
                return refused(what);
            }
            if queue.ready && !has(VIRTIO_CONFIG_S_FEATURES_OK) {
                return refused("a queue in use before its features were agreed");
            }
        }
        Ok(())
    }
}

impl VirtioQueueState {
    fn validate(&self) -> Result<(), &'static str> {
        if !self.max_size.is_power_of_two() || self.max_size > MAX_QUEUE_SIZE {
            return Err("a queue of an impossible size");
        }
        if !self.ready {
            return match (self.next_available, self.next_used) {
                (0, 0) => Ok(()),
                _ => Err("a position in a queue that is not in use"),
            };
        }
        if !self.size.is_power_of_two() || self.size > self.max_size {
            return Err("a queue of an impossible size");
        }
        let aligned = self.descriptor_table.is_multiple_of(16)
            && self.available_ring.is_multiple_of(2)
            && self.used_ring.is_multiple_of(4);
        if aligned {
            Ok(())
        } else {
            Err("a queue at an unaligned address")
        }
    }
}
