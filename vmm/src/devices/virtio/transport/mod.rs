//! The registers of a virtio device, virtio 1.2, section 4.2.2 (version 2: no
//! legacy interface).
//!
//! | status of the device       | what a driver's access does                     |
//! |----------------------------|-------------------------------------------------|
//! | before FEATURES_OK         | features can be chosen, queues cannot           |
//! | FEATURES_OK                | features stand; queues can be set up            |
//! | DRIVER_OK                  | notifications are worked on                     |
//! | DEVICE_NEEDS_RESET, FAILED | nothing is worked on until status 0 is written  |
//!
//! Accesses that the specification does not allow read as zeros and change
//! nothing.

mod registers;
mod saved;

use std::sync::{Arc, Mutex, PoisonError};

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
use vm_memory::GuestMemoryMmap;

use super::broken::Broken;
use super::queue::QueueSlot;
use super::{Host, VirtioDevice};

/// What a driver can set.
const DRIVER_STATUS_BITS: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE
    | VIRTIO_CONFIG_S_DRIVER
    | VIRTIO_CONFIG_S_FEATURES_OK
    | VIRTIO_CONFIG_S_DRIVER_OK
    | VIRTIO_CONFIG_S_FAILED;

/// Raises the device's interrupt, once for each call.
pub type Interrupt = Box<dyn Fn() + Send>;

/// A virtio device behind its registers.
pub struct Transport {
    device: Box<dyn VirtioDevice>,
    memory: GuestMemoryMmap<()>,
    interrupt: Interrupt,
    registers: Registers,
    queues: Vec<QueueSlot>,
    host: Host,
    /// The machine is stopped: nothing touches guest memory or the interrupt.
    quiet: bool,
    /// By queue, a bit: to be worked on when the machine runs again.
    postponed: u32,
    /// The driver is to look at the configuration when the machine runs again.
    config_postponed: bool,
}

/// Registers with nothing behind them but a value.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Registers {
    status: u32,
    driver_features: u64,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u32,
    interrupt_status: u32,
    config_generation: u32,
}

impl Registers {
    fn has(&self, status_bit: u32) -> bool {
        self.status & status_bit != 0
    }

    /// Whether the device works on its queues.
    fn is_running(&self) -> bool {
        self.has(VIRTIO_CONFIG_S_DRIVER_OK)
            && !self.has(VIRTIO_CONFIG_S_NEEDS_RESET | VIRTIO_CONFIG_S_FAILED)
    }
}

