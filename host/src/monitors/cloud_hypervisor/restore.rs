//! Machines of Cloud Hypervisor from snapshots.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::ensure;
use serde_json::{Value, json};

use super::description::{CONFIG, DEVICES, Description, MEMORY, NAME, PREFIX, interfaces};
use crate::error::Usage;
use crate::monitors::adapter::{DESCRIPTION, FileNames, Kind, Launch, Restorer, STATE, Started};
use crate::monitors::described::description;
use crate::monitors::disks::own_disk;
use crate::monitors::http::{Http, Refused};

/// The socket of a clone.
const API: &str = "api.sock";
/// What it says of a request that it does not understand.
const BAD_REQUEST: u16 = 400;

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
            // Not an overlay on the mounted image: see `commit`.
            disk["path"] = json!(own_disk(started, image)?);
            disk["image_type"] = json!("Raw");
            disk["backing_files"] = json!(false);
        }
        map_lazily(&mut config);
        let serial = started.dir.join("serial.sock");
        for name in ["serial", "console", "debug_console"] {
            let Some(line) = config
                .get_mut(name)
                .filter(|line| line.is_object() && line["mode"] != "Off" && line["mode"] != "Null")
            else {
                continue;
            };
            // What else it says of the line are places on buses.
            line["file"] = Value::Null;
            line["mode"] = json!("Null");
            if name == "serial" {
                line["mode"] = json!("Socket");
                line["socket"] = json!(serial);
            }
        }
        let nets = config["net"].as_array_mut().into_iter().flatten();
        for (net, tap) in nets.zip(started.taps) {
            net["tap"] = json!(tap);
            if let Some(fds) = net.get_mut("fds") {
                *fds = Value::Null;
            }
        }
        ensure!(
            interfaces(&config).all(|net| net["fds"].is_null()),
            Usage(
                "the machine's network interfaces were handed to it as open files, which no clone \
                 has; name a tap for each with --net"
                    .to_owned()
            )
        );
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
        match http.put("/vm.restore", Some(&lazily)) {
            Ok(_) => {}
            // A version that does not know the mode does not understand what it is asked.
            Err(error) if is_bad_request(&error) => {
                tracing::info!(%error, "it does not map the image: it copies it");
                http.put("/vm.restore", Some(&json!({"source_url": url})))?;
            }
            Err(error) => return Err(error),
        }
        if started.run {
            http.put("/vm.resume", None)?;
        }
        Ok(())
    }
}

/// The image is mapped for each clone alone, page by page.
fn map_lazily(config: &mut Value) {
    config["memory"]["shared"] = json!(false);
    config["memory"]["thp"] = json!(false);
    let zones = config["memory"].get_mut("zones");
    for zone in zones.and_then(Value::as_array_mut).into_iter().flatten() {
        zone["shared"] = json!(false);
    }
}

fn is_bad_request(error: &anyhow::Error) -> bool {
    let refused = error.downcast_ref::<Refused>();
    refused.is_some_and(|it| it.status == BAD_REQUEST)
}
