//! Letting a guest run and stopping it, on request or because it is ready.

use std::time::Instant;

use crate::error::{Error, Result};
use crate::machine::Sleep;
use crate::machine::run_control::Pausing;
use crate::machine::{Control, LONG_PAUSE, Machine, PAUSE_PATIENCE, lock};
use crate::state::{VmState, announce_stop};

impl Machine {
    /// Lets the guest run. Its clock goes on where it stood when it was paused.
    ///
    /// # Errors
    /// The machine has ended; it is still about to stop; or the host cannot do yet what
    /// the guest had asked of a device ([`Error::HostFailed`]), and the guest stays
    /// stopped.
    pub fn resume(&self) -> Result<()> {
        let deadline = Instant::now() + PAUSE_PATIENCE;
        let mut control = self.control(deadline)?;
        if self.shared.devices.host().has_fault() {
            self.stop_vcpus(deadline)?;
            self.shared.devices.host().mended();
        }
        self.let_run(&mut control, Some(deadline))
    }

    /// Without a deadline the vCPUs of a guest that does not run are out of it. With one it
    /// may have stopped by itself, and they be on their way out, or hang in a page that nobody
    /// gives.
    pub(super) fn let_run(&self, control: &mut Control, deadline: Option<Instant>) -> Result<()> {
        let shared = &self.shared;
        if !shared.run_control.is_running() {
            if let Some(deadline) = deadline {
                self.stop_vcpus(deadline)?;
            }
            for vcpu in &shared.vcpus {
                announce_stop(&lock(vcpu))?;
            }
            shared.devices.host().set_pausing(false);
            shared.devices.resume();
            if let Some(what) = shared.devices.host().fault() {
                shared.devices.quiesce(Instant::now() + PAUSE_PATIENCE);
                return Err(Error::HostFailed { what });
            }
            if let Some(nanos) = control.clock.take() {
                VmState::set_clock(&shared.vm, nanos, shared.facts.sets_clock_as_of)?;
            }
            control.sleep = Sleep::default();
        }
        if shared.run_control.run() {
            let paused = control.paused_since.take();
            if paused.is_some_and(|since| since.elapsed() >= LONG_PAUSE) {
                shared.run_control.long_pause_is_over();
            }
            return Ok(());
        }
        Err(Error::Ended(shared.run_control.wait_for_end()))
    }

    /// Stops the guest and returns once every vCPU is out of it. Its clock stops, too.
    ///
    /// # Errors
    /// The machine has ended; or it does not stop in time and goes on
    /// ([`Error::DoesNotStop`]).
    pub fn pause(&self) -> Result<()> {
        let deadline = Instant::now() + PAUSE_PATIENCE;
        let mut control = self.control(deadline)?;
        self.stop_vcpus(deadline)?;
        self.shared.run_control.stay_paused();
        if control.clock.is_none() {
            control.clock = Some(VmState::clock(&self.shared.vm)?);
            control.paused_since = Some(Instant::now());
        }
        Ok(())
    }

    /// Returns whether the guest ran.
    pub(super) fn stop_vcpus(&self, deadline: Instant) -> Result<bool> {
        let shared = &self.shared;
        match shared.run_control.pause(deadline) {
            Pausing::Paused { was_running } if shared.devices.quiesce(deadline) => Ok(was_running),
            Pausing::Paused { was_running } => {
                // The thread of a device hangs. The guest goes on as it was.
                if was_running
                    && !shared.run_control.paused_at_ready()
                    && !shared.devices.host().has_fault()
                {
                    shared.devices.host().set_pausing(false);
                    shared.devices.catch_up();
                    shared.run_control.run();
                }
                Err(Error::DoesNotStop)
            }
            Pausing::Ended => Err(Error::Ended(shared.run_control.wait_for_end())),
            Pausing::Late => {
                if shared.run_control.is_running() {
                    shared.devices.catch_up();
                }
                Err(Error::DoesNotStop)
            }
        }
    }

