//! Firecracker, at its API socket.
//!
//! Firecracker writes its state together with memory, into two files: here they are files in
//! memory of this process, which it opens by `/proc`. Of a machine that was restored from a
//! mount that memory is thrown away: what its process changed of the mapped image is exact,
//! and can only be a change to that. So nothing has to be remembered of earlier snapshots,
//! nor does it matter what Firecracker's own log of dirty pages was reset by.

use std::fs::{self, File};
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, ensure};
use rustix::fs::{MemfdFlags, memfd_create};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use snapstore_store::{ImageRole, Input, InputData, InputKind, Snapshot, Store};

use super::adapter::{
    Budget, DESCRIPTION, FileNames, Kind, Launch, Monitor, Restorer, STATE, SharedMemory, Started,
    Taken, runs,
};
use super::described::description;
use super::disks::{of_view, own_disk};
use super::http::Http;
use super::memory::{self, kept, whole};
use super::peer::Peer;
use crate::error::{NotFound, Usage};
use crate::monitor::memory_of_paused;

/// What Firecracker calls itself in messages.
const NAME: &str = "Firecracker";
/// The socket of a clone.
const API: &str = "api.sock";

/// What a snapshot says of its machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Description {
    /// Which description this is: 1.
    format: u32,
    /// The machine's working directory.
    directory: PathBuf,
    /// The guest's memory in bytes.
    memory_bytes: u64,
    /// How many vCPUs it has.
    cpus: Option<u32>,
    /// The disks that the guest writes to.
    disks: Vec<Disk>,
    /// The ids of its network interfaces.
    interfaces: Vec<String>,
    /// The socket of its vsock device.
    vsock: Option<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Disk {
    id: String,
    image: String,
    /// As Firecracker has it.
    path: String,
}

/// Firecracker, running.
pub struct Firecracker {
    http: Http,
    socket: PathBuf,
    peer: Peer,
    version: String,
}

impl Firecracker {
    pub fn connect(socket: &Path) -> anyhow::Result<Self> {
        let http = Http::new(socket, NAME, "");
        let said = http.first("/version")?;
        let version = said["firecracker_version"]
            .as_str()
            .with_context(|| format!("{} is no API socket of Firecracker", socket.display()))?;
        let version = version.trim_start_matches('v').to_owned();
        let peer = Peer::of(http.peer()?)?;
        Ok(Self {
            http,
            socket: socket.to_owned(),
            peer,
            version,
        })
    }

    fn description(&self) -> anyhow::Result<Description> {
        let config = self.http.get("/vm/config")?;
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let list = |name: &str| config[name].as_array().cloned().unwrap_or_default();
        let machine = &config["machine-config"];
        let mib = machine["mem_size_mib"].as_u64();
        let mib = mib.context("Firecracker does not say how much memory its guest has")?;
        ensure!(
            config["memory-hotplug"].is_null(),
            "the machine has memory that can be plugged in, which is not committed"
        );
        ensure!(
            list("pmem").is_empty(),
            "the machine has pmem devices, which are not committed"
        );
        let mut disks = Vec::new();
        for drive in list("drives") {
            let id = text(&drive["drive_id"]).context("a drive has no id")?;
            if drive["is_read_only"] == true {
                continue;
            }
            let path = text(&drive["path_on_host"]).with_context(|| {
                format!("the drive {id} is no file, and only those are committed")
            })?;
            let image = format!("disk{}", disks.len());
            disks.push(Disk { id, image, path });
        }
        let cpus = machine["vcpu_count"].as_u64();
        Ok(Description {
            format: 1,
            directory: self.peer.directory()?,
            memory_bytes: mib << 20,
            cpus: cpus.and_then(|cpus| u32::try_from(cpus).ok()),
            disks,
            interfaces: list("network-interfaces")
                .iter()
                .filter_map(|net| text(&net["iface_id"]))
                .collect(),
            vsock: text(&config["vsock"]["uds_path"]),
        })
    }

    /// Has it write a snapshot into two files in memory: state, and memory.
    fn create(&self, kind: &str) -> anyhow::Result<(File, File)> {
        let state = File::from(memfd_create("snapstore-state", MemfdFlags::CLOEXEC)?);
        let memory = File::from(memfd_create("snapstore-memory", MemfdFlags::CLOEXEC)?);
        let path = |file: &File| format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
        self.http
            .put(
                "/snapshot/create",
                Some(&json!({
                    "snapshot_type": kind,
                    "snapshot_path": path(&state),
                    "mem_file_path": path(&memory),
                })),
            )
            .context(
                "it has to be a process of the same user, and in no chroot, to write into files \
                 of this one",
            )?;
        Ok((state, memory))
    }
}

impl Monitor for Firecracker {
    fn kind(&self) -> Kind {
        Kind::Firecracker
    }

    fn version(&self) -> String {
        self.version.clone()
    }

