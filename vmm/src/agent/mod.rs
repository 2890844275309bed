//! The host's end of the connections to the guest's agent, through the device's
//! UNIX socket. What goes over them is drawn in `docs/AGENT.md`.
//!
//! A connection ends when its machine is restored elsewhere, never by the machine
//! being saved.

mod restored;

use std::io::{self, Read as _, Write as _};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
pub use snapstore_agent_protocol::MacAddress;
pub use snapstore_agent_protocol::{AGENT_PORT, ErrorKind, Exec, Exit, MAX_ENTROPY_BYTES};
use snapstore_agent_protocol::{
    FRAME_HEADER_BYTES, FrameKind, MAX_FRAME_BYTES, Reply, Request, parse_frame_header, put_frame,
    take_frame, to_hex,
};

/// How long it waits before it tries again to connect.
const RETRY: Duration = Duration::from_millis(20);
/// How much entropy a restored machine is given, in bytes.
const ENTROPY_BYTES: usize = 64;
/// How long an agent may take to answer a request, and to take one.
const ANSWER_PATIENCE: Duration = Duration::from_secs(10);
/// How much longer than it may take an agent may take to tell that a command is over.
const EXEC_GRACE: Duration = Duration::from_secs(10);
/// The longest answer of the device to a greeting, in bytes.
const MAX_ANSWER_BYTES: usize = 32;

/// What can go wrong between the host and an agent.
#[derive(thiserror::Error, Debug)]
#[non_exhaustive]
pub enum AgentError {
    /// Nobody answers.
    #[error("no agent answers in the guest (port {port} of {}): {source}", path.display())]
    NoAgent {
        /// The socket of the machine's vsock device.
        path: PathBuf,
        /// The guest's port.
        port: u32,
        /// What the last attempt came to.
        source: io::Error,
    },
    /// The connection broke.
    #[error("the connection to the guest's agent broke: {0}")]
    Connection(io::Error),
    /// The agent hangs, or its guest stands still.
    #[error("the guest's agent does not answer within {0} s; does the guest run?")]
    Late(u64),
    /// Standard input or output of this side failed.
    #[error("cannot pass on a guest's input or output: {0}")]
    Local(io::Error),
    /// The agent said no.
    #[error("the guest's agent: {message}")]
    Refused {
        /// Which kind of no.
        kind: ErrorKind,
        /// What it said, in one line.
        message: String,
    },
    /// The agent speaks another protocol.
    #[error(
        "the guest's agent answers something else than what it was asked; is it of another version?"
    )]
    Protocol,
}

/// Which output of a command.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// A connection to the agent of a guest.
pub struct AgentClient {
    stream: UnixStream,
    patience: Duration,
}

type Result<T> = std::result::Result<T, AgentError>;

impl AgentClient {
    /// Connects to the agent on a port of the guest, through the UNIX socket of
    /// the guest's vsock device. Tries again until `patience` is over: a guest may
    /// still boot, or have to notice that it was restored.
    ///
    /// # Errors
    /// [`AgentError::NoAgent`].
    pub fn connect(vsock: &Path, port: u32, patience: Duration) -> Result<Self> {
        Self::connect_while(vsock, port, patience, || true)
    }

