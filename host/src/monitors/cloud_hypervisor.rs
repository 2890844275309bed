//! Cloud Hypervisor, at its API socket.
//!
//! Its snapshot is a directory of three files with fixed names. Of a machine whose process
//! has mapped the memory of a mount, the one with the memory is there already when it
//! begins: Cloud Hypervisor then writes the two others and ends with an error, which costs
//! neither time nor room. What the process changed of the mapped image is read instead.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use snapstore_store::{ImageRole, Input, InputData, InputKind, Snapshot, Store};

use super::adapter::{
    Budget, DESCRIPTION, FileNames, Kind, Launch, Monitor, Restorer, STATE, SharedMemory, Started,
    Taken, runs,
};
use super::described::description;
use super::disks::{self, OpenLayer, own_disk};
use super::http::Http;
use super::memory::{kept, whole};
use super::peer::Peer;
use super::qcow2;
use crate::error::{NotFound, Usage};
use crate::monitor::memory_of_paused;
use crate::runtime::Runtime;

/// What it calls itself in messages.
const NAME: &str = "Cloud Hypervisor";
const PREFIX: &str = "/api/v1";
/// The socket of a clone.
const API: &str = "api.sock";
/// The names of the files of a snapshot.
const CONFIG: &str = "config.json";
const DEVICES: &str = "state.json";
const MEMORY: &str = "memory-ranges";
/// The most files that one disk may consist of.
const MOST_LAYERS: usize = 64;

/// What a snapshot says of its machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Description {
    /// Which description this is: 1.
    format: u32,
    /// The machine's working directory.
    directory: PathBuf,
    /// Its configuration, as Cloud Hypervisor wrote it.
    config: Value,
    /// For each of its disks the image, if the guest writes to it.
    disks: Vec<Option<String>>,
}

/// Cloud Hypervisor, running.
pub struct CloudHypervisor {
    http: Http,
    socket: PathBuf,
    peer: Peer,
    version: String,
}

impl CloudHypervisor {
    pub fn connect(socket: &Path) -> anyhow::Result<Self> {
        let http = Http::new(socket, NAME, PREFIX);
        let said = http.first("/vmm.ping")?;
        let version = said["version"]
            .as_str()
            .with_context(|| format!("{} is no API socket of {NAME}", socket.display()))?;
        let version = version.trim_start_matches('v').to_owned();
        let peer = Peer::of(http.peer()?)?;
        Ok(Self {
            http,
            socket: socket.to_owned(),
            peer,
            version,
        })
    }

    fn config(&self) -> anyhow::Result<Value> {
        let mut said = self.http.get("/vm.info")?;
        let config = said["config"].take();
        ensure!(
            config.is_object(),
            "{NAME} does not say how its guest is made"
        );
        Ok(config)
    }

    /// The files of a disk, the topmost first.
    fn layers(&self, disk: &Value) -> anyhow::Result<Vec<OpenLayer>> {
        let path = disk["path"].as_str().context("a disk has no path")?;
        let mut layers: Vec<OpenLayer> = Vec::new();
        let mut next = Some(PathBuf::from(path));
        while let Some(path) = next {
            let file = match layers.is_empty() {
                true => self.peer.open_file(&path)?,
                // It has those that lie under it open, too, but not under their own names.
                false => Some(File::open(&path)?),
            };
            let file = file.with_context(|| {
                format!(
                    "{NAME} does not have {} open; only files are committed",
                    path.display()
                )
            })?;
            let backing = qcow2::backing(&file)?;
            let dir = path.parent().map(Path::to_owned).unwrap_or_default();
            next = backing
                .as_ref()
                .and_then(|name| name.as_ref().map(|name| dir.join(name)));
            let real = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
            layers.push(OpenLayer {
                file,
                path: real,
                is_qcow2: backing.is_some(),
            });
            ensure!(
                layers.len() <= MOST_LAYERS,
                "a disk consists of too many files"
            );
        }
        Ok(layers)
    }

    /// Has it write its snapshot: configuration, devices, and memory unless that is there.
    fn snapshot(&self, with_memory: bool) -> anyhow::Result<Written> {
        let dir = Scratch::new()?;
        if !with_memory {
            File::create(dir.0.join(MEMORY))?;
        }
        let url = format!("file://{}", dir.0.display());
        let done = self
            .http
            .put("/vm.snapshot", Some(&json!({"destination_url": url})));
        let read = |name: &str| fs::read(dir.0.join(name));
        let whole = |name: &str| -> anyhow::Result<Vec<u8>> {
            let bytes = read(name)?;
            serde_json::from_slice::<Value>(&bytes)?;
            Ok(bytes)
        };
        let files = whole(CONFIG).and_then(|config| Ok((config, whole(DEVICES)?)));
        let (config, devices) = match (done, files) {
            (Ok(_), files) => files?,
            // The memory was in its way, as it should be.
            (Err(_), Ok(files)) if !with_memory => files,
            (Err(error), _) => return Err(error),
        };
        let memory = match with_memory {
            true => Some(File::open(dir.0.join(MEMORY))?),
            false => None,
        };
        Ok(Written {
            config: serde_json::from_slice(&config)?,
            devices,
            memory,
        })
    }
}

