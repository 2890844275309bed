//! A machine of nothing but KVM and memory.

use kvm_bindings::{kvm_pit_config, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use snapstore_vmm::state::{DeviceState, HostFacts, MachineState, VcpuState, VmState};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const MEMORY_BYTES: usize = 4 << 20;

pub struct Machine {
    pub vcpus: Vec<VcpuFd>,
    pub vm: VmFd,
    pub host: HostFacts,
    pub memory: GuestMemoryMmap,
    pub kvm: Kvm,
}

impl Machine {
    /// A machine as it is before its vCPUs are set up.
    pub fn bare(cpus: u64) -> Option<Self> {
        let kvm = match Kvm::new() {
            Ok(kvm) => kvm,
            Err(error) => {
                // A test's thread has its name.
                let test = std::thread::current();
                println!(
                    "SKIPPED {}: /dev/kvm: {error}",
                    test.name().unwrap_or("vmm")
                );
                return None;
            }
        };
        let vm = kvm.create_vm().unwrap();
        vm.create_irq_chip().unwrap();
        vm.create_pit2(kvm_pit_config::default()).unwrap();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).unwrap();
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: MEMORY_BYTES as u64,
            userspace_addr: memory.get_host_address(GuestAddress(0)).unwrap() as u64,
        };
        // SAFETY: the memory is mapped as long as the machine lives.
        unsafe { vm.set_user_memory_region(region) }.unwrap();
        let host = HostFacts::new(&kvm, &vm).unwrap();
        let vcpus = (0..cpus).map(|id| vm.create_vcpu(id).unwrap()).collect();
        Some(Self {
            vcpus,
            vm,
            host,
            memory,
            kvm,
        })
    }

    /// A machine whose vCPUs know what they are.
    pub fn new(cpus: u32) -> Option<Self> {
        let machine = Self::bare(cpus.into())?;
        for (id, vcpu) in (0..).zip(&machine.vcpus) {
            vcpu.set_cpuid2(&machine.host.guest_cpuid(id, cpus).unwrap())
                .unwrap();
        }
        Some(machine)
    }

    pub fn save(&self) -> MachineState {
        let vm = VmState::save(&self.vm).unwrap();
        let vcpus = self.vcpus.iter();
        MachineState {
            memory_bytes: MEMORY_BYTES as u64,
            vm,
            devices: DeviceState::default(),
            vm_generation: None,
            vcpus: vcpus
                .map(|vcpu| VcpuState::save(vcpu, &self.host).unwrap())
                .collect(),
        }
    }

    pub fn restore(&self, state: &MachineState) -> snapstore_vmm::Result<()> {
        state.check_host(&self.host, &self.vcpus[0])?;
        for (saved, vcpu) in state.vcpus.iter().zip(&self.vcpus) {
            saved.restore(vcpu, &self.host)?;
        }
        state.vm.restore(&self.vm)
    }
}
