//! What a guest is to be told of its CPU at most, so that its snapshots can be restored
//! on any host that has as much.
//!
//! The levels are those of the x86-64 psABI ("x86-64-v2" and so on), which name
//! instructions. Beside those a guest of a level has what every CPU with virtualisation
//! has ([`USUAL`]), and KVM's own features. All else is taken away: other instructions,
//! what protects from speculation ("mitigations" adds what the host has), leaves that
//! hold numbers of this host's CPU, and address bits beyond those of small CPUs.
//!
//! A CPU does not keep a guest from instructions that it was not told of, but for those
//! that need state which XCR0 lacks. A program that uses what it was not told of is on
//! its own.

use std::fmt;
use std::str::FromStr;

use kvm_bindings::kvm_cpuid_entry2;
use serde::{Deserialize, Serialize};

use super::StateError;
use super::features::Features;

/// The levels from the least on, each with what it has beyond the one before.
const LEVELS: [(&str, &str); 4] = [
    (
        "x86-64",
        "FPU TSC MSR PAE CX8 CMOV MMX FXSR SSE SSE2 SYSCALL LM",
    ),
    (
        "x86-64-v2",
        "CMPXCHG16B LAHF_LM POPCNT SSE3 SSE4.1 SSE4.2 SSSE3",
    ),
    ("x86-64-v3", "AVX AVX2 BMI1 BMI2 F16C FMA LZCNT MOVBE XSAVE"),
    ("x86-64-v4", "AVX512F AVX512BW AVX512CD AVX512DQ AVX512VL"),
];

/// What a guest of a level has besides, where the host has it: what kernels take for
/// granted on x86-64, what KVM does itself, how cores are told on AMD's CPUs.
const USUAL: &str = "VME DE PSE MCE APIC SEP MTRR PGE MCA PAT PSE36 CLFLUSH NX \
    x2APIC TSC-DEADLINE TSC_ADJUST TOPOEXT \
    KVM_CLOCKSOURCE KVM_NOP_IO_DELAY KVM_CLOCKSOURCE2 KVM_ASYNC_PF KVM_STEAL_TIME KVM_PV_EOI \
    KVM_PV_UNHALT KVM_PV_TLB_FLUSH KVM_ASYNC_PF_VMEXIT KVM_PV_SEND_IPI KVM_POLL_CONTROL \
    KVM_PV_SCHED_YIELD KVM_ASYNC_PF_INT KVM_CLOCKSOURCE_STABLE";

/// Leaf 0x80000001 edx: what AMD tells there once more of leaf 1 (VME to FXSR).
const AMD_AGAIN: u32 = 0x0183_f3ff;

/// What a guest protects itself from speculation with.
const MITIGATIONS: &str = "SPEC_CTRL STIBP SSBD ARCH_CAPABILITIES MD_CLEAR L1D_FLUSH \
    PSFD IPRED_CTRL RRSBA_CTRL BHI_CTRL MCDT_NO RTM_ALWAYS_ABORT \
    AMD_IBPB AMD_IBRS AMD_STIBP AMD_STIBP_ALWAYS_ON AMD_SSBD VIRT_SSBD AMD_SSB_NO AMD_PSFD \
    AUTOMATIC_IBRS SBPB IBPB_BRTYPE SRSO_NO SRSO_USER_KERNEL_NO SRSO_MSR_FIX";
/// The name that stands for all of these.
const ALL_MITIGATIONS: &str = "mitigations";

/// What does not work without another one. Intel manual volume 1, chapters 13 to 15.
const DEPENDENCIES: &[(&str, &str)] = &[
    (
        "XSAVE",
        "AVX XSAVEOPT XSAVEC XGETBV1 XSAVES XFD PKU MPX AMX-TILE",
    ),
    (
        "AVX",
        "AVX2 FMA F16C VAES VPCLMULQDQ AVX-VNNI AVX-IFMA AVX-VNNI-INT8 AVX-NE-CONVERT \
         AVX-VNNI-INT16 SHA512 SM3 SM4 XOP FMA4",
    ),
    ("AVX2", "AVX512F"),
    (
        "AVX512F",
        "AVX512DQ AVX512-IFMA AVX512PF AVX512ER AVX512CD AVX512BW AVX512VL AVX512-VBMI \
         AVX512-VBMI2 AVX512-VNNI AVX512-BITALG AVX512-VPOPCNTDQ AVX512-4VNNIW AVX512-4FMAPS \
         AVX512-VP2INTERSECT AVX512-BF16 AVX512-FP16 AVX10",
    ),
    ("AMX-TILE", "AMX-BF16 AMX-INT8 AMX-FP16 AMX-COMPLEX"),
];

