//! What this host's KVM offers to a machine.

use std::sync::OnceLock;

use kvm_bindings::{
    CpuId, KVM_CLOCK_REALTIME, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2, kvm_msr_entry,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use super::machine::MIN_XSAVE_BYTES;
use super::{
    Baseline, MAX_XSAVE_BYTES, StateError, baseline, cpu, cpuid, feature_msrs, guest_cpuid, msrs,
};
use crate::Result;
use crate::error::KvmContext;

/// Of the flags that KVM knows of clocks.
const AS_OF: i32 = KVM_CLOCK_REALTIME.cast_signed();

/// What this host's KVM offers.
#[derive(Clone, Debug)]
pub struct HostFacts {
    lists: &'static Lists,
    pub(super) xsave_bytes: usize,
    pub(super) has_xsave2: bool,
    /// Whether a guest's clock can be set as of a moment of the host's (Linux 5.16).
    pub(crate) sets_clock_as_of: bool,
}

/// What KVM tells of the host in lists, which takes it long: it asks the CPU, and that asks a
/// hypervisor if there is one.
#[derive(Debug)]
struct Lists {
    supported: Vec<kvm_cpuid_entry2>,
    msr_indices: Vec<u32>,
    feature_msrs: Vec<kvm_msr_entry>,
}

/// Asked once, for this process and those forked from it: the answers stay the same.
static LISTS: OnceLock<Lists> = OnceLock::new();

impl Lists {
    fn get(kvm: &Kvm) -> Result<&'static Self> {
        match LISTS.get() {
            Some(lists) => Ok(lists),
            None => {
                let lists = Self::ask(kvm)?;
                Ok(LISTS.get_or_init(|| lists))
            }
        }
    }

    fn ask(kvm: &Kvm) -> Result<Self> {
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
        Ok(Self {
            supported,
            msr_indices: msrs::indices(listed.as_slice()),
            feature_msrs: feature_msrs::of_host(kvm)?,
        })
    }
}

impl HostFacts {
    /// Asks KVM. No XSAVE feature may be enabled for this process afterwards
    /// (`ARCH_REQ_XCOMP_GUEST_PERM`), since that changes the answers.
    ///
    /// # Errors
    /// KVM refuses, or has no XSAVE; then the CPU is older than virtualisation
    /// that this monitor runs on.
    pub fn new(kvm: &Kvm, vm: &VmFd) -> Result<Self> {
        let (xsave_bytes, has_xsave2) = xsave_size(vm)?;
        Ok(Self {
            lists: Lists::get(kvm)?,
            xsave_bytes,
            has_xsave2,
            sets_clock_as_of: vm.check_extension_int(Cap::AdjustClock) & AS_OF != 0,
        })
    }

    /// Asks ahead what takes long, for the machines of processes that are forked from this one.
    /// What cannot be told now is said to each of them.
    pub fn ask_ahead() {
        if let Ok(kvm) = Kvm::new() {
            let _ = Lists::get(&kvm);
        }
    }

    pub(super) fn msr_indices(&self) -> &[u32] {
        &self.lists.msr_indices
    }

    pub(super) fn feature_msrs(&self) -> &[kvm_msr_entry] {
        &self.lists.feature_msrs
    }

    /// The CPUID that a guest can be given on this host: what KVM supports, but for what
    /// is never offered ([`guest_cpuid`]).
    pub fn supported_cpuid(&self) -> &[kvm_cpuid_entry2] {
        &self.lists.supported
    }

    /// The CPUID that a vCPU has after it was given all that KVM lists. Equal to
    /// the list where KVM uses the CPU's virtualisation; a KVM that emulates can
    /// give a vCPU more. The vCPU has never run, and is given its own CPUID
    /// afterwards.
    ///
    /// # Errors
    /// KVM refuses.
    pub(super) fn given_cpuid(&self, vcpu: &VcpuFd) -> Result<Vec<kvm_cpuid_entry2>> {
        let listed = CpuId::from_entries(&self.lists.supported).expect("KVM made a list as long");
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
        guest_cpuid(&self.lists.supported, cpu, cpus)
    }

    /// What a new guest of this baseline, whose memory ends there, can be given: for
    /// [`guest_cpuid`]. `vcpu` is one that has never run, to be given its CPUID afterwards.
    ///
    /// # Errors
    /// [`StateError::BaselineLacks`] if this host has less,
    /// [`StateError::FeatureNeeds`], and [`StateError::CannotLimit`] if this host's KVM
    /// tells a guest of more whatever it is given.
    pub fn limited_cpuid(
        &self,
        baseline: &Baseline,
        memory_end: u64,
        vcpu: &VcpuFd,
    ) -> Result<Vec<kvm_cpuid_entry2>> {
        let limited = match baseline.limit(&self.lists.supported, memory_end) {
            // A KVM that emulates has more than it lists.
            Err(StateError::BaselineLacks { .. }) => {
                baseline.limit(&self.given_cpuid(vcpu)?, memory_end)
            }
            limited => limited,
        }?;
        if !baseline.is_host() {
            let offered = guest_cpuid(&limited, 0, 1)?;
            vcpu.set_cpuid2(&offered).kvm("take the CPUID")?;
            baseline::check_limited(&cpu::cpuid(vcpu)?, offered.as_slice())?;
        }
        Ok(limited)
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
