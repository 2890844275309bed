//! A virtual machine: made paused, run, paused, saved, frozen for a commit.
//!
//! A machine is built in one order, whether it boots or is restored: memory,
//! the VM with its interrupt controllers and timer, the memory's slots, the
//! vCPUs, the devices; then state; then one thread a vCPU, waiting at the gate.

mod freeze;
mod gate;
mod kick;
mod parts;
mod power_on;
mod precopy;
mod vcpu;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_MP_STATE_HALTED, KVM_MP_STATE_UNINITIALIZED};
use kvm_ioctls::{VcpuFd, VmFd};

use crate::acpi::AcpiDevices;
use crate::addresses::VM_GENERATION;
use crate::confine::{self, Role};
use crate::devices::virtio::{self, Network, VirtioDevice};
use crate::devices::{Console, Devices, lock_until};
pub use crate::ending::Ending;
use crate::error::{Error, OsContext as _, Result};
use crate::generation;
use crate::loader::Kernel;
use crate::memory::{GuestMemory, Tracker};
use crate::state::{Baseline, HostFacts, MachineState, VcpuState, VmState, announce_stop};
pub use freeze::{Freeze, FreezeOptions, FreezeTimings, FrozenMemory};
use gate::{Closing, Gate, Next};
use parts::Parts;
use power_on::{mask_pics, power_on};
pub use precopy::LiveMemory;
use precopy::SinceRound;

/// The interrupt flag of RFLAGS.
const INTERRUPTS_ON: u64 = 1 << 9;

/// How long a machine may take to stop: as long as the longest request of a device, or
/// as a page of the snapshot that a vCPU waits for.
const PAUSE_PATIENCE: Duration = Duration::from_secs(3);
/// How long a guest that does nothing may take to stop for a look at it.
const LOOK_PATIENCE: Duration = Duration::from_millis(20);
/// A guest that has slept for so long is looked at, whether it will ever wake.
const LONG_SLEEP: Duration = Duration::from_millis(500);

/// How long the parts of building a machine took.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct BuildTimings {
    /// Creating the VM, its vCPUs and memory slots.
    pub create: Duration,
    /// Loading the saved state, or the kernel.
    pub load: Duration,
}

/// A virtual machine of this process.
pub struct Machine {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// Serialises pausing, resuming and freezing.
    control: Mutex<Control>,
    timings: BuildTimings,
}

/// A machine that has all it needs, and no thread yet: the process that has it can
/// still be confined.
pub struct Assembled(Machine);

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
    sleep: Sleep,
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
            sleep: Sleep::default(),
        }
    }
}

/// What is known of a guest that sleeps.
#[derive(Default)]
struct Sleep {
    /// How often its vCPUs' threads have gone to sleep, and when that was seen first.
    seen: Option<(Vec<u64>, Instant)>,
    /// Nothing but a reset would wake it.
    is_halted: bool,
}

/// What the vCPUs' threads share. The gate's kicks point into the vCPUs.
struct Shared {
    gate: Gate,
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

impl Assembled {
    /// A machine about to boot a kernel, with these virtio devices; it is paused. Its
    /// guest is told of a CPU as in the baseline.
    ///
    /// # Errors
    /// No KVM, a kernel that does not fit, a host that has less than the baseline, or what
    /// KVM refuses.
    pub fn boot(
        memory: GuestMemory,
        (cpus, baseline): (u32, &Baseline),
        kernel: &Kernel,
        console: &Arc<Console>,
        virtio_devices: Vec<Box<dyn VirtioDevice>>,
    ) -> Result<Self> {
        let began = Instant::now();
        let parts = Parts::create(memory, cpus)?;
        let created = Instant::now();
        let acpi = AcpiDevices {
            cpus,
            virtio_mmio: virtio::windows(virtio_devices.len()),
            vm_generation: Some(VM_GENERATION),
        };
        let entry = kernel.load(&parts.memory, &acpi)?;
        let facts = HostFacts::new(&parts.kvm, &parts.vm)?;
        let layout = parts.memory.layout();
        let ends = layout
            .slots()
            .iter()
            .map(|slot| slot.guest_address + slot.length);
        let offered = facts.limited_cpuid(baseline, ends.max().unwrap_or(0), &parts.vcpus[0])?;
        for (cpu, vcpu) in (0..).zip(&parts.vcpus) {
            power_on(vcpu, &offered, entry, (cpu, cpus), layout)?;
        }
        if entry.is_linux() {
            mask_pics(&parts.vm)?;
        }
        let devices = Devices::new(&parts.vm, console, &parts.memory, virtio_devices)?;
        let loaded = Instant::now();
        let timings = BuildTimings {
            create: created - began,
            load: loaded - created,
        };
        let vm_generation = acpi.vm_generation.filter(|_| entry.is_linux());
        Machine::assembled(
            (parts, devices),
            facts,
            (vm_generation, None),
            (timings, loaded),
        )
    }

