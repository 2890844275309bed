//! A machine of Firecracker that runs.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use snapstore_store::{ImageRole, Input, InputData, InputKind, Store};

use super::description::{Description, Disk, ReadOnly, is_below};
use super::version::{NAME, said_version};
use super::written::Written;
use crate::error::Usage;
use crate::monitors::adapter::{Budget, DESCRIPTION, Kind, Monitor, STATE, Taken, runs};
use crate::monitors::disks::of_view;
use crate::monitors::http::Http;
use crate::monitors::memory;
use crate::monitors::peer::Peer;

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
        let version = said_version(&http)
            .with_context(|| format!("{} is no API socket of Firecracker", socket.display()))?;
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
        let directory = self.peer.directory()?;
        let is_in_chroot = self.peer.own_root()?.is_some();
        let mut disks = Vec::new();
        let mut read_only = Vec::new();
        for drive in list("drives") {
            let id = text(&drive["drive_id"]).context("a drive has no id")?;
            let path = text(&drive["path_on_host"]).with_context(|| {
                format!("the drive {id} is no file, and only those are committed")
            })?;
            ensure!(
                path.starts_with('/') || is_below(Path::new(&path)),
                Usage(format!(
                    "the drive {id} has the path {path}, which leads out of the working directory: \
                     a clone, which has another one, would not find it; use an absolute path, or \
                     one without `..`"
                ))
            );
            if drive["is_read_only"] == true {
                // Nobody outside finds what is in a chroot once its machine is gone.
                if is_below(Path::new(&path)) && !is_in_chroot {
                    let file = fs::canonicalize(directory.join(&path))
                        .with_context(|| format!("the drive {id}: {path}"))?;
                    read_only.push(ReadOnly { path, file });
                }
                continue;
            }
            let image = format!("disk{}", disks.len());
            disks.push(Disk { id, image, path });
        }
        let cpus = machine["vcpu_count"].as_u64();
        Ok(Description {
            format: 1,
            directory,
            memory_bytes: mib << 20,
            cpus: cpus.and_then(|cpus| u32::try_from(cpus).ok()),
            huge_pages: text(&machine["huge_pages"]),
            disks,
            read_only,
            interfaces: list("network-interfaces")
                .iter()
                .filter_map(|net| text(&net["iface_id"]))
                .collect(),
            vsock: text(&config["vsock"]["uds_path"]),
        })
    }

    /// Has it write a snapshot into two files: state, and memory.
    fn create(&self, kind: &str) -> anyhow::Result<(File, File)> {
        let state = Written::new(&self.peer, "state")?;
        let memory = Written::new(&self.peer, "memory")?;
        self.http
            .put(
                "/snapshot/create",
                Some(&json!({
                    "snapshot_type": kind,
                    "snapshot_path": state.path,
                    "mem_file_path": memory.path,
                })),
            )
            .context(
                "it has to be a process of the same user, or in a chroot, to write into files \
                 of this one",
            )?;
        Ok((state.file.try_clone()?, memory.file.try_clone()?))
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
        let state = match memory::add_changed(store, &self.peer, &mut taken, budget)? {
            true => {
                // Some versions make diffs only where they keep a log of dirty pages. What it says
                // of memory is not used, and a diff is sooner written.
                let state = self.create("Diff").or_else(|_| self.create("Full"));
                state?.0
            }
            false => {
                let (state, memory) = self.create("Full")?;
                let length = memory.metadata()?.len();
                ensure!(
                    length == about.memory_bytes,
                    "Firecracker wrote {length} bytes of memory, and its guest has {}",
                    about.memory_bytes
                );
                memory::add_whole(memory, "the memory that Firecracker wrote", &mut taken)?;
                state
            }
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
        let length = usize::try_from(state.metadata()?.len())?;
        ensure!(length > 0, "Firecracker wrote an empty state");
        let mut bytes = vec![0; length];
        state.read_exact_at(&mut bytes, 0)?;
        taken.attach(STATE, bytes);
        taken.attach(DESCRIPTION, serde_json::to_vec_pretty(&about)?);
        Ok(taken)
    }
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
