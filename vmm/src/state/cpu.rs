//! What KVM holds of one vCPU, out of it and into it.
//!
//! All other vCPUs of the machine are stopped meanwhile: their interrupts and
//! `KVM_SET_VCPU_EVENTS` would race.

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use super::feature_msrs::has_arch_capabilities;
use super::machine::{MAX_CPUID_ENTRIES, MAX_MSRS};
use super::msrs::IA32_ARCH_CAPABILITIES;
use super::{HostFacts, StateError, bounded, msrs, xsave};
use crate::error::KvmContext;
use crate::{Error, Result};

/// What KVM holds of one vCPU. Its layout is that of the format's version 1 and of the payload
/// `vcpu` 1, and stays: another one is a type of its own, and another version of the payload.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct VcpuState {
    /// What the guest sees of the CPU.
    #[serde(deserialize_with = "bounded::list::<_, _, MAX_CPUID_ENTRIES>")]
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// The TSC's frequency in kHz; 0 if KVM does not know it.
    pub tsc_khz: u32,
    /// Whether it runs, halts, or waits to be started.
    pub mp_state: kvm_mp_state,
    /// General registers.
    pub regs: kvm_regs,
    /// Segments, control registers, APIC base.
    pub sregs: kvm_sregs,
    /// FPU and vector registers: the XSAVE area in its standard (not compacted)
    /// form, Intel manual volume 1, chapter 13.
    pub xsave: Vec<u8>,
    /// Extended control registers.
    pub xcrs: kvm_xcrs,
    /// Debug registers.
    pub debug_regs: kvm_debugregs,
    /// The local APIC.
    pub lapic: kvm_lapic_state,
    /// Model-specific registers.
    #[serde(deserialize_with = "bounded::list::<_, _, MAX_MSRS>")]
    pub msrs: Vec<kvm_msr_entry>,
    /// Exceptions, interrupts and NMIs on their way.
    pub events: kvm_vcpu_events,
}

/// IA32_APIC_BASE: of one vCPU of a machine.
const BOOTSTRAP_PROCESSOR: u64 = 1 << 8;

