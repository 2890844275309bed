//! Whether a guest that sleeps will ever wake.

use std::time::{Duration, Instant};

use kvm_bindings::{KVM_MP_STATE_HALTED, KVM_MP_STATE_UNINITIALIZED};

use crate::devices::lock_until;
use crate::machine::{Machine, lock};

/// The interrupt flag of RFLAGS.
const INTERRUPTS_ON: u64 = 1 << 9;

/// How long a guest that does nothing may take to stop for a look at it.
const LOOK_PATIENCE: Duration = Duration::from_millis(20);
/// A guest that has slept for so long is looked at, whether it will ever wake.
const LONG_SLEEP: Duration = Duration::from_millis(500);

impl Machine {
    /// Whether every vCPU waits for an interrupt with interrupts off, from which
    /// nothing but a reset would wake it, or was never started. Only a guest that did
    /// not stir for a while is looked at, which stops it for a moment; what was found
    /// stays so until someone lets it run anew.
    #[must_use]
    pub fn is_halted(&self) -> bool {
        let now = Instant::now();
        let Some(mut control) = lock_until(&self.control, now) else {
            // Someone is at it, and perhaps for long.
            return false;
        };
        if control.sleep.is_halted {
            return true;
        }
        let sleeps = self.shared.run_control.sleeps();
        let slept_on = match (&sleeps, &control.sleep.seen) {
            (Some(now), Some((before, since))) if now == before => since.elapsed() >= LONG_SLEEP,
            _ => {
                control.sleep.seen = sleeps.map(|sleeps| (sleeps, now));
                false
            }
        };
        if !slept_on {
            return false;
        }
        control.sleep.seen = None;
        let Ok(was_running) = self.stop_vcpus(now + LOOK_PATIENCE) else {
            return false;
        };
        let halted = self.shared.vcpus.iter().all(|vcpu| {
            let vcpu = lock(vcpu);
            match vcpu.get_mp_state().map(|state| state.mp_state) {
                Ok(KVM_MP_STATE_HALTED) => vcpu
                    .get_regs()
                    .is_ok_and(|regs| regs.rflags & INTERRUPTS_ON == 0),
                Ok(KVM_MP_STATE_UNINITIALIZED) => true,
                _ => false,
            }
        });
        // If this fails the machine has ended, which its owner will see.
        let _ = self.let_run_again(&mut control, was_running);
        control.sleep.is_halted = halted;
        halted
    }
}
