//! Feature MSRs: registers that tell a guest what its CPU can do, or is not vulnerable to.
//!
//! KVM lists those of the host (`KVM_GET_MSR_FEATURE_INDEX_LIST`). A guest reads them once
//! and relies on them: one that was told that its CPU is not vulnerable protects itself
//! no more. Those of a vCPU are saved with its other MSRs, and compared here by the names
//! of their bits. Left out: revisions of microcode, which say nothing that other bits do
//! not; what is about nested guests and performance counters, which no guest is told of.

use kvm_bindings::{Msrs, kvm_cpuid_entry2, kvm_msr_entry};
use kvm_ioctls::Kvm;

use super::msrs::{AMD64_DE_CFG, IA32_ARCH_CAPABILITIES, value};
use crate::Result;
use crate::error::KvmContext;

/// One of them.
struct FeatureMsr {
    index: u32,
    name: &'static str,
    /// From bit 0 on, `-` for a bit that says nothing of features.
    names: &'static str,
    /// Whether a bit without a name could be a feature.
    all_bits: bool,
    /// These say that the CPU is worse: a guest has to know.
    worse: u64,
    /// Whether a guest with this CPUID can read it.
    is_told: fn(&[kvm_cpuid_entry2]) -> bool,
}

const FEATURE_MSRS: &[FeatureMsr] = &[
    // Intel manual volume 4. Worse: RSBA, RRSBA.
    FeatureMsr {
        index: IA32_ARCH_CAPABILITIES,
        name: "IA32_ARCH_CAPABILITIES",
        names: "RDCL_NO IBRS_ALL RSBA SKIP_L1DFL_VMENTRY SSB_NO MDS_NO PSCHANGE_MC_NO TSX_CTRL \
                TAA_NO MCU_CONTROL MISC_PACKAGE_CTLS ENERGY_FILTERING_CTL DOITM SBDR_SSDP_NO \
                FBSDP_NO PSDP_NO MCU_ENUM FB_CLEAR FB_CLEAR_CTRL RRSBA BHI_NO \
                XAPIC_DISABLE_STATUS MCU_EXTENDED_SERVICE OVERCLOCKING_STATUS PBRSB_NO \
                GDS_CTRL GDS_NO RFDS_NO RFDS_CLEAR",
        all_bits: true,
        worse: 1 << 2 | 1 << 19,
        is_told: has_arch_capabilities,
    },
    FeatureMsr {
        index: AMD64_DE_CFG,
        name: "DE_CFG",
        names: "- LFENCE_SERIALIZE",
        all_bits: false,
        worse: 0,
        is_told: |_| true,
    },
];

/// Leaf 7.0, edx.
const ARCH_CAPABILITIES: u32 = 1 << 29;

/// Whether a guest with this CPUID can read IA32_ARCH_CAPABILITIES.
pub(super) fn has_arch_capabilities(cpuid: &[kvm_cpuid_entry2]) -> bool {
    let leaf = cpuid
        .iter()
        .find(|leaf| (leaf.function, leaf.index) == (7, 0));
    leaf.is_some_and(|leaf| leaf.edx & ARCH_CAPABILITIES != 0)
}

/// The host's, as KVM lists them. One that it does not list tells nothing.
pub(super) fn of_host(kvm: &Kvm) -> Result<Vec<kvm_msr_entry>> {
    let Ok(listed) = kvm.get_msr_feature_index_list() else {
        // Before Linux 4.18.
        return Ok(Vec::new());
    };
    let mut found = Vec::new();
    for msr in FEATURE_MSRS {
        if !listed.as_slice().contains(&msr.index) {
            continue;
        }
        let entry = kvm_msr_entry {
            index: msr.index,
            ..Default::default()
        };
        let mut asked = Msrs::from_entries(&[entry]).expect("one is not too many");
        if kvm.get_msrs(&mut asked).kvm("read a feature MSR")? == 1 {
            found.extend_from_slice(asked.as_slice());
        }
    }
    Ok(found)
}

