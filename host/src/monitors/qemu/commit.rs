//! A machine of QEMU that runs.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use rustix::fs::{MemfdFlags, Mode, OFlags, memfd_create};
use serde_json::{Value, json};
use snapstore_store::Store;

use super::description::{Description, REGIONS};
use super::{arguments, disks, regions};
use crate::error::Usage;
use crate::monitors::adapter::{Budget, DESCRIPTION, Kind, Monitor, STATE, Taken};
use crate::monitors::memory::{self, GuestMemory};
use crate::monitors::peer::Peer;
use crate::monitors::qmp::Qmp;

/// The numbers of sets of descriptors through which the state is written.
const FD_SETS: std::ops::Range<u64> = 0x736e_6170..0x736e_7170;
/// The longest state of devices.
const LONGEST_STATE_BYTES: u64 = 256 << 20;

/// QEMU, running.
pub struct Qemu {
    qmp: Qmp,
    socket: PathBuf,
    peer: Peer,
    plan: Option<Plan>,
}

/// What was found out before the guest was paused.
struct Plan {
    memory_backend: Option<String>,
    memory_bytes: u64,
    cpus: u32,
    machine: String,
    arguments: Vec<String>,
}

impl Qemu {
    pub fn connect(socket: &Path) -> anyhow::Result<Self> {
        let qmp = Qmp::connect(socket)?;
        let peer = Peer::of(qmp.peer()?)?;
        Ok(Self {
            qmp,
            socket: socket.to_owned(),
            peer,
            plan: None,
        })
    }

    /// The state of CPUs and devices.
    fn state(&mut self) -> anyhow::Result<Vec<u8>> {
        let file = File::from(memfd_create("snapstore-state", MemfdFlags::CLOEXEC)?);
        // QEMU takes a descriptor that it may only write to.
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        let writer = rustix::fs::open(path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
        let set = self.free_set()?;
        self.qmp
            .run_with("add-fd", json!({"fdset-id": set}), writer.as_fd())?;
        drop(writer);
        let name = format!("/dev/fdset/{set}");
        let saved = self.qmp.run_long(
            "xen-save-devices-state",
            json!({"filename": name, "live": false}),
        );
        let removed = self.qmp.run("remove-fd", json!({"fdset-id": set}));
        saved.context("the state of the devices cannot be saved")?;
        removed?;
        let length = file.metadata()?.len();
        ensure!(
            (1..=LONGEST_STATE_BYTES).contains(&length),
            "QEMU has written {length} bytes as the state of its devices"
        );
        let mut state = vec![0; usize::try_from(length)?];
        file.read_exact_at(&mut state, 0)?;
        Ok(state)
    }

    /// The number of a set that QEMU does not have. One that a killed commit left, with
    /// another client connected, is given up: QEMU closes what is in it once the guest
    /// runs, and not while it stands still. So it cannot be used again, either: of two files
    /// in it QEMU might write to that one.
    fn free_set(&mut self) -> anyhow::Result<u64> {
        let sets = self.qmp.run("query-fdsets", json!({}))?;
        let sets = sets.as_array().into_iter().flatten();
        let known: Vec<u64> = sets.filter_map(|set| set["fdset-id"].as_u64()).collect();
        for left in known.iter().filter(|set| FD_SETS.contains(*set)) {
            self.qmp.run("remove-fd", json!({"fdset-id": left}))?;
        }
        let mut free = FD_SETS.filter(|set| !known.contains(set));
        free.next()
            .context("QEMU has no set of descriptors left for its state")
    }

    /// Where the guest's memory is in the process.
    fn memory(&mut self, size_bytes: u64) -> anyhow::Result<GuestMemory> {
        let (block, host_address) = regions::host_address(&mut self.qmp, 0)?
            .context("QEMU does not say where its guest's memory is")?;
        tracing::debug!(block, host_address, "the guest's memory");
        Ok(GuestMemory {
            host_address,
            size_bytes,
        })
    }

    fn plan(&mut self) -> anyhow::Result<Plan> {
        let blocked = self.qmp.run("query-migrate", json!({}))?;
        let reasons = blocked["blocked-reasons"].as_array();
        if let Some(reasons) = reasons.filter(|reasons| !reasons.is_empty()) {
            let reasons: Vec<&str> = reasons.iter().filter_map(Value::as_str).collect();
            bail!(
                "the machine has devices whose state cannot be saved: {}",
                reasons.join("; ")
            );
        }
        let size = self.qmp.run("query-memory-size-summary", json!({}))?;
        let (base, plugged) = (&size["base-memory"], &size["plugged-memory"]);
        ensure!(
            plugged.as_u64().unwrap_or(0) == 0,
            "the machine has memory that was plugged in, which is not committed; start it with \
             all of its memory as -m"
        );
        let memory_bytes = base
            .as_u64()
            .context("QEMU does not say how much memory it has")?;
        let backends = self.qmp.run("query-memdev", json!({}))?;
        let backends = backends.as_array().map(Vec::as_slice).unwrap_or_default();
        ensure!(
            backends.len() <= 1,
            "the guest's memory consists of {} objects, and only one is committed; start it with \
             one memory-backend",
            backends.len()
        );
        let id = backends.first().and_then(|backend| backend["id"].as_str());
        let machine = self
            .qmp
            .run("qom-get", json!({"path": "/machine", "property": "type"}))?;
        let machine = machine.as_str().unwrap_or_default();
        let cpus = self.qmp.run("query-cpus-fast", json!({}))?;
        let mut arguments = self.peer.arguments()?;
        ensure!(!arguments.is_empty(), "QEMU's process has no arguments");
        arguments.remove(0);
        let named = id.filter(|id| arguments::has_object(&arguments, id));
        Ok(Plan {
            memory_backend: named.map(str::to_owned),
            memory_bytes,
            cpus: u32::try_from(cpus.as_array().map_or(0, Vec::len))?,
            machine: machine
                .strip_suffix("-machine")
                .unwrap_or(machine)
                .to_owned(),
            arguments,
        })
    }
}

impl Monitor for Qemu {
    fn kind(&self) -> Kind {
        Kind::Qemu
    }

