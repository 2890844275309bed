//! Ctrl-C and its like end what this command does in an orderly way: the store is
//! told, what was half done is taken away, and then the signal does what it always
//! does, so that whoever started this command sees it. A second one does that at once.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::Context as _;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::{flag, low_level};
use snapstore_store::Cancel;

const SIGNALS: [i32; 3] = [SIGINT, SIGTERM, SIGHUP];

/// The number of the signal that came.
static CAME: OnceLock<Arc<AtomicUsize>> = OnceLock::new();

/// A token that these signals cancel from now on, unless this process ignores them
/// (nohup(1)).
pub fn cancel_on_signal() -> anyhow::Result<Cancel> {
    let cancelled = Arc::new(AtomicBool::new(false));
    let came = CAME.get_or_init(Arc::default);
    for signal in SIGNALS {
        if is_ignored(signal) {
            continue;
        }
        let watched = flag::register_conditional_default(signal, cancelled.clone())
            .and_then(|_| {
                let number = usize::try_from(signal).unwrap_or_default();
                flag::register_usize(signal, came.clone(), number)
            })
            .and_then(|_| flag::register(signal, cancelled.clone()));
        watched.context("cannot watch for signals")?;
    }
    Ok(cancelled.into())
}

/// What a command ends with that was stopped by a signal: by that signal.
pub fn end(otherwise: ExitCode) -> ExitCode {
    let came = CAME.get().map_or(0, |came| came.load(Ordering::Relaxed));
    if let Some(signal) = i32::try_from(came).ok().filter(|signal| *signal != 0) {
        // Does not return but for a signal that ends nothing.
        let _ = low_level::emulate_default_handler(signal);
    }
    otherwise
}

fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}
