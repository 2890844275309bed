//! One connection: requests one after the other, until a command was run or the
//! other end leaves.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;

use snapstore_agent_protocol::{ErrorKind, PROTOCOL_VERSION, Reply, Request, read_line};

use crate::exec;
use crate::network::Interfaces;
use crate::reply::{refusal, send};
use crate::system;

/// Answers the requests of a connection over a stream socket in blocking mode.
/// Returns when the other end is done with it.
///
/// # Errors
/// The connection's; a command that runs is then killed.
pub fn serve<S: Read + Write + AsFd>(stream: &mut S) -> io::Result<()> {
    let mut interfaces = Interfaces::new();
    loop {
        let line = match read_line(stream) {
            Ok(Some(line)) => line,
            Ok(None) => return Ok(()),
            Err(error) => {
                // The other end may still want to know.
                let _ = send(stream, &refusal(&error));
                return Err(error);
            }
        };
        let request = match serde_json::from_slice(&line) {
            Ok(request) => request,
            Err(error) => {
                let reply = Reply::Error {
                    kind: ErrorKind::Invalid,
                    message: format!("not a request: {error}"),
                };
                return send(stream, &reply);
            }
        };
        let done = match request {
            Request::Exec(exec) => return exec::run(stream, &exec),
            Request::Ping => {
                let reply = Reply::Pong {
                    protocol: PROTOCOL_VERSION,
                };
                send(stream, &reply)?;
                continue;
            }
            Request::Settime { unix_nanoseconds } => system::set_time(unix_nanoseconds),
            Request::Reseed { bytes } => system::reseed(&bytes),
            Request::Setmac { from, to } => interfaces.set_mac(&from, &to),
            Request::Identity {
                hostname,
                machine_id,
            } => system::identify(hostname.as_deref(), machine_id.as_deref()),
        };
        send(
            stream,
            &done.map_or_else(|error| refusal(&error), |()| Reply::Done),
        )?;
    }
}

/// Tells one who connects that there are too many already.
///
/// # Errors
/// The connection's.
pub fn turn_away(stream: &mut impl Write) -> io::Result<()> {
    let reply = Reply::Error {
        kind: ErrorKind::Busy,
        message: "too many connections at a time".to_owned(),
    };
    send(stream, &reply)
}
