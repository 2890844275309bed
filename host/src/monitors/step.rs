//! Where a command that speaks with a monitor can be ended, to see what becomes of the guest.
//!
//! With debug assertions, `SNAPSTORE_KILL_AT_MONITOR_STEP=N` ends the process with SIGKILL at
//! its N-th step: just before a request is sent, or when it was sent and not answered yet.

/// Names the step at which the process is ended.
pub(super) const KILL_AT: &str = "SNAPSTORE_KILL_AT_MONITOR_STEP";

/// A step is about to be made.
#[cfg(debug_assertions)]
pub(super) fn step(what: &'static str) {
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    use rustix::process::{Signal, getpid, kill_process};

    static NUMBER: LazyLock<Option<u64>> =
        LazyLock::new(|| std::env::var(KILL_AT).ok()?.parse().ok());
    static STEPS: AtomicU64 = AtomicU64::new(0);

    let Some(kill_at) = *NUMBER else { return };
    if STEPS.fetch_add(1, Ordering::SeqCst) + 1 == kill_at {
        eprintln!("killed at step {kill_at}: {what}");
        let _ = kill_process(getpid(), Signal::KILL);
        loop {
            std::thread::park();
        }
    }
}

/// A step is about to be made.
#[cfg(not(debug_assertions))]
pub(super) fn step(_what: &'static str) {}
