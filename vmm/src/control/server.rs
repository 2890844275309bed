//! The machine's end of its control socket.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::net::Shutdown;
use std::ops::Range;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::confine::{self, Confinement, Role};
use crate::control::error_kind::ErrorKind;
use crate::control::protocol::{
    CommitReport, DiskInfo, Origin, Reply, Request, RunState, Seconds, Status, seconds,
};
use crate::control::wire::Connection;
use crate::devices::Console;
use crate::devices::virtio::{Content, Extent, FrozenDisk};
use crate::error::{Error, Result};
use crate::machine::{Ending, Freeze, FreezeOptions, Machine};
use crate::rate::Rate;

/// The most clients at a time; further ones are turned away.
const MAX_CLIENTS: usize = 64;
/// How long clients have to fetch their last answer once the machine ended.
const FAREWELL: Duration = Duration::from_millis(500);
/// How long accepting waits when there is no descriptor or no memory for a client.
const EXHAUSTED: Duration = Duration::from_millis(50);
/// How long a client that has frozen the machine may say nothing: it says that it is
/// alive more often than that, and one that was stopped does not.
const COMMIT_PATIENCE: Duration = Duration::from_secs(60);
/// A console's reader that takes nothing for so long is dropped.
const CONSOLE_PATIENCE: Duration = Duration::from_secs(30);
/// How often a console looks whether there is room for input.
const INPUT_RETRY: Duration = Duration::from_millis(5);
/// How long a console waits for output before it looks whether it is still used.
const OUTPUT_WAIT: Duration = Duration::from_secs(1);

/// Who a machine is.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Identity {
    /// Its name.
    pub name: String,
    /// The snapshot it was restored from.
    pub origin: Origin,
    /// Stages of its start before it was built, and their seconds.
    pub start: Seconds,
    /// How its process is confined, if it is.
    pub confinement: Option<Confinement>,
}

/// A machine with its console and its clients.
pub struct Vm {
    machine: Machine,
    console: Arc<Console>,
    identity: Identity,
    began: Instant,
    clients: AtomicUsize,
    /// Those that have asked to be told when the guest is ready.
    ready_clients: AtomicUsize,
    /// Whether the agent of a restored guest has taken entropy.
    reseeded: AtomicBool,
    record: Mutex<Record>,
}

/// What changes over a machine's life.
struct Record {
    origin: Origin,
    last_commit: Option<CommitReport>,
    /// What keeps the last committed snapshot from being collected.
    pin: Option<OwnedFd>,
    /// The process that commits at the moment.
    committer: Option<i32>,
}

impl Vm {
    /// A machine to be controlled; `began` is when its start began.
    #[must_use]
    pub fn new(
        machine: Machine,
        console: Arc<Console>,
        identity: Identity,
        began: Instant,
    ) -> Arc<Self> {
        let record = Record {
            origin: identity.origin.clone(),
            last_commit: None,
            pin: None,
            committer: None,
        };
        Arc::new(Self {
            machine,
            console,
            identity,
            began,
            clients: AtomicUsize::new(0),
            ready_clients: AtomicUsize::new(0),
            reseeded: AtomicBool::new(false),
            record: Mutex::new(record),
        })
    }

    /// The guest has taken entropy of its own.
    pub fn set_reseeded(&self) {
        self.reseeded.store(true, Ordering::Release);
    }

    /// The machine.
    #[must_use]
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Begins to serve clients.
    ///
    /// # Errors
    /// The socket's thread cannot be started.
    pub fn listen(self: &Arc<Self>, listener: UnixListener) -> io::Result<()> {
        let vm = self.clone();
        std::thread::Builder::new()
            .name("control".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || vm.accept(&listener))?;
        Ok(())
    }

    /// Waits until the machine has ended and its clients know of it.
    pub fn wait(&self) -> Ending {
        let ending = self.machine.wait();
        self.console.close();
        let deadline = Instant::now() + FAREWELL;
        while self.clients.load(Ordering::Acquire) > 0 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        ending
    }

