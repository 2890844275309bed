//! Building a machine, in one order whether it boots or is restored: memory, the VM with
//! its memory slots, its interrupt controllers and timer, the vCPUs, the devices; then
//! state; then one thread a vCPU, paused.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::acpi::AcpiDevices;
use crate::addresses::VM_GENERATION;
use crate::devices::virtio::{self, VirtioDevice};
use crate::devices::{Console, Devices};
use crate::error::{Error, OsContext as _, Result};
use crate::generation;
use crate::loader::Kernel;
use crate::machine::parts::Parts;
use crate::machine::power_on::{mask_pics, power_on};
use crate::machine::run_control::RunControl;
use crate::machine::{Control, Machine, Shared, vcpu_signal};
use crate::memory::GuestMemory;
use crate::state::{Baseline, HostFacts, MachineState};

/// Enough for the exit handlers; a process has as many as vCPUs.
const VCPU_STACK_BYTES: usize = 256 << 10;

/// How long the parts of building a machine took.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct BuildTimings {
    /// Creating the VM, its vCPUs and memory slots.
    pub create: Duration,
    /// Loading the saved state, or the kernel.
    pub load: Duration,
}

/// A machine that has all it needs, and no thread yet: the process that has it can
/// still be confined.
pub struct Assembled(Machine);

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

    /// The largest of its disks, in bytes; an overlay may take as much for each of its layers.
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
        vcpu_signal::install_handler()?;
        let shared = Arc::new(Shared {
            run_control: RunControl::new(parts.signals, devices.host().clone()),
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
}
