//! `snapstore-agent [--port PORT]`: listens for the host on a port of AF_VSOCK.
//!
//! A socket that listens outlives a restore of the machine; connections do not.

mod vsock;

use std::fs::File;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use snapstore_agent_protocol::AGENT_PORT;

/// The most connections at a time.
const MAX_CONNECTIONS: usize = 128;
/// How long it waits before it tries again what failed.
const PAUSE: Duration = Duration::from_millis(200);
/// How often it tries to listen: the driver may be loaded later.
const ATTEMPTS: u32 = 300;
const STACK_BYTES: usize = 256 << 10;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let port = match arguments[..] {
        [] => AGENT_PORT,
        ["--port", port] => match port.parse() {
            Ok(port) => port,
            Err(error) => return usage(&format!("{port} is not a port: {error}")),
        },
        ["--version"] => {
            println!("snapstore-agent {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        _ => return usage("unknown arguments"),
    };
    let mut failures = 0;
    loop {
        let error = match vsock::listen(port) {
            Ok(listener) => accept(&listener),
            Err(error) => error,
        };
        failures += 1;
        if failures == ATTEMPTS {
            eprintln!("error: cannot listen on vsock port {port}: {error}");
            return ExitCode::FAILURE;
        }
        std::thread::sleep(PAUSE);
    }
}

fn usage(error: &str) -> ExitCode {
    eprintln!("error: {error}\nusage: snapstore-agent [--port PORT]");
    ExitCode::from(2)
}

/// Serves all who connect, until the listening socket is none any more.
fn accept(listener: &std::os::fd::OwnedFd) -> std::io::Error {
    let connections = Arc::new(());
    loop {
        match vsock::accept(listener) {
            Ok(stream) => spawn(stream, &connections),
            Err(error) => match error.raw_os_error() {
                Some(libc::EBADF | libc::EINVAL | libc::ENOTSOCK | libc::EOPNOTSUPP) => {
                    return error;
                }
                Some(libc::EINTR | libc::ECONNABORTED) => {}
                _ => {
                    eprintln!("cannot accept a connection: {error}");
                    std::thread::sleep(PAUSE);
                }
            },
        }
    }
}

/// Serves a connection on a thread of its own. One too many is turned away.
fn spawn(stream: std::os::fd::OwnedFd, connections: &Arc<()>) {
    // Reads and writes of a socket are those of a file.
    let mut stream = File::from(stream);
    let counted = connections.clone();
    if Arc::strong_count(&counted) > MAX_CONNECTIONS + 1 {
        // It may have left already.
        let _ = snapstore_agent::turn_away(&mut stream);
        return;
    }
    let spawned = std::thread::Builder::new()
        .stack_size(STACK_BYTES)
        .spawn(move || {
            // The other end has left, or was told.
            let _ = snapstore_agent::serve(&mut stream);
            drop(counted);
        });
    if let Err(error) = spawned {
        eprintln!("cannot serve a connection: {error}");
    }
}
