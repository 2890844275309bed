//! A machine with its console and its clients.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::confine::Confinement;
use crate::control::protocol::{CommitReport, Origin, RunState, Seconds, Status, Totals, seconds};
use crate::devices::Console;
use crate::error::Error;
use crate::machine::{Ending, Machine};

/// How long clients have to fetch their last answer once the machine ended.
const FAREWELL: Duration = Duration::from_millis(500);

/// How long after it is tried once more to let a guest go on that does not stop.
const RETRY: Duration = Duration::from_millis(100);

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
    pub(super) clients: AtomicUsize,
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
    pub totals: Totals,
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
            totals: Totals::default(),
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
            totals: record.totals,
            last_commit: record.last_commit.clone(),
        }
    }

    /// Lets the guest go on past its readiness unless a client waits for that.
    pub fn skip_ready_unless_awaited(&self) {
        while self.ready_clients.load(Ordering::Acquire) == 0 {
            match self.machine.skip_ready() {
                // A vCPU hangs in a page of the snapshot, which may still come.
                Err(Error::DoesNotStop) => std::thread::sleep(RETRY),
                // A machine that has ended needs nothing.
                Ok(()) | Err(_) => return,
            }
        }
    }

    pub(super) fn record(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
