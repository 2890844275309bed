//! Machines of Firecracker from snapshots.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};

use super::description::{Description, Disk, is_below};
use super::version::{NAME, numbers, said_version};
use crate::error::Usage;
use crate::monitors::adapter::{FileNames, Kind, Launch, Restorer, STATE, Started};
use crate::monitors::described::description;
use crate::monitors::disks::own_disk;
use crate::monitors::http::Http;

/// The socket of a clone.
const API: &str = "api.sock";

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
            link(&own_disk(started, &disk.image)?, &place(started.dir, disk))?;
        }
        for disk in &about.read_only {
            link(&disk.file, &started.dir.join(&disk.path))?;
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
        let version = numbers(&said_version(&http)?);
        let mut load = json!({
            "snapshot_path": file(STATE),
            "mem_backend": {"backend_type": "File", "backend_path": file("memory.bin")},
            "resume_vm": false,
        });
        // Without it a commit would have all memory written that is at hand.
        let tracking = match version >= (1, 13) {
            true => "track_dirty_pages",
            false => "enable_diff_snapshots",
        };
        load[tracking] = json!(true);
        match about.huge_pages.as_deref() {
            None | Some("None") => {}
            // A fault would read 2 MiB of the image.
            Some(_) if version >= (1, 17) => load["huge_pages"] = json!("None"),
            Some(kind) => ensure!(
                kind != "2M",
                Usage(
                    "the machine was given huge pages (2M), and Firecracker before 1.17 does not \
                     restore such a one from a file"
                        .to_owned()
                )
            ),
        }
        let overrides: Vec<Value> = about
            .interfaces
            .iter()
            .zip(started.taps)
            .map(|(id, tap)| json!({"iface_id": id, "host_dev_name": tap}))
            .collect();
        if !overrides.is_empty() {
            load["network_overrides"] = overrides.into();
        }
        // A relative path is in the clone's own directory. Before 1.16 one clone can have
        // an absolute one, as it was.
        let is_absolute = about
            .vsock
            .as_ref()
            .is_some_and(|path| path.starts_with('/'));
        if is_absolute && version >= (1, 16) {
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

/// A link that leads there.
fn link(to: &Path, place: &Path) -> anyhow::Result<()> {
    if let Some(parent) = place.parent() {
        fs::create_dir_all(parent)?;
    }
    std::os::unix::fs::symlink(to, place)
        .with_context(|| format!("cannot make {}", place.display()))
}

/// Where a clone finds a disk of its own.
fn place(dir: &Path, disk: &Disk) -> PathBuf {
    let path = Path::new(&disk.path);
    match is_below(path) {
        true => dir.join(path),
        false => dir.join(format!("{}.img", disk.image)),
    }
}
