//! The names of CPU features, and which CPUID bits are features at all.
//!
//! Sources: Intel manual volume 2 (CPUID), AMD manual volume 3 appendix E, the
//! kernel's `arch/x86/include/asm/cpufeatures.h` and
//! `Documentation/virt/kvm/x86/cpuid.rst`.

use kvm_bindings::kvm_cpuid_entry2;

/// A register in which each bit says that the CPU can do something.
pub(super) struct FeatureWord {
    pub function: u32,
    pub index: u32,
    register: Register,
    /// Bits that say something else: about the guest itself, how many of something
    /// there are, or what the CPU cannot do.
    ignored: u32,
    /// From bit 0 on, `-` for a bit without a name.
    names: &'static str,
}

#[derive(Clone, Copy)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl FeatureWord {
    /// The bits of the word in `entry` that are features.
    pub fn bits(&self, entry: &kvm_cpuid_entry2) -> u32 {
        let value = match self.register {
            Register::Eax => entry.eax,
            Register::Ebx => entry.ebx,
            Register::Ecx => entry.ecx,
            Register::Edx => entry.edx,
        };
        value & !self.ignored
    }

    /// Takes away the features of the word in `entry` that are not among these bits.
    fn limit(&self, entry: &mut kvm_cpuid_entry2, bits: u32) {
        let value = match self.register {
            Register::Eax => &mut entry.eax,
            Register::Ebx => &mut entry.ebx,
            Register::Ecx => &mut entry.ecx,
            Register::Edx => &mut entry.edx,
        };
        *value &= bits | self.ignored;
    }

    /// Whether the word is of this leaf.
    fn is_of(&self, entry: &kvm_cpuid_entry2) -> bool {
        (self.function, self.index) == (entry.function, entry.index)
    }

    /// The name of a bit.
    pub fn name(&self, bit: u32) -> String {
        match self.names.split_whitespace().nth(bit as usize) {
            Some(name) if name != "-" => name.to_owned(),
            _ => self.place(bit),
        }
    }

    fn place(&self, bit: u32) -> String {
        let register = match self.register {
            Register::Eax => "eax",
            Register::Ebx => "ebx",
            Register::Ecx => "ecx",
            Register::Edx => "edx",
        };
        match self.function {
            7 | 0xd => format!(
                "leaf {:x}.{} {register} bit {bit}",
                self.function, self.index
            ),
            function => format!("leaf {function:#x} {register} bit {bit}"),
        }
    }
}

const fn word(
    (function, index, register): (u32, u32, Register),
    ignored: u32,
    names: &'static str,
) -> FeatureWord {
    FeatureWord {
        function,
        index,
        register,
        ignored,
        names,
    }
}

