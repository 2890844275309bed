//! Ctrl-C and its like end what this command does in an orderly way: the store is
//! told, what was half done is taken away, and then the signal does what it always
//! does, so that whoever started this command sees it. A second one does that at once.

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use anyhow::Context as _;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::{SigId, flag, low_level};
use snapstore_store::Cancel;

const SIGNALS: [i32; 3] = [SIGINT, SIGTERM, SIGHUP];

/// The number of the signal that came.
static CAME: OnceLock<Arc<AtomicUsize>> = OnceLock::new();

/// What is done at an interrupt from the terminal.
static AT_INTERRUPT: Mutex<Vec<SigId>> = Mutex::new(Vec::new());

/// A token that these signals cancel from now on, unless this process ignores them
/// (nohup(1)).
pub fn cancel_on_signal() -> anyhow::Result<Cancel> {
    let cancelled = Arc::new(AtomicBool::new(false));
    let came = CAME.get_or_init(Arc::default);
    for signal in SIGNALS {
        if is_ignored(signal) {
            continue;
        }
        let number = usize::try_from(signal).unwrap_or_default();
        let watched = [
            flag::register_conditional_default(signal, cancelled.clone()),
            flag::register_usize(signal, came.clone(), number),
            flag::register(signal, cancelled.clone()),
        ];
        let watched = watched.into_iter().collect::<std::io::Result<Vec<_>>>();
        let watched = watched.context("cannot watch for signals")?;
        if signal == SIGINT {
            at_interrupt().extend(watched);
        }
    }
    Ok(cancelled.into())
}

/// From now on an interrupt from the terminal is for the program that this one waits for,
/// and does nothing here.
pub fn leave_to_others() -> std::io::Result<()> {
    // Not ignored: that would be handed on to the other program.
    let nothing = flag::register(SIGINT, Arc::default())?;
    let before = std::mem::replace(&mut *at_interrupt(), vec![nothing]);
    for action in before {
        low_level::unregister(action);
    }
    Ok(())
}

fn at_interrupt() -> std::sync::MutexGuard<'static, Vec<SigId>> {
    AT_INTERRUPT.lock().unwrap_or_else(PoisonError::into_inner)
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