    /// A machine as it was when its state was saved, over a memory of that
    /// moment, with the same virtio devices; it is paused. A guest that knows of a VM
    /// generation identifier has another one, and is told so.
    ///
    /// # Errors
    /// No KVM, a memory of another size, other virtio devices, a host that lacks
    /// a CPU feature which the guest knows of, or what KVM refuses.
    pub fn restore(
        state: &MachineState,
        memory: GuestMemory,
        console: &Arc<Console>,
        virtio_devices: Vec<Box<dyn VirtioDevice>>,
    ) -> Result<Self> {
        let began = Instant::now();
        let expected = state.memory_bytes;
        let found = memory.layout().size_bytes();
        if found != expected {
            return Err(Error::ImageLength { found, expected });
        }
        let cpus = u32::try_from(state.vcpus.len()).unwrap_or(u32::MAX);
        let parts = Parts::create(memory, cpus)?;
        let created = Instant::now();
        let facts = HostFacts::new(&parts.kvm, &parts.vm)?;
        state.check_host(&facts, &parts.vcpus[0])?;
        for (saved, vcpu) in state.vcpus.iter().zip(&parts.vcpus) {
            saved.restore(vcpu, &facts)?;
        }
        state.vm.restore(&parts.vm)?;
        // After the interrupt controllers, which virtio devices interrupt.
        let devices = Devices::from_state(
            &parts.vm,
            console,
            &parts.memory,
            virtio_devices,
            &state.devices,
        )?;
        if let Some(address) = state.vm_generation {
            generation::renew(address, &parts.memory)?;
            generation::announce(&parts.vm)?;
        }
        let loaded = Instant::now();
        let timings = BuildTimings {
            create: created - began,
            load: loaded - created,
        };
        Machine::assembled(
            (parts, devices),
            facts,
            (state.vm_generation, Some(state.vm.clock_nanos)),
            (timings, loaded),
        )
    }

    /// The machine with its threads, in which nothing runs yet.
    ///
    /// # Errors
    /// The operating system has no room for a thread.
    pub fn start(self) -> Result<Machine> {
        let Self(mut machine) = self;
        machine.start_threads()?;
        Ok(machine)
    }

    /// How many vCPUs it has.
    #[must_use]
    pub fn cpus(&self) -> usize {
        self.0.cpus()
    }

    /// The largest of its disks, in bytes; an overlay may take twice as much.
    #[must_use]
    pub fn largest_disk_bytes(&self) -> u64 {
        let disks = self.0.disks();
        disks
            .iter()
            .map(virtio::Disk::size_bytes)
            .max()
            .unwrap_or(0)
    }

    /// The length of its memory, in bytes.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.0.memory().layout().size_bytes()
    }
}

impl Machine {
    /// [`Assembled::boot`] on all that the host has, with its threads.
    ///
    /// # Errors
    /// As there, and no room for a thread.
    pub fn boot(
        memory: GuestMemory,
        cpus: u32,
        kernel: &Kernel,
        console: &Arc<Console>,
        virtio_devices: Vec<Box<dyn VirtioDevice>>,
    ) -> Result<Self> {
        let cpus = (cpus, &Baseline::default());
        Assembled::boot(memory, cpus, kernel, console, virtio_devices)?.start()
    }

