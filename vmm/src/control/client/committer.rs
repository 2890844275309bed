//! A connection that commits a machine.

use std::fs::File;
use std::io::{self, Write as _};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, Mode, OFlags, openat};

use crate::control::client::frozen::FrozenMachine;
use crate::control::client::{Client, lock};
use crate::control::frozen_wire::{FrozenRecord, LiveMemory};
use crate::control::protocol::{Reply, Request};
use crate::error::Result;
use crate::memory::{ScanMethod, private_ranges, ranges};

/// How often a client that has frozen a machine says that it is still there.
const ALIVE_EVERY: Duration = Duration::from_secs(10);

/// A connection that commits a machine.
pub struct Committer {
    client: Arc<Mutex<Client>>,
    /// Ends the thread that says that this is alive.
    alive: Sender<()>,
    /// The last round whose pages were handed out.
    round: Option<u64>,
}

impl Client {
    /// Freezes the machine, and finds what it changed.
    ///
    /// # Errors
    /// As [`Client::request`]; [`crate::control::ErrorKind::Busy`] if another process commits it.
    pub fn freeze(self) -> Result<FrozenMachine> {
        Committer::new(self).freeze(false)
    }
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
    /// As [`Client::request`]; [`crate::control::ErrorKind::Busy`] if another process commits it.
    pub fn next_round(&mut self) -> Result<Option<LiveMemory>> {
        let mut client = lock(&self.client);
        let after = self.round;
        let reply = client.request(&Request::Precopy { after })?;
        if reply == Reply::Done {
            return Ok(None);
        }
        let (live, round) =
            client.unpack(|connection| LiveMemory::decode(reply, || connection.take_fd()))?;
        self.round = Some(round);
        Ok(Some(live))
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
        let reply = client.request(&request)?;
        if let Reply::Frozen { pid, .. } = &reply
            && let Some((machine, frozen)) = client.connection.peer_pid().zip(*pid)
            && let Err(error) = volunteer(machine, frozen)
        {
            tracing::debug!(%error, "the frozen copy may outlive its machine when memory is short");
        }
        let began = Instant::now();
        let record =
            client.unpack(|connection| FrozenRecord::decode(reply, || connection.take_fd()))?;
        let private = record
            .process
            .map(|(_, pagemap)| private_ranges(&pagemap, &record.slots, ScanMethod::Automatic))
            .transpose()?;
        let written = match (private, record.changed) {
            (Some(private), Some(changed)) => ranges::intersect(&private, &changed),
            (Some(all), None) | (None, Some(all)) => all,
            (None, None) => return Client::unexpected(),
        };
        let mut timings = record.timings;
        timings.insert("scan".to_owned(), began.elapsed().as_secs_f64());
        drop(client);
        Ok(FrozenMachine {
            client: self.client,
            _alive: self.alive,
            memory: record.memory,
            slots: record.slots,
            state: record.state,
            disks: record.disks,
            written,
            after_rounds: record.after.is_some() && record.after == asked,
            origin: record.origin,
            timings,
        })
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
