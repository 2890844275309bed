//! What a host and the agent of its guest say to each other, for both ends; drawn in
//! `docs/AGENT.md`.
//!
//! A request is a line of JSON. Everything else, both ways, is a frame:
//!
//! | bytes  | content                                         |
//! |--------|-------------------------------------------------|
//! | 1      | kind: 0 stdin, 1 stdout, 2 stderr, 3 reply      |
//! | 4      | length of the rest, little-endian, up to 64 KiB |
//! | length | bytes; of a reply, JSON                         |

mod mac;

use std::collections::BTreeMap;
use std::io::{self, Read};

use serde::{Deserialize, Serialize};

pub use mac::{MacAddress, NotAMacAddress};

/// The version of the protocol.
pub const PROTOCOL_VERSION: u32 = 1;
/// The port on which an agent listens unless it is told another.
pub const AGENT_PORT: u32 = 1024;
/// The longest request, in bytes.
pub const MAX_REQUEST_BYTES: usize = 1 << 20;
/// The longest content of a frame, in bytes.
pub const MAX_FRAME_BYTES: usize = 64 << 10;
/// The length of what comes before a frame's content, in bytes.
pub const FRAME_HEADER_BYTES: usize = 5;
/// The most entropy that one request adds, in bytes.
pub const MAX_ENTROPY_BYTES: usize = 512;

/// What the host asks for.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Request {
    /// Whether the agent is there. Answered by [`Reply::Pong`].
    Ping,
    /// Runs a command. Answered by frames of output, then by [`Reply::Exit`]. No
    /// request can follow on the same connection.
    Exec(Exec),
    /// Sets the clock. Answered by [`Reply::Done`].
    Settime {
        /// The time since the epoch, in nanoseconds.
        unix_nanoseconds: u64,
    },
    /// Adds entropy and has the kernel's generator take it up at once. Answered by
    /// [`Reply::Done`].
    Reseed {
        /// Up to [`MAX_ENTROPY_BYTES`], in hexadecimal.
        bytes: String,
    },
    /// Gives a network interface another address. Answered by [`Reply::Done`].
    Setmac {
        /// The address that it has.
        from: String,
        /// The address that it gets.
        to: String,
    },
    /// Names the machine. Answered by [`Reply::Done`].
    Identity {
        /// Its host name.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        hostname: Option<String>,
        /// The content of `/etc/machine-id`: 32 lower-case hexadecimal digits.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        machine_id: Option<String>,
    },
}

/// A command to run.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exec {
    /// The program, looked for in `PATH`, and its arguments.
    pub command: Vec<String>,
    /// Environment variables on top of the agent's.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Its working directory; else the agent's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub directory: Option<String>,
    /// Whether frames of standard input follow, the last of them empty. Else its
    /// standard input is empty.
    #[serde(default)]
    pub stdin: bool,
    /// Its processes are killed after this many seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_seconds: Option<u64>,
}

/// How a request ended.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reply {
    /// It was done.
    Done,
    /// The agent is there.
    Pong {
        /// [`PROTOCOL_VERSION`] of the agent.
        protocol: u32,
    },
    /// The command ended.
    Exit(Exit),
    /// It was not done.
    Error {
        /// Why, for programs.
        kind: ErrorKind,
        /// Why, for people.
        message: String,
    },
}

/// How a command ended: by itself, or by a signal.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Exit {
    /// Its exit code.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<i32>,
    /// The signal that ended it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<i32>,
    /// Whether it was killed because its time was over.
    #[serde(default)]
    pub timed_out: bool,
}

/// Why a request was not done.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// It is not a request.
    Invalid,
    /// There is no such program or directory.
    NotFound,
    /// The agent has no right to do it.
    Denied,
    /// Too many connections at a time.
    Busy,
    /// The guest's system refused.
    Failed,
}

/// What a frame holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FrameKind {
    /// Standard input of the command; empty at its end.
    Stdin,
    /// Standard output of the command.
    Stdout,
    /// Standard error of the command.
    Stderr,
    /// A [`Reply`].
    Reply,
}

impl FrameKind {
    fn from_wire(value: u8) -> Option<Self> {
        match value {
            0 => Some(Self::Stdin),
            1 => Some(Self::Stdout),
            2 => Some(Self::Stderr),
            3 => Some(Self::Reply),
            _ => None,
        }
    }

    fn to_wire(self) -> u8 {
        match self {
            Self::Stdin => 0,
            Self::Stdout => 1,
            Self::Stderr => 2,
            Self::Reply => 3,
        }
    }
}

/// Appends a frame to `out`. The content is at most [`MAX_FRAME_BYTES`] long.
pub fn put_frame(out: &mut Vec<u8>, kind: FrameKind, content: &[u8]) {
    let length = u32::try_from(content.len()).unwrap_or(u32::MAX);
    out.push(kind.to_wire());
    out.extend(length.to_le_bytes());
    out.extend(content);
}

