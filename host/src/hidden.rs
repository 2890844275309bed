//! The commands of a program that it starts itself with, and no user.
//!
//! Machines, their supervisor, and whoever looks at a mount need no store: they are
//! processes of a small program of their own where there is one ([`crate::background`]),
//! else of the program that starts them, which has the same commands.

use crate::spec::SUPERVISOR;
use crate::{look, monitors, process, supervisor};

/// One of the hidden commands, if this process is to be it: what it exits with.
/// `prepare` sets up the log of a process that lives long.
pub fn run_if_hidden(prepare: impl Fn()) -> Option<anyhow::Result<u8>> {
    let mut arguments = std::env::args_os().skip(1);
    let command = arguments.next()?;
    if command == monitors::SUPERVISOR {
        prepare();
        return Some(monitors::run_from_stdin());
    }
    if command == monitors::RESUMER {
        let rest: Option<Vec<String>> = arguments.map(|one| one.into_string().ok()).collect();
        return Some(monitors::wait_and_resume(&rest.unwrap_or_default()));
    }
    run_if_machine(prepare)
}

/// As [`run_if_hidden`], of the commands that need no store.
pub fn run_if_machine(prepare: impl Fn()) -> Option<anyhow::Result<u8>> {
    let mut arguments = std::env::args_os().skip(1);
    let command = arguments.next()?;
    if command == look::COMMAND {
        return Some(look::run(&arguments.collect::<Vec<_>>()));
    }
    if command != SUPERVISOR && command != process::COMMAND {
        return None;
    }
    prepare();
    let rest: Option<Vec<String>> = arguments.map(|one| one.into_string().ok()).collect();
    let rest = rest.unwrap_or_default();
    Some(match command == SUPERVISOR {
        true => supervisor::run_as_asked(),
        false => process::run(&rest),
    })
}
