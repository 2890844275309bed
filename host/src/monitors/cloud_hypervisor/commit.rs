//! A machine of Cloud Hypervisor that runs.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use snapstore_store::Store;

use super::description::{CONFIG, DEVICES, Description, MEMORY, NAME, PREFIX, interfaces};
use crate::monitors::adapter::{Budget, DESCRIPTION, Kind, Monitor, STATE, Taken, runs};
use crate::monitors::disks::{self, OpenLayer};
use crate::monitors::http::Http;
use crate::monitors::memory;
use crate::monitors::peer::Peer;
use crate::monitors::qcow2;
use crate::runtime::Runtime;

/// Devices that have a state which is not the monitor's own.
const ELSEWHERE: [&str; 8] = [
    "fs",
    "generic_vhost_user",
    "pmem",
    "devices",
    "user_devices",
    "vdpa",
    "tpm",
    "ivshmem",
];
/// The most files that one disk may consist of.
const MOST_LAYERS: usize = 64;

/// Cloud Hypervisor, running.
pub struct CloudHypervisor {
    http: Http,
    socket: PathBuf,
    peer: Peer,
    /// As `--version` has it, too.
    version: String,
    /// The release that this is, or will be.
    release: String,
}

impl CloudHypervisor {
    pub fn connect(socket: &Path) -> anyhow::Result<Self> {
        let http = Http::new(socket, NAME, PREFIX);
        let said = http.first("/vmm.ping")?;
        let said = |name: &str| {
            let version = said[name].as_str()?;
            Some(version.trim_start_matches('v').to_owned())
        };
        let release = said("version")
            .with_context(|| format!("{} is no API socket of {NAME}", socket.display()))?;
        let version = said("build_version").unwrap_or_else(|| release.clone());
        let peer = Peer::of(http.peer()?)?;
        Ok(Self {
            http,
            socket: socket.to_owned(),
            peer,
            version,
            release,
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
                !is_qcow2 || !pauses_without_flushing(&self.release),
                "the disk {} is a qcow2 image that the guest writes to, and {NAME} {} keeps parts of \
                 its tables in memory while the guest is paused: what is read of the file could be \
                 older than the memory; use a raw disk, or a version after 53.0",
                disk["path"],
                self.version
            );
        }
        for name in ELSEWHERE {
            let devices = &config[name];
            ensure!(
                devices.is_null() || devices.as_array().is_some_and(Vec::is_empty),
                "the machine has {name}, whose state is not in {NAME}, and which is not committed"
            );
        }
        ensure!(
            interfaces(&config).all(|net| net["vhost_user"] != true),
            "the machine has a network interface that another process serves, which is not committed"
        );
        // With memory, state and description.
        Ok(writable(&config).count() + 3)
    }

    fn take(&mut self, store: &Store, budget: &mut Budget) -> anyhow::Result<Taken> {
        let mut taken = Taken::default();
        let is_mapped = memory::add_changed(store, &self.peer, &mut taken, budget)?;
        let mut written = self.snapshot(!is_mapped)?;
        if let Some(file) = written.memory.take() {
            memory::add_whole(file, "the memory that Cloud Hypervisor wrote", &mut taken)?;
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
        taken.attach(STATE, written.devices);
        taken.attach(DESCRIPTION, serde_json::to_vec_pretty(&about)?);
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

fn writable(config: &Value) -> impl Iterator<Item = &Value> {
    let disks = config["disks"].as_array().into_iter().flatten();
    disks.filter(|disk| disk["readonly"] != true)
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
