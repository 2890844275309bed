//! The host's side: UNIX sockets, as Firecracker documents them in
//! `docs/vsock.md`.
//!
//! A program of the host connects to the device's socket, writes
//! `CONNECT <port>\n` and, when the guest accepts, reads `OK <port of the host>\n`;
//! then bytes go both ways. If the guest does not accept, the connection is
//! closed. When a program in the guest connects to a port of the host, the device
//! connects to the socket whose name is the device's with `_<port>` after it.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recv, socket_with,
};

use super::poll::{EventFlags, Poll, Source};

/// The longest line of a greeting, in bytes.
const MAX_LINE_BYTES: usize = 32;
/// The most that may be greeting at a time; beyond, the oldest is forgotten.
const MAX_GREETINGS: usize = 64;
/// The most that are accepted at once.
const MAX_ACCEPTS: usize = 16;
/// The numbers of greetings; those below have another meaning in events.
const FIRST_GREETING: u32 = 2;

/// A program of the host that connected and has not yet said to which port.
struct Greeting {
    number: u32,
    stream: UnixStream,
    line: Vec<u8>,
}

/// The device's socket.
pub(super) struct Host {
    path: PathBuf,
    listener: UnixListener,
    greetings: VecDeque<Greeting>,
    next_number: u32,
}

impl Host {
    /// Listens at `path`, where nothing may be yet.
    pub fn listen(path: &Path, poll: &Poll) -> io::Result<Self> {
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        poll.add(&listener, Source::Listener, EventFlags::IN)?;
        Ok(Self {
            path: path.to_owned(),
            listener,
            greetings: VecDeque::new(),
            next_number: FIRST_GREETING,
        })
    }

    /// Takes in those who connect.
    ///
    /// # Errors
    /// The operating system's: it has no descriptor left.
    pub fn accept(&mut self, poll: &Poll) -> io::Result<()> {
        for _ in 0..MAX_ACCEPTS {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return Ok(()),
                    io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => continue,
                    _ => return Err(error),
                },
            };
            stream.set_nonblocking(true)?;
            if self.greetings.len() >= MAX_GREETINGS
                && let Some(oldest) = self.greetings.pop_front()
            {
                poll.remove(&oldest.stream);
            }
            let number = self.next_number;
            self.next_number = number.checked_add(1).unwrap_or(FIRST_GREETING);
            poll.add(&stream, Source::Greeting(number), EventFlags::IN)?;
            self.greetings.push_back(Greeting {
                number,
                stream,
                line: Vec::new(),
            });
        }
        Ok(())
    }

    /// Hears out a greeting. When it is whole, the socket and the guest's port.
    pub fn hear(&mut self, number: u32, poll: &Poll) -> Option<(UnixStream, u32)> {
        let index = self
            .greetings
            .iter()
            .position(|greeting| greeting.number == number)?;
        let heard = self.greetings[index].read();
        if heard == Heard::Part {
            return None;
        }
        let greeting = self.greetings.remove(index)?;
        poll.remove(&greeting.stream);
        match heard {
            Heard::Port(port) => Some((greeting.stream, port)),
            Heard::Part | Heard::Nonsense => None,
        }
    }

    /// Connects to the socket for a port of the host.
    pub fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let mut path = OsString::from(&self.path);
        path.push(format!("_{port}"));
        let address = SocketAddrUnix::new(path.as_bytes())?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        // Done at once, or refused: also when the listener has too many waiting.
        connect(&socket, &address)?;
        Ok(UnixStream::from(socket))
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // Its directory goes with the machine; a socket left there hurts nobody. The
        // last owner may be a filtered thread, which may remove nothing: the
        // supervisor of a confined machine does it.
        if !crate::confine::is_confined() {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// How far a greeting is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Heard {
    Part,
    Port(u32),
    Nonsense,
}

impl Greeting {
    /// Reads byte by byte: what follows the line is for the guest.
    fn read(&mut self) -> Heard {
        let mut byte = [0];
        while self.line.len() < MAX_LINE_BYTES {
            match recv(&self.stream, &mut byte, RecvFlags::DONTWAIT) {
                Ok((_, 1)) if byte[0] == b'\n' => return parse(&self.line),
                Ok((_, 1)) => self.line.push(byte[0]),
                Err(Errno::AGAIN) => return Heard::Part,
                Err(Errno::INTR) => {}
                _ => return Heard::Nonsense,
            }
        }
        Heard::Nonsense
    }
}

fn parse(line: &[u8]) -> Heard {
    let line = std::str::from_utf8(line).unwrap_or_default();
    let port = line.trim_end_matches('\r').strip_prefix("CONNECT ");
    match port.map(str::parse) {
        Some(Ok(port)) => Heard::Port(port),
        _ => Heard::Nonsense,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greetings_are_parsed() {
        assert_eq!(parse(b"CONNECT 1024"), Heard::Port(1024));
        assert_eq!(parse(b"CONNECT 1024\r"), Heard::Port(1024));
        for line in [
            "",
            "CONNECT",
            "CONNECT ",
            "CONNECT -1",
            "CONNECT 4294967296",
            "connect 1",
        ] {
            assert_eq!(parse(line.as_bytes()), Heard::Nonsense, "{line}");
        }
        assert_eq!(parse(b"\xff"), Heard::Nonsense);
    }
}
