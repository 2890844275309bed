//! A virtual machine: made paused, run, paused, saved, frozen for a commit.
//!
//! `assemble` builds it; `run_control` says who may run, and each vCPU's thread asks it.

mod assemble;
mod freeze;
mod parts;
mod pausing;
mod power_on;
mod precopy;
mod run_control;
mod save;
mod sleep;
mod vcpu;
mod vcpu_signal;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_ioctls::{VcpuFd, VmFd};

use crate::confine::{self, Role};
use crate::devices::virtio::Network;
use crate::devices::{Devices, lock_until};
pub use crate::ending::Ending;
use crate::error::{Error, Result};
use crate::memory::{GuestMemory, Tracker};
use crate::state::HostFacts;
pub use assemble::{Assembled, BuildTimings};
pub use freeze::{Freeze, FreezeOptions, FreezeTimings, FrozenMemory};
pub use precopy::LiveMemory;
use precopy::SinceRound;
use run_control::{Next, RunControl};

/// How long a machine may take to stop: as long as the longest request of a device, or
/// as a page of the snapshot that a vCPU waits for.
const PAUSE_PATIENCE: Duration = Duration::from_secs(3);

/// A guest that stood still for so long has a wall clock that is wrong for others.
const LONG_PAUSE: Duration = Duration::from_secs(1);

/// A virtual machine of this process.
pub struct Machine {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// Serialises pausing, resuming and freezing.
    control: Mutex<Control>,
    timings: BuildTimings,
}

/// What only one controlling thread at a time may touch.
struct Control {
    /// From the first freeze on, where the kernel can.
    tracker: Option<Tracker>,
    /// Written since the last commit that is known to be durable, beyond what
    /// the tracker knows: image offsets in bytes.
    uncommitted: Vec<std::ops::Range<u64>>,
    /// Of a commit that reads memory before it freezes the machine.
    since_round: Option<SinceRound>,
    /// The number of its last round; numbers are never used again.
    round: u64,
    /// How often the machine was frozen.
    freezes: u64,
    /// Where the guest's clock stands, in nanoseconds, while it is paused on request or
    /// since it was restored.
    clock: Option<u64>,
    /// Since when it is paused on request.
    paused_since: Option<Instant>,
    sleep: Sleep,
}

/// What is known of a guest that sleeps.
#[derive(Default)]
struct Sleep {
    /// How often its vCPUs' threads have gone to sleep, and when that was seen first.
    seen: Option<(Vec<u64>, Instant)>,
    /// Nothing but a reset would wake it.
    is_halted: bool,
}

impl Control {
    fn new(clock: Option<u64>) -> Self {
        Self {
            tracker: None,
            uncommitted: Vec::new(),
            since_round: None,
            round: 0,
            freezes: 0,
            clock,
            paused_since: None,
            sleep: Sleep::default(),
        }
    }
}

/// What the vCPUs' threads share. The signals point into the vCPUs.
struct Shared {
    run_control: RunControl,
    vcpus: Vec<Mutex<VcpuFd>>,
    devices: Devices,
    vm: Arc<VmFd>,
    facts: HostFacts,
    memory: GuestMemory,
    /// Where the guest was told that its VM generation identifier is.
    vm_generation: Option<u64>,
    /// When a vCPU first entered the guest, in nanoseconds after `built`; 0: not
    /// yet.
    first_entry_nanos: AtomicU64,
    built: Instant,
}

impl Machine {
    /// Why the host keeps the guest from running: what it could not do for a device.
    #[must_use]
    pub fn host_fault(&self) -> Option<String> {
        self.shared.devices.host().fault()
    }

    /// Why the machine ended, if it has.
    #[must_use]
    pub fn ending(&self) -> Option<Ending> {
        self.shared.run_control.ending()
    }

    /// Ends the machine.
    pub fn stop(&self) {
        self.shared.run_control.end(Ending::Stopped);
    }

    /// Ends the machine, since its guest would share its randomness with others.
    pub fn end_not_reseeded(&self, reason: String) {
        self.shared.run_control.end(Ending::NotReseeded { reason });
    }

    /// Whether every vCPU is out of the guest.
    #[must_use]
    pub fn is_out_of_guest(&self) -> bool {
        self.shared.run_control.all_wait()
    }

    /// Waits until the machine has ended, by itself or by [`Machine::stop`].
    #[must_use]
    pub fn wait(&self) -> Ending {
        self.shared.run_control.wait_for_end()
    }

    /// Input for the guest's serial port; returns how many bytes were taken.
    pub fn serial_input(&self, bytes: &[u8]) -> usize {
        self.shared.devices.serial_input(bytes)
    }

    /// How many vCPUs it has.
    #[must_use]
    pub fn cpus(&self) -> usize {
        self.shared.vcpus.len()
    }

    /// The guest's memory.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.shared.memory
    }

    /// Its network interfaces.
    #[must_use]
    pub fn networks(&self) -> Vec<Network> {
        self.shared.devices.networks()
    }

    /// How long building it took.
    #[must_use]
    pub fn timings(&self) -> BuildTimings {
        self.timings
    }

    /// The time from the loaded machine to its first entry into the guest.
    #[must_use]
    pub fn first_entry(&self) -> Option<Duration> {
        match self.shared.first_entry_nanos.load(Ordering::Acquire) {
            0 => None,
            nanos => Some(Duration::from_nanos(nanos)),
        }
    }

    /// Whoever has it may wait for the guest, or for a device that hangs.
    fn control(&self, deadline: Instant) -> Result<MutexGuard<'_, Control>> {
        lock_until(&self.control, deadline).ok_or(Error::DoesNotStop)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop();
        self.shared.run_control.wait_for_end();
        if !self.shared.run_control.all_wait() {
            // One hangs in guest memory that nobody gives. It ends with the process.
            return;
        }
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn vcpu_thread(&self, cpu: usize) {
        confine::enter(Role::Vcpu);
        while self.run_control.wait_to_run(cpu) == Next::Run {
            if self.first_entry_nanos.load(Ordering::Relaxed) == 0 {
                let nanos = u64::try_from(self.built.elapsed().as_nanos()).unwrap_or(u64::MAX);
                self.first_entry_nanos
                    .store(nanos.max(1), Ordering::Release);
            }
            let ran = vcpu::run_guest(
                &mut lock(&self.vcpus[cpu]),
                &self.run_control,
                &self.devices,
                &self.memory,
            );
            if let Err(ending) = ran {
                self.run_control.end(ending);
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