    fn accept(self: &Arc<Self>, listener: &UnixListener) {
        confine::enter(Role::Control);
        // Given up for a moment to turn a client away when there is no other descriptor.
        let mut spare = listener.as_fd().try_clone_to_owned().ok();
        for stream in listener.incoming() {
            let stream = match stream {
                Ok(stream) => stream,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::debug!(%error, "no client can be accepted");
                    if spare.take().is_some()
                        && let Ok((stream, _)) = listener.accept()
                    {
                        turn_away(stream, "no descriptors are left to the machine");
                    }
                    spare = listener.as_fd().try_clone_to_owned().ok();
                    // Until a client leaves, accepting fails at once.
                    std::thread::sleep(EXHAUSTED);
                    continue;
                }
            };
            if self.clients.fetch_add(1, Ordering::AcqRel) >= MAX_CLIENTS {
                self.clients.fetch_sub(1, Ordering::AcqRel);
                turn_away(
                    stream,
                    &format!("the machine has {MAX_CLIENTS} clients already"),
                );
                continue;
            }
            let vm = self.clone();
            let started = std::thread::Builder::new()
                .name("client".to_owned())
                .stack_size(STACK_BYTES)
                .spawn(move || {
                    Client::new(&vm, stream).serve();
                    vm.clients.fetch_sub(1, Ordering::AcqRel);
                });
            if let Err(error) = started {
                static RATE: Rate = Rate::new();
                RATE.log(|more| tracing::warn!(%error, more, "a client was turned away"));
                self.clients.fetch_sub(1, Ordering::AcqRel);
            }
        }
    }

    /// How the machine is.
    #[must_use]
    pub fn status(&self) -> Status {
        let trouble = self.machine.host_fault();
        let state = match (self.machine.ending(), self.machine.is_running()) {
            (Some(_), _) if self.machine.is_out_of_guest() => RunState::Ended,
            (Some(_), _) => RunState::Stopping,
            (None, false) if trouble.is_some() => RunState::IoError,
            (None, false) => RunState::Paused,
            (None, true) if self.machine.is_halted() => RunState::Halted,
            (None, true) => RunState::Running,
        };
        let build = self.machine.timings();
        let mut start = self.identity.start.clone();
        start.extend(seconds([("create", build.create), ("load", build.load)]));
        if let Some(first) = self.machine.first_entry() {
            start.extend(seconds([("first_entry", first)]));
        }
        let networks = self.machine.networks();
        let record = self.record();
        Status {
            name: self.identity.name.clone(),
            pid: std::process::id(),
            state,
            trouble,
            cpus: self.machine.cpus(),
            memory_bytes: self.machine.memory().layout().size_bytes(),
            networks,
            origin: record.origin.clone(),
            uptime_seconds: self.began.elapsed().as_secs_f64(),
            reseeded: self.reseeded.load(Ordering::Acquire),
            console_bytes: self.console.written(),
            start,
            confinement: self.identity.confinement.clone(),
            last_commit: record.last_commit.clone(),
        }
    }

    /// Lets the guest go on past its readiness unless a client waits for that.
    pub fn pass_ready_unless_awaited(&self) {
        if self.ready_clients.load(Ordering::Acquire) == 0 {
            // A machine that has ended needs nothing.
            let _ = self.machine.pass_ready();
        }
    }

    fn record(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Says why to a client that is one too many.
fn turn_away(stream: UnixStream, why: &str) {
    let reply = Reply::Error {
        kind: ErrorKind::Busy,
        message: format!("{why}; try again later"),
    };
    // A client that has gone needs no answer, and none is waited for.
    let mut connection = Connection::new(stream);
    let _ = connection.set_patience(Some(EXHAUSTED));
    let _ = connection.send(&reply, &[]);
}

/// Requests are small and handled with few calls; a hundred machines have a
/// hundred of these.
const STACK_BYTES: usize = 256 << 10;

/// One client's connection.
struct Client<'a> {
    vm: &'a Vm,
    connection: Option<Connection>,
    /// What this client froze and has not yet committed.
    freeze: Option<Freeze>,
    /// The disks of what it froze and was too slow to commit. What a client reads of
    /// them stays what it was, as long as it is there.
    lost: Vec<FrozenDisk>,
    /// Whether it is this client that commits.
    commits: bool,
    /// Whether it was too slow.
    gave_up: bool,
    /// Whether it has asked to be told when the guest is ready.
    waits_for_ready: bool,
}

impl<'a> Client<'a> {
    fn new(vm: &'a Vm, stream: UnixStream) -> Self {
        Self {
            vm,
            connection: Some(Connection::new(stream)),
            freeze: None,
            lost: Vec::new(),
            commits: false,
            gave_up: false,
            waits_for_ready: false,
        }
    }

