//! A client's end of a machine's control socket.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::ops::Range;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};

use crate::control::error_kind::ErrorKind;
use crate::control::protocol::{CommitReport, DiskInfo, Origin, Reply, Request, Seconds, Status};
use crate::control::wire::Connection;
use crate::devices::virtio::{Content, Extent};
use crate::error::{Error, Result};
use crate::machine::Ending;
use crate::memory::{HostSlot, ScanMethod, private_ranges, ranges};

/// The longest list of changed ranges that is taken, in bytes: one for every
/// second page of a TiB would be more than any commit could write.
const MAX_LIST_BYTES: u64 = 1 << 31;

/// How long a machine may take to answer what it can answer at once, or after it has
/// stopped for it.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long it may take to freeze, or to let go of what it froze.
const FREEZE_PATIENCE: Duration = Duration::from_secs(60);
/// How often a client that has frozen a machine says that it is still there.
const ALIVE_EVERY: Duration = Duration::from_secs(10);

/// A connection to a machine.
pub struct Client {
    connection: Connection,
    path: PathBuf,
    patience: Option<Duration>,
}

/// A machine at one instant, to be committed by this process. The frozen copy
/// ends with it.
pub struct FrozenMachine {
    client: Arc<Mutex<Client>>,
    /// Ends the thread that says that this is alive.
    _alive: Sender<()>,
    memory: File,
    slots: Vec<HostSlot>,
    state: Vec<u8>,
    disks: Vec<FrozenDisk>,
    written: Vec<Range<u64>>,
    after_rounds: bool,
    origin: Origin,
    timings: Seconds,
}

/// A disk at one instant.
pub struct FrozenDisk {
    /// Its name.
    pub name: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// The file under the overlay.
    pub base: File,
    /// When that had last been changed when the machine began, in seconds and
    /// nanoseconds since 1970; `None` of what is not a regular file.
    pub base_modified: Option<(i64, i64)>,
    /// What the guest wrote; `None` for a disk that it can only read.
    pub overlay: Option<File>,
    /// What differs from the origin, or without one from the base; ascending.
    pub extents: Vec<Extent>,
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
        let reply = self.connection.receive::<Reply>();
        match reply.map_err(|source| self.broken(source))? {
            Some(Reply::Error { kind, message }) => Err(Error::Refused { kind, message }),
            Some(reply) => Ok(reply),
            None => Err(self.broken(io::ErrorKind::UnexpectedEof.into())),
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

    /// Freezes the machine, and finds what it changed.
    ///
    /// # Errors
    /// As [`Client::request`]; [`ErrorKind::Busy`] if another process commits it.
    pub fn freeze(self) -> Result<FrozenMachine> {
        Committer::new(self).freeze(false)
    }

    fn take_disk(&mut self, info: DiskInfo) -> Result<FrozenDisk> {
        let base = self.take_file()?;
        let overlay = info.has_overlay.then(|| self.take_file()).transpose()?;
        let mut list = self.take_file()?;
        let extents = read_extents(&mut list, &info).map_err(|source| self.broken(source))?;
        Ok(FrozenDisk {
            name: info.name,
            size_bytes: info.size_bytes,
            base,
            base_modified: info.base_modified,
            overlay,
            extents,
        })
    }

    fn take_file(&mut self) -> Result<File> {
        match self.connection.take_fd() {
            Some(fd) => Ok(File::from(fd)),
            None => Self::unexpected(),
        }
    }
}

/// A connection that commits a machine.
pub struct Committer {
    client: Arc<Mutex<Client>>,
    /// Ends the thread that says that this is alive.
    alive: Sender<()>,
    /// The last round whose pages were handed out.
    round: Option<u64>,
}

/// Some of a running guest's memory, to be read now.
pub struct LiveMemory {
    /// To be read at the slots' host addresses.
    pub memory: File,
    /// Where guest memory lies in it.
    pub slots: Vec<HostSlot>,
    /// What may differ from the origin, or from what the round before has read: image
    /// ranges in bytes.
    pub written: Vec<Range<u64>>,
    /// The snapshot that the rest of the memory is of; without one it is zero.
    pub origin: Origin,
}

impl Committer {
    /// From here on the machine hears now and then that this process lives.
    #[must_use]
    pub fn new(client: Client) -> Self {
        let client = Arc::new(Mutex::new(client));
        Self {
            alive: say_alive(&client),
            client,
            round: None,
        }
    }

