//! Access to the registers, by their offsets in the window.

use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_FEATURES_OK;
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_DEVICE_FEATURES,
    VIRTIO_MMIO_DEVICE_FEATURES_SEL, VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_DRIVER_FEATURES,
    VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INTERRUPT_STATUS,
    VIRTIO_MMIO_MAGIC_VALUE, VIRTIO_MMIO_QUEUE_AVAIL_HIGH, VIRTIO_MMIO_QUEUE_AVAIL_LOW,
    VIRTIO_MMIO_QUEUE_DESC_HIGH, VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NOTIFY,
    VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_NUM_MAX, VIRTIO_MMIO_QUEUE_READY,
    VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_QUEUE_USED_HIGH, VIRTIO_MMIO_QUEUE_USED_LOW,
    VIRTIO_MMIO_SHM_BASE_HIGH, VIRTIO_MMIO_SHM_BASE_LOW, VIRTIO_MMIO_SHM_LEN_HIGH,
    VIRTIO_MMIO_SHM_LEN_LOW, VIRTIO_MMIO_STATUS, VIRTIO_MMIO_VENDOR_ID, VIRTIO_MMIO_VERSION,
};

use super::super::queue::{Address, QueueSlot};
use super::Transport;

/// "virt"
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "SNAP", of no meaning to drivers.
const VENDOR: u32 = 0x5041_4e53;

impl Transport {
    /// The guest reads from the window.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(within) = offset.checked_sub(VIRTIO_MMIO_CONFIG.into()) {
            self.device.read_config(within, data);
        } else if let (Some(register), Ok(data)) = (register(offset), data.try_into()) {
            let data: &mut [u8; 4] = data;
            *data = self.read_register(register).to_le_bytes();
        }
    }

    /// The guest writes to the window.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(within) = offset.checked_sub(VIRTIO_MMIO_CONFIG.into()) {
            self.device.write_config(within, data);
        } else if let (Some(register), Ok(data)) = (register(offset), data.try_into()) {
            self.write_register(register, u32::from_le_bytes(data));
        }
    }

    fn read_register(&self, register: u32) -> u32 {
        let queue = self.selected();
        match register {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.device.id(),
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => half(
                self.offered_features(),
                self.registers.device_features_select,
            ),
            VIRTIO_MMIO_QUEUE_NUM_MAX => queue.map_or(0, |queue| queue.max_size().into()),
            VIRTIO_MMIO_QUEUE_READY => queue.is_some_and(QueueSlot::is_ready).into(),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.registers.interrupt_status,
            VIRTIO_MMIO_STATUS => self.registers.status,
            VIRTIO_MMIO_CONFIG_GENERATION => self.registers.config_generation,
            // There is no shared memory: regions of length and base -1.
            VIRTIO_MMIO_SHM_LEN_LOW
            | VIRTIO_MMIO_SHM_LEN_HIGH
            | VIRTIO_MMIO_SHM_BASE_LOW
            | VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            _ => 0,
        }
    }

    fn write_register(&mut self, register: u32, value: u32) {
        match register {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.registers.device_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.registers.driver_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES => self.write_features(value),
            VIRTIO_MMIO_QUEUE_SEL => self.registers.queue_select = value,
            VIRTIO_MMIO_QUEUE_NOTIFY => {
                self.serve(usize::try_from(value).unwrap_or(usize::MAX));
            }
            VIRTIO_MMIO_INTERRUPT_ACK => self.registers.interrupt_status &= !value,
            VIRTIO_MMIO_STATUS => self.write_status(value),
            _ if self.registers.has(VIRTIO_CONFIG_S_FEATURES_OK) => {
                self.write_queue_register(register, value);
            }
            _ => {}
        }
    }

    fn write_features(&mut self, value: u32) {
        if self.registers.has(VIRTIO_CONFIG_S_FEATURES_OK) {
            return;
        }
        let (value, features) = (u64::from(value), &mut self.registers.driver_features);
        match self.registers.driver_features_select {
            0 => *features = *features & !0xffff_ffff | value,
            1 => *features = *features & 0xffff_ffff | value << 32,
            _ => {}
        }
    }

    fn write_queue_register(&mut self, register: u32, value: u32) {
        let selected = usize::try_from(self.registers.queue_select).unwrap_or(usize::MAX);
        let Some(queue) = self.queues.get_mut(selected) else {
            return;
        };
        let (address, high) = match register {
            VIRTIO_MMIO_QUEUE_NUM => return queue.set_size(value),
            VIRTIO_MMIO_QUEUE_READY if value == 0 => return queue.disable(),
            VIRTIO_MMIO_QUEUE_READY => {
                if let Err(broken) = queue.enable(&self.memory) {
                    self.need_reset(&broken);
                }
                return;
            }
            VIRTIO_MMIO_QUEUE_DESC_LOW => (Address::Descriptors, false),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => (Address::Descriptors, true),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => (Address::Available, false),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => (Address::Available, true),
            VIRTIO_MMIO_QUEUE_USED_LOW => (Address::Used, false),
            VIRTIO_MMIO_QUEUE_USED_HIGH => (Address::Used, true),
            _ => return,
        };
        queue.set_address(address, high, value);
    }

    fn selected(&self) -> Option<&QueueSlot> {
        let selected = usize::try_from(self.registers.queue_select).ok()?;
        self.queues.get(selected)
    }
}

/// The register at an offset below the configuration.
fn register(offset: u64) -> Option<u32> {
    u32::try_from(offset)
        .ok()
        .filter(|offset| offset.is_multiple_of(4))
}

/// The 32 feature bits that a selector names.
fn half(features: u64, select: u32) -> u32 {
    let shifted = match select {
        0 => features,
        1 => features >> 32,
        _ => 0,
    };
    u32::try_from(shifted & 0xffff_ffff).unwrap_or(0)
}
