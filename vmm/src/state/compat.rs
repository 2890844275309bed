//! Whether a host can run a guest that was told about another host's CPU.

use kvm_bindings::kvm_cpuid_entry2;

use super::StateError;
use super::features::FEATURE_WORDS;
use crate::Result;

/// Refuses a host that lacks what the snapshot's guest was told it has. The guest
/// asked once, at boot, and uses it without asking again.
///
/// Both lists are as KVM gives them: `snapshot` of a vCPU, `host_supported` of
/// [`HostFacts::supported_cpuid`](super::HostFacts::supported_cpuid). A host may
/// have more than the snapshot.
///
/// # Errors
/// [`StateError::HostVendor`] and [`StateError::HostLacks`], which names the
/// features.
pub fn check_host(
    snapshot: &[kvm_cpuid_entry2],
    host_supported: &[kvm_cpuid_entry2],
) -> Result<()> {
    // A vCPU that was never given a CPUID was told nothing.
    if let Some(leaf) = find(snapshot, 0, 0) {
        let (snapshot, host) = (vendor_of(Some(leaf)), vendor(host_supported));
        if snapshot != host {
            return Err(StateError::HostVendor { snapshot, host }.into());
        }
    }
    let mut features = missing_features(snapshot, host_supported);
    features.extend(moved_components(snapshot, host_supported));
    features.extend(counters(snapshot));
    features.extend(hypervisors(snapshot, host_supported));
    features.extend(missing_address_bits(snapshot, host_supported));
    if features.is_empty() {
        return Ok(());
    }
    Err(StateError::HostLacks { features }.into())
}

fn missing_features(snapshot: &[kvm_cpuid_entry2], host: &[kvm_cpuid_entry2]) -> Vec<String> {
    let mut missing = Vec::new();
    for word in FEATURE_WORDS {
        let bits = |list| find(list, word.function, word.index).map_or(0, |leaf| word.bits(leaf));
        let lacking = bits(snapshot) & !bits(host);
        missing.extend(
            (0..u32::BITS)
                .filter(|bit| lacking & (1 << bit) != 0)
                .map(|bit| word.name(bit)),
        );
    }
    missing
}

/// Performance counters and nested virtualisation, which no guest is offered: their
/// state is not saved. Their leaves hold numbers, not features.
fn counters(snapshot: &[kvm_cpuid_entry2]) -> Vec<String> {
    let told = [
        (0xa, "performance counters"),
        (0x8000_0022, "performance counters of AMD"),
        (0x8000_000a, "SVM"),
    ];
    let has = |function| {
        let leaf = find(snapshot, function, 0);
        leaf.is_some_and(|leaf| (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) != (0, 0, 0, 0))
    };
    let told = told.into_iter().filter(|(function, _)| has(*function));
    told.map(|(_, name)| name.to_owned()).collect()
}

/// XSAVE components that are elsewhere in this host's area: a saved area could not
/// be read. Leaf 0xd from index 2 on: eax the size, ebx the offset in bytes.
fn moved_components(snapshot: &[kvm_cpuid_entry2], host: &[kvm_cpuid_entry2]) -> Vec<String> {
    let supervisor = |leaf: &kvm_cpuid_entry2| leaf.ecx & 1 != 0;
    snapshot
        .iter()
        .filter(|leaf| leaf.function == 0xd && leaf.index >= 2 && leaf.eax != 0)
        .filter(|leaf| !supervisor(leaf))
        .filter(|leaf| {
            let here = find(host, 0xd, leaf.index);
            // One that the host lacks altogether is told by its bit in XCR0.
            here.is_some_and(|here| here.eax != 0 && (here.eax, here.ebx) != (leaf.eax, leaf.ebx))
        })
        .map(|leaf| format!("XSAVE component {} at offset {}", leaf.index, leaf.ebx))
        .collect()
}

