//! Replies, as they go over a connection.

use std::io::{self, Write};

use snapstore_agent_protocol::{ErrorKind, FrameKind, Reply, put_frame};

/// A reply's frame.
pub(crate) fn reply_frame(reply: &Reply) -> io::Result<Vec<u8>> {
    let mut frame = Vec::new();
    put_frame(&mut frame, FrameKind::Reply, &serde_json::to_vec(reply)?);
    Ok(frame)
}

pub(crate) fn send(stream: &mut impl Write, reply: &Reply) -> io::Result<()> {
    stream.write_all(&reply_frame(reply)?)
}

/// An error as a reply.
pub(crate) fn refusal(error: &io::Error) -> Reply {
    let kind = match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => ErrorKind::NotFound,
        io::ErrorKind::PermissionDenied => ErrorKind::Denied,
        io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput => ErrorKind::Invalid,
        _ => ErrorKind::Failed,
    };
    Reply::Error {
        kind,
        message: error.to_string(),
    }
}

/// The error of a request that asks for what cannot be.
pub(crate) fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
