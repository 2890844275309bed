//! What a monitor's adapter is: [`Monitor`] for one that runs, [`Restorer`] to start one
//! from a snapshot. Whoever implements both for another monitor, and names it in [`Kind`] and
//! in `known`, has added it.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::bail;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use snapstore_store::{
    ImageRole, Input, InputData, InputKind, Snapshot, SnapshotId, Store, Unchanging,
};

use crate::error::Usage;
use crate::views::FrozenViews;

/// The label that names the monitor of a snapshot.
pub const MONITOR: &str = "monitor";
/// The label that has its version.
pub const VERSION: &str = "monitor-version";
/// The label that names the CPU that the guest ran on.
pub const CPU: &str = "monitor-cpu";
/// The attached file that describes the machine to its monitor's adapter.
pub const DESCRIPTION: &str = "monitor.json";
/// The attached file that has the state of CPUs and devices.
pub const STATE: &str = "vmstate";

/// A monitor that is known here.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// QEMU, at its QMP socket.
    Qemu,
    /// Firecracker, at its API socket.
    Firecracker,
    /// Cloud Hypervisor, at its API socket.
    CloudHypervisor,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Qemu, Self::Firecracker, Self::CloudHypervisor];

    /// Its name in labels and options.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Qemu => "qemu",
            Self::Firecracker => "firecracker",
            Self::CloudHypervisor => "cloud-hypervisor",
        }
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str(match self {
            Self::Qemu => "QEMU",
            Self::Firecracker => "Firecracker",
            Self::CloudHypervisor => "Cloud Hypervisor",
        })
    }
}

impl FromStr for Kind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut kinds = Self::ALL.into_iter();
        kinds.find(|kind| kind.name() == text).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            format!("no monitor is called {text}; those that are known: {names}")
        })
    }
}

/// A monitor that runs.
pub trait Monitor {
    /// Which one it is.
    fn kind(&self) -> Kind;
    /// Its version.
    fn version(&self) -> String;
    /// The socket at which it is told what to do.
    fn socket(&self) -> &Path;
    /// Whether its guest runs.
    fn is_running(&mut self) -> anyhow::Result<bool>;
    /// Stops the guest, with everything that its devices had under way.
    fn pause(&mut self) -> anyhow::Result<()>;
    /// Lets the guest go on.
    fn resume(&mut self) -> anyhow::Result<()>;
    /// Finds out whether it can be committed, before its guest is paused. Returns how many
    /// inputs [`Monitor::take`] will.
    fn check(&mut self, store: &Store) -> anyhow::Result<usize>;
    /// Reads the machine while its guest stands still.
    fn take(&mut self, store: &Store, budget: &mut Budget) -> anyhow::Result<Taken>;
}

