//! A client's end of a machine's control socket.

mod committer;
mod frozen;

use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};

use crate::control::error_kind::ErrorKind;
use crate::control::frozen_wire::Malformed;
use crate::control::protocol::{Reply, Request, Status};
use crate::control::wire::Connection;
use crate::error::{Error, Result};
use crate::machine::Ending;
pub use committer::Committer;
pub use frozen::FrozenMachine;

/// How long a machine may take to answer what it can answer at once, or after it has
/// stopped for it.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long it may take to freeze, or to let go of what it froze.
const FREEZE_PATIENCE: Duration = Duration::from_secs(60);
/// For how long that is waited for without a word.
const SILENT_FOR: Duration = Duration::from_secs(1);

/// A connection to a machine.
pub struct Client {
    connection: Connection,
    path: PathBuf,
    patience: Option<Duration>,
}

impl Client {
    /// Connects to a machine's socket.
    ///
    /// # Errors
    /// [`Error::NoMachine`] if nobody listens there.
    pub fn connect(path: &Path) -> Result<Self> {
        let stream = connect(path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Error::NoMachine {
                path: path.to_owned(),
            },
            io::ErrorKind::WouldBlock => Error::NoAnswer {
                path: path.to_owned(),
            },
            _ => Error::File {
                action: "connect to",
                path: path.to_owned(),
                source,
            },
        })?;
        Ok(Self {
            connection: Connection::new(stream),
            path: path.to_owned(),
            patience: None,
        })
    }

    /// A client over a connection that leads to a machine.
    #[must_use]
    pub fn over(stream: UnixStream) -> Self {
        Self {
            connection: Connection::new(stream),
            path: PathBuf::from("this connection"),
            patience: None,
        }
    }

    /// Waits so long for answers, and not as long as the request may take.
    #[must_use]
    pub fn with_patience(mut self, patience: Duration) -> Self {
        self.patience = Some(patience);
        self
    }

    fn broken(&self, source: io::Error) -> Error {
        if source.kind() == io::ErrorKind::WouldBlock {
            return Error::NoAnswer {
                path: self.path.clone(),
            };
        }
        Error::File {
            action: "talk to the machine at",
            path: self.path.clone(),
            source,
        }
    }

    /// Asks, and waits for the answer. An `error` reply is an error.
    ///
    /// # Errors
    /// [`Error::Refused`] if the machine says no; a broken connection.
    pub fn request(&mut self, request: &Request) -> Result<Reply> {
        self.request_with(request, &[])
    }

    fn request_with(&mut self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<Reply> {
        let patience = self.patience.or_else(|| patience(request));
        self.connection
            .set_patience(patience)
            .map_err(|source| self.broken(source))?;
        match self.connection.send(request, fds) {
            // One that turned this client away has said why.
            Err(source) if source.kind() != io::ErrorKind::BrokenPipe => {
                return Err(self.broken(source));
            }
            _ => {}
        }
        if let Some(patience) = patience {
            self.say_if_slow(patience);
        }
        let reply = self.connection.receive::<Reply>();
        match reply.map_err(|source| self.broken(source))? {
            Some(Reply::Error { kind, message }) => Err(Error::Refused { kind, message }),
            Some(reply) => Ok(reply),
            None => Err(self.broken(io::ErrorKind::UnexpectedEof.into())),
        }
    }

    /// What came with a reply, taken apart.
    fn unpack<T>(
        &mut self,
        decode: impl FnOnce(&mut Connection) -> std::result::Result<T, Malformed>,
    ) -> Result<T> {
        decode(&mut self.connection).or_else(|malformed| match malformed {
            Malformed::Unexpected => Self::unexpected(),
            Malformed::Io(source) => Err(self.broken(source)),
        })
    }

    /// Says what is waited for, once it has been for some time.
    fn say_if_slow(&self, patience: Duration) {
        if patience <= SILENT_FOR || self.connection.is_readable_within(SILENT_FOR) {
            return;
        }
        let pid = self.connection.peer_pid();
        let machine = self.path.display();
        let seconds = patience.as_secs();
        match pid {
            Some(pid) if is_stopped(pid) => tracing::warn!(
                "waiting for {machine}: the machine's process {pid} is stopped; `kill -CONT {pid}` \
                 lets it go on; this gives up after at most {seconds} s"
            ),
            _ => tracing::warn!(
                "waiting for the machine at {machine} to answer; this gives up after at most {seconds} s"
            ),
        }
    }

    fn unexpected<T>() -> Result<T> {
        Err(Error::Refused {
            kind: ErrorKind::Invalid,
            message: "the machine's answer does not fit the request; \
                      is it of another version of this program?"
                .to_owned(),
        })
    }

    /// How the machine is.
    ///
    /// # Errors
    /// As [`Client::request`].
    pub fn status(&mut self) -> Result<Status> {
        match self.request(&Request::Status)? {
            Reply::Status(status) => Ok(*status),
            _ => Self::unexpected(),
        }
    }

    /// Asks for something that has no answer of its own.
    ///
    /// # Errors
    /// As [`Client::request`].
    pub fn order(&mut self, request: &Request) -> Result<()> {
        match self.request(request)? {
            Reply::Done => Ok(()),
            _ => Self::unexpected(),
        }
    }

    /// Ends the machine, or waits until it has ended.
    ///
    /// # Errors
    /// As [`Client::request`].
    pub fn ending(&mut self, request: &Request) -> Result<Ending> {
        match self.request(request)? {
            Reply::Ended { ending } => Ok(ending),
            _ => Self::unexpected(),
        }
    }

    /// Turns the connection into the machine's serial line, and returns what it
    /// already sent.
    ///
    /// # Errors
    /// As [`Client::request`].
    pub fn console(mut self, replay: bool) -> Result<(UnixStream, Vec<u8>)> {
        match self.request(&Request::Console { replay })? {
            Reply::Console => {
                self.connection
                    .set_patience(None)
                    .map_err(|source| self.broken(source))?;
                Ok(self.connection.into_stream())
            }
            _ => Self::unexpected(),
        }
    }
}

/// Connects without waiting: a machine that takes no clients, since its process is
/// stopped, has no room for more at some time.
fn connect(path: &Path) -> io::Result<UnixStream> {
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// Whether a signal has stopped a process (proc(5), `stat`).
fn is_stopped(pid: i32) -> bool {
    let stat = crate::proc::read(&format!("{pid}/stat"));
    let state = stat.ok().and_then(|stat| {
        // The name before it may have anything in it.
        let after_name = stat.rsplit_once(')')?.1;
        after_name.trim_start().chars().next()
    });
    matches!(state, Some('T' | 't'))
}

/// How long a request may take; some take as long as the guest likes.
fn patience(request: &Request) -> Option<Duration> {
    match request {
        Request::Wait | Request::WaitReady => None,
        Request::Precopy { .. } | Request::Freeze { .. } | Request::Committed(_) => {
            Some(FREEZE_PATIENCE)
        }
        _ => Some(PATIENCE),
    }
}

fn lock(client: &Mutex<Client>) -> MutexGuard<'_, Client> {
    client.lock().unwrap_or_else(PoisonError::into_inner)
}
