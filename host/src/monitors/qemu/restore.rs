//! QEMU from a snapshot: started with its memory mapped from the mount, it loads the state of
//! its devices as an incoming migration that has no memory in it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags, fcntl_add_seals, memfd_create};
use serde_json::{Value, json};
use snapstore_store::{ImageRole, Region, Snapshot};

use super::arguments::{self, Clone};
use super::description::{Description, REGIONS};
use super::regions;
use crate::monitors::adapter::{FileNames, Kind, Launch, Restorer, STATE, SharedMemory, Started};
use crate::monitors::described::description;
use crate::monitors::peer::Peer;
use crate::monitors::qcow2;
use crate::monitors::qmp::{Qmp, Version};

/// How long QEMU may take to load the state of its devices.
const LOADING: Duration = Duration::from_secs(60);
/// How often it is asked whether it has.
const RETRY: Duration = Duration::from_millis(2);
/// The number of the first set of descriptors of disks.
const FIRST_SET: usize = 100;
/// The socket by which it is told what to do.
const API: &str = "qmp.sock";

/// The first version whose memory may be a file that cannot be written.
const MAPS_READ_ONLY: Version = Version {
    major: 8,
    minor: 2,
    micro: 0,
};

/// Starts QEMU from snapshots.
pub struct QemuRestorer;

impl Restorer for QemuRestorer {
    fn kind(&self) -> Kind {
        Kind::Qemu
    }

    fn program(&self, dir: &Path) -> anyhow::Result<PathBuf> {
        Ok(arguments::program(&description(dir)?))
    }

    fn version(&self, said: &str) -> Option<String> {
        Version::parse(said).map(|version| version.to_string())
    }

    fn names(
        &self,
        about: Option<&Value>,
        _has: &dyn Fn(&str) -> bool,
    ) -> anyhow::Result<FileNames> {
        let about: Option<Description> = about.cloned().map(serde_json::from_value).transpose()?;
        let disks = about.into_iter().flat_map(|about| about.disks);
        // All that is shown is raw: the name of a qcow2 file would say otherwise.
        let disks = disks.filter_map(|disk| match disk.files.as_slice() {
            [file] if !file.ends_with("qcow2") => Some((disk.image, file.clone())),
            _ => None,
        });
        Ok(FileNames {
            memory: "ram",
            state: "devices",
            disks: disks.collect(),
            made: Vec::new(),
        })
    }

    fn writes_to_view(&self) -> bool {
        false
    }

    fn memory(&self, version: &str, snapshot: &Snapshot) -> anyhow::Result<Option<SharedMemory>> {
        match Version::parse(version) {
            Some(version) if version >= MAPS_READ_ONLY => Ok(None),
            _ => filled(snapshot).map(Some),
        }
    }

    fn launch(&self, started: &Started<'_>) -> anyhow::Result<Launch> {
        let about: Description = description(started.mount)?;
        let mut fds: Vec<OwnedFd> = Vec::new();
        let mut disks = BTreeMap::new();
        let api = started.dir.join(API);
        let mut added = vec![
            "-S".to_owned(),
            "-incoming".to_owned(),
            "defer".to_owned(),
            "-global".to_owned(),
            "migration.send-configuration=off".to_owned(),
            "-qmp".to_owned(),
            format!("unix:{},server=on,wait=off", escaped(&api)),
        ];
        for (number, disk) in about.disks.iter().enumerate() {
            let base = started.mount.join(format!("{}.img", disk.image));
            let size_bytes = fs::metadata(&base)
                .with_context(|| format!("the snapshot has no disk {}", disk.image))?
                .len();
            let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
            let file = rustix::fs::open(started.overlay_dir, flags, Mode::RUSR | Mode::WUSR)
                .with_context(|| {
                    format!(
                        "cannot make a file for a disk in {}; name another directory with \
                         --overlay-dir",
                        started.overlay_dir.display()
                    )
                })?;
            let file = File::from(file);
            qcow2::write_empty(&file, size_bytes, &base)?;
            // QEMU opens a file of a set with just the rights that it has there.
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            let flags = OFlags::RDONLY | OFlags::CLOEXEC;
            let reader = rustix::fs::open(path, flags, Mode::empty())?;
            let set = FIRST_SET + number;
            for fd in [file.into(), reader] {
                added.push("-add-fd".to_owned());
                added.push(format!("fd={},set={set}", fd.as_raw_fd()));
                fds.push(fd);
            }
            disks.insert(disk.image.clone(), format!("/dev/fdset/{set}"));
        }
        let memory = match started.shared_memory {
            Some(fd) => format!("mem-path=/proc/self/fd/{fd},share=off"),
            None => format!(
                "mem-path={},share=off,readonly=on,rom=off",
                escaped(&started.mount.join("memory.bin"))
            ),
        };
        let memory = format!("size={},{memory}", about.memory_bytes);
        let clone = Clone {
            dir: started.dir,
            name: started.name,
            memory: &memory,
            disks: &disks,
            added,
            taps: started.taps,
        };
        Ok(Launch {
            arguments: arguments::of_clone(&about, &clone)?,
            fds,
            api,
            memory_bytes: about.memory_bytes,
            cpus: Some(about.cpus),
        })
    }

