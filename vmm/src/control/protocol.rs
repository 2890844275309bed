//! The requests and replies, as they are written in JSON.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::error_kind::ErrorKind;
use crate::confine::Confinement;
use crate::devices::virtio::Network;
use crate::machine::Ending;
use crate::memory::HostSlot;

/// Stages and how long they took, in seconds.
pub type Seconds = BTreeMap<String, f64>;

/// Seconds by stage from durations.
pub(crate) fn seconds<const N: usize>(stages: [(&str, Duration); N]) -> Seconds {
    stages
        .into_iter()
        .map(|(name, duration)| (name.to_owned(), duration.as_secs_f64()))
        .collect()
}

/// What a client asks for.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// How the machine is. Reply: `status`.
    Status,
    /// Stop the guest. Reply: `done`, once every vCPU is out of the guest.
    Pause,
    /// Let the guest run. Reply: `done`.
    Resume,
    /// End the machine. Reply: `ended`.
    Stop,
    /// Reply `ended` once the machine has ended.
    Wait,
    /// Reply `done` once the guest has said that it is ready; a machine that was
    /// started to stop then is paused.
    WaitReady,
    /// Turn this connection into the serial line. Reply: `console`, then raw
    /// bytes both ways.
    Console {
        /// Begin with the output that is still kept (up to 64 KiB).
        replay: bool,
    },
    /// What a commit may read while the guest runs, to have less to freeze. Reply:
    /// `live`, with descriptors, or `done` if nothing is to be gained.
    Precopy {
        /// The round before, which has been read.
        #[serde(default)]
        after: Option<u64>,
    },
    /// Freeze this instant for a commit. Reply: `frozen`, with descriptors.
    Freeze {
        /// The last round of this connection's `precopy`, which has been read.
        #[serde(default)]
        after: Option<u64>,
        /// All of the memory, however little was written.
        #[serde(default)]
        whole: bool,
    },
    /// The client is still at what it froze, or reads before that. Reply: `done`. One that
    /// says nothing for a minute loses its frozen copy, and its turn.
    Alive,
    /// What this connection froze is durable. Reply: `done`. A descriptor that
    /// comes with this line is kept until the next one comes or the machine ends.
    Committed(CommitReport),
}

/// What a commit of this machine led to.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct CommitReport {
    /// The snapshot, the parent of this machine's next commit.
    pub snapshot: String,
    /// The tag it got.
    pub tag: String,
    /// Stages and their seconds.
    pub timings: Seconds,
}

/// The snapshot that a machine's memory differs from by what it has written.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Origin {
    /// Its id; none before the first commit of a machine that booted.
    pub snapshot: Option<String>,
    /// The tag it was named by then.
    pub tag: Option<String>,
}

/// What the guest is doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    /// It has not run yet, and is about to without being told.
    Starting,
    /// It runs, or waits for an interrupt.
    Running,
    /// It was stopped by request, or is not let run until someone says so.
    Paused,
    /// Every vCPU waits for an interrupt with interrupts off: it will not do
    /// anything any more.
    Halted,
    /// The host could not do what the guest asked of a device, and the guest waits
    /// (`trouble`); it is done once more when someone resumes it.
    IoError,
    /// The machine has ended, but for a vCPU that waits for the host.
    Stopping,
    /// The machine has ended.
    Ended,
}

/// How a machine is.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Status {
    /// Its name.
    pub name: String,
    /// Its process.
    pub pid: u32,
    /// What the guest does.
    pub state: RunState,
    /// Why the guest does not run though nobody paused it.
    #[serde(default)]
    pub trouble: Option<String>,
    /// Its vCPUs.
    pub cpus: usize,
    /// Its memory in bytes.
    pub memory_bytes: u64,
    /// Its network interfaces.
    #[serde(default)]
    pub networks: Vec<Network>,
    /// The snapshot it differs from.
    pub origin: Origin,
    /// Seconds since its process began with it.
    pub uptime_seconds: f64,
    /// Whether the agent of a restored guest has taken entropy of its own.
    #[serde(default)]
    pub reseeded: bool,
    /// Bytes the guest has printed.
    pub console_bytes: u64,
    /// Stages of its start and their seconds.
    pub start: Seconds,
    /// How its process is confined; none if it is not.
    #[serde(default)]
    pub confinement: Option<Confinement>,
    /// What has been done with it since it began.
    #[serde(default)]
    pub totals: Totals,
    /// The last commit, if there was one.
    pub last_commit: Option<CommitReport>,
}

/// What has been done with a machine since its process began with it.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Totals {
    /// Pauses that clients have asked for.
    pub pauses: u64,
    /// Commits that are durable.
    pub commits: u64,
    /// Instants that were frozen, whether a commit came of it or not.
    pub freezes: u64,
    /// How long the guest stood still for all of those.
    pub freeze_pause_seconds: f64,
}

/// A disk of a frozen machine.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DiskInfo {
    /// Its name.
    pub name: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// When the file under it had last been changed when the machine began, in
    /// seconds and nanoseconds since 1970; none of what is not a regular file.
    #[serde(default)]
    pub base_modified: Option<(i64, i64)>,
    /// Whether it has an overlay; without one the guest can only read it.
    pub has_overlay: bool,
}

/// What the machine answers.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    /// Done.
    Done,
    /// How the machine is.
    Status(Box<Status>),
    /// Raw bytes follow.
    Console,
    /// Memory that the guest goes on writing. Descriptors: the memory, to be read at the
    /// slots' host addresses, and the image ranges to be read (`frozen_wire`). What
    /// is written from here on is in the list of the next round, or of the freeze.
    Live {
        /// Where the guest's memory lies.
        slots: Vec<HostSlot>,
        /// The number to name next.
        round: u64,
        /// The snapshot it differs from.
        origin: Origin,
    },
    /// The instant is frozen. Descriptors come with it, in the order that `frozen_wire` has.
    Frozen {
        /// The frozen process; none if what changed was copied.
        pid: Option<i32>,
        /// Where the guest's memory lies.
        slots: Vec<HostSlot>,
        /// Whether the changed ranges come with it.
        lists_changes: bool,
        /// The round of `precopy` that the list begins after; none if it begins after
        /// the last commit.
        #[serde(default)]
        after: Option<u64>,
        /// The disks.
        disks: Vec<DiskInfo>,
        /// The snapshot it differs from.
        origin: Origin,
        /// Stages and their seconds.
        timings: Seconds,
    },
    /// The machine has ended.
    Ended {
        /// Why.
        #[serde(flatten)]
        ending: Ending,
    },
    /// It was not done.
    Error {
        /// The kind of error.
        kind: ErrorKind,
        /// What happened.
        message: String,
    },
}
