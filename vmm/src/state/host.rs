//! What this host's KVM offers to a machine.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use super::machine::MIN_XSAVE_BYTES;
use super::{MAX_XSAVE_BYTES, StateError, cpu, cpuid, guest_cpuid, msrs};
use crate::Result;
use crate::error::KvmContext;

/// What this host's KVM offers, asked once per machine.
#[derive(Clone, Debug)]
pub struct HostFacts {
    supported: Vec<kvm_cpuid_entry2>,
    pub(super) msr_indices: Vec<u32>,
    pub(super) xsave_bytes: usize,
    pub(super) has_xsave2: bool,
    /// IA32_ARCH_CAPABILITIES as this host has it; none if KVM does not tell.
    pub(super) arch_capabilities: Option<u64>,
}

impl HostFacts {
    /// Asks KVM. No XSAVE feature may be enabled for this process afterwards
    /// (`ARCH_REQ_XCOMP_GUEST_PERM`), since that changes the answers.
    ///
    /// # Errors
    /// KVM refuses, or has no XSAVE; then the CPU is older than virtualisation
    /// that this monitor runs on.
    pub fn new(kvm: &Kvm, vm: &VmFd) -> Result<Self> {
        let mut supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .kvm("list the CPUID it supports")?
            .as_slice()
            .to_vec();
        // KVM tells of the TSC deadline timer by a capability; before Linux 6.14
        // the list lacks it.
        if kvm.check_extension(Cap::TscDeadlineTimer) {
            cpuid::offer_tsc_deadline(&mut supported);
        }
        cpuid::leave_out_all(&mut supported);
        let listed = kvm.get_msr_index_list().kvm("list the MSRs it keeps")?;
        let (xsave_bytes, has_xsave2) = xsave_size(vm)?;
        Ok(Self {
            supported,
            msr_indices: msrs::indices(listed.as_slice()),
            xsave_bytes,
            has_xsave2,
            arch_capabilities: msrs::host_arch_capabilities(kvm),
        })
    }

    /// The CPUID that a guest can be given on this host: what KVM supports, but for what
    /// is never offered ([`guest_cpuid`]).
    pub fn supported_cpuid(&self) -> &[kvm_cpuid_entry2] {
        &self.supported
    }

    /// The CPUID that a vCPU has after it was given all that KVM lists. Equal to
    /// the list where KVM uses the CPU's virtualisation; a KVM that emulates can
    /// give a vCPU more. The vCPU has never run, and is given its own CPUID
    /// afterwards.
    ///
    /// # Errors
    /// KVM refuses.
    pub(super) fn given_cpuid(&self, vcpu: &VcpuFd) -> Result<Vec<kvm_cpuid_entry2>> {
        let listed = CpuId::from_entries(&self.supported).expect("KVM made a list as long");
        vcpu.set_cpuid2(&listed).kvm("take the CPUID it supports")?;
        let mut given = cpu::cpuid(vcpu)?;
        cpuid::leave_out_all(&mut given);
        Ok(given)
    }

    /// The CPUID of one vCPU of a new guest; see [`guest_cpuid`].
    ///
    /// # Errors
    /// As [`guest_cpuid`].
    pub fn guest_cpuid(&self, cpu: u32, cpus: u32) -> Result<CpuId> {
        guest_cpuid(&self.supported, cpu, cpus)
    }
}

/// The size of `struct kvm_xsave` on this host in bytes, and whether only
/// `KVM_GET_XSAVE2` knows that size (Linux 5.17).
fn xsave_size(vm: &VmFd) -> Result<(usize, bool)> {
    let told = match vm.check_extension_int(Cap::Xsave2) {
        0 if vm.check_extension(Cap::Xsave) => return Ok((MIN_XSAVE_BYTES, false)),
        bytes => bytes,
    };
    let bytes = usize::try_from(told).unwrap_or(0).next_multiple_of(4);
    if !(MIN_XSAVE_BYTES..=MAX_XSAVE_BYTES).contains(&bytes) {
        return Err(StateError::HostXsave {
            bytes: told.into(),
            limit: MAX_XSAVE_BYTES,
        }
        .into());
    }
    Ok((bytes, true))
}