    fn serve(mut self) {
        while let Some(connection) = &mut self.connection {
            let (reply, fds) = match connection.receive::<Request>() {
                Ok(None) => break,
                Ok(Some(Request::Console { replay })) => {
                    self.console(replay);
                    break;
                }
                Ok(Some(request)) => self.answer(request),
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    self.refuse(&error);
                    break;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && self.commits => {
                    self.give_up_freeze();
                    continue;
                }
                Err(error) => {
                    tracing::debug!(%error, "a client's connection broke");
                    break;
                }
            };
            let borrowed: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
            if let Some(connection) = &mut self.connection
                && connection.send(&reply, &borrowed).is_err()
            {
                break;
            }
        }
        self.thaw();
        self.leave_ready();
    }

    fn refuse(&mut self, error: &io::Error) {
        let reply = Reply::Error {
            kind: ErrorKind::Invalid,
            message: format!("this is no request: {error}"),
        };
        if let Some(connection) = &mut self.connection {
            // The connection ends either way.
            let _ = connection.send(&reply, &[]);
        }
    }

    fn answer(&mut self, request: Request) -> (Reply, Vec<OwnedFd>) {
        let answer = match request {
            Request::Status => Ok(Reply::Status(Box::new(self.vm.status()))),
            Request::Pause => self.vm.machine.pause().map(|()| Reply::Done),
            Request::Resume => self.vm.machine.resume().map(|()| Reply::Done),
            Request::Stop => {
                self.vm.machine.stop();
                Ok(self.ended())
            }
            Request::Wait => Ok(self.ended()),
            Request::WaitReady => self.wait_ready().map(|()| Reply::Done),
            Request::Precopy { after } => return self.precopy(after),
            Request::Freeze { after, whole } => {
                return self.freeze(FreezeOptions { after, whole });
            }
            Request::Alive if !self.commits => Ok(self.nothing_frozen()),
            Request::Alive => Ok(Reply::Done),
            Request::Committed(report) => Ok(self.committed(report)),
            Request::Console { .. } => unreachable!("taken by the caller"),
        };
        (answer.unwrap_or_else(|error| failure(&error)), Vec::new())
    }

    fn wait_ready(&mut self) -> Result<()> {
        if !std::mem::replace(&mut self.waits_for_ready, true) {
            self.vm.ready_clients.fetch_add(1, Ordering::AcqRel);
        }
        self.vm.machine.wait_until_ready()
    }

    /// With the last client that wanted the guest to stand still when it is ready, the
    /// guest goes on: nobody else would let it.
    fn leave_ready(&self) {
        if self.waits_for_ready {
            self.vm.ready_clients.fetch_sub(1, Ordering::AcqRel);
            self.vm.pass_ready_unless_awaited();
        }
    }

    fn ended(&self) -> Reply {
        Reply::Ended {
            ending: self.vm.machine.wait(),
        }
    }

    /// Makes this client the one that commits. If another does, what it hears.
    fn begin_commit(&mut self) -> Option<Reply> {
        if self.commits {
            return None;
        }
        let peer = self.connection.as_ref().and_then(Connection::peer_pid);
        let mut record = self.vm.record();
        if let Some(pid) = record.committer {
            return Some(Reply::Error {
                kind: ErrorKind::Busy,
                message: format!("process {pid} is committing this machine; try again later"),
            });
        }
        record.committer = Some(peer.unwrap_or(0));
        drop(record);
        self.commits = true;
        self.set_patience(Some(COMMIT_PATIENCE));
        None
    }

    fn end_commit(&mut self) {
        if std::mem::take(&mut self.commits) {
            self.vm.record().committer = None;
            self.set_patience(None);
        }
    }

    fn precopy(&mut self, after: Option<u64>) -> (Reply, Vec<OwnedFd>) {
        if self.freeze.is_some() {
            return (invalid("this connection has frozen already"), Vec::new());
        }
        if let Some(busy) = self.begin_commit() {
            return (busy, Vec::new());
        }
        self.live(after).unwrap_or_else(|error| {
            self.end_commit();
            (failure(&error), Vec::new())
        })
    }

