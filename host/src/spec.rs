//! What a command that starts machines says to their processes, and what they answer.

use std::io::{self, Write as _};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use snapstore_vmm::control::{Origin, Status};

use crate::build::{MachineSource, Overlays};
use crate::error::ChildFailure;
use crate::networks::NetSpec;

/// The hidden command that starts machines and supervises them (`supervisor`).
pub const SUPERVISOR: &str = "vm-host";
/// What a hidden command exits with that failed.
pub const FAILED: u8 = 1;
/// What a machine's process exits with that could not start: nothing of it is kept.
pub const NOT_STARTED: u8 = 70;

/// What the process is asked that will start machines, one line each.
#[derive(Serialize)]
pub enum Order<'a> {
    /// Something of a mount, while it is waiting: the arguments of a look, and the answer is a
    /// line of its own.
    Look(Vec<String>),
    /// To start these, its last order. What they keep open comes with it.
    Start(&'a Spec),
}

/// An order, as it arrives.
#[derive(Deserialize)]
pub enum Ordered {
    /// As [`Order::Look`].
    Look(Vec<String>),
    /// As [`Order::Start`].
    Start(Box<Spec>),
}

/// What to start, as the hidden command reads it.
#[derive(Serialize, Deserialize)]
pub struct Spec {
    /// One machine for each.
    pub names: Vec<String>,
    /// What each is made from.
    pub what: MachineSource,
    /// Where what guests write to their disks is kept.
    pub overlays: Overlays,
    /// The network interfaces of each.
    pub nets: Vec<Vec<NetSpec>>,
    /// The snapshot that they come from.
    pub origin: Origin,
    /// Whether they begin to run at once.
    pub run: bool,
    /// Whether they begin to run at a byte for each on standard input, and end with it if
    /// none comes: whoever starts them may be killed meanwhile.
    #[serde(default)]
    pub run_on_word: bool,
    /// Whether they pause when their guests say that they are ready.
    pub stop_at_ready: bool,
    /// Whether a restored guest that takes no fresh entropy in time is ended.
    #[serde(default)]
    pub require_reseed: bool,
    /// Descriptors that each of them keeps open as long as it lives.
    pub kept: Vec<i32>,
    /// Whether they give up what they do not need before their guests run.
    pub confine: bool,
    /// Whether their processes are forked and not executed, and so have one layout of
    /// their addresses.
    pub share_layout: bool,
}

/// What each machine's process writes to standard output, one line, once it
/// answers or cannot.
#[derive(Serialize, Deserialize)]
pub struct Announcement {
    pub name: String,
    /// How it began, or why it did not.
    pub outcome: Result<Status, ChildFailure>,
}

/// A spec, as it was written.
pub fn parse(line: &str) -> anyhow::Result<Spec> {
    serde_json::from_str(line).context("what to start is not valid")
}

/// Tells who waits for it how a machine began, or why it did not.
pub fn announce(name: &str, outcome: Result<Status, ChildFailure>) -> io::Result<()> {
    let announcement = Announcement {
        name: name.to_owned(),
        outcome,
    };
    let mut line = serde_json::to_vec(&announcement)?;
    line.push(b'\n');
    // One write: a pipe takes lines of several processes whole.
    let mut out = io::stdout();
    out.write_all(&line)?;
    out.flush()
}