/// What a guest was told by its feature MSRs and is not so on this host.
pub(super) fn missing(
    cpuid: &[kvm_cpuid_entry2],
    saved: &[kvm_msr_entry],
    host: &[kvm_msr_entry],
) -> Vec<String> {
    let mut missing = Vec::new();
    for msr in FEATURE_MSRS.iter().filter(|msr| (msr.is_told)(cpuid)) {
        // A guest that was told nothing protects itself from everything.
        let Some(told) = value(saved, msr.index).filter(|told| *told != 0) else {
            continue;
        };
        let host = value(host, msr.index).unwrap_or(0);
        missing.extend(msr.of(told & !host & !msr.worse));
        let worse = msr.of(host & !told & msr.worse);
        missing.extend(worse.into_iter().map(|name| format!("no {name}")));
    }
    missing
}

/// What a guest was told by its feature MSRs, by name.
pub(super) fn told(cpuid: &[kvm_cpuid_entry2], saved: &[kvm_msr_entry]) -> Vec<String> {
    let msrs = FEATURE_MSRS.iter().filter(|msr| (msr.is_told)(cpuid));
    msrs.flat_map(|msr| msr.of(value(saved, msr.index).unwrap_or(0)))
        .collect()
}

impl FeatureMsr {
    /// The names of these bits.
    fn of(&self, bits: u64) -> Vec<String> {
        let set = (0..u64::BITS).filter(|bit| bits >> bit & 1 == 1);
        let names: Vec<_> = self.names.split_whitespace().collect();
        set.filter_map(|bit| match names.get(bit as usize) {
            Some(&"-") => None,
            Some(name) => Some((*name).to_owned()),
            None => self.all_bits.then(|| format!("{} bit {bit}", self.name)),
        })
        .collect()
    }
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

    /// The CPUID of a guest that can read IA32_ARCH_CAPABILITIES.
    fn cpuid() -> Vec<kvm_cpuid_entry2> {
        vec![kvm_cpuid_entry2 {
            function: 7,
            edx: ARCH_CAPABILITIES,
            ..Default::default()
        }]
    }

    #[test]
    fn a_guest_stays_where_it_is_as_safe_as_it_was_told() {
        let host = [msr(IA32_ARCH_CAPABILITIES, 0b1_0000_0001)];
        let missing_of =
            |bits, host: &[_]| missing(&cpuid(), &[msr(IA32_ARCH_CAPABILITIES, bits)], host);
        assert!(missing_of(1, &host).is_empty() && missing_of(0, &host).is_empty());
        assert_eq!(missing_of(0b11_0000, &host), ["SSB_NO", "MDS_NO"]);
        assert_eq!(
            missing_of(1 << 40, &host),
            ["IA32_ARCH_CAPABILITIES bit 40"]
        );
        // A host that tells nothing is as vulnerable as can be.
        assert_eq!(missing_of(1, &[]), ["RDCL_NO"]);
        assert!(missing(&cpuid(), &[], &host).is_empty());
        let worse = [msr(IA32_ARCH_CAPABILITIES, 1 | 1 << 19)];
        assert_eq!(missing_of(1, &worse), ["no RRSBA"]);
    }

    #[test]
    fn what_a_guest_cannot_read_it_was_not_told() {
        let saved = [msr(IA32_ARCH_CAPABILITIES, 1 << 4)];
        assert!(missing(&[], &saved, &[]).is_empty());
        assert!(told(&[], &saved).is_empty());
        assert_eq!(told(&cpuid(), &saved), ["SSB_NO"]);
    }

    #[test]
    fn a_serializing_lfence_is_a_feature_and_its_neighbours_are_none() {
        let saved = [msr(AMD64_DE_CFG, 0b110)];
        assert_eq!(missing(&[], &saved, &[]), ["LFENCE_SERIALIZE"]);
        assert!(missing(&[], &saved, &[msr(AMD64_DE_CFG, 2)]).is_empty());
        assert!(missing(&[], &[msr(AMD64_DE_CFG, 4)], &[]).is_empty());
    }
}
