//! What a new guest sees of its CPUs.
//!
//! One package, one core per vCPU, one thread per core, the APIC id of a vCPU its
//! index. Sources: Intel manual volume 2 (CPUID), AMD manual volume 3 appendix E,
//! the kernel's `Documentation/virt/kvm/x86/cpuid.rst`.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use super::{MAX_CPUID_ENTRIES, MAX_CPUS, StateError};
use crate::{Error, Result};

/// Leaf 1, ecx.
const VMX: u32 = 1 << 5;
const PDCM: u32 = 1 << 15;
pub(super) const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, edx: leaf 1 ebx tells how many logical processors there are.
const HTT: u32 = 1 << 28;
/// Leaf 7.0, edx: AMX-BF16, AMX-TILE, AMX-INT8. Leaf 7.1, eax: AMX-FP16.
const AMX: u32 = 1 << 22 | 1 << 24 | 1 << 25;
const AMX_FP16: u32 = 1 << 21;
/// Leaf 7.1, edx.
const AMX_COMPLEX: u32 = 1 << 8;
/// Leaf 7.0, ecx and edx; leaf 0xd.1, ecx: the states of shadow stacks and of
/// indirect branch tracking.
const SHSTK: u32 = 1 << 7;
const IBT: u32 = 1 << 20;
const XSS_CET: u32 = 1 << 11 | 1 << 12;
/// Leaf 0xd.0, eax: the tile data of AMX.
const XCR0_TILE_DATA: u32 = 1 << 18;
/// Leaf 0x80000001, ecx.
const CMP_LEGACY: u32 = 1 << 1;
const SVM: u32 = 1 << 2;
const TOPOEXT: u32 = 1 << 22;
const PERFCTR_CORE: u32 = 1 << 23;

/// The CPUID of vCPU `cpu` of `cpus`, out of what KVM supports.
///
/// Left out on purpose: nested virtualisation (VMX, SVM) and performance
/// counters, whose state is not saved; shadow stacks and indirect branch tracking
/// (CET), whose stack pointer is not; and AMX where this process has no permission
/// for its state.
///
/// # Errors
/// [`Error::Cpus`] unless `cpu < cpus <= MAX_CPUS`, and [`StateError::TooMany`]
/// if KVM supports so many entries that there is no room for the topology.
pub fn guest_cpuid(supported: &[kvm_cpuid_entry2], cpu: u32, cpus: u32) -> Result<CpuId> {
    if cpus > MAX_CPUS || cpu >= cpus {
        return Err(Error::Cpus {
            cpus,
            limit: MAX_CPUS,
        });
    }
    let topology = Topology { cpu, cpus };
    let has = |function, register: fn(&kvm_cpuid_entry2) -> u32, bit| {
        let entry = supported
            .iter()
            .find(|entry| (entry.function, entry.index) == (function, 0));
        entry.is_some_and(|entry| register(entry) & bit != 0)
    };
    let has_tiles = has(0xd, |leaf| leaf.eax, XCR0_TILE_DATA);
    let has_topoext = has(0x8000_0001, |leaf| leaf.ecx, TOPOEXT);
    let max_leaf = supported
        .iter()
        .find(|entry| entry.function == 0)
        .map_or(0, |entry| entry.eax);

    let mut entries: Vec<kvm_cpuid_entry2> = supported
        .iter()
        .filter(|entry| !matches!(entry.function, 0xb | 0x1f))
        .copied()
        .collect();
    for entry in &mut entries {
        leave_out(entry, has_tiles);
        topology.apply(entry, has_topoext);
        if entry.function == 1 {
            entry.ecx |= HYPERVISOR;
        }
    }
    for function in [0xb, 0x1f] {
        if function <= max_leaf {
            entries.extend(topology.levels(function));
        }
    }
    CpuId::from_entries(&entries).map_err(|_| {
        Error::from(StateError::TooMany {
            cpu: cpu as usize,
            what: "CPUID entries",
            limit: MAX_CPUID_ENTRIES,
        })
    })
}

/// Says in leaf 1 that there is a TSC deadline timer.
pub(super) fn offer_tsc_deadline(supported: &mut [kvm_cpuid_entry2]) {
    for entry in supported.iter_mut().filter(|entry| entry.function == 1) {
        entry.ecx |= TSC_DEADLINE;
    }
}

/// Takes away from a host's list what no guest is offered.
pub(super) fn leave_out_all(supported: &mut [kvm_cpuid_entry2]) {
    let tiles = |entry: &kvm_cpuid_entry2| {
        (entry.function, entry.index) == (0xd, 0) && entry.eax & XCR0_TILE_DATA != 0
    };
    let has_tiles = supported.iter().any(tiles);
    for entry in supported {
        leave_out(entry, has_tiles);
    }
}

