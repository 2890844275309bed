//! From errors to messages and exit codes.

use std::io;
use std::process::ExitCode;

use snapstore_host::ErrorClass;
use snapstore_vmm::agent::AgentError;

use crate::hints;
use crate::interrupt;
use crate::logging::say;
use crate::stoppable::is_stopped;

pub const FAILED: u8 = 1;
pub const USAGE: u8 = 2;
pub const NOT_FOUND: u8 = 3;
pub const DAMAGED: u8 = 4;
pub const BUSY: u8 = 5;
/// A remote did not answer: what was asked for may have happened.
pub const UNANSWERED: u8 = 6;
/// Of `exec`, as of a shell: there is no such command.
pub const NO_COMMAND: u8 = 127;

/// A guest has no such command, with what to say of it.
#[derive(thiserror::Error, Debug)]
#[error("{0}")]
pub struct NoCommand(pub String);

/// Standard output that could not be written, which is no failure if its reader
/// went away.
#[derive(thiserror::Error, Debug)]
#[error("cannot write the answer to standard output: {0}")]
pub struct Output(pub io::Error);

/// Marks failures of standard output.
pub fn output<T>(written: io::Result<T>) -> anyhow::Result<T> {
    Ok(written.map_err(Output)?)
}

/// Prints the error and returns its exit code. A reader that went away
/// (`snapstore tags | head -1`) is no failure.
pub fn report(error: &anyhow::Error) -> ExitCode {
    let output = match error.downcast_ref::<AgentError>() {
        Some(AgentError::Local(error)) => Some(error),
        _ => error.downcast_ref::<Output>().map(|output| &output.0),
    };
    if output.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe) {
        return ExitCode::SUCCESS;
    }
    say!("error: {}", message(error));
    let code = ExitCode::from(code(error));
    match error.downcast_ref() {
        Some(snapstore_store::Error::Cancelled) => interrupt::end(code),
        _ if is_stopped(error) => interrupt::end(code),
        _ => code,
    }
}

/// What was asked for instead of a command (`--help`), or what was typed wrong.
pub fn usage(answer: &clap::Error) -> ExitCode {
    match answer.print() {
        Err(error) if !answer.use_stderr() => report(&Output(error).into()),
        _ => ExitCode::from(u8::try_from(answer.exit_code()).unwrap_or(USAGE)),
    }
}

/// The error and its causes, and what can be done about it.
pub fn message(error: &anyhow::Error) -> String {
    let message = snapstore_host::message(error);
    match hints::of(error) {
        Some(hint) => format!("{message}; {hint}"),
        None => message,
    }
}

/// The exit code that an error stands for.
pub fn code(error: &anyhow::Error) -> u8 {
    if error.is::<NoCommand>() {
        return NO_COMMAND;
    }
    match class(error) {
        ErrorClass::Failed => FAILED,
        ErrorClass::Usage => USAGE,
        ErrorClass::NotFound => NOT_FOUND,
        ErrorClass::Damaged => DAMAGED,
        ErrorClass::Busy | ErrorClass::Unmounted => BUSY,
        ErrorClass::Unanswered => UNANSWERED,
    }
}

/// What kind of thing went wrong.
pub fn class(error: &anyhow::Error) -> ErrorClass {
    match error.downcast_ref() {
        Some(error) => of_remote(error),
        None => snapstore_host::class(error),
    }
}

fn of_remote(error: &snapstore_remote::Error) -> ErrorClass {
    use snapstore_remote::Error as Remote;
    use snapstore_remote::protocol::Error as Protocol;
    match error {
        Remote::Protocol(Protocol::Unanswered(error)) if error.changed_nothing() => {
            ErrorClass::Failed
        }
        Remote::Protocol(Protocol::Unanswered(_)) | Remote::NothingThere { .. } => {
            ErrorClass::Unanswered
        }
        Remote::Protocol(
            Protocol::Missing { .. } | Protocol::Damaged { .. } | Protocol::RolledBack { .. },
        ) => ErrorClass::Damaged,
        Remote::Protocol(Protocol::NoTag { .. }) | Remote::NoRemote { .. } => ErrorClass::NotFound,
        Remote::Protocol(
            Protocol::TagBusy { .. }
            | Protocol::LeaseLost { .. }
            | Protocol::Gone { .. }
            | Protocol::Ambiguous { .. },
        ) => ErrorClass::Busy,
        Remote::BadUrl { .. }
        | Remote::Unusable { .. }
        | Remote::InClear { .. }
        | Remote::Key { .. }
        | Remote::OtherKey { .. }
        | Remote::NoKey { .. }
        | Remote::InClearThere { .. } => ErrorClass::Usage,
        _ => ErrorClass::Failed,
    }
}