    fn version(&self) -> String {
        self.qmp.version().to_string()
    }

    fn socket(&self) -> &Path {
        &self.socket
    }

    fn is_running(&mut self) -> anyhow::Result<bool> {
        let status = self.qmp.run("query-status", json!({}))?;
        Ok(status["running"] == true)
    }

    fn pause(&mut self) -> anyhow::Result<()> {
        self.qmp.run_long("stop", json!({})).map(drop)
    }

    fn resume(&mut self) -> anyhow::Result<()> {
        self.qmp.run_long("cont", json!({})).map(drop)
    }

    fn check(&mut self, _store: &Store) -> anyhow::Result<usize> {
        let status = self.qmp.run("query-status", json!({}))?;
        let status = status["status"].as_str().unwrap_or_default();
        if !["running", "paused", "debug", "suspended", "watchdog"].contains(&status) {
            bail!(Usage(format!(
                "the machine is in the state {status}, in which it cannot be committed"
            )));
        }
        let plan = self.plan()?;
        let disks = disks::list(&mut self.qmp)?;
        arguments::check(&plan.arguments, &disks)?;
        self.plan = Some(plan);
        // With memory, state, regions and description.
        Ok(disks.len() + 4)
    }

    fn take(&mut self, store: &Store, budget: &mut Budget) -> anyhow::Result<Taken> {
        let plan = match self.plan.take() {
            Some(plan) => plan,
            None => self.plan()?,
        };
        let state = self.state()?;
        let memory = self.memory(plan.memory_bytes)?;
        let read = memory::read(store, &self.peer, memory, budget)?;
        let (regions, region_bytes) = regions::read(&mut self.qmp, &self.peer, memory)?;
        let listed = disks::list(&mut self.qmp)?;
        let mut taken = Taken {
            parent: read.parent,
            inputs: vec![read.input],
            read_bytes: read.read_bytes,
            is_held: read.is_held,
            ..Taken::default()
        };
        for disk in &listed {
            disks::take(store, &mut self.qmp, &self.peer, disk, &mut taken, budget)
                .with_context(|| format!("the disk {} cannot be committed", disk.device))?;
        }
        let description = Description {
            format: 1,
            machine: plan.machine,
            program: self.peer.program()?,
            arguments: plan.arguments,
            directory: self.peer.directory()?,
            memory_backend: plan.memory_backend,
            memory_bytes: plan.memory_bytes,
            cpus: plan.cpus,
            disks: listed.iter().map(disks::Listed::described).collect(),
            regions,
        };
        for (name, bytes) in [
            (STATE, state),
            (REGIONS, region_bytes),
            (DESCRIPTION, serde_json::to_vec_pretty(&description)?),
        ] {
            taken.attach(name, bytes);
        }
        Ok(taken)
    }
}
