//! Interrupt lines of devices.

use std::sync::Arc;

use kvm_ioctls::VmFd;
use vm_superio::Trigger;

/// Pulses an interrupt line. By ioctl rather than through an irqfd: KVM takes an
/// irqfd's signal in a worker of its own, which may run after the interrupt
/// controllers were saved, and the interrupt would be lost.
pub(super) struct IrqLine {
    vm: Arc<VmFd>,
    gsi: u32,
}

impl IrqLine {
    /// The line of this number.
    pub fn new(vm: &Arc<VmFd>, gsi: u32) -> Self {
        Self {
            vm: vm.clone(),
            gsi,
        }
    }
}

impl Trigger for IrqLine {
    type E = kvm_ioctls::Error;

    fn trigger(&self) -> Result<(), Self::E> {
        self.vm.set_irq_line(self.gsi, true)?;
        self.vm.set_irq_line(self.gsi, false)
    }
}