    fn socket(&self) -> &Path {
        &self.socket
    }

    fn is_running(&mut self) -> anyhow::Result<bool> {
        let said = self.http.get("/")?;
        runs(said["state"].as_str())
    }

    fn pause(&mut self) -> anyhow::Result<()> {
        self.http
            .patch("/vm", &json!({"state": "Paused"}))
            .map(drop)
    }

    fn resume(&mut self) -> anyhow::Result<()> {
        self.http
            .patch("/vm", &json!({"state": "Resumed"}))
            .map(drop)
    }

    fn check(&mut self, _store: &Store) -> anyhow::Result<usize> {
        let about = self.description()?;
        for disk in &about.disks {
            let file = self.peer.open_file(Path::new(&disk.path))?;
            ensure!(
                file.is_some(),
                "Firecracker does not have {} open; only disks that are files are committed",
                disk.path
            );
        }
        // With memory, state and description.
        Ok(about.disks.len() + 3)
    }

    fn take(&mut self, store: &Store, budget: &mut Budget) -> anyhow::Result<Taken> {
        let about = self.description()?;
        let mut taken = Taken::default();
        let state = match memory_of_paused(store, self.peer.pid) {
            Ok(mapped) => {
                // Some versions make diffs only where they keep a log of dirty pages. What it says
                // of memory is not used, and a diff is sooner written.
                let state = self.create("Diff").or_else(|_| self.create("Full"));
                let (state, _) = state?;
                taken.parent = Some(mapped.parent);
                taken.read_bytes += mapped.changed_bytes;
                let (input, is_held) = kept(mapped.input, budget)?;
                taken.is_held |= is_held;
                taken.inputs.push(input);
                state
            }
            Err(error) if error.is::<NotFound>() => {
                let (state, memory) = self.create("Full")?;
                taken
                    .inputs
                    .push(whole_memory(memory, &about, &mut taken.read_bytes)?);
                state
            }
            Err(error) => return Err(error),
        };
        for disk in &about.disks {
            let file = self.peer.open_file(Path::new(&disk.path))?;
            let file = file.with_context(|| format!("{} is not open any more", disk.path))?;
            if let Some(input) = of_view(store, &disk.image, &file, &mut taken)? {
                taken.inputs.push(input);
                continue;
            }
            let (input, bytes, is_held) = disk_input(disk, file)?;
            taken.read_bytes += bytes;
            taken.is_held |= is_held;
            taken.inputs.push(input);
        }
        let state = Arc::new(state);
        taken.inputs.push(attached(STATE, state)?);
        taken.inputs.push(Input {
            name: DESCRIPTION.to_owned(),
            role: ImageRole::File,
            data: InputData::Bytes(serde_json::to_vec_pretty(&about)?.into()),
            kind: InputKind::Full,
        });
        Ok(taken)
    }
}

fn whole_memory(file: File, about: &Description, read: &mut u64) -> anyhow::Result<Input> {
    let length = file.metadata()?.len();
    ensure!(
        length == about.memory_bytes,
        "Firecracker wrote {length} bytes of memory, and its guest has {}",
        about.memory_bytes
    );
    let (input, bytes) = whole(file, "the memory that Firecracker wrote")?;
    *read += bytes;
    Ok(input)
}

fn disk_input(disk: &Disk, file: File) -> anyhow::Result<(Input, u64, bool)> {
    let clone = memory::reflinked(&file);
    let is_held = clone.is_none();
    let file = clone.unwrap_or(file);
    let size_bytes = file.metadata()?.len();
    let extents = memory::data(&file, size_bytes)?;
    let bytes = extents.iter().map(|extent| extent.length).sum();
    let input = Input {
        name: disk.image.clone(),
        role: ImageRole::Disk,
        data: InputData::Extents {
            files: vec![Arc::new(file)],
            label: format!("the drive {}", disk.id),
            size_bytes,
            extents,
        },
        kind: InputKind::Full,
    };
    Ok((input, bytes, is_held))
}

fn attached(name: &str, file: Arc<File>) -> anyhow::Result<Input> {
    let mut bytes = vec![0; usize::try_from(file.metadata()?.len())?];
    std::os::unix::fs::FileExt::read_exact_at(&*file, &mut bytes, 0)?;
    ensure!(!bytes.is_empty(), "Firecracker wrote an empty state");
    Ok(Input {
        name: name.to_owned(),
        role: ImageRole::File,
        data: InputData::Bytes(bytes.into()),
        kind: InputKind::Full,
    })
}

/// Starts Firecracker from snapshots.
pub struct FirecrackerRestorer;

impl Restorer for FirecrackerRestorer {
    fn kind(&self) -> Kind {
        Kind::Firecracker
    }

    fn program(&self, _dir: &Path) -> anyhow::Result<PathBuf> {
        Ok(PathBuf::from("firecracker"))
    }

