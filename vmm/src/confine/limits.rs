//! Limits of a machine's process (getrlimit(2)).

use std::collections::BTreeMap;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::refused::refused;
use crate::error::Result;

/// Descriptors: more than all clients, sockets of the guest and disks together take.
const DESCRIPTORS: u64 = 4096;
/// Files that are none of the guest's disks: its log, and what is handed to a committer.
const SMALL_FILES_BYTES: u64 = 64 << 20;
/// Threads beside the vCPUs: two for each of 64 clients, those of devices, and frozen copies.
const TASKS: u64 = 192;

/// What a machine needs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Its vCPUs.
    pub cpus: u64,
    /// Its memory, in bytes.
    pub memory_bytes: u64,
    /// The most that a file of its disks may hold, overlays included, in bytes.
    pub disk_bytes: u64,
}

impl Limits {
    /// The most tasks (threads and frozen copies) that it has.
    pub(super) fn tasks(&self) -> u64 {
        TASKS + self.cpus
    }

    /// Sets the limits of this process: none is raised. Returns them by name.
    pub(super) fn apply(&self, own_user: bool) -> Result<BTreeMap<String, u64>> {
        let file_bytes = SMALL_FILES_BYTES
            .max(self.memory_bytes)
            .max(self.disk_bytes);
        let mut limits = vec![
            ("descriptors", Resource::Nofile, DESCRIPTORS),
            ("file_bytes", Resource::Fsize, file_bytes),
            ("core_bytes", Resource::Core, 0),
        ];
        // They count by user: another one's would count, too.
        if own_user {
            limits.push(("tasks", Resource::Nproc, self.tasks()));
        }
        let mut applied = BTreeMap::new();
        for (name, resource, wanted) in limits {
            let now = getrlimit(resource).current.unwrap_or(u64::MAX);
            let limit = Some(wanted.min(now));
            let both = Rlimit {
                current: limit,
                maximum: limit,
            };
            setrlimit(resource, both).map_err(refused("limit itself"))?;
            applied.insert(name.to_owned(), wanted.min(now));
        }
        Ok(applied)
    }
}