/// Takes away what the machine state does not hold.
fn leave_out(entry: &mut kvm_cpuid_entry2, has_tiles: bool) {
    match (entry.function, entry.index) {
        (1, _) => entry.ecx &= !(VMX | PDCM),
        (7, 0) => {
            entry.ecx &= !SHSTK;
            entry.edx &= !IBT;
            if !has_tiles {
                entry.edx &= !AMX;
            }
        }
        (7, 1) if !has_tiles => {
            entry.eax &= !AMX_FP16;
            entry.edx &= !AMX_COMPLEX;
        }
        (0xd, 1) => entry.ecx &= !XSS_CET,
        (0x8000_0001, _) => entry.ecx &= !(SVM | PERFCTR_CORE),
        // Performance counters of Intel and AMD; SVM.
        (0xa | 0x8000_0022 | 0x8000_000a, _) => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        _ => {}
    }
}

/// Where one vCPU is among all.
struct Topology {
    cpu: u32,
    cpus: u32,
}

impl Topology {
    /// How many bits of an APIC id tell the cores of the package apart.
    fn core_bits(&self) -> u32 {
        self.cpus.next_power_of_two().trailing_zeros()
    }

    /// The APIC ids that the package could have, a power of two.
    fn id_space(&self) -> u32 {
        1 << self.core_bits()
    }

    fn apply(&self, entry: &mut kvm_cpuid_entry2, has_topoext: bool) {
        let many = self.cpus > 1;
        match entry.function {
            1 => {
                // APIC id, logical processors, and what is about the cache line.
                entry.ebx = self.cpu << 24 | self.id_space() << 16 | entry.ebx & 0xffff;
                set(&mut entry.edx, HTT, many);
            }
            // A cache: none of that type ends the list, and stays as it is.
            4 if entry.eax & 0x1f != 0 => {
                let cores = (self.id_space() - 1).min(0x3f);
                entry.eax = cores << 26 | self.cache_sharing(entry.eax) << 14 | entry.eax & 0x3fff;
            }
            0x8000_0001 => set(&mut entry.ecx, CMP_LEGACY, many && has_topoext),
            // Cores, and bits of the APIC id for them. Intel has 0 here.
            0x8000_0008 if has_topoext => {
                entry.ecx = entry.ecx & !0xf0ff | self.core_bits() << 12 | (self.cpus - 1);
            }
            0x8000_001d if has_topoext && entry.eax & 0x1f != 0 => {
                entry.eax = self.cache_sharing(entry.eax) << 14 | entry.eax & 0x3fff;
            }
            // APIC id, core with one thread, the one node of the package.
            0x8000_001e if has_topoext => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (self.cpu, self.cpu, 0, 0);
            }
            _ => {}
        }
    }

    /// One less than the APIC ids that share a cache: caches of the third level on
    /// belong to the package, others to a core.
    fn cache_sharing(&self, eax: u32) -> u32 {
        let level = eax >> 5 & 7;
        if level >= 3 { self.id_space() - 1 } else { 0 }
    }

    /// The extended topology: threads, cores, end of the list.
    fn levels(&self, function: u32) -> [kvm_cpuid_entry2; 3] {
        const THREADS: u32 = 1;
        const CORES: u32 = 2;
        let level = |index, kind: u32, shift, processors| kvm_cpuid_entry2 {
            function,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: processors,
            ecx: kind << 8 | index,
            edx: self.cpu,
            ..Default::default()
        };
        [
            level(0, THREADS, 0, 1),
            level(1, CORES, self.core_bits(), self.cpus),
            level(2, 0, 0, 0),
        ]
    }
}

fn set(register: &mut u32, bit: u32, value: bool) {
    *register = if value {
        *register | bit
    } else {
        *register & !bit
    };
}

#[cfg(test)]
mod tests {
    use super::*;

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

