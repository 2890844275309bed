//! Talking to another program's socket: every wait has an end, and every answer a longest
//! length. The other end may be wedged, or may not be what it seems.

use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with, sockopt,
};

use crate::error::{Busy, NotFound};

/// How much is read at once.
const CHUNK_BYTES: usize = 64 << 10;

/// A connection to a monitor's socket, with what was read of it and not yet taken.
pub struct Wire {
    stream: UnixStream,
    path: PathBuf,
    read: Vec<u8>,
}

impl Wire {
    /// Connects. A socket file that nobody listens at is told apart from one that is not
    /// there, and from one whose owner takes no more clients.
    pub fn connect(path: &Path) -> anyhow::Result<Self> {
        let address = SocketAddrUnix::new(path)
            .map_err(|error| anyhow::anyhow!("{} cannot be a socket: {error}", path.display()))?;
        // connect(2) waits for a place in the queue of a server that takes nobody; a socket
        // that does not wait says so at once.
        let socket = socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )?;
        connect(&socket, &address).map_err(|error| refused(path, error.into()))?;
        let stream = UnixStream::from(socket);
        stream.set_nonblocking(false)?;
        Ok(Self {
            stream,
            path: path.to_owned(),
            read: Vec::new(),
        })
    }

    /// The process that listens at the socket, as the kernel tells (unix(7), SO_PEERCRED).
    pub fn peer(&self) -> anyhow::Result<u32> {
        let peer = sockopt::socket_peercred(&self.stream).context("cannot tell who listens")?;
        Ok(u32::try_from(peer.pid.as_raw_nonzero().get())?)
    }

    /// The stream itself.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Where the socket is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Sends all of this.
    pub fn send(&mut self, bytes: &[u8], deadline: Instant) -> anyhow::Result<()> {
        let mut rest = bytes;
        while !rest.is_empty() {
            self.stream.set_write_timeout(Some(left(deadline)))?;
            match self.stream.write(rest) {
                Ok(count) => rest = &rest[count..],
                Err(error) => self.check(error, deadline)?,
            }
        }
        Ok(())
    }

    /// The next line, without its end.
    pub fn line(&mut self, most: usize, deadline: Instant) -> anyhow::Result<Vec<u8>> {
        let mut looked_at = 0;
        loop {
            if let Some(at) = self.read[looked_at..]
                .iter()
                .position(|byte| *byte == b'\n')
            {
                let mut line: Vec<u8> = self.read.drain(..=looked_at + at).collect();
                line.pop();
                if line.last() == Some(&b'\r') {
                    line.pop();
                }
                return Ok(line);
            }
            looked_at = self.read.len();
            ensure!(
                looked_at <= most,
                "{} answers with a line of more than {most} bytes; it is no monitor's socket of \
                 the kind that was named",
                self.path.display()
            );
            if self.fill(deadline)? == 0 {
                bail!(
                    "{} closed the connection before it answered; look at the monitor's log",
                    self.path.display()
                );
            }
        }
    }

    /// The next `count` bytes.
    pub fn take(&mut self, count: usize, deadline: Instant) -> anyhow::Result<Vec<u8>> {
        while self.read.len() < count {
            if self.fill(deadline)? == 0 {
                bail!("{} closed the connection in an answer", self.path.display());
            }
        }
        Ok(self.read.drain(..count).collect())
    }

    fn fill(&mut self, deadline: Instant) -> anyhow::Result<usize> {
        let mut buffer = vec![0; CHUNK_BYTES];
        loop {
            self.stream.set_read_timeout(Some(left(deadline)))?;
            match self.stream.read(&mut buffer) {
                Ok(count) => {
                    self.read.extend_from_slice(&buffer[..count]);
                    return Ok(count);
                }
                Err(error) => self.check(error, deadline)?,
            }
        }
    }

    /// Whether to go on after an error.
    fn check(&self, error: io::Error, deadline: Instant) -> anyhow::Result<()> {
        match error.kind() {
            io::ErrorKind::Interrupted => Ok(()),
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                if Instant::now() < deadline {
                    return Ok(());
                }
                bail!(Busy(format!(
                    "{} does not answer: the monitor hangs, or another program is connected to \
                     it; end that one, or try again",
                    self.path.display()
                )))
            }
            _ => Err(error).with_context(|| format!("cannot talk to {}", self.path.display())),
        }
    }
}

/// What is left until then, and never nothing: that would mean to wait for ever.
fn left(deadline: Instant) -> Duration {
    let left = deadline.saturating_duration_since(Instant::now());
    left.max(Duration::from_millis(1))
}

fn refused(path: &Path, error: io::Error) -> anyhow::Error {
    let path = path.display();
    match error.kind() {
        io::ErrorKind::NotFound => NotFound(format!(
            "there is no socket {path}; start the monitor with one, or name another"
        ))
        .into(),
        io::ErrorKind::ConnectionRefused => NotFound(format!(
            "nobody listens at {path}: the monitor that made it has ended; remove the file"
        ))
        .into(),
        io::ErrorKind::WouldBlock => Busy(format!(
            "the monitor at {path} takes no more clients; end one, or try again"
        ))
        .into(),
        _ => anyhow::Error::from(error).context(format!("cannot connect to {path}")),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(200)
    }

    #[test]
    fn one_that_never_answers_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let _listener = UnixListener::bind(&path).unwrap();
        let mut wire = Wire::connect(&path).unwrap();
        let error = wire.line(100, soon()).unwrap_err();
        assert!(error.is::<Busy>(), "{error}");
        let error = wire.take(1, soon()).unwrap_err();
        assert!(error.is::<Busy>(), "{error}");
        // One that does not read, either.
        let error = wire.send(&vec![0; 64 << 20], soon()).unwrap_err();
        assert!(error.is::<Busy>(), "{error}");
    }

    #[test]
    fn an_answer_without_end_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let writer = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            while stream.write_all(&[b'x'; 4096]).is_ok() {}
        });
        let mut wire = Wire::connect(&path).unwrap();
        let late = Instant::now() + Duration::from_secs(60);
        let error = wire.line(1 << 20, late).unwrap_err();
        assert!(error.to_string().contains("more than"), "{error}");
        drop(wire);
        writer.join().unwrap();
    }

    #[test]
    fn sockets_that_nobody_listens_at_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        assert!(Wire::connect(&path).err().unwrap().is::<NotFound>());
        drop(UnixListener::bind(&path).unwrap());
        let error = Wire::connect(&path).err().unwrap();
        assert!(error.to_string().contains("nobody listens"), "{error}");
    }

    #[test]
    fn lines_come_one_by_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let mut wire = Wire::connect(&path).unwrap();
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"one\r\ntwo\nrest").unwrap();
        assert_eq!(wire.line(100, soon()).unwrap(), b"one");
        assert_eq!(wire.line(100, soon()).unwrap(), b"two");
        assert_eq!(wire.take(4, soon()).unwrap(), b"rest");
        assert_eq!(wire.peer().unwrap(), std::process::id());
    }
}
