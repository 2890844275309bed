//! What KVM holds for all vCPUs together: interrupt controllers, timer, clock.

use std::fmt;
use std::time::SystemTime;

use kvm_bindings::{
    KVM_CLOCK_REALTIME, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    kvm_clock_data, kvm_irqchip, kvm_pit_state2,
};
use kvm_ioctls::VmFd;

use super::StateError;
use crate::Result;
use crate::error::KvmContext;

/// What KVM holds for all vCPUs together.
#[derive(Clone)]
pub struct VmState {
    /// The first 8259 interrupt controller.
    pub pic_master: kvm_irqchip,
    /// The second 8259.
    pub pic_slave: kvm_irqchip,
    /// The I/O APIC.
    pub ioapic: kvm_irqchip,
    /// The 8254 timer and the speaker port.
    pub pit: kvm_pit_state2,
    /// The guest's kvmclock in nanoseconds.
    pub clock_nanos: u64,
}

impl VmState {
    /// Reads the state. The vCPUs must be stopped, the devices silent.
    ///
    /// To be called before the vCPUs are saved: the timer runs on, and an
    /// interrupt of its that goes from the I/O APIC to a vCPU's local APIC in
    /// between is then saved there. The other way round it would be in neither.
    ///
    /// # Errors
    /// KVM refuses; among others if the machine has no interrupt controllers.
    pub fn save(vm: &VmFd) -> Result<Self> {
        let chip = |chip_id| -> Result<kvm_irqchip> {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            vm.get_irqchip(&mut chip)
                .kvm("read an interrupt controller")?;
            Ok(chip)
        };
        // The timer before the controllers: a tick in between is then pending in
        // the controllers, and not lost.
        let pit = vm.get_pit2().kvm("read the timer")?;
        Ok(Self {
            pic_master: chip(KVM_IRQCHIP_PIC_MASTER)?,
            pic_slave: chip(KVM_IRQCHIP_PIC_SLAVE)?,
            ioapic: chip(KVM_IRQCHIP_IOAPIC)?,
            pit,
            clock_nanos: Self::clock(vm)?,
        })
    }

    /// Writes the state into a new machine, after all vCPUs were restored: the
    /// I/O APIC hands pending interrupts to the local APICs at once, and what
    /// `KVM_SET_LAPIC` overwrote would be lost.
    ///
    /// The guest's clock goes on where it stood. It does not jump by the time
    /// since the snapshot (`KVM_CLOCK_REALTIME` with the snapshot's time would make it so): a monotonic
    /// clock that jumps by hours fires every timeout in the guest. The guest's
    /// wall clock is therefore behind until it is set.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn restore(&self, vm: &VmFd) -> Result<()> {
        for chip in [&self.pic_master, &self.pic_slave, &self.ioapic] {
            vm.set_irqchip(chip).kvm("take an interrupt controller")?;
        }
        // After the controllers: the timer runs from here on, and a tick before
        // would meet controllers that have it masked.
        vm.set_pit2(&self.pit).kvm("take the timer")?;
        // Last, and after the vCPUs' TSCs: KVM reckons the clock from the TSC.
        Self::set_clock(vm, self.clock_nanos, false)
    }

    /// The guest's kvmclock in nanoseconds.
    pub(crate) fn clock(vm: &VmFd) -> Result<u64> {
        Ok(vm.get_clock().kvm("read the clock")?.clock)
    }

    /// Lets the guest's kvmclock go on from there. Where KVM takes it `as_of` this
    /// moment, the time until it has it is not lost to the guest.
    pub(crate) fn set_clock(vm: &VmFd, nanos: u64, as_of: bool) -> Result<()> {
        let mut clock = kvm_clock_data {
            clock: nanos,
            ..Default::default()
        };
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        if let (true, Ok(now)) = (as_of, now) {
            clock.flags = KVM_CLOCK_REALTIME;
            clock.realtime = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
        }
        vm.set_clock(&clock).kvm("take the clock")
    }

    /// Refuses controllers in the wrong places, which KVM would take for others.
    pub(super) fn validate(&self) -> Result<(), StateError> {
        let chips = [
            (KVM_IRQCHIP_PIC_MASTER, &self.pic_master),
            (KVM_IRQCHIP_PIC_SLAVE, &self.pic_slave),
            (KVM_IRQCHIP_IOAPIC, &self.ioapic),
        ];
        match chips
            .into_iter()
            .find(|(index, chip)| chip.chip_id != *index)
        {
            Some((index, chip)) => Err(StateError::InterruptController {
                index,
                found: chip.chip_id,
            }),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for VmState {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The controllers are unions, which have no Debug.
        formatter
            .debug_struct("VmState")
            .field("pit", &self.pit)
            .field("clock_nanos", &self.clock_nanos)
            .finish_non_exhaustive()
    }
}
