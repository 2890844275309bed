//! What a machine state asks of the CPU that it is restored on.

use serde::Serialize;

use super::baseline::level_of;
use super::compat::{address_bits, vendor};
use super::features::Features;
use super::{MachineState, feature_msrs};

/// What a machine state asks of the CPU that it is restored on.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct CpuNeeds {
    /// The CPU's vendor, by its twelve letters; none if the guest was told none.
    pub vendor: Option<String>,
    /// The highest level of the x86-64 psABI that its guest was told of, if any.
    pub level: Option<String>,
    /// What it was told of beyond that level, and what every CPU of that level has under
    /// virtualisation, by name.
    pub features: Vec<String>,
    /// What feature MSRs told it that its CPU is not vulnerable to, or is.
    pub feature_msrs: Vec<String>,
    /// Bits of its physical addresses.
    pub address_bits: u32,
    /// The frequency of its TSC in kHz, which the host must have within 250 parts per
    /// million or be able to scale to; 0 if it is not known.
    pub tsc_khz: u32,
}

impl MachineState {
    /// What this state asks of a CPU; `None` of a machine without vCPUs.
    #[must_use]
    pub fn cpu_needs(&self) -> Option<CpuNeeds> {
        let first = self.vcpus.first()?;
        // What any of the vCPUs was told of.
        let features = self.vcpus.iter().fold(Features::NONE, |set, vcpu| {
            set.with(Features::of(&vcpu.cpuid))
        });
        let (level, beyond) = level_of(features);
        let vendor = vendor(&first.cpuid);
        Some(CpuNeeds {
            vendor: (!vendor.is_empty()).then_some(vendor),
            level: level.map(str::to_owned),
            features: beyond.names(),
            feature_msrs: feature_msrs::told(&first.cpuid, &first.msrs),
            address_bits: address_bits(&first.cpuid),
            tsc_khz: first.tsc_khz,
        })
    }
}