impl Transport {
    /// A device after power-on. It is quiet until [`Transport::resume`].
    #[must_use]
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemoryMmap<()>,
        interrupt: Interrupt,
    ) -> Self {
        let queues = device.queue_sizes().iter();
        Self {
            queues: queues.map(|size| QueueSlot::new(*size)).collect(),
            device,
            memory,
            interrupt,
            registers: Registers::default(),
            host: Host::default(),
            quiet: true,
            postponed: 0,
            config_postponed: false,
        }
    }

    /// The device as its threads, which begin, and the vCPUs share it.
    #[cfg(test)]
    #[must_use]
    pub fn shared(self) -> Arc<Mutex<Self>> {
        let shared = Arc::new(Mutex::new(self));
        Self::start_threads(&shared);
        shared
    }

    /// Starts the device's threads, if it has some.
    pub fn start_threads(shared: &Arc<Mutex<Self>>) {
        let weak = Arc::downgrade(shared);
        let mut transport = shared.lock().unwrap_or_else(PoisonError::into_inner);
        transport.device.attached(weak);
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &dyn VirtioDevice {
        &*self.device
    }

    /// The machine around the device.
    pub(crate) fn set_host(&mut self, host: Host) {
        self.host = host;
    }

    /// Works on a queue, as when the guest notifies it: for a thread of the
    /// device that has something for the driver. In a stopped machine it is done
    /// when that runs again.
    pub fn serve(&mut self, queue_index: usize) {
        if !self.registers.is_running() || queue_index >= self.queues.len() {
            return;
        }
        if self.quiet || self.host.is_pausing() || self.host.has_fault() {
            self.postponed |= 1 << queue_index;
            return;
        }
        let due = std::mem::take(&mut self.postponed) | 1 << queue_index;
        for queue_index in 0..self.queues.len() {
            if due & 1 << queue_index != 0 {
                self.work(queue_index);
            }
        }
    }

    fn work(&mut self, queue_index: usize) {
        let Some(mut queue) = self.queues[queue_index].open(&self.memory, &self.host) else {
            return;
        };
        let processed = self.device.process(queue_index, &mut queue);
        let wants_interrupt = queue.wants_interrupt();
        let mut postpone = self.host.is_pausing() && queue.has_more();
        if let Some(fault) = self.device.take_fault() {
            self.host.fail(fault);
            postpone = true;
        }
        if postpone {
            self.postponed |= 1 << queue_index;
        }
        if wants_interrupt {
            self.raise(VIRTIO_MMIO_INT_VRING);
        }
        if let Err(broken) = processed {
            self.need_reset(&broken);
        }
    }

    /// Does what was postponed while the machine was about to stop, and then did not.
    pub fn catch_up(&mut self) {
        let postponed = std::mem::take(&mut self.postponed);
        for queue_index in 0..self.queues.len() {
            if postponed & 1 << queue_index != 0 {
                self.serve(queue_index);
            }
        }
    }

    /// From here on nothing touches guest memory or the interrupt, until
    /// [`Transport::resume`]. The vCPUs must be stopped.
    pub fn quiesce(&mut self) {
        self.quiet = true;
    }

    /// The machine is about to run: what waited for that is done.
    pub fn resume(&mut self) {
        if !std::mem::take(&mut self.quiet) {
            return;
        }
        if std::mem::take(&mut self.config_postponed) {
            self.config_changed();
        }
        self.catch_up();
    }

    /// The device's configuration changed: the driver is to look at it, in a
    /// stopped machine when that runs again.
    pub fn config_changed(&mut self) {
        if self.quiet {
            self.config_postponed = true;
            return;
        }
        self.registers.config_generation = self.registers.config_generation.wrapping_add(1);
        if self.registers.has(VIRTIO_CONFIG_S_DRIVER_OK) {
            self.raise(VIRTIO_MMIO_INT_CONFIG);
        }
    }

    fn raise(&mut self, cause: u32) {
        self.registers.interrupt_status |= cause;
        (self.interrupt)();
    }

    /// Virtio 1.2, section 2.1.2.
    fn need_reset(&mut self, broken: &Broken) {
        tracing::debug!(device = self.device.id(), %broken, "a driver broke its device");
        self.registers.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
        if self.registers.has(VIRTIO_CONFIG_S_DRIVER_OK) {
            self.raise(VIRTIO_MMIO_INT_CONFIG);
        }
    }

    fn offered_features(&self) -> u64 {
        self.device.features() | 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    /// Whether the driver took only what is offered, and what it must take.
    fn accepts(&self, features: u64) -> bool {
        features & !self.offered_features() == 0 && features & 1 << VIRTIO_F_VERSION_1 != 0
    }

    /// The driver goes on to the next status, or resets the device. Bits are only
    /// ever added; FEATURES_OK stays unset if the features are not accepted,
    /// which the driver sees when it reads the status back.
    fn write_status(&mut self, written: u32) {
        if written == 0 {
            return self.reset();
        }
        let before = self.registers.status;
        self.registers.status |= written & DRIVER_STATUS_BITS;
        if !before & self.registers.status & VIRTIO_CONFIG_S_FEATURES_OK != 0 {
            let features = self.registers.driver_features;
            if self.accepts(features) {
                self.device.negotiated(features);
            } else {
                self.registers.status &= !VIRTIO_CONFIG_S_FEATURES_OK;
            }
        }
        if !self.registers.has(VIRTIO_CONFIG_S_FEATURES_OK) {
            self.registers.status &= !VIRTIO_CONFIG_S_DRIVER_OK;
        }
        if !before & self.registers.status & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            // A driver may have filled queues, and notified, before.
            for queue_index in 0..self.queues.len() {
                self.serve(queue_index);
            }
        }
    }

    fn reset(&mut self) {
        self.registers = Registers {
            config_generation: self.registers.config_generation,
            ..Registers::default()
        };
        for queue in &mut self.queues {
            *queue = QueueSlot::new(queue.max_size());
        }
        self.postponed = 0;
        self.config_postponed = false;
        self.device.reset();
    }
}