/// Fewer bits of physical addresses than the guest makes use of.
fn missing_address_bits(
    snapshot: &[kvm_cpuid_entry2],
    host: &[kvm_cpuid_entry2],
) -> Option<String> {
    let bits = address_bits(snapshot);
    (bits > address_bits(host)).then(|| format!("{bits}-bit physical addresses"))
}

/// The bits of physical addresses; 0 if a CPU does not tell.
pub(super) fn address_bits(cpuid: &[kvm_cpuid_entry2]) -> u32 {
    find(cpuid, 0x8000_0008, 0).map_or(0, |leaf| leaf.eax & 0xff)
}

/// Leaves of another hypervisor than the host's, as which KVM can act for a guest that
/// was told so, and which none is.
fn hypervisors(snapshot: &[kvm_cpuid_entry2], host: &[kvm_cpuid_entry2]) -> Vec<String> {
    const LEAVES: std::ops::Range<u32> = 0x4000_0000..0x5000_0000;
    let is_other = |leaf: &&kvm_cpuid_entry2| {
        let here = find(host, leaf.function, leaf.index);
        let signature = |leaf: &kvm_cpuid_entry2| [leaf.ebx, leaf.ecx, leaf.edx];
        match (leaf.function, here) {
            _ if (leaf.eax, signature(leaf)) == (0, [0; 3]) => false,
            (0x4000_0000, Some(here)) => signature(here) != signature(leaf),
            (_, here) => here.is_none(),
        }
    };
    let leaves = snapshot.iter();
    let leaves = leaves.filter(|leaf| LEAVES.contains(&leaf.function));
    leaves
        .filter(is_other)
        .map(|leaf| format!("another hypervisor (leaf {:#x})", leaf.function))
        .collect()
}

fn find(list: &[kvm_cpuid_entry2], function: u32, index: u32) -> Option<&kvm_cpuid_entry2> {
    list.iter()
        .find(|leaf| (leaf.function, leaf.index) == (function, index))
}

/// The vendor's twelve letters; none if a CPU does not tell.
pub(super) fn vendor(cpuid: &[kvm_cpuid_entry2]) -> String {
    vendor_of(find(cpuid, 0, 0))
}