impl VcpuState {
    /// Reads the state of a vCPU whose `KVM_RUN` was last left by an interrupted
    /// call, so that no exit is half done.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn save(vcpu: &VcpuFd, host: &HostFacts) -> Result<Self> {
        // First: reading it lets KVM act upon an INIT or SIPI that is pending
        // (kvm_apic_accept_events), which changes most of what is read below.
        let mp_state = vcpu.get_mp_state().kvm("read the MP state")?;
        let regs = vcpu.get_regs().kvm("read registers")?;
        let sregs = vcpu.get_sregs().kvm("read special registers")?;
        let xsave = xsave::save(vcpu, host)?;
        let xcrs = vcpu.get_xcrs().kvm("read extended control registers")?;
        let debug_regs = vcpu.get_debug_regs().kvm("read debug registers")?;
        let cpuid = cpuid(vcpu)?;
        // Not known on a host whose TSC is not stable.
        let tsc_khz = vcpu.get_tsc_khz().unwrap_or(0);
        // The timer's deadline, an MSR, before the local APIC: if the timer fires
        // in between, the guest gets the interrupt twice and not never.
        let mut msrs = msrs::save(vcpu, host.msr_indices())?;
        // KVM shows the monitor what the guest is not told.
        if !has_arch_capabilities(&cpuid) {
            msrs.retain(|msr| msr.index != IA32_ARCH_CAPABILITIES);
        }
        let lapic = vcpu.get_lapic().kvm("read the local APIC")?;
        // Last: the calls before may still have turned something into an event.
        let events = vcpu.get_vcpu_events().kvm("read vCPU events")?;
        Ok(Self {
            cpuid,
            tsc_khz,
            mp_state,
            regs,
            sregs,
            xsave,
            xcrs,
            debug_regs,
            lapic,
            msrs,
            events,
        })
    }

    /// Writes the state into a vCPU that has never run, of a machine that has its
    /// memory and its interrupt controllers. The machine's
    /// [`VmState`](super::VmState) comes after all vCPUs.
    ///
    /// # Errors
    /// [`StateError::MsrRefused`], [`StateError::TscFrequency`] or
    /// [`StateError::XsaveBeyondHost`] if this host cannot do what the snapshot's
    /// could, [`Error::Kvm`] for a value that no vCPU can have. The vCPU is not to
    /// be run then.
    pub fn restore(&self, vcpu: &VcpuFd, host: &HostFacts) -> Result<()> {
        // First: KVM checks control registers, XCR0 and MSRs against it, and makes
        // room for the XSAVE components that it names.
        let cpuid = CpuId::from_entries(&self.cpuid).map_err(|_| StateError::TooMany {
            cpu: 0,
            what: "CPUID entries",
            limit: MAX_CPUID_ENTRIES,
        })?;
        vcpu.set_cpuid2(&cpuid).kvm("take the CPUID")?;
        // Before the TSC, whose offset KVM computes at this frequency.
        self.restore_tsc_frequency(vcpu)?;
        vcpu.set_regs(&self.regs).kvm("take registers")?;
        vcpu.set_sregs(&self.sregs).kvm("take special registers")?;
        // After the special registers: with those of a CPU at its reset vector KVM
        // makes a halted vCPU runnable.
        vcpu.set_mp_state(self.mp_state).kvm("take the MP state")?;
        xsave::restore(vcpu, host, &self.xsave)?;
        vcpu.set_xcrs(&self.xcrs)
            .kvm("take extended control registers")?;
        vcpu.set_debug_regs(&self.debug_regs)
            .kvm("take debug registers")?;
        // After the special registers, which hold the APIC base with its mode.
        // Before the MSRs: KVM ignores a TSC deadline, without an error, unless the
        // local APIC's timer is in deadline mode, and forgets it when the mode
        // changes.
        vcpu.set_lapic(&self.lapic).kvm("take the local APIC")?;
        if self.sregs.apic_base & BOOTSTRAP_PROCESSOR != 0 {
            msrs::leave_tsc(vcpu, &self.msrs)?;
        }
        let mut settable = self.msrs.clone();
        if !has_arch_capabilities(&self.cpuid) {
            settable.retain(|msr| msr.index != IA32_ARCH_CAPABILITIES);
        }
        msrs::restore(vcpu, &settable, self.armed_deadline(), host.msr_indices())?;
        // Last: KVM_SET_REGS drops pending exceptions, KVM_SET_SREGS pending
        // interrupts.
        vcpu.set_vcpu_events(&self.events).kvm("take vCPU events")?;
        Ok(())
    }

    /// What to arm a deadline timer with whose deadline reads 0.
    ///
    /// KVM clears the deadline when the timer has fired, and the interrupt can
    /// still be lost on its way to the guest, which then waits for ever. So the
    /// timer of a guest that uses it is made to fire at once: an interrupt too
    /// many does no harm. `None` if the guest does not use the timer so.
    fn armed_deadline(&self) -> Option<u64> {
        /// The local APIC's timer register: offset, mask bit, mode bits, and the
        /// mode of the TSC deadline. Intel manual, volume 3, section 11.5.
        const LVT_TIMER: std::ops::Range<usize> = 0x320..0x324;
        const MASKED: u32 = 1 << 16;
        const MODE: u32 = 3 << 17;
        const DEADLINE_MODE: u32 = 2 << 17;
        let timer = self.lapic.regs[LVT_TIMER]
            .iter()
            .rev()
            .fold(0_u32, |value, &byte| {
                value << 8 | u32::from(byte.cast_unsigned())
            });
        if timer & MASKED != 0 || timer & MODE != DEADLINE_MODE {
            return None;
        }
        msrs::value(&self.msrs, msrs::IA32_TSC)
    }

    /// Makes the guest's TSC tick as fast as it did.
    fn restore_tsc_frequency(&self, vcpu: &VcpuFd) -> Result<()> {
        let host_khz = vcpu.get_tsc_khz().unwrap_or(0);
        if self.tsc_khz == 0 || is_same_frequency(self.tsc_khz, host_khz) {
            return Ok(());
        }
        vcpu.set_tsc_khz(self.tsc_khz).map_err(|_| {
            Error::from(StateError::TscFrequency {
                snapshot_khz: self.tsc_khz,
                host_khz,
            })
        })
    }
}

