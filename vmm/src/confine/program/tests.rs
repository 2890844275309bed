use std::collections::BTreeSet;

use super::*;
use crate::confine::role::Role;
use crate::confine::rules::{self, Known};

/// The call that a program is asked about.
#[derive(Clone, Copy, Debug)]
struct Call {
    arch: u32,
    number: u32,
    arguments: [u64; 6],
}

impl Call {
    /// As the kernel shows it to the program (`struct seccomp_data`).
    fn data(&self) -> [u32; 16] {
        let mut data = [0; 16];
        data[..2].copy_from_slice(&[self.number, self.arch]);
        for (words, long) in data[4..].chunks_exact_mut(2).zip(self.arguments) {
            words.copy_from_slice(&[long as u32, (long >> 32) as u32]);
        }
        data
    }
}

/// What the kernel does.
fn decide(program: &[sock_filter], call: &Call) -> u32 {
    let data = call.data();
    let (mut at, mut loaded) = (0, 0);
    loop {
        let it = &program[at];
        let jump = |holds: bool| usize::from(if holds { it.jt } else { it.jf });
        at += 1;
        match it.code {
            LOAD => loaded = data[it.k as usize / 4],
            JUMP => at += it.k as usize,
            IF_EQUAL => at += jump(loaded == it.k),
            IF_AT_LEAST => at += jump(loaded >= it.k),
            IF_ANY_BIT => at += jump(loaded & it.k != 0),
            RETURN => return it.k,
            other => panic!("instruction {other:#x}"),
        }
    }
}

/// What the rules say.
fn meant(rules: &Rules, call: &Call) -> u32 {
    let holds = |condition: &Argument| {
        let of = |number: u8| call.arguments[usize::from(number)];
        match *condition {
            Argument::Is(number, value) => of(number) as u32 == value,
            Argument::Lacks(number, bits) => of(number) as u32 & bits == 0,
            Argument::IsLong(number, value) => of(number) == value,
        }
    };
    match rules.get(&call.number) {
        _ if call.arch != AUDIT_ARCH_X86_64 => libc::SECCOMP_RET_KILL_PROCESS,
        Some(Verdict::Allow) => libc::SECCOMP_RET_ALLOW,
        Some(Verdict::If(any)) if any.iter().any(|all| all.iter().all(holds)) => {
            libc::SECCOMP_RET_ALLOW
        }
        Some(Verdict::Fail(error)) => libc::SECCOMP_RET_ERRNO | u32::from(*error),
        Some(Verdict::If(_)) | None => libc::SECCOMP_RET_KILL_PROCESS,
    }
}

/// Values around those that the rules name, also such whose upper half is not zero.
fn values(rules: &Rules) -> BTreeSet<u64> {
    let named = rules.values().filter_map(|verdict| match verdict {
        Verdict::If(any) => Some(any.iter().flatten()),
        Verdict::Allow | Verdict::Fail(_) => None,
    });
    let named = named.flatten().map(|condition| match *condition {
        Argument::Is(_, value) | Argument::Lacks(_, value) => u64::from(value),
        Argument::IsLong(_, value) => value,
    });
    let around = named.flat_map(|value| {
        let beyond = value | 1 << 32;
        [
            value,
            value ^ 1,
            value << 1,
            beyond,
            beyond ^ 2,
            value << 32,
        ]
    });
    around.chain([0, 1, u64::MAX]).collect()
}

/// Compares the program with its rules, for every number and many arguments.
fn check(rules: &Rules) -> usize {
    let program = compile(rules).unwrap();
    let values = values(rules);
    let beyond = rules.keys().max().map_or(1, |most| most + 3);
    let odd = [0x4000_0000, 0x4000_0001, u32::MAX];
    let mut seen = BTreeSet::new();
    for number in (0..beyond).chain(odd) {
        for value in &values {
            for other in [0, *value] {
                for place in 0..6 {
                    let mut arguments = [other; 6];
                    arguments[place] = *value;
                    for arch in [AUDIT_ARCH_X86_64, 0x4000_0003] {
                        let call = Call {
                            arch,
                            number,
                            arguments,
                        };
                        let meant = meant(rules, &call);
                        assert_eq!(decide(&program, &call), meant, "{call:x?}");
                        seen.insert(meant);
                    }
                }
            }
        }
    }
    assert!(seen.len() > 1, "there is nothing to tell apart");
    program.len()
}

const KNOWN: Known = Known { pid: 4711, proc: 9 };

#[test]
fn programs_decide_as_their_rules_say() {
    for role in Role::ALL {
        check(&rules::of(role, &KNOWN));
    }
}

#[test]
fn what_is_too_far_to_jump_to_is_reached() {
    let mut rules: Rules = (0..200)
        .map(|number| (2 * number, Verdict::Allow))
        .collect();
    let some = |count| {
        (0..count)
            .map(|value| vec![Argument::Is(1, value)])
            .collect()
    };
    rules.insert(7, Verdict::If(some(300)));
    rules.insert(9, Verdict::Fail(38));
    rules.insert(
        301,
        Verdict::If(vec![vec![
            Argument::IsLong(0, 3 << 32),
            Argument::Lacks(2, 4),
        ]]),
    );
    assert!(check(&rules) > 2 * usize::from(u8::MAX));
}

#[test]
fn rules_without_lists_allow_nothing() {
    let rules = [(1, Verdict::If(Vec::new())), (2, Verdict::Allow)].into();
    check(&rules);
}

#[test]
fn a_program_that_the_kernel_would_not_take_is_an_error() {
    let rules = (0..2 * MOST as u32).map(|number| (2 * number, Verdict::Allow));
    assert!(compile(&rules.collect()).is_err());
}