    /// After a pause that the guest's owner did not ask for: the guest goes on as it
    /// was, but for one that stands still because it is ready, or for a fault of the
    /// host's.
    pub(super) fn let_run_again(&self, control: &mut Control, was_running: bool) -> Result<()> {
        let shared = &self.shared;
        if was_running
            && !shared.run_control.paused_at_ready()
            && !shared.devices.host().has_fault()
        {
            return self.let_run(control, None);
        }
        Ok(())
    }

    /// From here on the guest is paused when it first says that it is ready, by a
    /// byte to port 0x620, at that instruction.
    pub fn stop_at_ready(&self) {
        self.shared.run_control.stop_at_ready();
    }

    /// Nobody waits for the guest to be ready any more: it will not be paused then,
    /// and goes on if it was, unless someone has paused it besides.
    ///
    /// # Errors
    /// The machine has ended; or it stands at ready, but for a vCPU that does not stop.
    pub fn skip_ready(&self) -> Result<()> {
        let deadline = Instant::now() + PAUSE_PATIENCE;
        let mut control = self.control(deadline)?;
        if self.shared.run_control.skip_ready() {
            return self.let_run(&mut control, Some(deadline));
        }
        Ok(())
    }

    /// Waits until the guest has said that it is ready.
    ///
    /// # Errors
    /// The machine ended first.
    pub fn wait_until_ready(&self) -> Result<()> {
        if self.shared.run_control.wait_until_ready() {
            return Ok(());
        }
        Err(Error::Ended(self.shared.run_control.wait_for_end()))
    }

    /// Waits until the guest may run. Returns whether it may, and the machine has not ended.
    #[must_use]
    pub fn wait_until_running(&self) -> bool {
        self.shared.run_control.wait_until_running()
    }

    /// Whether the guest may run.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.shared.run_control.is_running()
    }

    /// Whether the guest was let run at any time.
    #[must_use]
    pub fn has_run(&self) -> bool {
        self.shared.run_control.has_run()
    }

    /// Waits until the guest runs again after more long pauses than these, which its wall
    /// clock does not know of. Returns how many there were; `None` once the machine ends.
    #[must_use]
    pub fn wait_for_long_pause(&self, seen: u64) -> Option<u64> {
        self.shared.run_control.wait_for_long_pause(seen)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::sync::Arc;

    use super::*;
    use crate::memory::{GuestMemory, MemoryLayout};
    use crate::{Console, Kernel};

    /// A machine of two vCPUs, unless there is no KVM.
    fn machine(test: &str) -> Option<Machine> {
        if let Err(error) = File::options().read(true).write(true).open("/dev/kvm") {
            println!("SKIPPED {test}: /dev/kvm: {error}");
            return None;
        }
        let program = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(program.path(), snapstore_guests::HALT).unwrap();
        let memory = GuestMemory::anonymous(MemoryLayout::new(2 << 20).unwrap()).unwrap();
        let kernel = Kernel::Flat(program.path().into());
        let console = Arc::new(Console::new());
        Some(Machine::boot(memory, 2, &kernel, &console, Vec::new()).unwrap())
    }

    #[test]
    fn a_guest_that_stands_at_ready_but_for_a_vcpu_that_hangs_is_given_up() {
        let test = "a_guest_that_stands_at_ready_but_for_a_vcpu_that_hangs_is_given_up";
        let Some(machine) = machine(test) else { return };
        let machine = Arc::new(machine);
        machine.stop_at_ready();
        // As in a page of a server that was stopped.
        let hung = lock(&machine.shared.vcpus[1]);
        machine.shared.run_control.run();
        while machine.is_out_of_guest() {
            std::thread::yield_now();
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
        machine.shared.run_control.guest_is_ready();
        for ask in [Machine::resume, Machine::skip_ready] {
            let (answer, answered) = std::sync::mpsc::channel();
            let asked = machine.clone();
            std::thread::spawn(move || answer.send(ask(&asked)));
            let answer = answered.recv_timeout(PAUSE_PATIENCE * 3).expect("it hangs");
            assert!(matches!(answer, Err(Error::DoesNotStop)), "{answer:?}");
        }
        drop(hung);
        machine.resume().unwrap();
        assert!(machine.is_running());
    }
}
