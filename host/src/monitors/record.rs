//! What is written down of a machine of another monitor, in its directory: who it is, and
//! what it was restored from. A record counts as long as the process lives that it names.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use super::adapter::Kind;
use crate::runtime::{Runtime, VmDir, began};

/// The longest record that is read.
const LONGEST_BYTES: u64 = 1 << 20;

/// A machine of another monitor.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// The machine's name.
    pub name: String,
    /// Its monitor.
    pub monitor: Kind,
    /// The version of that.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// When that began, in clock ticks since the system did.
    pub since: u64,
    /// The snapshot that it was restored from.
    pub snapshot: String,
    /// Its tag, as it was named.
    pub tag: String,
    /// The guest's memory in bytes.
    pub memory_bytes: u64,
    /// How many vCPUs it has, if that is known.
    pub cpus: Option<u32>,
    /// Device and inode of a copy of the snapshot's memory, which it has mapped instead of
    /// a mount's.
    pub shared_memory: Option<((u32, u32), u64)>,
    /// The socket by which the monitor is told what to do.
    pub api: PathBuf,
    /// Other sockets and files of it, by what they are.
    pub paths: BTreeMap<String, PathBuf>,
}

/// Where the record of a machine is.
fn path(vm: &VmDir) -> PathBuf {
    vm.monitor_dir().join("record.json")
}

impl Record {
    /// How long its process has lived.
    #[must_use]
    pub fn uptime_seconds(&self) -> f64 {
        let up = fs::read_to_string("/proc/uptime").unwrap_or_default();
        let up: f64 = up
            .split(' ')
            .next()
            .and_then(|up| up.parse().ok())
            .unwrap_or(0.0);
        // As proc(5) counts: the kernel's unit for programs is a hundredth of a second.
        #[allow(clippy::cast_precision_loss, reason = "it is printed")]
        let since = self.since as f64 / 100.0;
        (up - since).max(0.0)
    }

    /// Writes it down.
    pub fn write(&self, vm: &VmDir) -> anyhow::Result<()> {
        let path = path(vm);
        // In one step: others look for it at any time.
        let new = path.with_extension("new");
        fs::write(&new, serde_json::to_vec_pretty(self)?)
            .and_then(|()| fs::rename(&new, &path))
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// That of a machine, if it is another monitor's and its process lives.
    pub fn of(vm: &VmDir) -> Option<Self> {
        let path = path(vm);
        let record = read(&path)?;
        let lives = i32::try_from(record.pid).ok().and_then(began) == Some(record.since);
        lives.then_some(record)
    }

    /// That of the machine that is this process.
    pub fn of_process(pid: u32, since: u64) -> anyhow::Result<Option<Self>> {
        let vms = Runtime::open()?.vms()?;
        let mut records = vms.iter().filter_map(Self::of);
        Ok(records.find(|it| (it.pid, it.since) == (pid, since)))
    }
}

fn read(path: &Path) -> Option<Record> {
    if fs::metadata(path).ok()?.len() > LONGEST_BYTES {
        return None;
    }
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}
