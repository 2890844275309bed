//! From errors to messages and exit codes.

use std::io;
use std::process::ExitCode;

use snapstore_store::ErrorClass;

pub const FAILED: u8 = 1;
pub const NOT_FOUND: u8 = 3;
pub const DAMAGED: u8 = 4;
pub const BUSY: u8 = 5;

/// Prints the error and returns its exit code. A reader that went away
/// (`snapstore tags | head -1`) is no failure.
pub fn report(error: &anyhow::Error) -> ExitCode {
    let reader_gone = error
        .downcast_ref::<io::Error>()
        .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe);
    if reader_gone {
        return ExitCode::SUCCESS;
    }
    eprintln!("error: {}", message(error));
    ExitCode::from(code(error))
}

/// The error and its causes. Many of ours name their cause themselves: what the
/// line ends with already is not said again.
fn message(error: &anyhow::Error) -> String {
    let mut message = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !message.ends_with(&cause) {
            message += ": ";
            message += &cause;
        }
    }
    message
}

fn code(error: &anyhow::Error) -> u8 {
    if let Some(error) = error.downcast_ref::<snapstore_store::Error>() {
        return store_code(error);
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
        ErrorClass::Invalid | ErrorClass::Io => FAILED,
    }
}