/// Components of XCR0 and whose state they are.
const COMPONENTS: &[(&str, &str)] = &[
    ("XSAVE", "XCR0:x87 XCR0:SSE"),
    ("AVX", "XCR0:AVX"),
    ("MPX", "XCR0:BNDREGS XCR0:BNDCSR"),
    ("AVX512F", "XCR0:OPMASK XCR0:ZMM_Hi256 XCR0:Hi16_ZMM"),
    ("PKU", "XCR0:PKRU"),
    ("AMX-TILE", "XCR0:TILECFG XCR0:TILEDATA"),
];

/// The address bits of a guest whose memory fits: those of Intel's small CPUs.
const ADDRESS_BITS: u32 = 39;
const VIRTUAL_ADDRESS_BITS: u32 = 48;

/// What a guest is told of its CPU at most.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Baseline {
    /// A number of a level; none for all that the host has.
    level: Option<usize>,
    changes: Vec<Change>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
struct Change {
    name: String,
    features: Features,
    adds: bool,
}

impl FromStr for Baseline {
    type Err = String;

    /// `host` or a level, then names of features with `+` or `-` before each, all
    /// separated by commas.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(',');
        let base = parts.next().unwrap_or_default();
        let level = match base {
            "host" => None,
            base => Some(
                LEVELS
                    .iter()
                    .position(|(name, _)| *name == base)
                    .ok_or_else(|| {
                        let levels = LEVELS.map(|(name, _)| name).join(", ");
                        format!("a CPU is host or one of {levels}, not {base:?}")
                    })?,
            ),
        };
        let changes = parts.map(Change::parse).collect::<Result<_, _>>()?;
        Ok(Self { level, changes })
    }
}

impl TryFrom<String> for Baseline {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Baseline> for String {
    fn from(baseline: Baseline) -> Self {
        baseline.to_string()
    }
}

impl fmt::Display for Baseline {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(self.level.map_or("host", |level| LEVELS[level].0))?;
        for change in &self.changes {
            let sign = if change.adds { '+' } else { '-' };
            write!(out, ",{sign}{}", change.name)?;
        }
        Ok(())
    }
}

impl Change {
    fn parse(text: &str) -> Result<Self, String> {
        let (adds, name) = match text.split_at_checked(1) {
            Some(("+", name)) => (true, name),
            Some(("-", name)) => (false, name),
            _ => {
                return Err(format!(
                    "{text:?} is neither +FEATURE, to have it, nor -FEATURE, to do without"
                ));
            }
        };
        let is_component = name.contains(':');
        let features = match name {
            ALL_MITIGATIONS => Some(Features::of_names(MITIGATIONS)),
            name => Features::named(name).filter(|_| !is_component),
        };
        Ok(Self {
            name: name.to_owned(),
            features: features.ok_or_else(|| {
                format!("no CPU feature is named {name:?}; `show --json` names those of a snapshot")
            })?,
            adds,
        })
    }

    /// All of a group that the host has, and no less of one feature.
    fn may_be_missing(&self) -> bool {
        self.name == ALL_MITIGATIONS
    }
}

impl Baseline {
    /// Whether it takes nothing away.
    #[must_use]
    pub fn is_host(&self) -> bool {
        *self == Self::default()
    }

