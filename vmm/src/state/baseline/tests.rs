//! Baselines on a made-up host that has everything.

use super::*;
use crate::state::check_host;
use crate::state::cpuid::guest_cpuid;

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

/// A CPU with every feature that has a name, and what other CPUs do not have.
fn host() -> Vec<kvm_cpuid_entry2> {
    const ALL: u32 = u32::MAX;
    vec![
        leaf(0, 0, [0x1f, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
        leaf(1, 0, [0xc06f2, 0x0902_0800, ALL, ALL]),
        leaf(4, 0, [0x0400_0121, 1, 2, 3]),
        leaf(5, 0, [64, 64, 3, 0x2020]),
        leaf(6, 0, [0x77, 2, 1, 0]),
        leaf(7, 0, [2, ALL, ALL, ALL]),
        leaf(7, 1, [ALL, 0, 0, ALL]),
        leaf(7, 2, [0, 0, 0, ALL]),
        leaf(0xd, 0, [0x602e7, 11008, 11008, 0]),
        leaf(0xd, 1, [ALL, 2696, 0x1800, 0]),
        leaf(0xd, 2, [256, 576, 0, 0]),
        leaf(0xd, 5, [64, 1088, 0, 0]),
        leaf(0xd, 6, [512, 1152, 0, 0]),
        leaf(0xd, 7, [1024, 1664, 0, 0]),
        leaf(0xd, 9, [8, 2688, 0, 0]),
        leaf(0xd, 11, [16, 0, 1, 0]),
        leaf(0xd, 17, [64, 2752, 2, 0]),
        leaf(0xd, 18, [8192, 2816, 6, 0]),
        leaf(0x12, 0, [3, 0, 0, 0]),
        leaf(0x15, 0, [2, 216, 0, 0]),
        leaf(0x1d, 0, [1, 0, 0, 0]),
        leaf(
            0x4000_0000,
            0,
            [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d],
        ),
        leaf(0x4000_0001, 0, [ALL, 0, 0, 0]),
        leaf(0x8000_0000, 0, [0x8000_0021, 0, 0, 0]),
        leaf(0x8000_0001, 0, [0, 0, ALL, ALL]),
        leaf(0x8000_0007, 0, [1, 2, 3, ALL]),
        leaf(0x8000_0008, 0, [0x34_3934, ALL, 0, 0]),
        leaf(0x8000_001b, 0, [ALL, 0, 0, 0]),
        leaf(0x8000_0021, 0, [ALL, 7, 7, 7]),
    ]
}

fn limited(text: &str) -> Vec<kvm_cpuid_entry2> {
    let baseline: Baseline = text.parse().unwrap();
    assert_eq!(baseline.to_string(), text);
    baseline.limit(&host(), 1 << 30).unwrap()
}

fn find(list: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
    let found = list
        .iter()
        .find(|leaf| (leaf.function, leaf.index) == (function, index));
    *found.unwrap()
}

fn names(text: &str) -> Vec<String> {
    Features::of(&limited(text)).names()
}

#[test]
fn every_name_in_the_tables_is_of_a_feature() {
    let lists = [USUAL, MITIGATIONS].into_iter();
    let levels = LEVELS.iter().map(|(_, names)| *names);
    let pairs = DEPENDENCIES.iter().chain(COMPONENTS);
    let pairs = pairs.flat_map(|(one, names)| [*one, *names]);
    let all = lists.chain(levels).chain(pairs);
    for name in all.flat_map(str::split_whitespace) {
        assert!(Features::named(name).is_some(), "{name}");
    }
}

#[test]
fn the_host_is_left_as_it_is() {
    assert_eq!(limited("host"), host());
    assert!("host".parse::<Baseline>().unwrap().is_host());
    assert!(!"x86-64".parse::<Baseline>().unwrap().is_host());
}

#[test]
fn a_level_has_what_it_names_and_what_is_usual() {
    let first = names("x86-64");
    for (number, (level, names_of_it)) in LEVELS.iter().enumerate() {
        let has = names(level);
        for name in names_of_it.split_whitespace() {
            let canonical = Features::named(name).unwrap().names().remove(0);
            assert!(has.contains(&canonical), "{level}: {name}");
        }
        let (found, beyond) = level_of(Features::of(&limited(level)));
        assert_eq!(found, Some(*level));
        assert!(beyond.is_empty(), "{level}: {:?}", beyond.names());
        assert!(first.iter().all(|name| has.contains(name)), "{level}");
        for name in [
            "AES",
            "RDRAND",
            "SMEP",
            "SPEC_CTRL",
            "XSAVES",
            "INVARIANT_TSC",
            "PCID",
        ] {
            assert!(!has.contains(&name.to_owned()), "{level}: {name}");
        }
        assert_eq!(has.contains(&"XSAVE".to_owned()), number >= 2, "{level}");
    }
}

#[test]
fn a_guest_of_a_level_runs_wherever_that_is_there() {
    let guest = |text| {
        guest_cpuid(&limited(text), 1, 2)
            .unwrap()
            .as_slice()
            .to_vec()
    };
    for (number, (level, _)) in LEVELS.iter().enumerate() {
        for (better, _) in &LEVELS[number..] {
            check_host(&guest(level), &limited(better)).unwrap();
        }
        check_host(&guest(level), &host()).unwrap();
        for (lesser, _) in &LEVELS[..number] {
            let refused = check_host(&guest(level), &limited(lesser)).unwrap_err();
            assert!(refused.to_string().contains("lacks CPU features"));
        }
    }
    // Also one of AES, and nowhere else.
    check_host(&guest("x86-64-v2,+aes"), &limited("x86-64-v3,+aes")).unwrap();
    let refused = check_host(&guest("x86-64-v2,+aes"), &limited("x86-64-v3")).unwrap_err();
    assert!(refused.to_string().contains("AES;"), "{refused}");
}

#[test]
fn leaves_of_this_cpu_are_taken_away() {
    let list = limited("x86-64-v3");
    let functions: Vec<_> = list.iter().map(|leaf| leaf.function).collect();
    for gone in [5, 0x12, 0x15, 0x1d, 0x8000_001b, 0x8000_0021] {
        assert!(!functions.contains(&gone), "{gone:#x}");
    }
    assert_eq!(find(&list, 0, 0).eax, 0xd);
    assert_eq!(find(&list, 7, 0).eax, 0);
    assert_eq!(find(&list, 6, 0), leaf(6, 0, [4, 0, 0, 0]));
    assert_eq!(find(&list, 0x8000_0000, 0).eax, 0x8000_0008);
    assert_eq!(find(&list, 0x8000_0008, 0).eax, 0x3027, "39 and 48 bits");
    let large: Baseline = "x86-64-v3".parse().unwrap();
    let large = large.limit(&host(), (1 << 40) + (1 << 30)).unwrap();
    assert_eq!(find(&large, 0x8000_0008, 0).eax, 0x3029);
    let safe = limited("x86-64-v3,+mitigations");
    assert_eq!(find(&safe, 0x8000_0000, 0).eax, 0x8000_0021);
    assert_eq!(find(&safe, 0x8000_0021, 0).ebx, 0);
    assert!(Features::of(&safe).has(&Features::of_names("SPEC_CTRL AMD_SSB_NO SRSO_NO")));
}

#[test]
fn the_xsave_area_is_that_of_the_features() {
    for (text, xcr0, bytes) in [
        ("x86-64-v2", 0, 0),
        ("x86-64-v3", 7, 832),
        ("x86-64-v3,+pku", 0x207, 2696),
        ("x86-64-v4", 0xe7, 2688),
        ("host,-amx-tile", 0x2e7, 2696),
        ("host,-avx512f", 0x60207, 11008),
        ("host,-xsave", 0, 0),
    ] {
        let list = limited(text);
        let leaf = find(&list, 0xd, 0);
        assert_eq!(
            (leaf.eax, leaf.ebx, leaf.ecx),
            (xcr0, bytes, bytes),
            "{text}"
        );
        let components = list.iter().filter(|leaf| leaf.function == 0xd);
        let user = components.filter(|leaf| leaf.index >= 2 && leaf.ecx & 1 == 0);
        assert_eq!(user.count(), (xcr0 >> 2).count_ones() as usize, "{text}");
    }
}

#[test]
fn what_depends_on_a_feature_goes_with_it() {
    let without = names("host,-avx");
    for gone in ["AVX", "AVX2", "FMA", "AVX512F", "AVX512VL", "VAES"] {
        assert!(!without.contains(&gone.to_owned()), "{gone}");
    }
    assert!(without.contains(&"AES".to_owned()));
    let baseline: Baseline = "x86-64-v2,+avx2".parse().unwrap();
    let refused = baseline.limit(&host(), 0).unwrap_err();
    assert!(
        matches!(&refused, StateError::FeatureNeeds { feature, needs }
            if feature == "avx2" && needs == "AVX"),
        "{refused}"
    );
    limited("x86-64-v2,+xsave,+avx,+avx2");
}

#[test]
fn a_host_with_less_is_named_what_it_lacks() {
    let lesser = limited("x86-64-v3");
    let refusal = |text: &str| {
        let baseline: Baseline = text.parse().unwrap();
        baseline.limit(&lesser, 0).unwrap_err().to_string()
    };
    let refused = refusal("x86-64-v4");
    assert!(
        refused.contains("(x86-64-v4): AVX512F, AVX512DQ, AVX512CD, AVX512BW, AVX512VL;"),
        "{refused}"
    );
    assert!(refusal("x86-64-v3,+aes").contains("(+aes): AES;"));
    // A group is what there is of it.
    let group: Baseline = "x86-64-v3,+mitigations".parse().unwrap();
    assert_eq!(group.limit(&lesser, 0).unwrap(), lesser);
}

#[test]
fn a_kvm_that_takes_nothing_away_is_told() {
    check_limited(&limited("x86-64-v2"), &limited("x86-64-v3")).unwrap();
    let refused = check_limited(&limited("x86-64-v2,+aes"), &limited("x86-64-v3")).unwrap_err();
    assert!(
        matches!(&refused, StateError::CannotLimit { features } if *features == ["AES"]),
        "{refused}"
    );
}

#[test]
fn what_is_no_baseline_is_refused() {
    for text in [
        "",
        "x86-64-v5",
        "X86-64-V2",
        "haswell",
        "host,",
        "host,aes",
        "host,+",
        "host,+nonsense",
        "host,-xcr0:avx",
        "+aes",
        "x86-64-v2 ,+aes",
    ] {
        assert!(text.parse::<Baseline>().is_err(), "{text}");
    }
}