    fn intel() -> Vec<kvm_cpuid_entry2> {
        vec![
            leaf(0, 0, [0x1f, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
            leaf(1, 0, [0xc06f2, 0x0902_0800, VMX | PDCM | TSC_DEADLINE, 1]),
            leaf(4, 0, [0x0400_0121, 1, 2, 3]),
            leaf(4, 3, [0x0400_4163, 1, 2, 3]),
            leaf(4, 4, [0, 0, 0, 0]),
            leaf(7, 0, [1, 0, SHSTK | 1, AMX | IBT | 1 << 26]),
            leaf(0xa, 0, [8, 8, 8, 8]),
            leaf(0xb, 0, [9, 9, 9, 9]),
            leaf(0xd, 0, [0xe7, 0, 0, 0]),
            leaf(0x15, 0, [2, 216, 0, 0]),
            leaf(0x8000_0008, 0, [0x3930, 0, 0, 0]),
            leaf(7, 1, [AMX_FP16 | 1, 0, 0, AMX_COMPLEX | 1]),
            leaf(0xd, 1, [1, 0, XSS_CET | 1 << 8, 0]),
        ]
    }

    fn find(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid
            .as_slice()
            .iter()
            .find(|entry| (entry.function, entry.index) == (function, index))
            .unwrap()
    }

    #[test]
    fn every_vcpu_is_a_core_of_one_package() {
        for (cpus, bits) in [(1, 0), (2, 1), (3, 2), (4, 2), (64, 6)] {
            for cpu in 0..cpus {
                let cpuid = guest_cpuid(&intel(), cpu, cpus).unwrap();
                let one = find(&cpuid, 1, 0);
                assert_eq!(one.ebx, cpu << 24 | (1 << bits) << 16 | 0x0800);
                assert_eq!(one.edx & HTT != 0, cpus > 1);
                for function in [0xb, 0x1f] {
                    let threads = find(&cpuid, function, 0);
                    assert_eq!((threads.eax, threads.ebx, threads.ecx), (0, 1, 0x100));
                    let cores = find(&cpuid, function, 1);
                    assert_eq!((cores.eax, cores.ebx, cores.ecx), (bits, cpus, 0x201));
                    let end = find(&cpuid, function, 2);
                    assert_eq!((end.eax, end.ebx, end.ecx), (0, 0, 2));
                    assert!([threads, cores, end].iter().all(|level| level.edx == cpu));
                }
            }
        }
    }

    #[test]
    fn caches_are_of_a_core_or_of_the_package() {
        let cpuid = guest_cpuid(&intel(), 1, 4).unwrap();
        assert_eq!(find(&cpuid, 4, 0).eax, 3 << 26 | 0x121);
        assert_eq!(find(&cpuid, 4, 3).eax, 3 << 26 | 3 << 14 | 0x163);
        assert_eq!(find(&cpuid, 4, 4).eax, 0);
        let alone = guest_cpuid(&intel(), 0, 1).unwrap();
        assert_eq!(find(&alone, 4, 3).eax, 0x163);
    }

    #[test]
    fn what_is_not_saved_is_not_offered() {
        let cpuid = guest_cpuid(&intel(), 0, 1).unwrap();
        assert_eq!(find(&cpuid, 1, 0).ecx, HYPERVISOR | TSC_DEADLINE);
        assert_eq!(find(&cpuid, 7, 0).edx, 1 << 26, "no AMX without its state");
        assert_eq!(find(&cpuid, 7, 0).ecx, 1);
        assert_eq!((find(&cpuid, 7, 1).eax, find(&cpuid, 7, 1).edx), (1, 1));
        assert_eq!(find(&cpuid, 0xd, 1).ecx, 1 << 8);
        let counters = find(&cpuid, 0xa, 0);
        assert_eq!(
            (counters.eax, counters.ebx, counters.ecx, counters.edx),
            (0, 0, 0, 0)
        );
        let mut with_tiles = intel();
        with_tiles[8].eax |= XCR0_TILE_DATA;
        let cpuid = guest_cpuid(&with_tiles, 0, 1).unwrap();
        assert_eq!(find(&cpuid, 7, 0).edx, AMX | 1 << 26);
        assert_eq!(find(&cpuid, 7, 1).edx, AMX_COMPLEX | 1);
    }

    #[test]
    fn other_leaves_stay_as_they_are() {
        let cpuid = guest_cpuid(&intel(), 2, 4).unwrap();
        assert_eq!(find(&cpuid, 0x15, 0), intel()[9]);
        assert_eq!(
            find(&cpuid, 0x8000_0008, 0),
            intel()[10],
            "AMD's fields only on AMD"
        );
    }

    #[test]
    fn amd_cores_are_told_in_its_own_leaves() {
        let amd = [
            leaf(0, 0, [0x10, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
            leaf(0x8000_0001, 0, [0, 0, TOPOEXT | SVM | PERFCTR_CORE, 0]),
            leaf(0x8000_0008, 0, [0x3030, 0, 0xf_70ff, 0]),
            leaf(0x8000_001d, 3, [0x0001_c163, 1, 2, 3]),
            leaf(0x8000_001e, 0, [7, 7, 7, 7]),
        ];
        let cpuid = guest_cpuid(&amd, 2, 4).unwrap();
        assert_eq!(find(&cpuid, 0x8000_0001, 0).ecx, TOPOEXT | CMP_LEGACY);
        assert_eq!(find(&cpuid, 0x8000_0008, 0).ecx, 0xf_2003);
        assert_eq!(find(&cpuid, 0x8000_001d, 3).eax, 3 << 14 | 0x163);
        let ids = find(&cpuid, 0x8000_001e, 0);
        assert_eq!((ids.eax, ids.ebx, ids.ecx), (2, 2, 0));
        assert!(cpuid.as_slice().iter().all(|entry| entry.function != 0x1f));
    }

    #[test]
    fn vcpus_that_cannot_be_are_refused() {
        for (cpu, cpus) in [(0, 0), (1, 1), (4, 2), (0, 65), (u32::MAX, u32::MAX)] {
            let refused = guest_cpuid(&intel(), cpu, cpus);
            assert!(
                matches!(refused, Err(Error::Cpus { .. })),
                "{cpu} of {cpus}"
            );
        }
    }

    #[test]
    fn more_entries_than_kvm_takes_are_an_error() {
        let many = vec![leaf(0, 0, [0x1f, 0, 0, 0]); 256];
        assert!(matches!(
            guest_cpuid(&many, 0, 1),
            Err(Error::State(StateError::TooMany { .. }))
        ));
    }
}