/// Every word of features, in the order in which they are told.
pub(super) const FEATURE_WORDS: &[FeatureWord] = &[
    // Ignored: OSXSAVE, which mirrors the guest's CR4, and the hypervisor bit,
    // which the monitor sets.
    word(
        (1, 0, Register::Ecx),
        1 << 27 | 1 << 31,
        "SSE3 PCLMULQDQ DTES64 MONITOR DS-CPL VMX SMX EIST TM2 SSSE3 CNXT-ID SDBG FMA CMPXCHG16B \
         xTPR PDCM - PCID DCA SSE4.1 SSE4.2 x2APIC MOVBE POPCNT TSC-DEADLINE AES XSAVE OSXSAVE \
         AVX F16C RDRAND HYPERVISOR",
    ),
    // Ignored: HTT, which tells how many vCPUs there are.
    word(
        (1, 0, Register::Edx),
        1 << 28,
        "FPU VME DE PSE TSC MSR PAE MCE CX8 APIC - SEP MTRR PGE MCA CMOV PAT PSE36 PSN CLFLUSH - \
         DS ACPI MMX FXSR SSE SSE2 SS HTT TM IA64 PBE",
    ),
    // Ignored: bits that say that the FPU does less (6, 13).
    word(
        (7, 0, Register::Ebx),
        1 << 6 | 1 << 13,
        "FSGSBASE TSC_ADJUST SGX BMI1 HLE AVX2 - SMEP BMI2 ERMS INVPCID RTM RDT-M - MPX RDT-A \
         AVX512F AVX512DQ RDSEED ADX SMAP AVX512-IFMA PCOMMIT CLFLUSHOPT CLWB INTEL_PT AVX512PF \
         AVX512ER AVX512CD SHA AVX512BW AVX512VL",
    ),
    // Ignored: OSPKE, which mirrors the guest's CR4, and MAWAU, a number.
    word(
        (7, 0, Register::Ecx),
        1 << 4 | 0x1f << 17,
        "PREFETCHWT1 AVX512-VBMI UMIP PKU OSPKE WAITPKG AVX512-VBMI2 SHSTK GFNI VAES VPCLMULQDQ \
         AVX512-VNNI AVX512-BITALG TME AVX512-VPOPCNTDQ - LA57 - - - - - RDPID KL \
         BUS_LOCK_DETECT CLDEMOTE - MOVDIRI MOVDIR64B ENQCMD SGX_LC PKS",
    ),
    word(
        (7, 0, Register::Edx),
        0,
        "- SGX-KEYS AVX512-4VNNIW AVX512-4FMAPS FSRM - - - AVX512-VP2INTERSECT SRBDS_CTRL \
         MD_CLEAR RTM_ALWAYS_ABORT - TSX_FORCE_ABORT SERIALIZE HYBRID TSXLDTRK - PCONFIG \
         ARCH_LBR IBT - AMX-BF16 AVX512-FP16 AMX-TILE AMX-INT8 SPEC_CTRL STIBP L1D_FLUSH \
         ARCH_CAPABILITIES CORE_CAPABILITIES SSBD",
    ),
    word(
        (7, 1, Register::Eax),
        0,
        "SHA512 SM3 SM4 RAO-INT AVX-VNNI AVX512-BF16 LASS CMPCCXADD ARCHPERFMONEXT - FZRM FSRS \
         FSRC - - - - FRED LKGS WRMSRNS NMI_SRC AMX-FP16 HRESET AVX-IFMA - - LAM MSRLIST",
    ),
    word(
        (7, 1, Register::Edx),
        0,
        "- - - - AVX-VNNI-INT8 AVX-NE-CONVERT - - AMX-COMPLEX - AVX-VNNI-INT16 - - - PREFETCHITI \
         - - UIRET_UIF CET_SSS AVX10",
    ),
    word(
        (7, 2, Register::Edx),
        0,
        "PSFD IPRED_CTRL RRSBA_CTRL DDPD_U BHI_CTRL MCDT_NO",
    ),
    word(
        (0xd, 0, Register::Eax),
        0,
        "XCR0:x87 XCR0:SSE XCR0:AVX XCR0:BNDREGS XCR0:BNDCSR XCR0:OPMASK XCR0:ZMM_Hi256 \
         XCR0:Hi16_ZMM - XCR0:PKRU - - - - - - - XCR0:TILECFG XCR0:TILEDATA",
    ),
    word((0xd, 0, Register::Edx), 0, ""),
    word(
        (0xd, 1, Register::Eax),
        0,
        "XSAVEOPT XSAVEC XGETBV1 XSAVES XFD",
    ),
    word((0xd, 1, Register::Ecx), 0, ""),
    // Ignored: CMP_LEGACY, which tells how many vCPUs there are.
    word(
        (0x8000_0001, 0, Register::Ecx),
        1 << 1,
        "LAHF_LM CMP_LEGACY SVM EXTAPIC CR8_LEGACY LZCNT SSE4A MISALIGNSSE 3DNOWPREFETCH OSVW \
         IBS XOP SKINIT WDT - LWP FMA4 TCE - NODEID_MSR - TBM TOPOEXT PERFCTR_CORE PERFCTR_NB - \
         BPEXT PTSC PERFCTR_LLC MWAITX",
    ),
    word(
        (0x8000_0001, 0, Register::Edx),
        0,
        "- - - - - - - - - - - SYSCALL - - - - - - - MP NX - MMXEXT - - FXSR_OPT PDPE1GB RDTSCP \
         - LM 3DNOWEXT 3DNOW",
    ),
    word(
        (0x8000_0007, 0, Register::Edx),
        0,
        "- - - - - - - - INVARIANT_TSC",
    ),
    word(
        (0x8000_0008, 0, Register::Ebx),
        0,
        "CLZERO - XSAVEERPTR - RDPRU - - - - WBNOINVD - - AMD_IBPB - AMD_IBRS AMD_STIBP - \
         AMD_STIBP_ALWAYS_ON - - - - - - AMD_SSBD VIRT_SSBD AMD_SSB_NO - AMD_PSFD",
    ),
    // Ignored: what newer kernels tell of every CPU that has it, and older ones do not
    // (2, 6, 9).
    word(
        (0x8000_0021, 0, Register::Eax),
        1 << 2 | 1 << 6 | 1 << 9,
        "NO_NESTED_DATA_BP FSGS_NON_SERIALIZING LFENCE_SERIALIZING SMM_PGCFG_LOCK - - \
         NULL_SEL_CLEARS_BASE UPPER_ADDRESS_IGNORE AUTOMATIC_IBRS NO_SMM_CTL_MSR AMD_FSRS AMD_FSRC \
         - PREFETCH_CTL_MSR - - - CPUID_USER_DIS - - PREFETCHI - - - - - - SBPB IBPB_BRTYPE \
         SRSO_NO SRSO_USER_KERNEL_NO SRSO_MSR_FIX",
    ),
    word(
        (0x4000_0001, 0, Register::Eax),
        0,
        "KVM_CLOCKSOURCE KVM_NOP_IO_DELAY KVM_MMU_OP KVM_CLOCKSOURCE2 KVM_ASYNC_PF \
         KVM_STEAL_TIME KVM_PV_EOI KVM_PV_UNHALT - KVM_PV_TLB_FLUSH KVM_ASYNC_PF_VMEXIT \
         KVM_PV_SEND_IPI KVM_POLL_CONTROL KVM_PV_SCHED_YIELD KVM_ASYNC_PF_INT \
         KVM_MSI_EXT_DEST_ID KVM_HC_MAP_GPA_RANGE KVM_MIGRATION_CONTROL - - - - - - \
         KVM_CLOCKSOURCE_STABLE",
    ),
];