/// The kind and the length of the content of the frame that begins so.
///
/// # Errors
/// It is not a frame.
pub fn parse_frame_header(header: [u8; FRAME_HEADER_BYTES]) -> io::Result<(FrameKind, usize)> {
    let [kind, length @ ..] = header;
    let length = usize::try_from(u32::from_le_bytes(length)).unwrap_or(usize::MAX);
    match FrameKind::from_wire(kind) {
        Some(kind) if length <= MAX_FRAME_BYTES => Ok((kind, length)),
        _ => Err(invalid("not a frame of the agent's protocol")),
    }
}

/// Takes the first frame out of `received`, if it is whole.
///
/// # Errors
/// It is not a frame.
pub fn take_frame(received: &mut Vec<u8>) -> io::Result<Option<(FrameKind, Vec<u8>)>> {
    let Some(header) = received.first_chunk() else {
        return Ok(None);
    };
    let (kind, length) = parse_frame_header(*header)?;
    let end = FRAME_HEADER_BYTES + length;
    if received.len() < end {
        return Ok(None);
    }
    let rest = received.split_off(end);
    let mut frame = std::mem::replace(received, rest);
    frame.drain(..FRAME_HEADER_BYTES);
    Ok(Some((kind, frame)))
}

/// Reads a request's line byte by byte: what follows it is left unread. `None`
/// when the stream ends before it begins.
///
/// # Errors
/// The stream's, and a line that is too long or ends early.
pub fn read_line(stream: &mut impl Read) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    let mut byte = [0];
    while line.len() <= MAX_REQUEST_BYTES {
        match stream.read(&mut byte) {
            Ok(0) if line.is_empty() => return Ok(None),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) if byte[0] == b'\n' => return Ok(Some(line)),
            Ok(_) => line.push(byte[0]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Err(invalid("the request is too long"))
}

/// Bytes in hexadecimal.
#[must_use]
pub fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The bytes that are written in hexadecimal; `None` if it is not.
#[must_use]
pub fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    if !digits.len().is_multiple_of(2) || !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    let pairs = digits.chunks_exact(2);
    let byte = |pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    pairs.map(byte).collect()
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_the_documented_text() {
        let text = |request: &Request| serde_json::to_string(request).unwrap();
        assert_eq!(text(&Request::Ping), r#""ping""#);
        let settime = Request::Settime {
            unix_nanoseconds: 7,
        };
        assert_eq!(text(&settime), r#"{"settime":{"unix_nanoseconds":7}}"#);
        let setmac = Request::Setmac {
            from: "02:00:00:00:00:01".to_owned(),
            to: "02:00:00:00:00:02".to_owned(),
        };
        let wanted = r#"{"setmac":{"from":"02:00:00:00:00:01","to":"02:00:00:00:00:02"}}"#;
        assert_eq!(text(&setmac), wanted);
        let exec = r#"{"exec":{"command":["sh","-c","id"],"env":{"A":"b"},"stdin":true,"timeout_seconds":5}}"#;
        assert_eq!(text(&serde_json::from_str(exec).unwrap()), exec);
        let exit = Reply::Exit(Exit {
            code: Some(3),
            ..Exit::default()
        });
        let exit = serde_json::to_string(&exit).unwrap();
        assert_eq!(exit, r#"{"exit":{"code":3,"timed_out":false}}"#);
    }

    #[test]
    fn frames_are_taken_whole() {
        let mut bytes = Vec::new();
        put_frame(&mut bytes, FrameKind::Stdout, b"abc");
        put_frame(&mut bytes, FrameKind::Stdin, b"");
        let mut part = bytes[..7].to_vec();
        assert_eq!(take_frame(&mut part).unwrap(), None);
        let frame = take_frame(&mut bytes).unwrap();
        assert_eq!(frame, Some((FrameKind::Stdout, b"abc".to_vec())));
        let frame = take_frame(&mut bytes).unwrap();
        assert_eq!(frame, Some((FrameKind::Stdin, Vec::new())));
        assert_eq!(take_frame(&mut bytes).unwrap(), None);
        assert!(take_frame(&mut vec![4, 0, 0, 0, 0]).is_err());
        assert!(take_frame(&mut vec![1, 1, 0, 1, 0]).is_err());
    }

    #[test]
    fn hexadecimal_goes_both_ways() {
        assert_eq!(
            from_hex(&to_hex(&[0, 0x7f, 0xff])),
            Some(vec![0, 0x7f, 0xff])
        );
        for text in ["0", "0g", "+1", "é"] {
            assert_eq!(from_hex(text), None, "{text}");
        }
    }
}