fn vendor_of(leaf: Option<&kvm_cpuid_entry2>) -> String {
    let words = leaf.map_or([0; 3], |leaf| [leaf.ebx, leaf.edx, leaf.ecx]);
    let letters: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let text = String::from_utf8_lossy(&letters);
    text.trim_end_matches('\0').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    fn leaf(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    fn host() -> Vec<kvm_cpuid_entry2> {
        vec![
            leaf(0, 0, [0x1f, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
            leaf(1, 0, [0, 0, 1 << 12 | 1 << 28, 1 << 25]),
            leaf(7, 0, [2, 1 << 5 | 1 << 16, 0, 1 << 5]),
            leaf(0xd, 0, [0xe7, 0, 0, 0]),
            leaf(0xd, 2, [256, 576, 0, 0]),
            leaf(0x8000_0008, 0, [0x3930, 0, 0, 0]),
            leaf(0x4000_0001, 0, [1 << 24 | 1, 0, 0, 0]),
        ]
    }

    /// The names that the error tells when the host lacks a bit of a leaf.
    fn lacking(change: impl Fn(&mut Vec<kvm_cpuid_entry2>)) -> Vec<String> {
        let mut lesser = host();
        change(&mut lesser);
        match check_host(&host(), &lesser) {
            Err(Error::State(StateError::HostLacks { features })) => features,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_host_can_run_its_own_guests_and_those_of_lesser_hosts() {
        check_host(&host(), &host()).unwrap();
        check_host(&[], &host()).unwrap();
        let mut better = host();
        better[1].ecx |= 1 << 30;
        better.push(leaf(7, 1, [0xffff, 0, 0, 0]));
        check_host(&host(), &better).unwrap();
    }

    #[test]
    fn every_missing_feature_is_named() {
        let features = lacking(|host| {
            host[1].ecx = 0;
            host[2].ebx &= !(1 << 16);
            host[2].edx = 0;
            host[3].eax = 7;
            host[6].eax = 1;
        });
        assert_eq!(
            features,
            [
                "FMA",
                "AVX",
                "AVX512F",
                "leaf 7.0 edx bit 5",
                "XCR0:OPMASK",
                "XCR0:ZMM_Hi256",
                "XCR0:Hi16_ZMM",
                "KVM_CLOCKSOURCE_STABLE"
            ]
        );
    }

    #[test]
    fn a_missing_leaf_lacks_all_its_features() {
        assert_eq!(
            lacking(|host| host.retain(|leaf| leaf.function != 1)),
            ["FMA", "AVX", "SSE"]
        );
    }

    #[test]
    fn the_message_names_the_features_and_what_to_do() {
        let error = StateError::HostLacks {
            features: vec!["AVX2".into(), "FMA".into()],
        };
        assert!(error.to_string().contains("AVX2, FMA; restore it on"));
    }

    #[test]
    fn another_vendor_is_refused() {
        let mut amd = host();
        (amd[0].ebx, amd[0].edx, amd[0].ecx) = (0x6874_7541, 0x6974_6e65, 0x444d_4163);
        let refused = check_host(&host(), &amd).unwrap_err();
        let text = refused.to_string();
        assert!(
            text.contains("GenuineIntel") && text.contains("AuthenticAMD"),
            "{text}"
        );
        assert!(check_host(&host(), &[]).is_err());
    }

    #[test]
    fn bits_about_the_guest_itself_are_no_features() {
        let mut guest = host();
        guest[1].ebx = 3 << 24 | 4 << 16;
        guest[1].ecx |= 1 << 27 | 1 << 31;
        guest[1].edx |= 1 << 28;
        guest[2].ecx |= 1 << 4;
        check_host(&guest, &host()).unwrap();
    }

    #[test]
    fn what_is_never_offered_is_refused_though_the_host_has_it() {
        let mut crafted = host();
        crafted.push(leaf(0xa, 0, [0x0730_0805, 0, 0, 0x603]));
        crafted.push(leaf(0x8000_000a, 0, [1, 0, 0, 0]));
        let refused = check_host(&crafted, &crafted).unwrap_err().to_string();
        assert!(refused.contains("performance counters, SVM"), "{refused}");
        let mut crafted = host();
        crafted[1].ecx |= 1 << 5;
        crafted[2].ecx |= 1 << 7;
        let mut offered = crafted.clone();
        crate::state::cpuid::leave_out_all(&mut offered);
        let refused = check_host(&crafted, &offered).unwrap_err().to_string();
        assert!(refused.contains("VMX, SHSTK"), "{refused}");
    }

    #[test]
    fn another_hypervisor_is_refused() {
        let kvm = [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d];
        let mut host = host();
        host.push(leaf(0x4000_0000, 0, kvm));
        check_host(&host, &host).unwrap();
        // Hyper-V's signature, its leaves, and KVM's at another place.
        let hyper_v = [0x4000_0005, 0x7263_694d, 0x666f_736f, 0x7648_2074];
        for odd in [
            leaf(0x4000_0000, 0, hyper_v),
            leaf(0x4000_0003, 0, [1, 0, 0, 0]),
            leaf(0x4000_0100, 0, kvm),
            leaf(0x4000_0101, 0, [u32::MAX, 0, 0, 0]),
        ] {
            let mut crafted = host.clone();
            crafted.retain(|leaf| leaf.function != odd.function);
            crafted.push(odd);
            let refused = check_host(&crafted, &host).unwrap_err().to_string();
            let named = format!("another hypervisor (leaf {:#x})", odd.function);
            assert!(refused.contains(&named), "{refused}");
        }
    }

    #[test]
    fn a_moved_xsave_component_and_narrower_addresses_are_refused() {
        assert_eq!(
            lacking(|host| host[4].ebx = 640),
            ["XSAVE component 2 at offset 576"]
        );
        assert_eq!(
            lacking(|host| host[5].eax = 0x3027),
            ["48-bit physical addresses"]
        );
    }
}