    /// As [`AgentClient::connect`], as long as it `makes_sense`.
    ///
    /// # Errors
    /// [`AgentError::NoAgent`].
    pub fn connect_while(
        vsock: &Path,
        port: u32,
        patience: Duration,
        makes_sense: impl Fn() -> bool,
    ) -> Result<Self> {
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match attempt(vsock, port, left.max(RETRY)) {
                Ok(stream) => return Ok(Self::over(stream)),
                Err(_) if left > RETRY && makes_sense() => std::thread::sleep(RETRY),
                Err(source) => {
                    return Err(AgentError::NoAgent {
                        path: vsock.to_owned(),
                        port,
                        source,
                    });
                }
            }
        }
    }

    /// A client over a connection that leads to an agent.
    #[must_use]
    pub fn over(stream: UnixStream) -> Self {
        Self {
            stream,
            patience: ANSWER_PATIENCE,
        }
    }

    /// Waits so long for the answer to a request.
    #[must_use]
    pub fn with_patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Whether the agent answers.
    ///
    /// # Errors
    /// It does not.
    pub fn ping(&mut self) -> Result<()> {
        match self.request(&Request::Ping)? {
            Reply::Pong { .. } => Ok(()),
            _ => Err(AgentError::Protocol),
        }
    }

    /// Sets the guest's clock.
    ///
    /// # Errors
    /// The agent may not, or the connection broke.
    pub fn set_time(&mut self, time: SystemTime) -> Result<()> {
        let since_epoch = time.duration_since(SystemTime::UNIX_EPOCH);
        let nanoseconds = since_epoch.map_or(0, |time| time.as_nanos());
        let request = Request::Settime {
            unix_nanoseconds: u64::try_from(nanoseconds).unwrap_or(u64::MAX),
        };
        self.order(&request)
    }

    /// Adds entropy to the guest, at most [`MAX_ENTROPY_BYTES`].
    ///
    /// # Errors
    /// The agent may not, or the connection broke.
    pub fn reseed(&mut self, entropy: &[u8]) -> Result<()> {
        self.order(&Request::Reseed {
            bytes: to_hex(entropy),
        })
    }

    /// Names the guest.
    ///
    /// # Errors
    /// The agent may not, or the connection broke.
    pub fn identify(&mut self, hostname: Option<&str>, machine_id: Option<&str>) -> Result<()> {
        self.order(&Request::Identity {
            hostname: hostname.map(str::to_owned),
            machine_id: machine_id.map(str::to_owned),
        })
    }

    /// Gives the guest's network interface with the address `from` the address
    /// `to`. An agent that knows no such request ends the connection.
    ///
    /// # Errors
    /// There is no such interface, the agent may not, or the connection broke.
    pub fn set_mac(&mut self, from: MacAddress, to: MacAddress) -> Result<()> {
        self.order(&Request::Setmac {
            from: from.to_string(),
            to: to.to_string(),
        })
    }

    /// Adds entropy of the host's that nobody else has.
    ///
    /// # Errors
    /// As [`AgentClient::reseed`], or the host has none.
    pub fn reseed_afresh(&mut self) -> Result<()> {
        let mut entropy = [0; ENTROPY_BYTES];
        let got = rustix::rand::getrandom(&mut entropy, rustix::rand::GetRandomFlags::empty());
        got.map_err(|error| AgentError::Local(error.into()))?;
        self.reseed(&entropy)
    }

    fn order(&mut self, request: &Request) -> Result<()> {
        match self.request(request)? {
            Reply::Done => Ok(()),
            _ => Err(AgentError::Protocol),
        }
    }

    fn send_line(&mut self, request: &Request) -> Result<()> {
        let mut line = serde_json::to_vec(request).map_err(|_| AgentError::Protocol)?;
        line.push(b'\n');
        // A guest that takes a little now and then is waited for no longer.
        let deadline = Instant::now() + self.patience;
        let mut left = &line[..];
        while !left.is_empty() {
            let set = self.stream.set_write_timeout(Some(self.left(deadline)?));
            set.map_err(AgentError::Connection)?;
            match self.stream.write(left) {
                Ok(0) => return Err(AgentError::Connection(io::ErrorKind::WriteZero.into())),
                Ok(taken) => left = &left[taken..],
                Err(error) => self.heed(error)?,
            }
        }
        Ok(())
    }

    fn request(&mut self, request: &Request) -> Result<Reply> {
        self.send_line(request)?;
        let deadline = Instant::now() + self.patience;
        let mut header = [0; FRAME_HEADER_BYTES];
        self.read_exact(&mut header, deadline)?;
        let (FrameKind::Reply, length) = frame_header(header)? else {
            return Err(AgentError::Protocol);
        };
        let mut content = vec![0; length];
        self.read_exact(&mut content, deadline)?;
        parse_reply(&content)
    }

    fn read_exact(&mut self, mut out: &mut [u8], deadline: Instant) -> Result<()> {
        while !out.is_empty() {
            let set = self.stream.set_read_timeout(Some(self.left(deadline)?));
            set.map_err(AgentError::Connection)?;
            match self.stream.read(out) {
                Ok(0) => return Err(AgentError::Connection(io::ErrorKind::UnexpectedEof.into())),
                Ok(got) => out = &mut out[got..],
                Err(error) => self.heed(error)?,
            }
        }
        Ok(())
    }

    /// The time until then, of which there is some.
    fn left(&self, deadline: Instant) -> Result<Duration> {
        let left = deadline.saturating_duration_since(Instant::now());
        match left.is_zero() {
            true => Err(self.late()),
            false => Ok(left),
        }
    }

    /// What an attempt to send or receive came to: nothing, if it is to be tried again.
    fn heed(&self, error: io::Error) -> Result<()> {
        match error.kind() {
            io::ErrorKind::Interrupted => Ok(()),
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Err(self.late()),
            _ => Err(AgentError::Connection(error)),
        }
    }

    fn late(&self) -> AgentError {
        AgentError::Late(self.patience.as_secs())
    }

    /// Runs a command. Its output goes to `output` as it comes. If the command
    /// takes input, it is what `stdin` gives, to its end.
    ///
    /// # Errors
    /// There is no such command; the connection broke, upon which the guest kills
    /// the command; it should have been killed since its time was over, and the agent says
    /// nothing; or `stdin` or `output` failed.
    pub fn exec(
        mut self,
        exec: &Exec,
        stdin: Option<BorrowedFd<'_>>,
        output: &mut dyn FnMut(Stream, &[u8]) -> io::Result<()>,
    ) -> Result<Exit> {
        let mut exec = exec.clone();
        exec.stdin = stdin.is_some();
        let longest = exec.timeout_seconds.map(Duration::from_secs);
        self.send_line(&Request::Exec(exec))?;
        // A command may take as long as its user allows, and an agent no longer.
        self.patience = longest.map_or(Duration::MAX, |longest| longest + EXEC_GRACE);
        let deadline = Instant::now().checked_add(self.patience);
        let (mut stdin, mut unsent, mut received) = (stdin, Vec::new(), Vec::new());
        loop {
            let left = deadline.map(|deadline| self.left(deadline)).transpose()?;
            let input = stdin.filter(|_| unsent.is_empty());
            let readable = wait(&self.stream, input, &unsent, left)?;
            if let (Some(input), true) = (stdin, readable) {
                stdin = take_input(input, &mut unsent)?;
            }
            pass_on(&self.stream, &mut unsent)?;
            receive(&self.stream, &mut received)?;
            while let Some((kind, content)) =
                take_frame(&mut received).map_err(|_| AgentError::Protocol)?
            {
                let stream = match kind {
                    FrameKind::Stdout => Stream::Stdout,
                    FrameKind::Stderr => Stream::Stderr,
                    FrameKind::Stdin => return Err(AgentError::Protocol),
                    FrameKind::Reply => {
                        return match parse_reply(&content)? {
                            Reply::Exit(exit) => Ok(exit),
                            _ => Err(AgentError::Protocol),
                        };
                    }
                };
                output(stream, &content).map_err(AgentError::Local)?;
            }
        }
    }
}

