//! A transport to and from a machine state.

use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_FEATURES_OK;
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_INT_VRING;
use vm_memory::GuestMemoryMmap;

use super::super::VirtioDevice;
use super::super::queue::QueueSlot;
use super::{Interrupt, Registers, Transport};
use crate::state::VirtioState;

impl Transport {
    /// What a restored transport needs to be as this one. It must be quiet.
    #[must_use]
    pub fn save(&self) -> VirtioState {
        let registers = &self.registers;
        VirtioState {
            device: self.device.save(),
            status: byte(registers.status),
            driver_features: registers.driver_features,
            device_features_select: registers.device_features_select,
            driver_features_select: registers.driver_features_select,
            queue_select: registers.queue_select,
            interrupt_status: byte(registers.interrupt_status),
            config_generation: registers.config_generation,
            queues: self.queues.iter().map(QueueSlot::save).collect(),
        }
    }

    /// A transport as it was saved, quiet. Interrupt controllers and vCPUs must
    /// have been restored: a device whose driver runs interrupts it once, and
    /// looks at all queues when the machine runs again, so that an interrupt or a
    /// notification that was lost with the old machine is made up for. To a
    /// driver both mean nothing new when there is nothing new.
    ///
    /// # Errors
    /// In what the state differs from the device, or from what can be.
    pub fn restore(
        mut device: Box<dyn VirtioDevice>,
        memory: GuestMemoryMmap<()>,
        interrupt: Interrupt,
        state: &VirtioState,
    ) -> Result<Self, &'static str> {
        device.restore(&state.device)?;
        let sizes = device.queue_sizes().iter();
        if !sizes.eq(state.queues.iter().map(|queue| &queue.max_size)) {
            return Err("its queues");
        }
        let mut queues = Vec::with_capacity(state.queues.len());
        for queue in &state.queues {
            let queue = QueueSlot::restore(queue, &memory);
            queues.push(queue.map_err(|_| "where its queues are")?);
        }
        let mut transport = Self {
            queues,
            device,
            memory,
            interrupt,
            registers: Registers {
                status: state.status.into(),
                driver_features: state.driver_features,
                device_features_select: state.device_features_select,
                driver_features_select: state.driver_features_select,
                queue_select: state.queue_select,
                interrupt_status: state.interrupt_status.into(),
                config_generation: state.config_generation,
            },
            host: super::Host::default(),
            quiet: true,
            postponed: 0,
            config_postponed: false,
        };
        if transport.registers.has(VIRTIO_CONFIG_S_FEATURES_OK) {
            if !transport.accepts(state.driver_features) {
                return Err("its features");
            }
            transport.device.negotiated(state.driver_features);
        }
        transport.config_postponed = transport.device.config_differs();
        transport.wake();
        Ok(transport)
    }

    /// Interrupts a running driver once, and lets every queue be looked at.
    fn wake(&mut self) {
        if self.registers.is_running() {
            for (queue_index, queue) in self.queues.iter().enumerate() {
                self.postponed |= u32::from(queue.is_ready()) << queue_index;
            }
        }
        if self.postponed != 0 {
            self.raise(VIRTIO_MMIO_INT_VRING);
        } else if self.registers.interrupt_status != 0 {
            self.raise(0);
        }
    }
}

fn byte(register: u32) -> u8 {
    u8::try_from(register & 0xff).unwrap_or(0)
}
