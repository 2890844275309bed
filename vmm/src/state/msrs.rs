//! The model-specific registers of a vCPU.

use std::ops::RangeInclusive;

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::{MAX_MSRS, StateError};
use crate::Result;
use crate::error::KvmContext;

pub(super) const IA32_TSC: u32 = 0x10;
pub(super) const IA32_ARCH_CAPABILITIES: u32 = 0x10a;
/// AMD manual volume 4: DE_CFG.
pub(super) const AMD64_DE_CFG: u32 = 0xc001_1029;
pub(super) const IA32_TSC_DEADLINE: u32 = 0x6e0;
const KVM_ASYNC_PF_EN: u32 = 0x4b56_4d02;
/// KVM shows the host's value to the monitor whatever the guest is offered, and some
/// kernels take no other one. Guests are not told of it (PDCM).
const IA32_PERF_CAPABILITIES: u32 = 0x345;

/// What is saved besides `KVM_GET_MSR_INDEX_LIST`, if KVM answers for it. The
/// names are those of the Intel manual (volume 4) and of the kernel's
/// `Documentation/virt/kvm/x86/msr.rst`.
const EXTRA: &[RangeInclusive<u32>] = &[
    IA32_TSC..=IA32_TSC,
    0x3b..=0x3b, // IA32_TSC_ADJUST
    0x48..=0x48, // IA32_SPEC_CTRL
    IA32_ARCH_CAPABILITIES..=IA32_ARCH_CAPABILITIES,
    0x1a0..=0x1a0, // IA32_MISC_ENABLE
    0x200..=0x20f, // IA32_MTRR_PHYSBASE0 to PHYSMASK7
    0x250..=0x250, // IA32_MTRR_FIX64K_00000
    0x258..=0x259, // IA32_MTRR_FIX16K_80000, A0000
    0x268..=0x26f, // IA32_MTRR_FIX4K_C0000 to F8000
    0x277..=0x277, // IA32_PAT
    0x2ff..=0x2ff, // IA32_MTRR_DEF_TYPE
    0x400..=0x47f, // machine check banks 0 to 31
    IA32_TSC_DEADLINE..=IA32_TSC_DEADLINE,
    0x11..=0x12,               // kvmclock by its old numbers
    0x4b56_4d00..=0x4b56_4d07, // KVM: clock, async page faults, steal time, EOI, polling
    0x4b56_4d08..=0x4b56_4d08, // KVM: migration control
    AMD64_DE_CFG..=AMD64_DE_CFG,
];

/// Those that KVM acts upon when they are set, in the order in which it needs
/// them, after all others.
const DEFERRED: [u32; 2] = [
    // Wakes whatever waited for a page, by the interrupt vector of another MSR.
    KVM_ASYNC_PF_EN,
    // KVM arms the timer by comparing it with the guest's TSC: before IA32_TSC is
    // right, the timer would be armed wrongly or not at all.
    IA32_TSC_DEADLINE,
];

/// The MSRs to save, each once, given those that KVM lists.
pub(super) fn indices(listed: &[u32]) -> Vec<u32> {
    let extra = EXTRA.iter().cloned().flatten();
    let mut indices: Vec<u32> = listed.iter().copied().chain(extra).collect();
    indices.retain(|&index| index != IA32_PERF_CAPABILITIES);
    indices.sort_unstable();
    indices.dedup();
    indices.truncate(MAX_MSRS);
    indices
}

