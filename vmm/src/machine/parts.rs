//! The parts of a machine, made in the order that KVM wants.

use std::sync::Arc;

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use crate::addresses::{KVM_IDENTITY_MAP, KVM_TSS};
use crate::error::{Error, KvmContext as _, Result};
use crate::machine::vcpu_signal::VcpuSignal;
use crate::memory::{GuestMemory, HostSlot};
use crate::state::MAX_CPUS;

/// The parts of a machine before they are given state.
pub(super) struct Parts {
    pub kvm: Kvm,
    pub vm: Arc<VmFd>,
    pub vcpus: Vec<VcpuFd>,
    pub signals: Vec<VcpuSignal>,
    pub memory: GuestMemory,
}

impl Parts {
    /// A VM with these vCPUs and this memory.
    ///
    /// # Errors
    /// No KVM, an old one, an impossible number of vCPUs, or what KVM refuses.
    pub fn create(memory: GuestMemory, cpus: u32) -> Result<Self> {
        if cpus == 0 || cpus > MAX_CPUS {
            return Err(Error::Cpus {
                cpus,
                limit: MAX_CPUS,
            });
        }
        let kvm = Kvm::new().map_err(|errno| Error::NoKvm {
            source: std::io::Error::from_raw_os_error(errno.errno()),
        })?;
        check_capabilities(&kvm)?;
        let vm = create_vm(&kvm)?;
        vm.set_identity_map_address(KVM_IDENTITY_MAP)
            .kvm("place its identity map")?;
        vm.set_tss_address(KVM_TSS).kvm("place its TSS")?;
        // Before the interrupt controllers and the timer: since Linux 6.18 KVM forgets its old
        // list of devices later (call_srcu), and a slot that is set after them waits for that,
        // a tick of the kernel's timer and more.
        for (number, slot) in (0..).zip(memory.host_slots()) {
            set_slot(&vm, number, &slot)?;
        }
        // Before the vCPUs, which get their local APICs with it.
        vm.create_irq_chip()
            .kvm("create the interrupt controllers")?;
        vm.create_pit2(kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        })
        .kvm("create the timer")?;
        let shared_bytes = kvm
            .get_vcpu_mmap_size()
            .kvm("tell the size of a vCPU's page")?;
        let mut vcpus = Vec::new();
        let mut signals = Vec::new();
        for cpu in 0..cpus {
            let mut vcpu = vm.create_vcpu(cpu.into()).kvm("create a vCPU")?;
            signals.push(VcpuSignal::new(&mut vcpu, shared_bytes)?);
            vcpus.push(vcpu);
        }
        Ok(Self {
            kvm,
            vm: Arc::new(vm),
            vcpus,
            signals,
            memory,
        })
    }
}

fn check_capabilities(kvm: &Kvm) -> Result<()> {
    let needed = [
        (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
        (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
        (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
        (Cap::PitState2, "KVM_CAP_PIT_STATE2"),
        (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
        (Cap::MpState, "KVM_CAP_MP_STATE"),
        (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    ];
    for (capability, name) in needed {
        if !kvm.check_extension(capability) {
            return Err(Error::Capability { name });
        }
    }
    Ok(())
}

/// `KVM_CREATE_VM` fails with EINTR when a signal arrives meanwhile.
fn create_vm(kvm: &Kvm) -> Result<VmFd> {
    loop {
        match kvm.create_vm() {
            Err(errno) if errno.errno() == libc::EINTR => {}
            other => return other.kvm("create a VM"),
        }
    }
}

fn set_slot(vm: &VmFd, number: u32, slot: &HostSlot) -> Result<()> {
    let region = kvm_userspace_memory_region {
        slot: number,
        flags: 0,
        guest_phys_addr: slot.guest_address,
        memory_size: slot.length,
        userspace_addr: slot.host_address,
    };
    // SAFETY: the range is a mapping of the guest's memory, which the machine
    // keeps for as long as it keeps the VM.
    unsafe { vm.set_user_memory_region(region) }.kvm("take a memory slot")
}