    /// The CPUID of a guest of this baseline, out of that which a host supports, for a
    /// guest whose memory ends there.
    ///
    /// # Errors
    /// [`StateError::BaselineLacks`] and [`StateError::FeatureNeeds`].
    pub(super) fn limit(
        &self,
        supported: &[kvm_cpuid_entry2],
        memory_end: u64,
    ) -> Result<Vec<kvm_cpuid_entry2>, StateError> {
        if self.is_host() {
            return Ok(supported.to_vec());
        }
        let host = Features::of(supported);
        let mut wanted = self.features(&host)?;
        for (owner, components) in COMPONENTS {
            if !wanted.has(&Features::of_names(owner)) {
                wanted = wanted.without(Features::of_names(components));
            } else if self.level.is_some() {
                wanted = wanted.with(Features::of_names(components).and(host));
            }
        }
        let mut limited = supported.to_vec();
        for entry in &mut limited {
            wanted.limit(entry);
        }
        if self.level.is_some() {
            limited.retain(|entry| is_kept(entry, &wanted));
            for entry in &mut limited {
                make_plain(entry, memory_end);
            }
            limit_leaves(&mut limited);
        }
        fit_xsave(&mut limited);
        Ok(limited)
    }

    /// The features of the guest, but for the components of XCR0 of a level.
    fn features(&self, host: &Features) -> Result<Features, StateError> {
        let mut wanted = match self.level {
            None => *host,
            Some(level) => {
                let needed = level_features(level);
                let lacking = needed.without(*host);
                if !lacking.is_empty() {
                    return Err(StateError::BaselineLacks {
                        baseline: LEVELS[level].0.to_owned(),
                        features: lacking.names(),
                    });
                }
                needed.with(usual().and(*host))
            }
        };
        for change in &self.changes {
            if !change.adds {
                wanted = wanted.without(change.features);
                continue;
            }
            let lacking = change.features.without(*host);
            if !lacking.is_empty() && !change.may_be_missing() {
                return Err(StateError::BaselineLacks {
                    baseline: format!("+{}", change.name),
                    features: lacking.names(),
                });
            }
            wanted = wanted.with(change.features.and(*host));
        }
        // What was not named, and does not work any more, goes with what was taken away.
        for (needed, dependents) in DEPENDENCIES {
            if wanted.has(&Features::of_names(needed)) {
                continue;
            }
            let useless = wanted.and(Features::of_names(dependents));
            let mut added = self.changes.iter().filter(|change| change.adds);
            if let Some(change) = added.find(|change| !change.features.and(useless).is_empty()) {
                return Err(StateError::FeatureNeeds {
                    feature: change.name.clone(),
                    needs: (*needed).to_owned(),
                });
            }
            wanted = wanted.without(useless);
        }
        Ok(wanted)
    }
}

/// Refuses a vCPU that tells its guest of more than it was offered.
pub(super) fn check_limited(
    given: &[kvm_cpuid_entry2],
    offered: &[kvm_cpuid_entry2],
) -> Result<(), StateError> {
    let more = Features::of(given).without(Features::of(offered));
    if more.is_empty() {
        return Ok(());
    }
    Err(StateError::CannotLimit {
        features: more.names(),
    })
}

/// All that a level names.
fn level_features(level: usize) -> Features {
    let names = LEVELS.iter().take(level + 1);
    names.fold(Features::NONE, |set, (_, names)| {
        set.with(Features::of_names(names))
    })
}

fn usual() -> Features {
    let again = kvm_cpuid_entry2 {
        edx: AMD_AGAIN,
        ..Default::default()
    };
    Features::of_names(USUAL).with(Features::of_bits(0x8000_0001, 0, &again))
}

/// The highest level that a CPU of these features has, and what it has beyond.
pub(super) fn level_of(features: Features) -> (Option<&'static str>, Features) {
    let level = (0..LEVELS.len()).rfind(|level| features.has(&level_features(*level)));
    let Some(level) = level else {
        return (None, features);
    };
    let plain = level_features(level).with(usual());
    let components = COMPONENTS.iter().filter(|(owner, _)| {
        let owner = Features::of_names(owner);
        features.has(&owner)
    });
    let plain = components.fold(plain, |set, (_, components)| {
        set.with(Features::of_names(components))
    });
    (Some(LEVELS[level].0), features.without(plain))
}