struct Written {
    config: Value,
    devices: Vec<u8>,
    memory: Option<File>,
}

/// A directory in memory that goes when this does.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> anyhow::Result<Self> {
        let runtime = Runtime::open()?;
        let dir = runtime
            .path()
            .join(format!("snapshot-{}", std::process::id()));
        match fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        fs::create_dir(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        Ok(Self(dir))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Monitor for CloudHypervisor {
    fn kind(&self) -> Kind {
        Kind::CloudHypervisor
    }

    fn version(&self) -> String {
        self.version.clone()
    }

    fn socket(&self) -> &Path {
        &self.socket
    }

    fn is_running(&mut self) -> anyhow::Result<bool> {
        let said = self.http.get("/vm.info")?;
        runs(said["state"].as_str())
    }

    fn pause(&mut self) -> anyhow::Result<()> {
        self.http.put("/vm.pause", None).map(drop)
    }

    fn resume(&mut self) -> anyhow::Result<()> {
        self.http.put("/vm.resume", None).map(drop)
    }

    fn check(&mut self, _store: &Store) -> anyhow::Result<usize> {
        let config = self.config()?;
        for disk in writable(&config) {
            let layers = self.layers(disk)?;
            let is_qcow2 = layers.first().is_some_and(|top| top.is_qcow2);
            ensure!(
                !is_qcow2 || !pauses_without_flushing(&self.version),
                "the disk {} is a qcow2 image that the guest writes to, and {NAME} {} keeps parts of \
                 its tables in memory while the guest is paused: what is read of the file could be \
                 older than the memory; use a raw disk, or a version after 53.0",
                disk["path"],
                self.version
            );
        }
        for name in ["fs", "pmem", "devices", "user_devices", "vdpa"] {
            ensure!(
                config[name].as_array().is_none_or(Vec::is_empty),
                "the machine has {name}, which are not committed"
            );
        }
        // With memory, state and description.
        Ok(writable(&config).count() + 3)
    }

    fn take(&mut self, store: &Store, budget: &mut Budget) -> anyhow::Result<Taken> {
        let mut taken = Taken::default();
        let mut written = match memory_of_paused(store, self.peer.pid) {
            Ok(mapped) => {
                taken.parent = Some(mapped.parent);
                taken.read_bytes += mapped.changed_bytes;
                let (input, is_held) = kept(mapped.input, budget)?;
                taken.is_held |= is_held;
                taken.inputs.push(input);
                self.snapshot(false)?
            }
            Err(error) if error.is::<NotFound>() => self.snapshot(true)?,
            Err(error) => return Err(error),
        };
        if let Some(memory) = written.memory.take() {
            let input = whole(memory, "the memory that Cloud Hypervisor wrote")?;
            taken.read_bytes += input.1;
            taken.inputs.push(input.0);
        }
        let mut images = Vec::new();
        let mut count = 0;
        for disk in written.config["disks"].as_array().into_iter().flatten() {
            if disk["readonly"] == true {
                images.push(None);
                continue;
            }
            let image = format!("disk{count}");
            count += 1;
            let layers = self.layers(disk)?;
            if let [top] = layers.as_slice()
                && !top.is_qcow2
                && let Some(input) = disks::of_view(store, &image, &top.file, &mut taken)?
            {
                taken.inputs.push(input);
                images.push(Some(image));
                continue;
            }
            disks::add(store, &image, layers, &mut taken, budget)
                .with_context(|| format!("the disk {} cannot be committed", disk["path"]))?;
            images.push(Some(image));
        }
        let about = Description {
            format: 1,
            directory: self.peer.directory()?,
            config: written.config,
            disks: images,
        };
        for (name, bytes) in [
            (STATE, written.devices),
            (DESCRIPTION, serde_json::to_vec_pretty(&about)?),
        ] {
            taken.inputs.push(Input {
                name: name.to_owned(),
                role: ImageRole::File,
                data: InputData::Bytes(Arc::from(bytes)),
                kind: InputKind::Full,
            });
        }
        Ok(taken)
    }
}

/// Whether this version may pause a guest and not write what it has in memory of the tables
/// of a qcow2 image. Up to 53.0 a pause waits for requests that are under way, and tables are
/// written when the guest flushes. A version that is none is one of these.
fn pauses_without_flushing(version: &str) -> bool {
    let mut numbers = version.split(|it: char| !it.is_ascii_digit());
    let mut next = || numbers.next().and_then(|it| it.parse::<u32>().ok());
    next().is_none_or(|major| (major, next().unwrap_or(0)) <= (53, 0))
}

/// The image is mapped for each clone alone, page by page.
fn map_lazily(config: &mut Value) {
    config["memory"]["shared"] = json!(false);
    config["memory"]["thp"] = json!(false);
}

fn writable(config: &Value) -> impl Iterator<Item = &Value> {
    let disks = config["disks"].as_array().into_iter().flatten();
    disks.filter(|disk| disk["readonly"] != true)
}

/// Starts Cloud Hypervisor from snapshots.
pub struct CloudHypervisorRestorer;

impl Restorer for CloudHypervisorRestorer {
    fn kind(&self) -> Kind {
        Kind::CloudHypervisor
    }

    fn program(&self, _dir: &Path) -> anyhow::Result<PathBuf> {
        Ok(PathBuf::from("cloud-hypervisor"))
    }

    fn version(&self, said: &str) -> Option<String> {
        let rest = said.trim().strip_prefix("cloud-hypervisor v")?;
        rest.split_whitespace().next().map(str::to_owned)
    }

    /// With a configuration that finds the disks in its working directory.
    fn names(
        &self,
        about: Option<&Value>,
        has: &dyn Fn(&str) -> bool,
    ) -> anyhow::Result<FileNames> {
        let about: Option<Description> = about.cloned().map(serde_json::from_value).transpose()?;
        let mut made = Vec::new();
        match about {
            Some(mut about) => {
                let disks = about.config["disks"].as_array_mut().into_iter().flatten();
                for (disk, image) in disks.zip(&about.disks) {
                    match image {
                        Some(image) => {
                            disk["path"] = json!(format!("{image}.img"));
                            disk["image_type"] = json!("Raw");
                            disk["backing_files"] = json!(false);
                        }
                        None => {
                            let path = disk["path"].as_str().unwrap_or_default();
                            disk["path"] = json!(about.directory.join(path));
                        }
                    }
                }
                map_lazily(&mut about.config);
                made.push((
                    CONFIG.to_owned(),
                    serde_json::to_string_pretty(&about.config)?,
                ));
            }
            None => ensure!(
                has(CONFIG),
                Usage(format!(
                    "it has neither {CONFIG} (`commit --file \
                     {CONFIG}=FILE`) nor {DESCRIPTION} (`commit --cloud-hypervisor`)"
                ))
            ),
        }
        Ok(FileNames {
            memory: MEMORY,
            state: DEVICES,
            disks: Vec::new(),
            made,
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
        let mut config = about.config.clone();
        let disks = config["disks"].as_array_mut().into_iter().flatten();
        for (disk, image) in disks.zip(&about.disks) {
            let Some(image) = image else {
                let path = disk["path"].as_str().unwrap_or_default();
                disk["path"] = json!(about.directory.join(path));
                continue;
            };
            // Not an overlay on the mounted image: see `pauses_without_flushing`.
            disk["path"] = json!(own_disk(started, image)?);
            disk["image_type"] = json!("Raw");
            disk["backing_files"] = json!(false);
        }
        map_lazily(&mut config);
        for (name, file) in [("serial", "serial.sock"), ("console", "")] {
            let line = &mut config[name];
            if !line.is_object() || line["mode"] == "Off" || line["mode"] == "Null" {
                continue;
            }
            *line = match file {
                "" => json!({"mode": "Null"}),
                file => json!({"mode": "Socket", "socket": started.dir.join(file)}),
            };
        }
        let nets = config["net"].as_array_mut().into_iter().flatten();
        for (net, tap) in nets.zip(started.taps) {
            net["tap"] = json!(tap);
        }
        if config["vsock"].is_object() {
            config["vsock"]["socket"] = json!(started.dir.join("vsock.sock"));
        }
        let dir = started.dir.join("snapshot");
        fs::create_dir(&dir)?;
        fs::write(dir.join(CONFIG), serde_json::to_vec_pretty(&config)?)?;
        symlink(started.mount.join(STATE), dir.join(DEVICES))?;
        symlink(started.mount.join("memory.bin"), dir.join(MEMORY))?;
        let api = started.dir.join(API);
        let memory = fs::metadata(started.mount.join("memory.bin"))?.len();
        let cpus = about.config["cpus"]["boot_vcpus"].as_u64();
        Ok(Launch {
            arguments: vec!["--api-socket".to_owned(), api.display().to_string()],
            fds: Vec::new(),
            api,
            memory_bytes: memory,
            cpus: cpus.and_then(|cpus| u32::try_from(cpus).ok()),
        })
    }

    fn load(&self, started: &Started<'_>, launch: &Launch, _pid: u32) -> anyhow::Result<()> {
        let http = Http::new(&launch.api, NAME, PREFIX);
        let url = format!("file://{}", started.dir.join("snapshot").display());
        let lazily = json!({"source_url": url, "memory_restore_mode": "CopyOnWrite"});
        if let Err(error) = http.put("/vm.restore", Some(&lazily)) {
            tracing::info!(%error, "it does not map the image: it copies it");
            http.put("/vm.restore", Some(&json!({"source_url": url})))?;
        }
        if started.run {
            http.put("/vm.resume", None)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_that_flush_when_they_pause_are_those_after_53() {
        for version in ["53.0", "53.0-7-gabc", "52.1", "9", "", "unknown"] {
            assert!(pauses_without_flushing(version), "{version}");
        }
        for version in ["53.1", "54.0", "54.0-dirty", "60", "100.0"] {
            assert!(!pauses_without_flushing(version), "{version}");
        }
    }
}