/// A set of features.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Features([u32; FEATURE_WORDS.len()]);

impl Features {
    pub const NONE: Self = Self([0; FEATURE_WORDS.len()]);

    /// The features of a CPU.
    pub fn of(cpuid: &[kvm_cpuid_entry2]) -> Self {
        let bits = |word: &FeatureWord| {
            let entry = cpuid.iter().find(|entry| word.is_of(entry));
            entry.map_or(0, |entry| word.bits(entry))
        };
        let mut set = Self::NONE;
        for (has, word) in set.0.iter_mut().zip(FEATURE_WORDS) {
            *has = bits(word);
        }
        set
    }

    /// The feature of this name, written in any case and with or without `_`, `-` and
    /// `.`; none if there is no such.
    pub fn named(name: &str) -> Option<Self> {
        let wanted = plain(name);
        for (number, word) in FEATURE_WORDS.iter().enumerate() {
            let names = word.names.split_whitespace();
            let bit = names
                .enumerate()
                .position(|(bit, name)| word.ignored & 1 << bit == 0 && plain(name) == wanted);
            if let Some(bit) = bit.filter(|_| !wanted.is_empty()) {
                let mut set = Self::NONE;
                set.0[number] = 1 << bit;
                return Some(set);
            }
        }
        None
    }

    /// The features of these names, which there are.
    pub fn of_names(names: &str) -> Self {
        let sets = names.split_whitespace().filter_map(Self::named);
        sets.fold(Self::NONE, Self::with)
    }

    /// The bits of one register, for those that have no names.
    pub fn of_bits(function: u32, index: u32, entry: &kvm_cpuid_entry2) -> Self {
        Self::of(&[kvm_cpuid_entry2 {
            function,
            index,
            ..*entry
        }])
    }

    pub fn is_empty(&self) -> bool {
        *self == Self::NONE
    }

    pub fn has(&self, other: &Self) -> bool {
        other.without(*self).is_empty()
    }

    pub fn with(self, other: Self) -> Self {
        self.merged(other, |one, other| one | other)
    }

    pub fn without(self, other: Self) -> Self {
        self.merged(other, |one, other| one & !other)
    }

    pub fn and(self, other: Self) -> Self {
        self.merged(other, |one, other| one & other)
    }

    fn merged(mut self, other: Self, merge: impl Fn(u32, u32) -> u32) -> Self {
        for (one, other) in self.0.iter_mut().zip(other.0) {
            *one = merge(*one, other);
        }
        self
    }

    /// Their names, in the order in which they are told.
    pub fn names(&self) -> Vec<String> {
        let words = self.0.iter().zip(FEATURE_WORDS);
        words
            .flat_map(|(bits, word)| {
                let set = (0..u32::BITS).filter(move |bit| bits & 1 << bit != 0);
                set.map(|bit| word.name(bit))
            })
            .collect()
    }