    fn live(&self, after: Option<u64>) -> Result<(Reply, Vec<OwnedFd>)> {
        let Some(live) = self.vm.machine.precopy(after)? else {
            return Ok((Reply::Done, Vec::new()));
        };
        let list = memory_file("written ranges", &range_bytes(&live.pages));
        let list = list.map_err(|source| Error::Os {
            action: "hand over what was written",
            source,
        })?;
        let reply = Reply::Live {
            slots: live.slots,
            round: live.round,
            origin: self.vm.record().origin.clone(),
        };
        Ok((reply, vec![live.memory.into(), list]))
    }

    fn freeze(&mut self, options: FreezeOptions) -> (Reply, Vec<OwnedFd>) {
        if self.freeze.is_some() {
            return (invalid("this connection has frozen already"), Vec::new());
        }
        if let Some(busy) = self.begin_commit() {
            return (busy, Vec::new());
        }
        self.frozen(options).unwrap_or_else(|error| {
            self.thaw();
            (failure(&error), Vec::new())
        })
    }

    fn frozen(&mut self, options: FreezeOptions) -> Result<(Reply, Vec<OwnedFd>)> {
        let freeze = self.vm.machine.freeze_with(options)?;
        let io = |source| Error::Os {
            action: "hand over the frozen copy",
            source,
        };
        let mut fds = vec![freeze.memory.file().try_clone().map_err(io)?.into()];
        if let Some((_, pagemap)) = freeze.memory.process() {
            fds.push(pagemap.try_clone().map_err(io)?.into());
        }
        fds.push(memory_file("machine state", &freeze.state.encode()).map_err(io)?);
        if let Some(changed) = &freeze.changed {
            fds.push(memory_file("changed ranges", &range_bytes(changed)).map_err(io)?);
        }
        let origin = self.vm.record().origin.clone();
        let mut disks = Vec::new();
        for disk in &freeze.disks {
            disks.push(DiskInfo {
                name: disk.name().to_owned(),
                size_bytes: disk.size_bytes(),
                base_modified: disk.base_modified(),
                has_overlay: disk.overlay().is_some(),
            });
            fds.push(disk.base().try_clone().map_err(io)?.into());
            if let Some(overlay) = disk.overlay() {
                fds.push(overlay.try_clone().map_err(io)?.into());
            }
            let extents = match origin.snapshot {
                Some(_) => disk.changed(),
                None => disk.overlaid(),
            };
            fds.push(memory_file("disk extents", &extent_bytes(&extents)).map_err(io)?);
        }
        let timings = &freeze.timings;
        let reply = Reply::Frozen {
            pid: freeze.memory.process().map(|(pid, _)| pid),
            slots: freeze.memory.slots().to_vec(),
            lists_changes: freeze.changed.is_some(),
            after: freeze.after,
            disks,
            origin,
            timings: seconds([
                ("pause", timings.pause),
                ("stop", timings.stop),
                ("state_save", timings.save),
                ("list", timings.list),
                ("copy", timings.copy),
                ("fork", timings.fork),
            ]),
        };
        self.freeze = Some(freeze);
        Ok((reply, fds))
    }

    fn committed(&mut self, report: CommitReport) -> Reply {
        let Some(freeze) = self.freeze.take() else {
            return self.nothing_frozen();
        };
        let fd = self.connection.as_mut().and_then(Connection::take_fd);
        {
            let mut record = self.vm.record();
            record.origin = Origin {
                snapshot: Some(report.snapshot.clone()),
                tag: Some(report.tag.clone()),
            };
            record.last_commit = Some(report);
            record.pin = fd;
        }
        // Before the copy goes, so that whoever sees that it is gone can commit: at
        // worst that lists again what this one has committed.
        self.end_commit();
        self.vm.machine.committed(freeze);
        Reply::Done
    }

    fn nothing_frozen(&self) -> Reply {
        if !self.gave_up {
            return invalid("this connection has frozen nothing");
        }
        invalid(
            "the frozen copy has been given up, since its client said nothing for a minute; \
             commit the machine again",
        )
    }

    fn set_patience(&self, patience: Option<Duration>) {
        if let Some(connection) = &self.connection
            && let Err(error) = connection.set_patience(patience)
        {
            tracing::debug!(%error, "a client is waited for without end");
        }
    }

    /// The client has been stopped, or hangs: others may commit. Its copy of the memory
    /// ends, and reading it fails. Of disks what it may still read is kept, since a
    /// commit of anything else would be wrong.
    fn give_up_freeze(&mut self) {
        self.end_commit();
        self.gave_up = true;
        if let Some(freeze) = self.freeze.take() {
            let Freeze { memory, disks, .. } = freeze;
            self.lost = disks;
            drop(memory);
        }
    }

