//! The directory of one machine: what is in it, and what it tells of the machine.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use snapstore_vmm::Error;
use snapstore_vmm::control::Client;

use super::ending::{KILLED, end_of_log, last_words, said_in_order};
use crate::error::{Busy, NotFound};

/// The socket of a machine's vsock device, in the machine's directory.
pub const VSOCK: &str = "vsock.sock";

/// What another monitor makes, in its machine's directory.
pub(super) const MONITOR_DIR: &str = "monitor";

/// The directory of one machine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VmDir {
    /// The machine's name.
    pub name: String,
    pub(super) dir: PathBuf,
}

impl VmDir {
    /// The directory itself.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("control.sock")
    }

    /// The socket of its vsock device, if it has one.
    pub fn vsock(&self) -> PathBuf {
        self.dir.join(VSOCK)
    }

    /// What another monitor makes, if it is a machine of one.
    pub fn monitor_dir(&self) -> PathBuf {
        self.dir.join(MONITOR_DIR)
    }

    /// Its process's standard error.
    pub fn log(&self) -> PathBuf {
        self.dir.join("log")
    }

    /// A connection to the machine.
    pub fn connect(&self) -> anyhow::Result<Client> {
        match Client::connect(&self.socket()) {
            // It has its name before its socket, and loses it after.
            Err(Error::NoMachine { .. }) if self.is_running() => Err(self.is_starting()),
            Err(Error::NoMachine { .. }) => Err(self.not_running()),
            other => Ok(other?),
        }
    }

    /// What to say of a machine that has its name, and no socket.
    pub fn is_starting(&self) -> anyhow::Error {
        Busy(format!(
            "{} is still starting, or just ending; try again",
            self.name
        ))
        .into()
    }

    /// What to say of a machine that does not run.
    pub(super) fn not_running(&self) -> anyhow::Error {
        if self.is_reserved() {
            return self.is_starting();
        }
        let name = &self.name;
        NotFound(match self.ending() {
            Some(ending) => format!("the machine {name} has ended: {ending}"),
            None => format!("no machine is named {name}; `snapstore ps` lists those that run"),
        })
        .into()
    }

    /// Whether its process lives.
    pub fn is_running(&self) -> bool {
        File::open(self.lock_path()).is_ok_and(|lock| {
            let locked = rustix::fs::flock(&lock, FlockOperation::NonBlockingLockShared);
            locked == Err(Errno::WOULDBLOCK)
        })
    }

    /// Whether a command is about to start it.
    pub fn is_reserved(&self) -> bool {
        File::open(self.starter_path()).is_ok_and(|lock| {
            let locked = rustix::fs::flock(&lock, FlockOperation::NonBlockingLockShared);
            locked == Err(Errno::WOULDBLOCK)
        })
    }

    /// Whether anything of it is left.
    pub fn exists(&self) -> bool {
        self.lock_path().exists()
    }

    /// Whether it has ended as wanted, and only has to be cleared away.
    pub fn has_ended_in_order(&self) -> bool {
        !self.is_running() && end_of_log(&self.log()).is_ok_and(|log| said_in_order(&log))
    }

    /// Why it ended badly, if it has ended so.
    pub fn ending(&self) -> Option<String> {
        if self.has_ended_in_order() {
            return None;
        }
        let said = fs::read_to_string(self.dir.join("ending"));
        let said = said.or_else(|_| end_of_log(&self.log()).map(|log| last_words(&log)));
        let said = said.ok()?;
        Some(match said.trim() {
            "" => KILLED.to_owned(),
            said => said.strip_prefix("error: ").unwrap_or(said).to_owned(),
        })
    }

    pub(super) fn lock_path(&self) -> PathBuf {
        self.dir.join("lock")
    }

    /// The process that holds the name, if it has said so and lives.
    pub fn process(&self) -> Option<OwnedFd> {
        let said = fs::read_to_string(self.lock_path()).ok()?;
        let mut said = said.split_ascii_whitespace();
        let (pid, since) = (said.next()?.parse().ok()?, said.next()?.parse().ok()?);
        let process = pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()?;
        // Looked at once it is held: the number is its own as long as it lives.
        let is_its = began(pid) == Some(since) && !has_ended(&process);
        (is_its && self.is_running()).then_some(process)
    }
}

/// Whether a process has ended, though perhaps nobody has taken note of it yet.
fn has_ended(process: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(process, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}

/// A process, by its number and when it began (proc(5), `stat`, field 22): a number alone
/// may be another's by now.
pub(crate) fn began(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let after_name = stat.rsplit_once(')')?.1;
    after_name.split_ascii_whitespace().nth(19)?.parse().ok()
}
