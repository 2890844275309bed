//! Lines and file descriptors over a UNIX socket.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The longest line that is taken, in bytes.
const MAX_LINE_BYTES: usize = 64 << 10;
/// The most descriptors that come with a line: four of memory and state, three a
/// disk.
const MAX_FDS: usize = 4 + 3 * crate::state::MAX_VIRTIO_DEVICES;

/// One end of a connection that carries lines of JSON, and descriptors with them.
pub struct Connection {
    stream: UnixStream,
    max_line_bytes: usize,
    received: Vec<u8>,
    fds: VecDeque<OwnedFd>,
}

impl Connection {
    /// One that takes lines of 64 KiB at most.
    #[must_use]
    pub fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            max_line_bytes: MAX_LINE_BYTES,
            received: Vec::new(),
            fds: VecDeque::new(),
        }
    }

    /// Takes lines of any length, from somebody who is trusted.
    #[must_use]
    pub fn with_lines_of_any_length(self) -> Self {
        Self {
            max_line_bytes: usize::MAX,
            ..self
        }
    }

    /// Sends one line, and descriptors with it.
    ///
    /// # Errors
    /// The other end is gone, or there are too many descriptors.
    pub fn send(&mut self, message: &impl Serialize, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::Error::other("too many descriptors for one line"));
        }
        let sent = rustix::net::sendmsg(
            &self.stream,
            &[IoSlice::new(&line)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        )?;
        self.stream.write_all(&line[sent..])
    }

    /// The next line; `None` at the end of the connection.
    ///
    /// # Errors
    /// A line that is too long or says something else, or what the socket says.
    pub fn receive<T: DeserializeOwned>(&mut self) -> io::Result<Option<T>> {
        loop {
            if let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.received.drain(..=end).collect();
                // Not as serde_json converts it: a line that ends within a value
                // would look like the end of the connection.
                let parsed = serde_json::from_slice(&line);
                return parsed
                    .map(Some)
                    .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error));
            }
            if self.received.len() >= self.max_line_bytes {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "the line is too long",
                ));
            }
            if self.fill()? == 0 {
                return match self.received.is_empty() {
                    true => Ok(None),
                    false => Err(io::ErrorKind::UnexpectedEof.into()),
                };
            }
        }
    }

    fn fill(&mut self) -> io::Result<usize> {
        let mut bytes = [0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let got = loop {
            match rustix::net::recvmsg(
                &self.stream,
                &mut [IoSliceMut::new(&mut bytes)],
                &mut ancillary,
                RecvFlags::CMSG_CLOEXEC,
            ) {
                Err(rustix::io::Errno::INTR) => {}
                other => break other?.bytes,
            }
        };
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.fds.extend(fds);
            }
        }
        // Descriptors that no line asked for are closed.
        while self.fds.len() > MAX_FDS {
            self.fds.pop_front();
        }
        self.received.extend_from_slice(&bytes[..got]);
        Ok(got)
    }

    /// Whether there is something to receive, or the end, before this time is over.
    #[must_use]
    pub fn is_readable_within(&self, time: Duration) -> bool {
        let deadline = Instant::now() + time;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(left) = Timespec::try_from(left) else {
                return false;
            };
            match poll(&mut [PollFd::new(&self.stream, PollFlags::IN)], Some(&left)) {
                Err(rustix::io::Errno::INTR) => {}
                // Who cannot wait is told when it receives.
                other => return other.is_ok_and(|ready| ready > 0),
            }
        }
    }

    /// How long to wait for the other end to send or to take something: `WouldBlock`
    /// then. What was received until then stays.
    ///
    /// # Errors
    /// What the socket says.
    pub fn set_patience(&self, patience: Option<Duration>) -> io::Result<()> {
        self.stream.set_read_timeout(patience)?;
        self.stream.set_write_timeout(patience)
    }

    /// The oldest descriptor that came and was not yet taken.
    pub fn take_fd(&mut self) -> Option<OwnedFd> {
        self.fds.pop_front()
    }

    /// The stream, and what was already received from it.
    #[must_use]
    pub fn into_stream(self) -> (UnixStream, Vec<u8>) {
        (self.stream, self.received)
    }

    /// The process at the other end.
    #[must_use]
    pub fn peer_pid(&self) -> Option<i32> {
        let credentials = rustix::net::sockopt::socket_peercred(&self.stream).ok()?;
        Some(credentials.pid.as_raw_nonzero().get())
    }
}

/// Reads requests as a machine does, to the end of the connection, and tells how many
/// there were.
///
/// # Errors
/// The connection's, or what came is no request.
pub fn read_requests(stream: UnixStream) -> io::Result<usize> {
    let mut connection = Connection::new(stream);
    let mut count = 0;
    while connection.receive::<super::Request>()?.is_some() {
        count += 1;
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::{Reply, Request};
    use std::os::fd::AsFd as _;

    fn pair() -> (Connection, Connection) {
        let (a, b) = UnixStream::pair().unwrap();
        (Connection::new(a), Connection::new(b))
    }

    #[test]
    fn lines_and_descriptors_arrive_in_order() {
        let (mut a, mut b) = pair();
        let file = tempfile::tempfile().unwrap();
        let hold = Request::Committed(crate::control::CommitReport::default());
        a.send(&Request::Status, &[]).unwrap();
        a.send(&hold, &[file.as_fd()]).unwrap();
        assert_eq!(b.receive::<Request>().unwrap(), Some(Request::Status));
        assert_eq!(b.receive::<Request>().unwrap(), Some(hold));
        assert!(b.take_fd().is_some());
        assert!(b.take_fd().is_none());
        drop(a);
        assert_eq!(b.receive::<Request>().unwrap(), None);
    }

    #[test]
    fn what_is_no_request_is_refused() {
        let lines: [&[u8]; 6] = [
            b"\n",
            b"{\n",
            b"{}\n",
            b"{\"request\":\"explode\"}\n",
            b"\xff\xfe\n",
            b"{\"request\":\"console\"}\n",
        ];
        for line in lines {
            let (mut a, mut b) = pair();
            a.stream.write_all(line).unwrap();
            let error = b.receive::<Request>().unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{line:?}");
        }
    }

    #[test]
    fn an_endless_line_is_refused() {
        let (mut a, mut b) = pair();
        let writer = std::thread::spawn(move || a.stream.write_all(&vec![b' '; 1 << 20]));
        let error = b.receive::<Request>().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        drop(b);
        assert!(writer.join().unwrap().is_err());
    }

    #[test]
    fn an_ending_is_one_flat_object() {
        let reply = Reply::Ended {
            ending: crate::machine::Ending::TripleFault,
        };
        let text = serde_json::to_string(&reply).unwrap();
        assert_eq!(text, r#"{"reply":"ended","ending":"triple_fault"}"#);
        assert_eq!(serde_json::from_str::<Reply>(&text).unwrap(), reply);
    }
}