    fn version(&self, said: &str) -> Option<String> {
        let line = said
            .lines()
            .find(|line| line.starts_with("Firecracker v"))?;
        Some(line.trim_start_matches("Firecracker v").trim().to_owned())
    }

    /// As its documentation calls them.
    fn names(
        &self,
        about: Option<&Value>,
        _has: &dyn Fn(&str) -> bool,
    ) -> anyhow::Result<FileNames> {
        let about: Option<Description> = about.cloned().map(serde_json::from_value).transpose()?;
        let disks = about.into_iter().flat_map(|about| about.disks);
        Ok(FileNames {
            memory: "mem_file",
            state: "snapshot_file",
            disks: disks.map(|disk| (disk.image, disk.path)).collect(),
            made: Vec::new(),
        })
    }

    fn writes_to_view(&self) -> bool {
        true
    }

    fn memory(&self, _: &str, _: &Snapshot) -> anyhow::Result<Option<SharedMemory>> {
        Ok(None)
    }

    fn launch(&self, started: &Started<'_>) -> anyhow::Result<Launch> {
        let about: Description = description(started.mount)?;
        ensure!(
            started.taps.len() <= about.interfaces.len(),
            Usage(format!(
                "the machine has {} network interfaces; name as many taps at most",
                about.interfaces.len()
            ))
        );
        for disk in &about.disks {
            let link = own_disk(started, &disk.image)?;
            let place = place(started.dir, disk);
            if let Some(parent) = place.parent() {
                fs::create_dir_all(parent)?;
            }
            std::os::unix::fs::symlink(link, &place)
                .with_context(|| format!("cannot make {}", place.display()))?;
        }
        let vsock = about.vsock.as_deref().map(Path::new);
        if let Some(parent) = vsock
            .filter(|path| path.is_relative())
            .and_then(Path::parent)
        {
            fs::create_dir_all(started.dir.join(parent))?;
        }
        let id: String = started
            .name
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
            .take(64)
            .collect();
        let api = started.dir.join(API);
        Ok(Launch {
            arguments: vec![
                "--api-sock".to_owned(),
                api.display().to_string(),
                "--id".to_owned(),
                id,
            ],
            fds: Vec::new(),
            api,
            memory_bytes: about.memory_bytes,
            cpus: about.cpus,
        })
    }

    fn load(&self, started: &Started<'_>, launch: &Launch, _pid: u32) -> anyhow::Result<()> {
        let about: Description = description(started.mount)?;
        let http = Http::new(&launch.api, NAME, "");
        let file = |name: &str| started.mount.join(name).display().to_string();
        let mut load = json!({
            "snapshot_path": file(STATE),
            "mem_backend": {"backend_type": "File", "backend_path": file("memory.bin")},
            // The name that every version knows: newer ones call it track_dirty_pages.
            "enable_diff_snapshots": true,
            "resume_vm": false,
        });
        let overrides: Vec<Value> = about
            .interfaces
            .iter()
            .zip(started.taps)
            .map(|(id, tap)| json!({"iface_id": id, "host_dev_name": tap}))
            .collect();
        if !overrides.is_empty() {
            load["network_overrides"] = overrides.into();
        }
        // A relative path is in the clone's own directory.
        if about
            .vsock
            .as_ref()
            .is_some_and(|path| path.starts_with('/'))
        {
            let own = started.dir.join("vsock.sock");
            load["vsock_override"] = json!({"uds_path": own});
        }
        http.put("/snapshot/load", Some(&load))
            .with_context(|| missing_disks(&about))?;
        for disk in about.disks.iter().filter(|disk| disk.path.starts_with('/')) {
            http.patch(
                &format!("/drives/{}", disk.id),
                &json!({"drive_id": disk.id, "path_on_host": place(started.dir, disk)}),
            )?;
        }
        if started.run {
            http.patch("/vm", &json!({"state": "Resumed"}))?;
        }
        Ok(())
    }
}

/// What a user can do if a load fails.
fn missing_disks(about: &Description) -> String {
    let absolute = about.disks.iter().filter(|disk| disk.path.starts_with('/'));
    let missing: Vec<&str> = absolute
        .map(|disk| disk.path.as_str())
        .filter(|path| !Path::new(path).exists())
        .collect();
    match missing.is_empty() {
        true => "the state cannot be loaded".to_owned(),
        false => format!(
            "Firecracker opens {} when it loads the state, though the clone gets disks of its \
             own: put a file of the same length there, or give drives relative paths before a \
             machine is committed",
            missing.join(", ")
        ),
    }
}

/// Where a clone finds a disk of its own.
fn place(dir: &Path, disk: &Disk) -> PathBuf {
    let path = Path::new(&disk.path);
    let is_below = path.components().all(|part| {
        matches!(
            part,
            std::path::Component::Normal(_) | std::path::Component::CurDir
        )
    });
    match is_below {
        true => dir.join(path),
        false => dir.join(format!("{}.img", disk.image)),
    }
}