    /// Takes away all other features from a leaf.
    pub fn limit(&self, entry: &mut kvm_cpuid_entry2) {
        for (bits, word) in self.0.iter().zip(FEATURE_WORDS) {
            if word.is_of(entry) {
                word.limit(entry, *bits);
            }
        }
    }
}

/// A name as it is compared.
fn plain(name: &str) -> String {
    let letters = name
        .chars()
        .filter(|letter| !matches!(letter, '_' | '-' | '.'));
    letters.flat_map(char::to_lowercase).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_found_by_their_names() {
        let sse = Features::named("SSE4.2").unwrap();
        assert_eq!(sse.names(), ["SSE4.2"]);
        for name in ["sse4.2", "sse4_2", "SSE42", "sse4-2"] {
            assert_eq!(Features::named(name), Some(sse), "{name}");
        }
        for name in ["", "-", "_", "sse9", "HTT", "OSXSAVE", "leaf 7.0 edx bit 5"] {
            assert_eq!(Features::named(name), None, "{name}");
        }
        // Every name is of one feature.
        let names = FEATURE_WORDS
            .iter()
            .flat_map(|word| word.names.split_whitespace())
            .filter(|name| *name != "-");
        let mut plain: Vec<_> = names.map(plain).collect();
        let count = plain.len();
        plain.sort();
        plain.dedup();
        assert_eq!(plain.len(), count);
    }

    fn name(function: u32, index: u32, register: &str, bit: u32) -> String {
        let word = FEATURE_WORDS
            .iter()
            .find(|word| {
                (word.function, word.index) == (function, index) && word.place(0).contains(register)
            })
            .unwrap();
        word.name(bit)
    }

    #[test]
    fn names_are_at_their_bits() {
        for (function, index, register, bit, expected) in [
            (1, 0, "ecx", 12, "FMA"),
            (1, 0, "ecx", 24, "TSC-DEADLINE"),
            (1, 0, "ecx", 30, "RDRAND"),
            (1, 0, "edx", 26, "SSE2"),
            (1, 0, "edx", 31, "PBE"),
            (7, 0, "ebx", 5, "AVX2"),
            (7, 0, "ebx", 16, "AVX512F"),
            (7, 0, "ebx", 31, "AVX512VL"),
            (7, 0, "ecx", 16, "LA57"),
            (7, 0, "ecx", 22, "RDPID"),
            (7, 0, "ecx", 31, "PKS"),
            (7, 0, "edx", 24, "AMX-TILE"),
            (7, 0, "edx", 31, "SSBD"),
            (7, 1, "eax", 5, "AVX512-BF16"),
            (7, 1, "eax", 26, "LAM"),
            (7, 1, "edx", 8, "AMX-COMPLEX"),
            (7, 1, "edx", 19, "AVX10"),
            (0x8000_0021, 0, "eax", 8, "AUTOMATIC_IBRS"),
            (0x8000_0021, 0, "eax", 17, "CPUID_USER_DIS"),
            (0x8000_0021, 0, "eax", 27, "SBPB"),
            (0x8000_0021, 0, "eax", 31, "SRSO_MSR_FIX"),
            (0xd, 0, "eax", 9, "XCR0:PKRU"),
            (0xd, 0, "eax", 18, "XCR0:TILEDATA"),
            (0xd, 1, "eax", 4, "XFD"),
            (0x8000_0001, 0, "ecx", 22, "TOPOEXT"),
            (0x8000_0001, 0, "edx", 20, "NX"),
            (0x8000_0001, 0, "edx", 29, "LM"),
            (0x8000_0007, 0, "edx", 8, "INVARIANT_TSC"),
            (0x8000_0008, 0, "ebx", 24, "AMD_SSBD"),
            (0x4000_0001, 0, "eax", 14, "KVM_ASYNC_PF_INT"),
            (0x4000_0001, 0, "eax", 24, "KVM_CLOCKSOURCE_STABLE"),
        ] {
            assert_eq!(name(function, index, register, bit), expected);
        }
    }

    #[test]
    fn a_bit_without_a_name_is_told_by_its_place() {
        assert_eq!(name(7, 0, "edx", 5), "leaf 7.0 edx bit 5");
        assert_eq!(name(0xd, 1, "ecx", 11), "leaf d.1 ecx bit 11");
        assert_eq!(name(0x8000_0001, 0, "edx", 0), "leaf 0x80000001 edx bit 0");
    }
}
