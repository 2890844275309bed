//! The machine's end of its control socket.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::confine::{self, Confinement, Role};
use crate::control::error_kind::ErrorKind;
use crate::control::protocol::{CommitReport, Origin, Reply, RunState, Seconds, Status, seconds};
use crate::control::session::Session;
use crate::control::wire::Connection;
use crate::devices::Console;
use crate::machine::{Ending, Machine};
use crate::rate::Rate;

/// The most clients at a time; further ones are turned away.
const MAX_CLIENTS: usize = 64;
/// How long clients have to fetch their last answer once the machine ended.
const FAREWELL: Duration = Duration::from_millis(500);
/// How long accepting waits when there is no descriptor or no memory for a client.
const EXHAUSTED: Duration = Duration::from_millis(50);
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
    /// Whether whoever starts it will let it run.
    pub will_run: bool,
}

/// A machine with its console and its clients.
pub struct Vm {
    pub(super) machine: Machine,
    pub(super) console: Arc<Console>,
    identity: Identity,
    began: Instant,
    clients: AtomicUsize,
    /// Those that have asked to be told when the guest is ready.
    pub(super) ready_clients: AtomicUsize,
    /// Whether the agent of a restored guest has taken entropy.
    reseeded: AtomicBool,
    record: Mutex<Record>,
}

/// What changes over a machine's life.
pub(super) struct Record {
    pub origin: Origin,
    pub last_commit: Option<CommitReport>,
    /// What keeps the last committed snapshot from being collected.
    pub pin: Option<OwnedFd>,
    /// The process that commits at the moment.
    pub committer: Option<i32>,
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
                    Session::new(&vm, stream).serve();
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
            (None, false) if self.identity.will_run && !self.machine.has_run() => {
                RunState::Starting
            }
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
    pub fn skip_ready_unless_awaited(&self) {
        if self.ready_clients.load(Ordering::Acquire) == 0 {
            // A machine that has ended needs nothing.
            let _ = self.machine.skip_ready();
        }
    }

    pub(super) fn record(&self) -> MutexGuard<'_, Record> {
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
