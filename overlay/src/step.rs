//! Where the process that keeps overlays can be ended, to see what is found again.
//!
//! With debug assertions, `SNAPSTORE_KILL_AT_OVERLAY_STEP=N` ends the process with SIGKILL
//! just before its N-th step that makes or gives up what a later process looks for.

/// A step is about to be made.
#[cfg(debug_assertions)]
pub fn step(what: &'static str) {
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    use rustix::process::{Signal, getpid, kill_process};

    static KILL_AT: LazyLock<Option<u64>> = LazyLock::new(|| {
        let number = std::env::var("SNAPSTORE_KILL_AT_OVERLAY_STEP");
        number.ok()?.parse().ok()
    });
    static STEPS: AtomicU64 = AtomicU64::new(0);

    let Some(kill_at) = *KILL_AT else { return };
    if STEPS.fetch_add(1, Ordering::SeqCst) + 1 == kill_at {
        eprintln!("killed before step {kill_at}: {what}");
        let _ = kill_process(getpid(), Signal::KILL);
        loop {
            std::thread::park();
        }
    }
}

/// A step is about to be made.
#[cfg(not(debug_assertions))]
pub fn step(_what: &'static str) {}