    /// [`Assembled::restore`], with its threads.
    ///
    /// # Errors
    /// As there, and no room for a thread.
    pub fn restore(
        state: &MachineState,
        memory: GuestMemory,
        console: &Arc<Console>,
        virtio_devices: Vec<Box<dyn VirtioDevice>>,
    ) -> Result<Self> {
        Assembled::restore(state, memory, console, virtio_devices)?.start()
    }

    fn assembled(
        (parts, devices): (Parts, Devices),
        facts: HostFacts,
        (vm_generation, clock): (Option<u64>, Option<u64>),
        (timings, built): (BuildTimings, Instant),
    ) -> Result<Assembled> {
        kick::install_handler()?;
        let shared = Arc::new(Shared {
            gate: Gate::new(parts.kicks, devices.host().clone()),
            vcpus: parts.vcpus.into_iter().map(Mutex::new).collect(),
            devices,
            vm: parts.vm,
            facts,
            memory: parts.memory,
            vm_generation,
            first_entry_nanos: AtomicU64::new(0),
            built,
        });
        Ok(Assembled(Self {
            shared,
            threads: Vec::new(),
            control: Mutex::new(Control::new(clock)),
            timings,
        }))
    }

    /// Starts the threads of the vCPUs, which wait, and those of devices.
    fn start_threads(&mut self) -> Result<()> {
        self.shared.devices.start_threads();
        for cpu in 0..self.cpus() {
            let shared = self.shared.clone();
            let thread = std::thread::Builder::new()
                .name(format!("vcpu {cpu}"))
                .stack_size(VCPU_STACK_BYTES)
                .spawn(move || shared.vcpu_thread(cpu))
                .os("start a vCPU's thread")?;
            self.threads.push(thread);
        }
        Ok(())
    }

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
            // It stopped by itself, and its vCPUs may still be on their way out.
            self.close_gate(deadline)?;
            self.shared.devices.host().mended();
        }
        self.open_gate(&mut control)
    }

    fn open_gate(&self, control: &mut Control) -> Result<()> {
        let shared = &self.shared;
        if !shared.gate.is_open() {
            for vcpu in &shared.vcpus {
                announce_stop(&lock(vcpu))?;
            }
            shared.devices.host().set_closing(false);
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
        if shared.gate.open() {
            return Ok(());
        }
        Err(Error::Ended(shared.gate.wait_for_end()))
    }

    /// Stops the guest and returns once every vCPU is out of it. Its clock stops, too.
    ///
    /// # Errors
    /// The machine has ended; or it does not stop in time and goes on
    /// ([`Error::DoesNotStop`]).
    pub fn pause(&self) -> Result<()> {
        let deadline = Instant::now() + PAUSE_PATIENCE;
        let mut control = self.control(deadline)?;
        self.close_gate(deadline)?;
        self.shared.gate.stay_closed();
        if control.clock.is_none() {
            control.clock = Some(VmState::clock(&self.shared.vm)?);
        }
        Ok(())
    }

    /// Returns whether the guest ran.
    fn close_gate(&self, deadline: Instant) -> Result<bool> {
        let shared = &self.shared;
        match shared.gate.close(deadline) {
            Closing::Closed { was_open } if shared.devices.quiesce(deadline) => Ok(was_open),
            Closing::Closed { was_open } => {
                // The thread of a device hangs. The guest goes on as it was.
                if was_open && !shared.gate.stands_at_ready() && !shared.devices.host().has_fault()
                {
                    shared.devices.host().set_closing(false);
                    shared.devices.catch_up();
                    shared.gate.open();
                }
                Err(Error::DoesNotStop)
            }
            Closing::Ended => Err(Error::Ended(shared.gate.wait_for_end())),
            Closing::Late => {
                if shared.gate.is_open() {
                    shared.devices.catch_up();
                }
                Err(Error::DoesNotStop)
            }
        }
    }

    /// After a pause that the guest's owner did not ask for: the guest goes on as it
    /// was, but for one that stands still because it is ready, or for a fault of the
    /// host's.
    fn reopen_gate(&self, control: &mut Control, was_open: bool) -> Result<()> {
        let shared = &self.shared;
        if was_open && !shared.gate.stands_at_ready() && !shared.devices.host().has_fault() {
            return self.open_gate(control);
        }
        Ok(())
    }

    /// From here on the guest is paused when it first says that it is ready, by a
    /// byte to port 0x620, at that instruction.
    pub fn stop_at_ready(&self) {
        self.shared.gate.stop_at_ready();
    }

    /// Nobody waits for the guest to be ready any more: it will not be paused then,
    /// and goes on if it was, unless someone has paused it besides.
    ///
    /// # Errors
    /// The machine has ended.
    pub fn pass_ready(&self) -> Result<()> {
        let mut control = self.control(Instant::now() + PAUSE_PATIENCE)?;
        if self.shared.gate.pass_ready() {
            return self.open_gate(&mut control);
        }
        Ok(())
    }

    /// Waits until the guest has said that it is ready.
    ///
    /// # Errors
    /// The machine ended first.
    pub fn wait_until_ready(&self) -> Result<()> {
        if self.shared.gate.wait_until_ready() {
            return Ok(());
        }
        Err(Error::Ended(self.shared.gate.wait_for_end()))
    }

    /// Waits until the guest may run. Returns whether it may, and the machine has not ended.
    #[must_use]
    pub fn wait_until_running(&self) -> bool {
        self.shared.gate.wait_until_open()
    }

    /// Whether the guest may run.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.shared.gate.is_open()
    }

    /// Why the host keeps the guest from running: what it could not do for a device.
    #[must_use]
    pub fn host_fault(&self) -> Option<String> {
        self.shared.devices.host().fault()
    }

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
        let sleeps = self.shared.gate.sleeps();
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
        let Ok(was_open) = self.close_gate(now + LOOK_PATIENCE) else {
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
        let _ = self.reopen_gate(&mut control, was_open);
        control.sleep.is_halted = halted;
        halted
    }

    /// Why the machine ended, if it has.
    #[must_use]
    pub fn ending(&self) -> Option<Ending> {
        self.shared.gate.ending()
    }

    /// Ends the machine.
    pub fn stop(&self) {
        self.shared.gate.end(Ending::Stopped);
    }

    /// Ends the machine, since its guest would share its randomness with others.
    pub fn end_not_reseeded(&self, reason: String) {
        self.shared.gate.end(Ending::NotReseeded { reason });
    }

    /// Whether every vCPU is out of the guest.
    #[must_use]
    pub fn is_out_of_guest(&self) -> bool {
        self.shared.gate.all_wait()
    }

    /// Waits until the machine has ended, by itself or by [`Machine::stop`].
    #[must_use]
    pub fn wait(&self) -> Ending {
        self.shared.gate.wait_for_end()
    }

    /// The state of a paused machine, besides its memory.
    ///
    /// # Errors
    /// It is not paused, or has ended, or KVM refuses.
    pub fn save(&self) -> Result<MachineState> {
        let deadline = Instant::now() + PAUSE_PATIENCE;
        let control = self.control(deadline)?;
        if self.shared.gate.is_open() {
            return Err(Error::NotPaused);
        }
        // One that stopped by itself may have vCPUs on their way out of the guest.
        self.close_gate(deadline)?;
        self.save_paused(&control)
    }

    fn save_paused(&self, control: &Control) -> Result<MachineState> {
        if self.shared.gate.is_open() {
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
        self.shared.gate.wait_for_end();
        if !self.shared.gate.all_wait() {
            // One hangs in guest memory that nobody gives. It ends with the process.
            return;
        }
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}

/// Enough for the exit handlers; a process has as many as vCPUs.
const VCPU_STACK_BYTES: usize = 256 << 10;

impl Shared {
    fn vcpu_thread(&self, cpu: usize) {
        confine::enter(Role::Vcpu);
        while self.gate.wait_to_enter(cpu) == Next::Run {
            if self.first_entry_nanos.load(Ordering::Relaxed) == 0 {
                let nanos = u64::try_from(self.built.elapsed().as_nanos()).unwrap_or(u64::MAX);
                self.first_entry_nanos
                    .store(nanos.max(1), Ordering::Release);
            }
            let ran = vcpu::run_guest(
                &mut lock(&self.vcpus[cpu]),
                &self.gate,
                &self.devices,
                self.memory.layout(),
            );
            if let Err(ending) = ran {
                self.gate.end(ending);
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
