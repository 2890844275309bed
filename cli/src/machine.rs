//! The program that `snapstore` starts for each machine, for its supervisor, and to look at
//! mounts. It holds nothing of the store: it starts faster, takes less of the host's memory
//! for each machine, and a guest that breaks out finds less in it.

#![forbid(unsafe_code)]
// What else these modules have is for the other program.
#![allow(dead_code)]

mod bounded_log;
mod log_format;
mod logging;

use std::process::ExitCode;

use log_format::LogFormat;

/// Of this program's use by anybody but `snapstore`.
const MISUSED: u8 = 2;

fn main() -> ExitCode {
    let of = std::env::var_os(snapstore_host::MACHINE_OF);
    let version = env!("CARGO_PKG_VERSION");
    if of.as_ref().is_none_or(|of| of != version) {
        let by = of.map(|of| format!(", not by that of {}", of.to_string_lossy()));
        logging::say!(
            "error: snapstore-machine is started by snapstore of its own version, \
             {version}{}; install both together",
            by.unwrap_or_default()
        );
        return MISUSED.into();
    }
    let done = snapstore_host::tidy().and_then(|()| {
        snapstore_host::run_if_machine(prepare)
            .unwrap_or_else(|| anyhow::bail!("snapstore-machine has no command for users"))
    });
    done.map_or_else(
        |error| {
            logging::say!("error: {}", snapstore_host::message(&error));
            ExitCode::FAILURE
        },
        ExitCode::from,
    )
}

/// The log of a process that lives long.
fn prepare() {
    let told = std::env::var(snapstore_host::LOG_FORMAT).ok();
    if let Some(format) = told.as_deref().and_then(LogFormat::named) {
        format.choose();
    }
    logging::to_file_at_stderr(0);
}
