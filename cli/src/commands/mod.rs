//! One module per command.

use std::process::ExitCode;

use snapstore_store::Error;

use crate::logging::say;

pub mod commit;
pub mod commit_monitor;
pub mod commit_vm;
pub mod completions;
pub mod control;
pub mod copy;
pub mod cp;
pub mod diff;
pub mod doctor;
pub mod exec;
pub mod export;
pub mod forget;
pub mod gc;
pub mod generate;
pub mod import;
pub mod init;
pub mod lazy;
pub mod log;
pub mod map;
pub mod metrics;
pub mod mount;
pub mod ps;
pub mod remote;
mod remote_gc;
mod remote_told;
pub mod repair;
pub mod report;
pub mod restore;
pub mod restore_with;
pub mod run;
pub mod show;
mod show_mount;
pub mod start;
pub mod stats;
pub mod tag;
pub mod top;
pub mod umount;
pub mod upgrade;
pub mod verify;
pub mod warm;

/// Ends a command whose answer tells what was found: standard error has a line that says why
/// the exit code is not zero, whatever becomes of the answer.
fn ended(code: u8, why: &str) -> ExitCode {
    say!("error: {why}");
    ExitCode::from(code)
}

/// That nothing is named twice: whoever does that meant something else.
pub fn each_once(names: &[String]) -> Result<(), Error> {
    let mut before = names.iter().enumerate();
    match before.find(|(at, name)| names[..*at].contains(name)) {
        Some((_, name)) => Err(Error::DuplicateName { name: name.clone() }),
        None => Ok(()),
    }
}