/// A monitor that can be started from a snapshot.
pub trait Restorer {
    /// Which one it is.
    fn kind(&self) -> Kind;
    /// The program to look for, given where the snapshot's files are.
    fn program(&self, dir: &Path) -> anyhow::Result<PathBuf>;
    /// The version in what it says when asked with `--version`.
    fn version(&self, said: &str) -> Option<String>;
    /// Under which names its own commands look for a snapshot's files, given what the
    /// snapshot says of its machine and whether it has a file of a name.
    fn names(&self, about: Option<&Value>, has: &dyn Fn(&str) -> bool)
    -> anyhow::Result<FileNames>;
    /// Whether each clone's disks are files of a writable view, since it takes raw ones only.
    fn writes_to_view(&self) -> bool {
        true
    }
    /// A copy of the snapshot's memory for all machines to map, where this version cannot
    /// map the mounted file.
    fn memory(&self, _version: &str, _of: &Snapshot) -> anyhow::Result<Option<SharedMemory>> {
        Ok(None)
    }
    /// How the process of a machine is started.
    fn launch(&self, started: &Started<'_>) -> anyhow::Result<Launch>;
    /// Has the process load its state, and run its guest if that is wanted.
    fn load(&self, started: &Started<'_>, launch: &Launch, pid: u32) -> anyhow::Result<()>;
}

/// Under which names a monitor looks for a snapshot's files.
pub struct FileNames {
    /// The guest's memory; one of `monitor::MEMORY_FILES`.
    pub memory: &'static str,
    /// The state of CPUs and devices.
    pub state: &'static str,
    /// The disks' images, and where the monitor had them.
    pub disks: Vec<(String, String)>,
    /// Files that it needs beside them, unless the snapshot has them, and what is in them.
    pub made: Vec<(String, String)>,
}

/// A file in memory that cannot be changed, as long as it is open anywhere.
pub struct SharedMemory(pub File);

/// What a machine is at one instant.
#[derive(Default)]
pub struct Taken {
    /// The snapshot that changes are given to.
    pub parent: Option<SnapshotId>,
    /// Memory, disks, and attached files.
    pub inputs: Vec<Input>,
    /// Files under them.
    pub unchanging: Vec<Unchanging>,
    /// How much was read of the process.
    pub read_bytes: u64,
    /// Whether inputs can only be read as long as the guest stands still.
    pub is_held: bool,
    /// What the user should know.
    pub remarks: Vec<String>,
    /// Views that stand still until this is dropped.
    pub views: FrozenViews,
}

impl Taken {
    /// Adds an attached file.
    pub fn attach(&mut self, name: &str, bytes: Vec<u8>) {
        self.inputs.push(Input {
            name: name.to_owned(),
            role: ImageRole::File,
            data: InputData::Bytes(bytes.into()),
            kind: InputKind::Full,
        });
    }
}

/// How much may be copied into memory so that the guest goes on sooner.
pub struct Budget {
    left: u64,
}

impl Budget {
    /// A quarter of the memory that is free.
    pub fn of_host() -> Self {
        let table = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let free = table.lines().find_map(|line| {
            let kib = line.strip_prefix("MemAvailable:")?.trim();
            kib.strip_suffix("kB")?.trim().parse::<u64>().ok()
        });
        Self {
            left: free.unwrap_or(0) * 1024 / 4,
        }
    }

    /// Whether so much more may be copied.
    pub fn take(&mut self, bytes: u64) -> bool {
        match self.left.checked_sub(bytes) {
            Some(left) => {
                self.left = left;
                true
            }
            None => false,
        }
    }
}

/// One machine that is about to be started.
pub struct Started<'a> {
    /// Its name.
    pub name: &'a str,
    /// Where its monitor's sockets and logs are.
    pub dir: &'a Path,
    /// Where the snapshot's files are.
    pub mount: &'a Path,
    /// A copy of the snapshot's memory, as the process has it open.
    pub shared_memory: Option<i32>,
    /// The clone's directory in a writable view, if it has its disks there.
    pub view: Option<&'a Path>,
    /// Where large files without a name can be made.
    pub overlay_dir: &'a Path,
    /// Its taps.
    pub taps: &'a [String],
    /// Whether its guest is to run.
    pub run: bool,
}

/// How the process of a monitor is started.
pub struct Launch {
    /// Its arguments.
    pub arguments: Vec<String>,
    /// What it inherits.
    pub fds: Vec<OwnedFd>,
    /// Where it will listen.
    pub api: PathBuf,
    /// The guest's memory in bytes.
    pub memory_bytes: u64,
    /// How many vCPUs the guest has, if that is known.
    pub cpus: Option<u32>,
}

/// Whether a machine runs, of which its monitor says that it is in this state.
pub(super) fn runs(state: Option<&str>) -> anyhow::Result<bool> {
    match state {
        Some("Running") => Ok(true),
        Some("Paused") => Ok(false),
        other => bail!(Usage(format!(
            "the machine is in the state {:?}, in which it cannot be committed",
            other.unwrap_or_default()
        ))),
    }
}
