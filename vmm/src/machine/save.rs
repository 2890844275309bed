//! Saving the state of a machine that stands still.

use std::time::Instant;

use crate::error::{Error, Result};
use crate::machine::{Control, Machine, PAUSE_PATIENCE, lock};
use crate::state::{MachineState, VcpuState, VmState};

impl Machine {
    /// The state of a paused machine, besides its memory.
    ///
    /// # Errors
    /// It is not paused, or has ended, or KVM refuses.
    pub fn save(&self) -> Result<MachineState> {
        let deadline = Instant::now() + PAUSE_PATIENCE;
        let control = self.control(deadline)?;
        if self.shared.run_control.is_running() {
            return Err(Error::NotPaused);
        }
        // One that stopped by itself may have vCPUs on their way out of the guest.
        self.stop_vcpus(deadline)?;
        self.save_paused(&control)
    }

    pub(super) fn save_paused(&self, control: &Control) -> Result<MachineState> {
        if self.shared.run_control.is_running() {
            return Err(Error::NotPaused);
        }
        let shared = &self.shared;
        // A request may be half done.
        if let Some(what) = shared.devices.host().fault() {
            return Err(Error::HostFailed { what });
        }
        // The interrupt controllers and the timer first: the timer's ticks reach
        // the vCPUs' local APICs even now, and one between the two is then seen
        // twice and not never.
        let mut vm = VmState::save(&shared.vm)?;
        if let Some(nanos) = control.clock {
            vm.clock_nanos = nanos;
        }
        let vcpus = shared
            .vcpus
            .iter()
            .map(|vcpu| VcpuState::save(&lock(vcpu), &shared.facts))
            .collect::<Result<_>>()?;
        Ok(MachineState {
            memory_bytes: shared.memory.layout().size_bytes(),
            vm,
            devices: shared.devices.state(),
            vm_generation: shared.vm_generation,
            vcpus,
        })
    }
}