    /// Ends the frozen copy, if this client has one.
    fn thaw(&mut self) {
        // First, so that whoever sees that the copy is gone can commit.
        self.end_commit();
        self.freeze = None;
    }

    fn console(&mut self, replay: bool) {
        let Some(mut connection) = self.connection.take() else {
            return;
        };
        let from = if replay { 0 } else { self.vm.console.written() };
        if connection.send(&Reply::Console, &[]).is_err() {
            return;
        }
        let (stream, early) = connection.into_stream();
        let gone = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                print_to(&self.vm.console, &stream, from, &gone);
                // Ends the reading half below.
                let _ = stream.shutdown(Shutdown::Both);
            });
            self.type_from(&stream, &early);
            gone.store(true, Ordering::Release);
        });
    }

    /// Gives the guest what the client types, at the guest's pace.
    fn type_from(&self, mut stream: &UnixStream, early: &[u8]) {
        if !self.type_all(early, stream) {
            return;
        }
        let mut bytes = [0; 4096];
        loop {
            match stream.read(&mut bytes) {
                Ok(0) => return,
                Ok(got) if self.type_all(&bytes[..got], stream) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(_) | Err(_) => return,
            }
        }
    }

    /// Whether the machine took all of it before it ended. What a client leaves
    /// that a guest does not read is dropped.
    fn type_all(&self, mut input: &[u8], client: &UnixStream) -> bool {
        while !input.is_empty() {
            let taken = self.vm.machine.serial_input(input);
            input = &input[taken..];
            if taken == 0 {
                if self.vm.machine.ending().is_some() || has_hung_up(client) {
                    return false;
                }
                std::thread::sleep(INPUT_RETRY);
            }
        }
        true
    }
}

/// Whether nobody is at the other end any more.
fn has_hung_up(stream: &UnixStream) -> bool {
    let mut fds = [PollFd::new(stream, PollFlags::empty())];
    let at_once = Timespec::default();
    poll(&mut fds, Some(&at_once)).is_ok_and(|ready| ready > 0)
}

/// Sends the guest's output until the machine or the client ends.
fn print_to(console: &Console, mut stream: &UnixStream, mut from: u64, gone: &AtomicBool) {
    if stream.set_write_timeout(Some(CONSOLE_PATIENCE)).is_err() {
        return;
    }
    while let Some(output) = console.read(from, OUTPUT_WAIT) {
        if gone.load(Ordering::Acquire) {
            return;
        }
        if output.missed > 0 {
            let note = format!("\r\n[{} bytes of output were lost]\r\n", output.missed);
            if from > 0 && stream.write_all(note.as_bytes()).is_err() {
                return;
            }
        }
        from = output.next;
        if stream.write_all(&output.bytes).is_err() {
            return;
        }
    }
}

/// What a list of image ranges looks like (`Reply::Frozen`).
fn range_bytes(ranges: &[Range<u64>]) -> Vec<u8> {
    let ends = ranges
        .iter()
        .flat_map(|range| [range.start.to_le_bytes(), range.end.to_le_bytes()]);
    ends.flatten().collect()
}

/// What the list of a disk's extents looks like (`Reply::Frozen`).
fn extent_bytes(extents: &[Extent]) -> Vec<u8> {
    let numbers = extents.iter().flat_map(|extent| {
        let (kind, file_offset) = match extent.content {
            Content::Zeros => (0, 0),
            Content::Overlay { file_offset } => (1, file_offset),
        };
        [extent.image_offset, extent.length, kind, file_offset]
    });
    numbers.flat_map(u64::to_le_bytes).collect()
}

/// An anonymous file with this content.
fn memory_file(name: &str, bytes: &[u8]) -> io::Result<OwnedFd> {
    let fd = rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC)?;
    let mut file = File::from(fd);
    file.write_all(bytes)?;
    Ok(file.into())
}

fn invalid(message: &str) -> Reply {
    Reply::Error {
        kind: ErrorKind::Invalid,
        message: message.to_owned(),
    }
}

fn failure(error: &Error) -> Reply {
    let kind = match error {
        Error::Ended(_) => ErrorKind::Ended,
        Error::DoesNotStop => ErrorKind::Busy,
        _ => ErrorKind::Failed,
    };
    Reply::Error {
        kind,
        message: error.to_string(),
    }
}
