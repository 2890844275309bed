//! Programs that decide about system calls (seccomp(2)), from what is allowed.
//!
//! When one is installed, the kernel checks it, translates it, and then tries it with every
//! number that a call can have. So the number is looked for by halving: a program that asks
//! for one number after the other takes three times as long to install.

use std::collections::BTreeMap;
use std::io;
use std::mem::offset_of;

use seccompiler::{BpfProgram, sock_filter};

/// A condition on an argument, of which the kernel looks at 32 bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Argument {
    Is(u8, u32),
    /// None of these bits is set.
    Lacks(u8, u32),
    /// All 64 bits are these.
    IsLong(u8, u64),
}

/// What becomes of a system call.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Verdict {
    Allow,
    /// It is made if all of one of these lists hold; otherwise the process ends.
    If(Vec<Vec<Argument>>),
    /// It is not made, and fails with this number.
    Fail(u16),
}

/// By number; a call without a verdict ends the process.
pub(super) type Rules = BTreeMap<u32, Verdict>;

/// linux/audit.h.
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;

/// The most instructions of a program (BPF_MAXINSNS).
const MOST: usize = 4096;

// linux/bpf_common.h, as instructions have them.
const LOAD: u16 = code(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS);
const JUMP: u16 = code(libc::BPF_JMP | libc::BPF_JA);
const IF_EQUAL: u16 = code(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K);
const IF_AT_LEAST: u16 = code(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K);
const IF_ANY_BIT: u16 = code(libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K);
const RETURN: u16 = code(libc::BPF_RET | libc::BPF_K);

/// They fit in 16 bits.
const fn code(bits: u32) -> u16 {
    bits as u16
}

/// The program of these rules.
///
/// # Errors
/// It is longer than the kernel takes.
pub(super) fn compile(rules: &Rules) -> io::Result<BpfProgram> {
    let mut made = Backwards(Vec::with_capacity(3 * rules.len()));
    let kill = made.add(RETURN, libc::SECCOMP_RET_KILL_PROCESS);
    let allow = made.add(RETURN, libc::SECCOMP_RET_ALLOW);
    // From which number on which place decides: a gap between two calls kills.
    let mut places: Vec<(u32, Place)> = Vec::with_capacity(2 * rules.len() + 1);
    let mut from = |number: u32, place: Place| {
        if places.last().is_some_and(|(first, _)| *first == number) {
            places.pop();
        }
        if places.last().is_none_or(|(_, last)| *last != place) {
            places.push((number, place));
        }
    };
    from(0, kill);
    for (number, verdict) in rules {
        let place = match verdict {
            Verdict::Allow => allow,
            Verdict::Fail(error) => made.add(RETURN, libc::SECCOMP_RET_ERRNO | u32::from(*error)),
            Verdict::If(any) => made.any_of(any, allow, kill),
        };
        from(*number, place);
        from(number + 1, kill);
    }
    let search = made.search(&places);
    made.go_to(search);
    made.add(LOAD, offset(offset_of!(libc::seccomp_data, nr)));
    let number = made.next();
    made.branch(IF_EQUAL, AUDIT_ARCH_X86_64, number, kill);
    made.add(LOAD, offset(offset_of!(libc::seccomp_data, arch)));
    let Backwards(mut program) = made;
    program.reverse();
    match program.len() {
        ..=MOST => Ok(program),
        length => Err(io::Error::other(format!(
            "a filter of {length} instructions"
        ))),
    }
}

/// Where an argument's lower 32 bits are, on a little-endian machine; the upper follow.
fn argument(number: u8) -> u32 {
    offset(offset_of!(libc::seccomp_data, args)) + u32::from(number) * 8
}

fn offset(bytes: usize) -> u32 {
    u32::try_from(bytes).expect("the structure is small")
}

/// How many instructions follow the one at a place, the last being 0.
type Place = usize;

/// A program from its last instruction to its first: jumps only lead forward, so that where
/// they lead to is there already.
struct Backwards(Vec<sock_filter>);

impl Backwards {
    /// The place of the instruction that was added last.
    fn next(&self) -> Place {
        self.0.len() - 1
    }

    fn add(&mut self, code: u16, k: u32) -> Place {
        self.jumping(code, k, (0, 0))
    }

    fn jumping(&mut self, code: u16, k: u32, (jt, jf): (u8, u8)) -> Place {
        self.0.push(sock_filter { code, jt, jf, k });
        self.next()
    }

    /// Makes what is added before this come to `place` by itself.
    fn go_to(&mut self, place: Place) {
        let skipped = self.next() - place;
        if skipped > 0 {
            self.add(JUMP, offset(skipped));
        }
    }

    /// An instruction that goes to one of two places.
    fn branch(&mut self, code: u16, k: u32, mut yes: Place, mut no: Place) -> Place {
        // Room for a jump on the way to the other one.
        const FAR: usize = u8::MAX as usize - 1;
        for place in [&mut yes, &mut no] {
            if self.next() - *place >= FAR {
                *place = self.nearer(*place);
            }
        }
        let near = |place| u8::try_from(self.next() - place).expect("it was made near");
        let jumps = (near(yes), near(no));
        self.jumping(code, k, jumps)
    }

    /// A place that does the same.
    fn nearer(&mut self, place: Place) -> Place {
        let there = self.0[place].clone();
        if there.code == RETURN {
            return self.add(RETURN, there.k);
        }
        let skipped = self.next() - place;
        self.add(JUMP, offset(skipped))
    }

    /// Goes by the number in the accumulator, of which each place has those from its own to
    /// the next one's.
    fn search(&mut self, places: &[(u32, Place)]) -> Place {
        match places {
            [(_, place)] => *place,
            _ => {
                let (below, above) = places.split_at(places.len() / 2);
                let yes = self.search(above);
                let no = self.search(below);
                self.branch(IF_AT_LEAST, above[0].0, yes, no)
            }
        }
    }

    /// Goes to `yes` if all of one of the lists hold.
    fn any_of(&mut self, any: &[Vec<Argument>], yes: Place, no: Place) -> Place {
        let mut otherwise = no;
        for (index, all) in any.iter().enumerate().rev() {
            let before = index.checked_sub(1).map(|before| any[before].as_slice());
            otherwise = match (before, all.as_slice()) {
                // The one before has loaded it, and leads here with it.
                (Some([Argument::Is(loaded, _)]), [Argument::Is(number, value)])
                    if loaded == number =>
                {
                    self.branch(IF_EQUAL, *value, yes, otherwise)
                }
                (_, all) => all.iter().rev().fold(yes, |then, condition| {
                    self.condition(*condition, then, otherwise)
                }),
            };
        }
        otherwise
    }

    fn condition(&mut self, condition: Argument, yes: Place, no: Place) -> Place {
        match condition {
            Argument::Is(number, value) => {
                self.branch(IF_EQUAL, value, yes, no);
                self.add(LOAD, argument(number))
            }
            Argument::Lacks(number, bits) => {
                self.branch(IF_ANY_BIT, bits, no, yes);
                self.add(LOAD, argument(number))
            }
            Argument::IsLong(number, value) => {
                let low = u32::try_from(value & u64::from(u32::MAX)).expect("32 bits");
                let high = u32::try_from(value >> 32).expect("32 bits");
                self.branch(IF_EQUAL, high, yes, no);
                let then = self.add(LOAD, argument(number) + 4);
                self.branch(IF_EQUAL, low, then, no);
                self.add(LOAD, argument(number))
            }
        }
    }
}

#[cfg(test)]
mod tests;
