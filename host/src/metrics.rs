//! What is to be told of a store's mounts and of this user's machines while they live.
//!
//! Every server and machine is asked side by side, each with a deadline: one that hangs is
//! told as that, and holds up no other.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use snapstore_fuse::{MountCounters, Mountpoint};
use snapstore_vmm::control::{Client, Status};

use crate::look;
use crate::monitors::Record;
use crate::runtime::{Runtime, VmDir, runtime_dir};
use crate::start::for_each;

/// How long a machine may take to say how it is.
const PATIENCE: Duration = Duration::from_secs(2);

/// A mount of this user.
#[derive(Clone, Debug)]
pub struct Mount {
    /// Where it is.
    pub dir: PathBuf,
    /// Whether it can be written to.
    pub is_writable: bool,
    /// What its server has counted; none of one that does not answer, is gone, or is of an
    /// older version.
    pub counters: Option<MountCounters>,
}

/// A machine of this user.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Its name.
    pub name: String,
    /// How it is; none of one that does not answer, has ended badly, or is of another monitor.
    pub status: Option<Status>,
    /// What is known of one of another monitor.
    pub record: Option<Record>,
    /// Memory that its process shares with nobody, in bytes: what its guest has written,
    /// above all.
    pub private_bytes: Option<u64>,
}

/// This user's mounts of a store. Those of others are not asked: their servers could say
/// what they like, or nothing.
pub fn mounts(store: &Path) -> anyhow::Result<Vec<Mount>> {
    let store = fs::canonicalize(store)?;
    let user = rustix::process::geteuid().as_raw();
    let all = Mountpoint::all()?;
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    for (number, mount) in all.iter().enumerate() {
        // Another one on top of it is what a path leads to.
        let is_hidden = all[number + 1..].iter().any(|it| it.dir == mount.dir);
        let is_ours = mount.user == user && mount.store == store;
        // A bind mount is the same server's.
        if is_ours && !is_hidden && seen.insert(mount.device) {
            found.push(mount);
        }
    }
    let dirs: Vec<_> = found.iter().map(|mount| mount.dir.clone()).collect();
    let counters = look::counters(&dirs);
    let told = found
        .into_iter()
        .zip(counters)
        .map(|(mount, counters)| Mount {
            dir: mount.dir.clone(),
            is_writable: mount.is_writable,
            counters,
        });
    Ok(told.collect())
}

/// This user's machines, but for those that have ended as they should or are only just
/// started.
pub fn machines() -> anyhow::Result<Vec<Machine>> {
    // Whoever only asks makes no directory for machines.
    if !runtime_dir().is_dir() {
        return Ok(Vec::new());
    }
    let vms = Runtime::open()?.vms()?;
    let machines = for_each(&vms, |vm| Ok(look_at(vm)))?;
    Ok(machines.into_iter().flatten().collect())
}

fn look_at(vm: &VmDir) -> Option<Machine> {
    let machine = |status: Option<Status>, record: Option<Record>| {
        let pid = status.as_ref().map(|status| status.pid);
        let pid = pid.or_else(|| record.as_ref().map(|record| record.pid));
        Machine {
            name: vm.name.clone(),
            private_bytes: pid.and_then(private_bytes),
            status,
            record,
        }
    };
    if let Some(record) = Record::of(vm) {
        return Some(machine(None, Some(record)));
    }
    let status = Client::connect(&vm.socket())
        .map(|client| client.with_patience(PATIENCE))
        .and_then(|mut client| client.status());
    match status {
        Ok(status) => Some(machine(Some(status), None)),
        // Not one that is about to start, or just ending.
        Err(_) if vm.is_reserved() || !vm.exists() || vm.has_ended_in_order() => None,
        Err(_) => Some(machine(None, None)),
    }
}

/// The kernel answers this without looking at the process's memory, which may hang.
fn private_bytes(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}