/// Connects, and says to which port.
fn attempt(vsock: &Path, port: u32, patience: Duration) -> io::Result<UnixStream> {
    let deadline = Instant::now() + patience;
    let mut stream = UnixStream::connect(vsock)?;
    stream.set_write_timeout(Some(patience))?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
    let mut answer = Vec::new();
    let mut byte = [0];
    while answer.last() != Some(&b'\n') && answer.len() < MAX_ANSWER_BYTES {
        let left = deadline.saturating_duration_since(Instant::now());
        stream.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        if stream.read(&mut byte)? == 0 {
            return Err(io::Error::new(
                io::ErrorKind::ConnectionRefused,
                "the guest did not accept the connection",
            ));
        }
        answer.extend(byte);
    }
    if !answer.starts_with(b"OK ") {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "this is no vsock device's socket",
        ));
    }
    stream.set_read_timeout(None)?;
    Ok(stream)
}

fn frame_header(header: [u8; FRAME_HEADER_BYTES]) -> Result<(FrameKind, usize)> {
    parse_frame_header(header).map_err(|_| AgentError::Protocol)
}

fn parse_reply(content: &[u8]) -> Result<Reply> {
    match serde_json::from_slice(content) {
        Ok(Reply::Error { kind, message }) => Err(AgentError::Refused {
            kind,
            message: plain(&message),
        }),
        Ok(reply) => Ok(reply),
        Err(_) => Err(AgentError::Protocol),
    }
}

