//! Processes, and waiting for what they do.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};

/// How long anything that must happen may take on a busy machine.
pub(super) const PATIENCE: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(10);

/// Waits until `look` finds something.
///
/// # Errors
/// Its own, and that it never found anything.
pub fn eventually<T>(what: &str, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        ensure!(Instant::now() < deadline, "never: {what}");
        sleep(POLL);
    }
}

/// The names in a directory, which may not be there.
#[must_use]
pub fn names(dir: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

/// Sends a signal.
///
/// # Errors
/// If there is no such process.
pub fn signal(pid: u32, signal: Signal) -> Result<()> {
    let pid = Pid::from_raw(i32::try_from(pid)?).context("no process has number 0")?;
    Ok(kill_process(pid, signal)?)
}

/// Whether any thread of a process runs; what only waits to be noted does not.
#[must_use]
pub fn runs(pid: u32) -> bool {
    names(Path::new(&format!("/proc/{pid}/task")))
        .iter()
        .any(|thread| {
            let stat = fs::read_to_string(format!("/proc/{pid}/task/{thread}/stat"));
            let ended = |stat: &str| {
                let state = stat.rsplit(") ").next().unwrap_or_default();
                state.starts_with('Z') || state.starts_with('X')
            };
            stat.is_ok_and(|stat| !ended(&stat))
        })
}

/// Ends a process at once and waits until it is gone.
///
/// # Errors
/// If it does not go.
pub fn kill(pid: u32) -> Result<()> {
    signal(pid, Signal::KILL)?;
    eventually(&format!("process {pid} ends"), || {
        Ok((!runs(pid)).then_some(()))
    })
}