    /// Memory that may be read while the guest runs. By asking once more the caller says
    /// that it has read what it was told before; pages written meanwhile are listed again.
    /// `None` if no further round is worthwhile.
    ///
    /// # Errors
    /// As [`Client::request`]; [`ErrorKind::Busy`] if another process commits it.
    pub fn next_round(&mut self) -> Result<Option<LiveMemory>> {
        let mut client = lock(&self.client);
        let after = self.round;
        let (slots, round, origin) = match client.request(&Request::Precopy { after })? {
            Reply::Done => return Ok(None),
            Reply::Live {
                slots,
                round,
                origin,
            } => (slots, round, origin),
            _ => return Client::unexpected(),
        };
        let memory = client.take_file()?;
        let mut list = client.take_file()?;
        let written = read_ranges(&mut list).map_err(|source| client.broken(source))?;
        self.round = Some(round);
        Ok(Some(LiveMemory {
            memory,
            slots,
            written,
            origin,
        }))
    }

    /// Freezes the machine, and finds what it changed: since the last round, if its pages
    /// have been read ([`FrozenMachine::after_rounds`]). With `whole` all of the memory is
    /// frozen, and not only what changed.
    ///
    /// # Errors
    /// As [`Committer::next_round`].
    pub fn freeze(self, whole: bool) -> Result<FrozenMachine> {
        let asked = self.round;
        let mut client = lock(&self.client);
        let request = Request::Freeze {
            after: asked,
            whole,
        };
        let Reply::Frozen {
            pid,
            slots,
            lists_changes,
            after,
            disks,
            origin,
            timings,
        } = client.request(&request)?
        else {
            return Client::unexpected();
        };
        if let Some((machine, frozen)) = client.connection.peer_pid().zip(pid)
            && let Err(error) = volunteer(machine, frozen)
        {
            tracing::debug!(%error, "the frozen copy may outlive its machine when memory is short");
        }
        let memory = client.take_file()?;
        let pagemap = pid.map(|_| client.take_file()).transpose()?;
        let mut state_file = client.take_file()?;
        let mut state = Vec::new();
        let began = std::time::Instant::now();
        read_from_start(&mut state_file, &mut state, crate::state::MAX_STATE_BYTES)
            .map_err(|source| client.broken(source))?;
        let private = pagemap
            .map(|pagemap| private_ranges(&pagemap, &slots, ScanMethod::Automatic))
            .transpose()?;
        let mut changed = None;
        if lists_changes {
            let mut list = client.take_file()?;
            changed = Some(read_ranges(&mut list).map_err(|source| client.broken(source))?);
        }
        let written = match (private, changed) {
            (Some(private), Some(changed)) => ranges::intersect(&private, &changed),
            (Some(all), None) | (None, Some(all)) => all,
            (None, None) => return Client::unexpected(),
        };
        let disks = disks
            .into_iter()
            .map(|info| client.take_disk(info))
            .collect::<Result<_>>()?;
        let mut timings = timings;
        timings.insert("scan".to_owned(), began.elapsed().as_secs_f64());
        drop(client);
        Ok(FrozenMachine {
            client: self.client,
            _alive: self.alive,
            memory,
            slots,
            state,
            disks,
            written,
            after_rounds: after.is_some() && after == asked,
            origin,
            timings,
        })
    }
}

impl FrozenMachine {
    /// Whether what was written is what was written since the last round of
    /// [`Committer::next_round`]; else it is since the last commit, and what the rounds
    /// have read is of no use.
    #[must_use]
    pub fn after_rounds(&self) -> bool {
        self.after_rounds
    }

    /// The frozen memory, to be read at the slots' host addresses. If what was written was
    /// copied it holds nothing else.
    #[must_use]
    pub fn memory(&self) -> &File {
        &self.memory
    }

    /// Where guest memory lies in it.
    #[must_use]
    pub fn slots(&self) -> &[HostSlot] {
        &self.slots
    }

    /// The guest's memory in bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.slots.iter().map(|slot| slot.length).sum()
    }

    /// The encoded machine state.
    #[must_use]
    pub fn state(&self) -> &[u8] {
        &self.state
    }

    /// The disks.
    #[must_use]
    pub fn disks(&self) -> &[FrozenDisk] {
        &self.disks
    }

    /// What may differ from the origin: image ranges in bytes.
    #[must_use]
    pub fn written(&self) -> &[Range<u64>] {
        &self.written
    }

    /// The snapshot that the rest of the memory is of; without one it is zero.
    #[must_use]
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// Stages so far, and their seconds.
    #[must_use]
    pub fn timings(&self) -> &Seconds {
        &self.timings
    }

    /// Fills `out` with guest memory from image offset `offset` on; both are
    /// whole pages, and of what was written.
    ///
    /// # Errors
    /// The frozen copy is gone, or the range is not in the image.
    pub fn read_exact_at(&self, out: &mut [u8], offset: u64) -> io::Result<()> {
        let slot = self
            .slots
            .iter()
            .find(|slot| (slot.image_offset..slot.image_offset + slot.length).contains(&offset))
            .ok_or(io::ErrorKind::InvalidInput)?;
        self.memory
            .read_exact_at(out, slot.host_address + (offset - slot.image_offset))
    }