/// Reads the MSRs. Those that this vCPU does not have are left out.
pub(super) fn save(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>> {
    let mut saved = Vec::with_capacity(indices.len());
    let mut left = indices;
    while !left.is_empty() {
        let chunk = &left[..left.len().min(KVM_MAX_MSR_ENTRIES)];
        let mut msrs = list(chunk.iter().map(|&index| kvm_msr_entry {
            index,
            ..Default::default()
        }));
        // KVM stops at the first that it cannot read and tells how many it read.
        let read = vcpu.get_msrs(&mut msrs).kvm("read MSRs")?.min(chunk.len());
        saved.extend_from_slice(&msrs.as_slice()[..read]);
        left = &left[(read + usize::from(read < chunk.len()))..];
    }
    Ok(saved)
}

/// Sets the TSC far from the one that is to be restored next.
///
/// Up to Linux 6.7, KVM takes a TSC that is within a second of the running one for an
/// attempt to synchronise vCPUs, and keeps its own: a new vCPU's runs from 0, and
/// a guest that was saved in its first second would lose that time. For the first
/// vCPU only; the others are to be synchronised with it.
pub(super) fn leave_tsc(vcpu: &VcpuFd, saved: &[kvm_msr_entry]) -> Result<()> {
    const FAR: u64 = 1 << 40;
    if let Some(tsc) = value(saved, IA32_TSC) {
        let far = kvm_msr_entry {
            index: IA32_TSC,
            data: tsc.wrapping_add(FAR),
            ..Default::default()
        };
        vcpu.set_msrs(&list([far].into_iter())).kvm("set the TSC")?;
    }
    Ok(())
}

/// Writes the MSRs, the deferred ones last.
///
/// A zero TSC deadline is set to `armed_deadline` if there is one.
///
/// # Errors
/// [`StateError::MsrRefused`] for one that KVM does not take and that does not
/// have the value already.
pub(super) fn restore(
    vcpu: &VcpuFd,
    saved: &[kvm_msr_entry],
    armed_deadline: Option<u64>,
    known: &[u32],
) -> Result<()> {
    let ordered = in_order(&only_known(saved, known)?, armed_deadline);
    let mut left = ordered.as_slice();
    while !left.is_empty() {
        let chunk = &left[..left.len().min(KVM_MAX_MSR_ENTRIES)];
        let msrs = list(chunk.iter().copied());
        let set = vcpu.set_msrs(&msrs).kvm("set MSRs")?;
        // KVM stops at the first that it does not take.
        if let Some(refused) = chunk.get(set) {
            accept_refusal(vcpu, refused)?;
            left = &left[set + 1..];
        } else {
            left = &left[chunk.len()..];
        }
    }
    Ok(())
}

/// What a snapshot may set: the MSRs that this host saves itself. Another one is no harm
/// if it is zero, as of a newer kernel's snapshot.
fn only_known(saved: &[kvm_msr_entry], known: &[u32]) -> Result<Vec<kvm_msr_entry>, StateError> {
    let is_known = |msr: &&kvm_msr_entry| known.binary_search(&msr.index).is_ok();
    match saved.iter().find(|msr| msr.data != 0 && !is_known(msr)) {
        Some(msr) => Err(StateError::MsrRefused {
            index: msr.index,
            value: msr.data,
        }),
        None => Ok(saved.iter().filter(is_known).copied().collect()),
    }
}

/// Some MSRs can be read and not written, or not by every kernel. That is no
/// harm if the value is there already, nor if it is zero where nobody knows the
/// MSR: KVM answers so for some of those that it lists and the guest does not have.
fn accept_refusal(vcpu: &VcpuFd, refused: &kvm_msr_entry) -> Result<()> {
    let has = save(vcpu, &[refused.index])?;
    if has.first().map_or(0, |has| has.data) == refused.data {
        return Ok(());
    }
    Err(StateError::MsrRefused {
        index: refused.index,
        value: refused.data,
    }
    .into())
}

fn in_order(saved: &[kvm_msr_entry], armed_deadline: Option<u64>) -> Vec<kvm_msr_entry> {
    let rank = |index| {
        let place = DEFERRED.iter().position(|&deferred| deferred == index);
        place.map_or(0, |place| place + 1)
    };
    let mut ordered = saved.to_vec();
    ordered.sort_by_key(|msr| rank(msr.index));
    for msr in &mut ordered {
        // The bindings' padding field; KVM has no meaning for it.
        msr.reserved = 0;
        if let (IA32_TSC_DEADLINE, 0, Some(deadline)) = (msr.index, msr.data, armed_deadline) {
            msr.data = deadline;
        }
    }
    ordered
}

/// The value of an MSR in a saved state.
pub(super) fn value(saved: &[kvm_msr_entry], index: u32) -> Option<u64> {
    let entry = saved.iter().find(|msr| msr.index == index)?;
    Some(entry.data)
}

fn list(entries: impl Iterator<Item = kvm_msr_entry>) -> Msrs {
    let entries: Vec<_> = entries.collect();
    Msrs::from_entries(&entries).expect("a chunk has at most KVM_MAX_MSR_ENTRIES")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn msr(index: u32, data: u64) -> kvm_msr_entry {
        kvm_msr_entry {
            index,
            data,
            ..Default::default()
        }
    }

    #[test]
    fn each_msr_is_saved_once_and_all_fit() {
        let indices = indices(&[0x10, 0x6e0, 0x174, IA32_PERF_CAPABILITIES, 0x10]);
        let mut unique = indices.clone();
        unique.dedup();
        assert_eq!(unique, indices);
        assert!(indices.contains(&0x174) && indices.contains(&KVM_ASYNC_PF_EN));
        assert!(!indices.contains(&IA32_PERF_CAPABILITIES));
        assert_eq!(
            super::indices(&(0..5000).collect::<Vec<_>>()).len(),
            MAX_MSRS
        );
    }

    #[test]
    fn the_deadline_comes_last_whatever_the_order() {
        let saved = [
            msr(IA32_TSC_DEADLINE, 5),
            msr(KVM_ASYNC_PF_EN, 1),
            msr(0x4b56_4d06, 2),
            msr(IA32_TSC, 3),
        ];
        let order: Vec<u32> = in_order(&saved, None).iter().map(|msr| msr.index).collect();
        assert_eq!(
            order,
            [0x4b56_4d06, IA32_TSC, KVM_ASYNC_PF_EN, IA32_TSC_DEADLINE]
        );
    }

    #[test]
    fn a_snapshot_sets_only_what_is_saved() {
        let known = indices(&[0x174]);
        let saved = [msr(0x174, 5), msr(0xc000_0fff, 0)];
        assert_eq!(only_known(&saved, &known).unwrap(), saved[..1]);
        assert!(only_known(&[msr(0xc000_0fff, 1)], &known).is_err());
    }

    #[test]
    fn only_a_zero_deadline_is_replaced() {
        let zero = in_order(&[msr(IA32_TSC_DEADLINE, 0)], Some(9));
        assert_eq!(zero[0].data, 9);
        let unarmed = in_order(&[msr(IA32_TSC_DEADLINE, 0)], None);
        assert_eq!(unarmed[0].data, 0);
        let set = in_order(&[msr(IA32_TSC_DEADLINE, 4), msr(IA32_TSC, 0)], Some(9));
        assert_eq!(set.iter().map(|msr| msr.data).collect::<Vec<_>>(), [0, 4]);
    }
}