/// Hosts of one kind measure their TSC a little differently at each boot; NTP
/// corrects up to 500 parts per million, half of which is allowed here.
fn is_same_frequency(one_khz: u32, other_khz: u32) -> bool {
    u64::from(one_khz.abs_diff(other_khz)) * 1_000_000 <= u64::from(one_khz) * 250
}

/// The vCPU's CPUID. Some kernels leave the list as long as the caller made it,
/// with zeros behind the entries.
pub(super) fn cpuid(vcpu: &VcpuFd) -> Result<Vec<kvm_cpuid_entry2>> {
    let list = vcpu
        .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
        .kvm("read the CPUID")?;
    let mut entries = list.as_slice().to_vec();
    let used = entries
        .iter()
        .rposition(|entry| *entry != kvm_cpuid_entry2::default());
    entries.truncate(used.map_or(0, |last| last + 1));
    Ok(entries)
}

/// Tells the guest's kernel that it was stopped, before it runs again; otherwise
/// its watchdogs take the pause for a lockup. To be called for each vCPU on each
/// resume, after a restore as after a pause: KVM writes the mark into the guest's
/// memory only when the vCPU runs, so a mark set at the pause is not in the
/// snapshot. Kernel documentation: `KVM_KVMCLOCK_CTRL`.
///
/// # Errors
/// KVM refuses. A guest that does not use kvmclock is none.
pub fn announce_stop(vcpu: &VcpuFd) -> Result<()> {
    match vcpu.kvmclock_ctrl() {
        Err(error) if error.errno() == libc::EINVAL => Ok(()),
        done => done.kvm("tell the guest that it was stopped"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frequencies_are_the_same_within_250_parts_per_million() {
        assert!(is_same_frequency(2_000_000, 2_000_500));
        assert!(is_same_frequency(2_000_000, 1_999_500));
        assert!(!is_same_frequency(2_000_000, 2_000_501));
        assert!(!is_same_frequency(2_000_000, 0));
        assert!(!is_same_frequency(u32::MAX, 1));
    }

    fn with_timer(lvt: u32) -> VcpuState {
        let mut lapic = kvm_lapic_state::default();
        for (register, byte) in lapic.regs[0x320..].iter_mut().zip(lvt.to_le_bytes()) {
            *register = byte.cast_signed();
        }
        VcpuState {
            cpuid: Vec::new(),
            tsc_khz: 0,
            mp_state: kvm_mp_state::default(),
            regs: kvm_regs::default(),
            sregs: kvm_sregs::default(),
            xsave: Vec::new(),
            xcrs: kvm_xcrs::default(),
            debug_regs: kvm_debugregs::default(),
            lapic,
            msrs: vec![kvm_msr_entry {
                index: msrs::IA32_TSC,
                data: 1234,
                ..Default::default()
            }],
            events: kvm_vcpu_events::default(),
        }
    }

    #[test]
    fn a_timer_is_armed_again_only_if_it_is_a_deadline_timer_in_use() {
        assert_eq!(with_timer(0x400ec).armed_deadline(), Some(1234));
        assert_eq!(with_timer(0x500ec).armed_deadline(), None, "masked");
        assert_eq!(with_timer(0x200ec).armed_deadline(), None, "periodic");
        assert_eq!(with_timer(0x000ec).armed_deadline(), None, "one shot");
    }
}