    /// Tells the machine that all this is durable; `pin` keeps the snapshot for
    /// it. The frozen copy ends.
    ///
    /// # Errors
    /// As [`Client::request`]: the machine then takes its older snapshot for its
    /// origin and will commit the same pages once more.
    pub fn committed(self, report: CommitReport, pin: Option<OwnedFd>) -> Result<()> {
        let fds: Vec<_> = pin.iter().map(|fd| fd.as_fd()).collect();
        let mut client = lock(&self.client);
        match client.request_with(&Request::Committed(report), &fds)? {
            Reply::Done => Ok(()),
            _ => Client::unexpected(),
        }
    }
}

/// Lets the kernel end the frozen copy first when memory is short, and not the machine,
/// which has as much and more to lose: a commit can be done again. The machine's process
/// is confined and cannot say so; and it can name no process that is not its child.
fn volunteer(machine: i32, frozen: i32) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let process = openat(CWD, format!("/proc/{frozen}"), flags, Mode::empty())?;
    let open = |name: &str, flags| -> io::Result<File> {
        Ok(openat(&process, name, flags | OFlags::CLOEXEC, Mode::empty())?.into())
    };
    let status = io::read_to_string(open("status", OFlags::RDONLY)?)?;
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
    if parent.and_then(|parent| parent.trim().parse().ok()) != Some(machine) {
        return Err(io::Error::other("it is not the machine's"));
    }
    open("oom_score_adj", OFlags::WRONLY)?.write_all(b"1000")
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

/// Says again and again that the client of a frozen machine is there, until the sender
/// is dropped.
fn say_alive(client: &Arc<Mutex<Client>>) -> Sender<()> {
    let (sender, dropped) = channel();
    let client = Arc::downgrade(client);
    let said = std::thread::Builder::new()
        .name("alive".to_owned())
        .spawn(move || {
            while let Err(RecvTimeoutError::Timeout) = dropped.recv_timeout(ALIVE_EVERY) {
                let Some(client) = client.upgrade() else {
                    return;
                };
                if lock(&client).order(&Request::Alive).is_err() {
                    // Whoever commits hears of it when it reads, or at the end.
                    return;
                }
            }
        });
    if let Err(error) = said {
        tracing::debug!(%error, "a machine is not told that it is still being committed");
    }
    sender
}

fn lock(client: &Mutex<Client>) -> MutexGuard<'_, Client> {
    client.lock().unwrap_or_else(PoisonError::into_inner)
}

fn read_from_start(file: &mut File, out: &mut Vec<u8>, limit_bytes: u64) -> io::Result<()> {
    io::Seek::rewind(file)?;
    file.take(limit_bytes + 1).read_to_end(out)?;
    if out.len() as u64 > limit_bytes {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "it sent more than it may",
        ));
    }
    Ok(())
}

fn read_extents(file: &mut File, disk: &DiskInfo) -> io::Result<Vec<Extent>> {
    let mut bytes = Vec::new();
    read_from_start(file, &mut bytes, MAX_LIST_BYTES)?;
    let (records, rest) = bytes.as_chunks::<32>();
    let mut end = 0;
    let mut extents = Vec::new();
    for record in records {
        let [image_offset, length, kind, file_offset] = numbers(record);
        let content = match (kind, disk.has_overlay) {
            (0, _) => Content::Zeros,
            (1, true) => Content::Overlay { file_offset },
            _ => return Err(io::ErrorKind::InvalidData.into()),
        };
        let stop = image_offset.checked_add(length);
        if image_offset < end || length == 0 || stop.is_none_or(|stop| stop > disk.size_bytes) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        end = image_offset + length;
        extents.push(Extent {
            image_offset,
            length,
            content,
        });
    }
    match rest {
        [] => Ok(extents),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// The little-endian numbers of a record.
fn numbers(record: &[u8; 32]) -> [u64; 4] {
    let (numbers, _) = record.as_chunks::<8>();
    [0, 1, 2, 3].map(|at| u64::from_le_bytes(numbers[at]))
}

fn read_ranges(file: &mut File) -> io::Result<Vec<Range<u64>>> {
    let mut bytes = Vec::new();
    read_from_start(file, &mut bytes, MAX_LIST_BYTES)?;
    let (pairs, rest) = bytes.as_chunks::<16>();
    let mut end = 0;
    let mut ranges = Vec::new();
    for pair in pairs {
        let (start, stop) = pair.split_at(8);
        let number = |half: &[u8]| half.try_into().map(u64::from_le_bytes);
        let range = match (number(start), number(stop)) {
            (Ok(start), Ok(stop)) if end <= start && start < stop => start..stop,
            _ => return Err(io::ErrorKind::InvalidData.into()),
        };
        end = range.end;
        ranges.push(range);
    }
    if rest.is_empty() {
        Ok(ranges)
    } else {
        Err(io::ErrorKind::InvalidData.into())
    }
}
