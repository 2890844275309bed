//! From errors to messages and exit codes.

use std::io;
use std::process::ExitCode;

use snapstore_store::ErrorClass;
use snapstore_vmm::agent::{self, AgentError};

use crate::logging::say;

pub const FAILED: u8 = 1;
pub const USAGE: u8 = 2;
pub const NOT_FOUND: u8 = 3;
pub const DAMAGED: u8 = 4;
pub const BUSY: u8 = 5;
/// Of `exec`, as of a shell: there is no such command.
pub const NO_COMMAND: u8 = 127;

/// What cannot be meant, with what to say of it.
#[derive(Debug)]
pub struct Usage(pub String);

/// A thing that does not exist, with what to say of it.
#[derive(Debug)]
pub struct NotFound(pub String);

/// A thing that another process holds, with what to say of it.
#[derive(Debug)]
pub struct Busy(pub String);

/// What another process of this program failed with.
#[derive(Debug)]
pub struct Elsewhere {
    pub message: String,
    pub exit_code: u8,
}

/// Standard output that could not be written, which is no failure if its reader
/// went away.
#[derive(thiserror::Error, Debug)]
#[error("cannot write the answer to standard output: {0}")]
pub struct Output(pub io::Error);

/// Marks failures of standard output.
pub fn output<T>(written: io::Result<T>) -> anyhow::Result<T> {
    Ok(written.map_err(Output)?)
}

macro_rules! message_is_field {
    ($($error:ty: $field:tt),*) => {$(
        impl std::fmt::Display for $error {
            fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                out.write_str(&self.$field)
            }
        }
        impl std::error::Error for $error {}
    )*};
}

message_is_field!(Usage: 0, NotFound: 0, Busy: 0, Elsewhere: message);

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
    ExitCode::from(code(error))
}

/// What was asked for instead of a command (`--help`), or what was typed wrong.
pub fn usage(answer: &clap::Error) -> ExitCode {
    match answer.print() {
        Err(error) if !answer.use_stderr() => report(&Output(error).into()),
        _ => ExitCode::from(u8::try_from(answer.exit_code()).unwrap_or(USAGE)),
    }
}

/// The error and its causes. Many of ours name their cause themselves: what the
/// line ends with already is not said again.
pub fn message(error: &anyhow::Error) -> String {
    let mut message = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !message.ends_with(&cause) {
            message += ": ";
            message += &cause;
        }
    }
    message
}

pub fn code(error: &anyhow::Error) -> u8 {
    if error.is::<Usage>() {
        return USAGE;
    }
    if error.is::<NotFound>() {
        return NOT_FOUND;
    }
    if error.is::<Busy>() {
        return BUSY;
    }
    if let Some(error) = error.downcast_ref::<Elsewhere>() {
        return error.exit_code;
    }
    if let Some(error) = error.downcast_ref::<snapstore_vmm::Error>() {
        return vmm_code(error);
    }
    if let Some(error) = error.downcast_ref::<snapstore_store::Error>() {
        return store_code(error);
    }
    if let Some(AgentError::Refused { kind, .. }) = error.downcast_ref::<AgentError>() {
        return match kind {
            agent::ErrorKind::Busy => BUSY,
            _ => FAILED,
        };
    }
    match error.downcast_ref::<snapstore_fuse::Error>() {
        Some(snapstore_fuse::Error::Store(error)) => store_code(error),
        Some(snapstore_fuse::Error::NotMounted { .. }) => NOT_FOUND,
        Some(
            snapstore_fuse::Error::InUse { .. } | snapstore_fuse::Error::AlreadyMounted { .. },
        ) => BUSY,
        _ => FAILED,
    }
}

fn store_code(error: &snapstore_store::Error) -> u8 {
    match error.class() {
        ErrorClass::NotFound => NOT_FOUND,
        ErrorClass::Damaged => DAMAGED,
        ErrorClass::Busy => BUSY,
        ErrorClass::Invalid | ErrorClass::Newer | ErrorClass::Io => FAILED,
    }
}

fn vmm_code(error: &snapstore_vmm::Error) -> u8 {
    use snapstore_vmm::control::ErrorKind;
    match error {
        snapstore_vmm::Error::NoMachine { .. } | snapstore_vmm::Error::NoTap { .. } => NOT_FOUND,
        snapstore_vmm::Error::TapBusy { .. }
        | snapstore_vmm::Error::DiskBusy { .. }
        | snapstore_vmm::Error::NoAnswer { .. }
        | snapstore_vmm::Error::Refused {
            kind: ErrorKind::Busy,
            ..
        } => BUSY,
        _ => FAILED,
    }
}