    fn load(&self, started: &Started<'_>, launch: &Launch, pid: u32) -> anyhow::Result<()> {
        let about: Description = description(started.mount)?;
        let mut qmp = Qmp::connect(&launch.api)?;
        let peer = Peer::of(pid)?;
        let state = fs::read(started.mount.join(STATE)).context("cannot read the state")?;
        let (ours, theirs) = UnixStream::pair()?;
        qmp.run_with(
            "getfd",
            json!({"fdname": "snapstore-state"}),
            theirs.as_fd(),
        )?;
        drop(theirs);
        let writer = std::thread::spawn(move || {
            let mut ours = ours;
            ours.set_write_timeout(Some(LOADING))?;
            ours.write_all(&state)
        });
        qmp.run_long("migrate-incoming", json!({"uri": "fd:snapstore-state"}))?;
        let deadline = Instant::now() + LOADING;
        loop {
            let status = qmp.run("query-status", json!({}))?;
            if status["status"] != "inmigrate" {
                break;
            }
            let failed = qmp.run("query-migrate", json!({}))?;
            if failed["status"] == "failed" {
                bail!(
                    "QEMU cannot load the state of its devices: {}",
                    failed["error-desc"]
                        .as_str()
                        .unwrap_or("it does not say why")
                );
            }
            ensure!(
                Instant::now() < deadline,
                "QEMU does not come to the end of loading the state of its devices"
            );
            std::thread::sleep(RETRY);
        }
        match writer.join() {
            Ok(written) => written.context("QEMU did not read all of the state")?,
            Err(_) => bail!("the state could not be written"),
        }
        let bytes =
            regions::load(&started.mount.join(REGIONS)).context("cannot read the regions")?;
        regions::write(&mut qmp, &peer, &about.regions, &bytes)?;
        if started.run {
            qmp.run_long("cont", json!({}))?;
        }
        Ok(())
    }
}

/// A comma in a value is written twice.
fn escaped(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// A copy of the memory in use, which all machines share: before 8.2, QEMU opens the file of
/// its memory for writing, though it maps it privately.
fn filled(snapshot: &Snapshot) -> anyhow::Result<SharedMemory> {
    let mut images = snapshot.images();
    let (_, reader) = images
        .find(|(image, _)| image.role == ImageRole::Memory)
        .context("the snapshot has no memory")?;
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(memfd_create("snapstore-memory", flags)?);
    file.set_len(reader.size_bytes())?;
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    while let Some(start) = reader.seek(at, Region::Data)? {
        let end = reader.seek(start, Region::Hole)?;
        let end = end.unwrap_or(reader.size_bytes());
        at = start;
        while at < end {
            let left = usize::try_from(end - at).unwrap_or(buffer.len());
            let part = left.min(buffer.len());
            let read = reader.read_at(&mut buffer[..part], at)?;
            ensure!(read > 0, "the snapshot's memory is cut off");
            std::os::unix::fs::FileExt::write_all_at(&file, &buffer[..read], at)?;
            at += read as u64;
        }
    }
    fcntl_add_seals(
        &file,
        SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL,
    )?;
    Ok(SharedMemory(file))
}