/// Whether a guest of a level has the leaf: those that hold its features, topology and
/// caches, names, and KVM's.
fn is_kept(entry: &kvm_cpuid_entry2, wanted: &Features) -> bool {
    match (entry.function, entry.index) {
        // Components of the XSAVE area.
        (0xd, component @ 2..32) => {
            let mask = kvm_cpuid_entry2 {
                eax: 1 << component,
                ..Default::default()
            };
            let bit = Features::of_bits(0xd, 0, &mask);
            wanted.has(&bit) && !bit.is_empty()
        }
        (0xd, component) => component < 2,
        (7, subleaf) => subleaf == 0 || !wanted.and(Features::of(&[ones(entry)])).is_empty(),
        (0x8000_0021, _) => !wanted.and(Features::of(&[ones(entry)])).is_empty(),
        (0 | 1 | 2 | 4 | 6 | 0xb, _) => true,
        (0x4000_0000 | 0x4000_0001, _) => true,
        (0x8000_0000..=0x8000_0008 | 0x8000_001d | 0x8000_001e, _) => true,
        _ => false,
    }
}

/// The leaf with every bit set.
fn ones(entry: &kvm_cpuid_entry2) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        eax: u32::MAX,
        ebx: u32::MAX,
        ecx: u32::MAX,
        edx: u32::MAX,
        ..*entry
    }
}

/// Takes numbers away that are of this host's CPU.
fn make_plain(entry: &mut kvm_cpuid_entry2, memory_end: u64) {
    /// Leaf 6, eax: the timer of the local APIC never stops.
    const ARAT: u32 = 1 << 2;
    match (entry.function, entry.index) {
        (6, _) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (entry.eax & ARAT, 0, 0, 0),
        (0x8000_0007, _) => (entry.eax, entry.ebx, entry.ecx) = (0, 0, 0),
        (0x8000_0008, _) => {
            let needed = u64::BITS - memory_end.saturating_sub(1).leading_zeros();
            let physical = (entry.eax & 0xff).min(ADDRESS_BITS.max(needed));
            let virtual_bits = (entry.eax >> 8 & 0xff).min(VIRTUAL_ADDRESS_BITS);
            entry.eax = virtual_bits << 8 | physical;
        }
        (0x8000_0021, _) => (entry.ebx, entry.ecx, entry.edx) = (0, 0, 0),
        // Components that the monitor manages for itself.
        (0xd, 1) => (entry.ecx, entry.edx) = (0, 0),
        _ => {}
    }
}

/// Says in leaves 0, 7 and 0x80000000 which are the last.
fn limit_leaves(list: &mut [kvm_cpuid_entry2]) {
    let last = |within: std::ops::Range<u32>| {
        let functions = list.iter().map(|entry| entry.function);
        functions.filter(|function| within.contains(function)).max()
    };
    let (basic, extended) = (last(0..0x4000_0000), last(0x8000_0000..0xc000_0000));
    let subleaf = list.iter().filter(|entry| entry.function == 7);
    let subleaf = subleaf.map(|entry| entry.index).max();
    for entry in list {
        match (entry.function, entry.index) {
            (0, _) => entry.eax = basic.unwrap_or(0),
            (7, 0) => entry.eax = subleaf.unwrap_or(0),
            (0x8000_0000, _) => entry.eax = extended.unwrap_or(0x8000_0000),
            _ => {}
        }
    }
}

/// Has leaf 0xd tell of the components in XCR0 only, and of the room that they take.
/// Intel manual volume 1, section 13.2.
fn fit_xsave(list: &mut Vec<kvm_cpuid_entry2>) {
    const LEGACY_AND_HEADER_BYTES: u32 = 576;
    let find = |index| {
        list.iter()
            .find(move |entry| (entry.function, entry.index) == (0xd, index))
    };
    let xcr0 = find(0).map_or(0, |entry| entry.eax);
    let supervisor = find(1).map_or(0, |entry| entry.ecx);
    list.retain(|entry| match (entry.function, entry.index) {
        (0xd, component @ 2..32) => (xcr0 | supervisor) & 1 << component != 0,
        _ => true,
    });
    let ends = list.iter().filter_map(|entry| {
        let is_component = entry.function == 0xd && (2..32).contains(&entry.index);
        let is_user = is_component && xcr0 & 1 << entry.index != 0;
        is_user.then(|| entry.ebx.saturating_add(entry.eax))
    });
    let bytes = ends.max().unwrap_or(0).max(LEGACY_AND_HEADER_BYTES);
    for entry in list {
        if (entry.function, entry.index) == (0xd, 0) {
            let bytes = if xcr0 == 0 { 0 } else { bytes };
            (entry.ebx, entry.ecx) = (bytes, bytes);
        }
    }
}

#[cfg(test)]
mod tests;
