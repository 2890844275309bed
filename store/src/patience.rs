//! A process that gives way to others, but not while they wait for it.
//!
//! At the lowest priority a thread may be kept from the processor for as long as others are
//! busy. If it holds a lock then, so is every commit, whatever the priority of that is.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::process::{Pid, Resource, getpriority_process, getrlimit, setpriority_process};
use rustix::thread::gettid;

/// nice(2).
const LOWEST: i32 = 19;
const ORDINARY: i32 = 0;
/// CAP_SYS_NICE.
const MAY_RAISE: u64 = 1 << 23;

static IS_PATIENT: AtomicBool = AtomicBool::new(false);

/// From now on what this process works on gives way to whatever else wants a processor: this
/// thread and those that are started later are at the lowest priority, but for the moments in which
/// they hold a lock that commits wait for. A user who may not raise a priority again
/// (`RLIMIT_NICE`) has only the threads that share the work at the lowest one.
///
/// To be called before a store is opened. A process without a class of its own for the
/// disk has the lowest level of the ordinary one then (ioprio_set(2)).
pub fn be_patient() {
    IS_PATIENT.store(true, Ordering::Relaxed);
    if may_raise() {
        lower();
    }
}

/// Of a thread that shares the work.
pub(crate) fn at_start_of_thread() {
    if IS_PATIENT.load(Ordering::Relaxed) {
        lower();
    }
}

fn lower() {
    // Where that is forbidden it is as it was.
    let _ = setpriority_process(None, LOWEST);
}

fn may_raise() -> bool {
    let limit = getrlimit(Resource::Nice).current;
    if limit.is_none_or(|ceiling| ceiling >= 20) {
        return true;
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok());
    effective.is_some_and(|bits| bits & MAY_RAISE != 0)
}

thread_local! {
    /// How many there are of this thread, and the priority that it had before the first.
    static AWAKE: Cell<(u32, i32)> = const { Cell::new((0, LOWEST)) };
}

/// Keeps the thread that made it at the ordinary priority, if it is a patient one, while others
/// wait for it.
#[derive(Debug)]
pub(crate) struct Awake {
    thread: Pid,
}

impl Awake {
    pub fn while_held() -> Option<Self> {
        match IS_PATIENT.load(Ordering::Relaxed) {
            true => Self::begin(),
            false => None,
        }
    }

    fn begin() -> Option<Self> {
        let (held, mut before) = AWAKE.get();
        if held == 0 {
            before = getpriority_process(None).ok()?;
            if before <= ORDINARY || setpriority_process(None, ORDINARY).is_err() {
                return None;
            }
        }
        AWAKE.set((held + 1, before));
        Some(Self { thread: gettid() })
    }
}

impl Drop for Awake {
    fn drop(&mut self) {
        // What went to another thread with its lock leaves the first one as it is.
        if self.thread != gettid() {
            return;
        }
        let (held, before) = AWAKE.get();
        AWAKE.set((held - 1, before));
        if held == 1 {
            let _ = setpriority_process(None, before);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_waited_for_has_the_ordinary_priority() {
        // In a thread of its own: priorities are a thread's.
        let test = std::thread::spawn(|| {
            if !may_raise() {
                println!("SKIPPED who_is_waited_for_has_the_ordinary_priority: RLIMIT_NICE");
                return;
            }
            let now = || getpriority_process(None).unwrap();
            lower();
            assert_eq!(now(), LOWEST);
            let outer = Awake::begin();
            assert_eq!(now(), ORDINARY);
            // One lock is taken under another, and may be held for longer.
            let inner = Awake::begin();
            drop(outer);
            assert_eq!(now(), ORDINARY);
            drop(inner);
            assert_eq!(now(), LOWEST);
            // Nobody is patient who has not said so.
            assert!(Awake::while_held().is_none());
        });
        test.join().unwrap();
    }
}