/// What a guest says, as one line that does nothing to a terminal: it comes to the log of its
/// machine, whose last line tells how the machine ended, and before people.
#[must_use]
pub fn plain(text: &str) -> String {
    text.replace(char::is_control, " ")
}

/// Waits until something can be done; returns whether there is input.
fn wait(
    stream: &UnixStream,
    stdin: Option<BorrowedFd<'_>>,
    unsent: &[u8],
    patience: Option<Duration>,
) -> Result<bool> {
    let mut events = PollFlags::IN;
    if !unsent.is_empty() {
        events |= PollFlags::OUT;
    }
    let mut fds = vec![PollFd::new(stream, events)];
    fds.extend(stdin.map(|stdin| PollFd::from_borrowed_fd(stdin, PollFlags::IN)));
    let patience = patience.and_then(|patience| Timespec::try_from(patience).ok());
    match poll(&mut fds, patience.as_ref()) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(error) => return Err(AgentError::Local(error.into())),
    }
    Ok(fds.get(1).is_some_and(|stdin| !stdin.revents().is_empty()))
}

/// Makes a frame of some input. Returns where the next comes from.
fn take_input<'fd>(
    stdin: BorrowedFd<'fd>,
    unsent: &mut Vec<u8>,
) -> Result<Option<BorrowedFd<'fd>>> {
    let mut piece = [0; MAX_FRAME_BYTES / 4];
    match rustix::io::read(stdin, &mut piece) {
        Ok(length) => {
            put_frame(unsent, FrameKind::Stdin, &piece[..length]);
            Ok((length > 0).then_some(stdin))
        }
        Err(Errno::AGAIN | Errno::INTR) => Ok(Some(stdin)),
        Err(error) => Err(AgentError::Local(error.into())),
    }
}

/// Sends what the device takes. Nothing is lost when it takes no more: the agent
/// says how the command ended before it leaves.
fn pass_on(stream: &UnixStream, unsent: &mut Vec<u8>) -> Result<()> {
    while !unsent.is_empty() {
        match send(stream, unsent, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(sent) => {
                unsent.drain(..sent);
            }
            Err(Errno::AGAIN) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(Errno::PIPE | Errno::CONNRESET) => unsent.clear(),
            Err(error) => return Err(AgentError::Connection(error.into())),
        }
    }
    Ok(())
}

/// Receives what there is.
fn receive(stream: &UnixStream, received: &mut Vec<u8>) -> Result<()> {
    let mut bytes = [0; MAX_FRAME_BYTES / 4];
    match recv(stream, &mut bytes, RecvFlags::DONTWAIT) {
        Ok((_, 0)) => Err(AgentError::Connection(io::ErrorKind::UnexpectedEof.into())),
        Ok((_, length)) => {
            received.extend(&bytes[..length]);
            Ok(())
        }
        Err(Errno::AGAIN | Errno::INTR) => Ok(()),
        Err(error) => Err(AgentError::Connection(error.into())),
    }
}

#[cfg(test)]
mod tests;
