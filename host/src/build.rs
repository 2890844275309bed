//! A machine with its memory and devices, from what a user named or from a
//! snapshot's files.
//!
//! Linux guests get, in this order, their disks, a source of entropy, a socket
//! and their network interfaces; the order is part of a snapshot's state. Flat
//! programs get none.

use std::fs::File;
use std::io::{self, Read as _};
use std::ops::Range;
use std::os::fd::{AsRawFd as _, RawFd};
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};
use snapstore_vmm::control::Seconds;
use snapstore_vmm::memory::{Base, GuestMemory, MemoryLayout};
use snapstore_vmm::state::{
    Baseline, MAX_STATE_BYTES, MachineState, StateError, VirtioDeviceState,
};
use snapstore_vmm::virtio::{Block, Disk, Entropy, VirtioDevice, Vsock};
use snapstore_vmm::{Assembled, Console, Error, Kernel};

use crate::error::Usage;
use crate::networks::{self, NetSpec};
use crate::runtime::VSOCK;
use crate::snapshot_files::SnapshotFiles;

/// What a machine is made from.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MachineSource {
    /// A kernel, from its beginning.
    Boot {
        /// A Linux bzImage or vmlinux, else a flat program.
        #[serde(with = "snapstore_fuse::path_json")]
        kernel: PathBuf,
        /// Linux's first root filesystem.
        #[serde(with = "snapstore_fuse::path_json::option")]
        initrd: Option<PathBuf>,
        /// Linux's command line.
        cmdline: String,
        /// The guest's memory.
        memory_bytes: u64,
        /// How many vCPUs.
        cpus: u32,
        /// What they are at most.
        cpu: Baseline,
        /// Its disks, in the order of their numbers.
        disks: Vec<DiskSpec>,
    },
    /// A machine that was committed, as it was then.
    Restore {
        /// The snapshot's files.
        #[serde(with = "snapstore_fuse::path_json")]
        dir: PathBuf,
        /// The snapshot that they must be of.
        snapshot: String,
        /// A memory that is nearly the same, which other machines have mapped.
        #[serde(default)]
        common: Option<CommonMemory>,
        /// The holes of its memory, if they were looked for already.
        #[serde(default)]
        holes: Option<Vec<Range<u64>>>,
    },
}

/// A snapshot's files, as far as they are the same for all machines that are made from them.
pub struct Opened {
    files: SnapshotFiles,
    image: File,
    state: MachineState,
}

impl Opened {
    /// Of a machine that is restored.
    ///
    /// # Errors
    /// They are not there any more, or damaged.
    fn new(dir: &Path, snapshot: &str) -> anyhow::Result<Self> {
        let files = SnapshotFiles::hold(dir, snapshot)?;
        let state = read_state(&files)?;
        let image = files.open(MEMORY)?;
        Ok(Self {
            files,
            image,
            state,
        })
    }

    /// Its descriptors, which are its own.
    pub fn fds(&self) -> [RawFd; 2] {
        [self.files.as_raw_fd(), self.image.as_raw_fd()]
    }

    /// Closes them in a forked process. What was read stays as it is: its pages are those of
    /// all such processes as long as none writes to them.
    pub fn close(self) {
        std::mem::forget(self.state);
    }
}

impl MachineSource {
    /// Opens what several machines need, and looks where their memory has holes, once for all
    /// of them. What cannot be had now is looked for by each, which says so.
    pub fn open_ahead(&mut self) -> Option<Opened> {
        let Self::Restore {
            dir,
            snapshot,
            holes,
            ..
        } = self
        else {
            return None;
        };
        let opened = Opened::new(dir, snapshot).ok()?;
        let layout = MemoryLayout::new(opened.state.memory_bytes).ok()?;
        *holes = GuestMemory::holes(&layout, &opened.image).ok();
        Some(opened)
    }
}

/// Another snapshot's memory, as the process of a machine is told of it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CommonMemory {
    /// The other snapshot's files.
    #[serde(with = "snapstore_fuse::path_json")]
    pub dir: PathBuf,
    /// The other snapshot.
    pub snapshot: String,
    /// Where the machine's own may differ, in bytes.
    pub differs: Vec<Range<u64>>,
}

/// A disk that a user named.
#[derive(Serialize, Deserialize)]
pub struct DiskSpec {
    /// A raw image.
    #[serde(with = "snapstore_fuse::path_json")]
    pub path: PathBuf,
    /// What becomes of what the guest writes.
    pub access: DiskAccess,
}

/// What becomes of what a guest writes to a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskAccess {
    /// It is kept apart, until it is committed.
    Overlay,
    /// The guest cannot write.
    ReadOnly,
    /// It goes to the file; such a machine cannot be committed.
    InPlace,
}

/// A snapshot's files that a machine is made from, beside its disks.
const MEMORY: &str = "memory.bin";
const STATE: &str = "vmstate";

/// Kernels are loaded at 1 MiB.
const LEAST_MEMORY_BYTES: u64 = 2 << 20;

type Devices = Vec<Box<dyn VirtioDevice>>;

/// Builds the machine, paused and without threads, in the process's working directory,
/// which is the machine's; tells how long its parts took. `opened` is what was opened ahead.
pub fn build(
    (what, opened): (&MachineSource, Option<&Opened>),
    nets: &[NetSpec],
    overlays: &Overlays,
    console: &Arc<Console>,
) -> anyhow::Result<(Assembled, Seconds)> {
    let mut stages = Stages::new();
    let machine = match what {
        MachineSource::Boot {
            kernel,
            initrd,
            cmdline,
            memory_bytes,
            cpus,
            cpu,
            disks,
        } => {
            let kernel = kernel_of(kernel, initrd.as_deref(), cmdline)?;
            let devices = match &kernel {
                Kernel::Flat(_) if !nets.is_empty() => {
                    bail!("a flat program has no network; leave --net out")
                }
                Kernel::Flat(_) if !disks.is_empty() => {
                    bail!("a flat program has no disks; leave --disk out")
                }
                Kernel::Flat(_) => Devices::new(),
                Kernel::Linux { .. } => linux_devices(disks, nets, overlays)?,
            };
            stages.end("open");
            if *memory_bytes < LEAST_MEMORY_BYTES {
                bail!(Usage(format!(
                    "a machine has at least 2M of memory, of which its kernel takes what it needs \
                     above the first 1M; {memory_bytes} bytes are too few"
                )));
            }
            let layout = MemoryLayout::new(*memory_bytes).map_err(usage)?;
            let memory = GuestMemory::anonymous(layout)?;
            stages.end("map");
            Assembled::boot(memory, (*cpus, cpu), &kernel, console, devices).map_err(usage)?
        }
        MachineSource::Restore {
            dir,
            snapshot,
            common,
            holes,
        } => {
            let own;
            let opened = match opened {
                Some(opened) => opened,
                None => {
                    own = Opened::new(dir, snapshot)?;
                    &own
                }
            };
            let Opened {
                files,
                image,
                state,
            } = opened;
            let devices = saved_devices(state, files, nets, overlays)?;
            stages.end("open");
            let layout = MemoryLayout::new(state.memory_bytes)?;
            let found;
            let holes = match holes {
                Some(holes) => holes,
                None => {
                    found = GuestMemory::holes(&layout, image)?;
                    &found
                }
            };
            let memory = match common {
                None => GuestMemory::from_image_over(layout, image, holes, None)?,
                Some(common) => {
                    let others = SnapshotFiles::hold(&common.dir, &common.snapshot)?;
                    let base = Base {
                        image: &others.open(MEMORY)?,
                        differs: &common.differs,
                    };
                    GuestMemory::from_image_over(layout, image, holes, Some(&base))?
                }
            };
            stages.end("map");
            Assembled::restore(state, memory, console, devices)?
        }
    };
    Ok((machine, stages.done))
}

/// A machine of a size that cannot be is no failure of ours.
fn usage(error: Error) -> anyhow::Error {
    match error {
        Error::Cpus { .. }
        | Error::MemorySize { .. }
        | Error::State(StateError::FeatureNeeds { .. }) => Usage(error.to_string()).into(),
        error => error.into(),
    }
}

struct Stages {
    began: Instant,
    done: Seconds,
}

impl Stages {
    fn new() -> Self {
        Self {
            began: Instant::now(),
            done: Seconds::new(),
        }
    }

    fn end(&mut self, name: &str) {
        let took = self.began.elapsed().as_secs_f64();
        self.done.insert(name.to_owned(), took);
        self.began = Instant::now();
    }
}

fn open(path: &Path) -> anyhow::Result<File> {
    check_kind(path)?;
    File::open(path).with_context(|| format!("cannot open {}", path.display()))
}

/// What kind of program a file holds.
fn kernel_of(path: &Path, initrd: Option<&Path>, cmdline: &str) -> anyhow::Result<Kernel> {
    let mut head = Vec::new();
    open(path)?
        .take(0x206)
        .read_to_end(&mut head)
        .with_context(|| format!("cannot read {}", path.display()))?;
    initrd.map_or(Ok(()), check_kind)?;
    let is_linux = head.starts_with(b"\x7fELF") || head.get(0x202..0x206) == Some(b"HdrS");
    Ok(if is_linux || initrd.is_some() {
        Kernel::Linux {
            kernel: path.to_owned(),
            initrd: initrd.map(Path::to_owned),
            cmdline: cmdline.to_owned(),
        }
    } else {
        Kernel::Flat(path.to_owned())
    })
}

fn linux_devices(
    disks: &[DiskSpec],
    nets: &[NetSpec],
    overlays: &Overlays,
) -> anyhow::Result<Devices> {
    let mut devices = Devices::new();
    for (number, disk) in disks.iter().enumerate() {
        let name = disk_name(number);
        let disk = match disk.access {
            DiskAccess::Overlay => overlays.disk(&name, open(&disk.path)?)?,
            DiskAccess::ReadOnly => Disk::read_only(&name, open(&disk.path)?)?,
            DiskAccess::InPlace => Disk::in_place(&name, open_for_writing(&disk.path)?)?,
        };
        devices.push(Box::new(Block::new(disk)));
    }
    devices.push(Box::new(Entropy::new()));
    devices.push(Box::new(Vsock::new(Path::new(VSOCK), None)?));
    for net in nets {
        devices.push(Box::new(networks::device(Some(net))?));
    }
    Ok(devices)
}

/// The devices that a snapshot's machine had. A network interface for which there
/// is no tap has its link down.
fn saved_devices(
    state: &MachineState,
    files: &SnapshotFiles,
    nets: &[NetSpec],
    overlays: &Overlays,
) -> anyhow::Result<Devices> {
    let mut devices = Devices::new();
    let (mut disks, mut interfaces) = (0, 0);
    for saved in &state.devices.virtio {
        devices.push(match saved.device {
            VirtioDeviceState::Block { read_only, .. } => {
                let name = disk_name(disks);
                disks += 1;
                let base = files.open(&format!("{name}.img"))?;
                Box::new(Block::new(if read_only {
                    Disk::read_only(&name, base)?
                } else {
                    overlays.disk(&name, base)?
                }))
            }
            VirtioDeviceState::Entropy => Box::new(Entropy::new()),
            VirtioDeviceState::Vsock { .. } => Box::new(Vsock::new(Path::new(VSOCK), None)?),
            VirtioDeviceState::Net { .. } => {
                interfaces += 1;
                Box::new(networks::device(nets.get(interfaces - 1))?)
            }
        });
    }
    if nets.len() > interfaces {
        let interfaces = match interfaces {
            0 => "no network interface".to_owned(),
            1 => "one network interface".to_owned(),
            count => format!("{count} network interfaces"),
        };
        bail!(
            "the snapshot has {interfaces}, and --net names {} taps; \
             a machine gets its interfaces when it boots (`snapstore run --net TAP`)",
            nets.len()
        );
    }
    Ok(devices)
}

/// What a disk is called in snapshots.
fn disk_name(number: usize) -> String {
    format!("disk{number}")
}

/// Where what guests write to their disks is kept, and how much of it for each disk.
#[derive(Serialize, Deserialize)]
pub struct Overlays {
    #[serde(with = "snapstore_fuse::path_json")]
    dir: PathBuf,
    limit_bytes: Option<u64>,
}

impl Overlays {
    /// As the user wants it, else not in memory, if there is a directory for large
    /// temporary files (hier(7)).
    pub fn new(dir: Option<&Path>, limit_bytes: Option<u64>) -> anyhow::Result<Self> {
        let large = Path::new("/var/tmp");
        let dir = match dir {
            Some(dir) => std::path::absolute(dir)
                .with_context(|| format!("cannot find {}", dir.display()))?,
            None if large.is_dir() => large.to_owned(),
            None => std::env::temp_dir(),
        };
        Ok(Self { dir, limit_bytes })
    }

    /// Where they are.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn disk(&self, name: &str, base: File) -> Result<Disk, Error> {
        Disk::limited_overlay(name, base, &self.dir, self.limit_bytes)
    }
}

/// Before opening: to open a named pipe would wait for its other end, and a directory
/// opens like a file of the largest size.
pub fn check_kind(path: &Path) -> anyhow::Result<()> {
    let kind = std::fs::metadata(path)
        .with_context(|| format!("cannot open {}", path.display()))?
        .file_type();
    if kind.is_file() || kind.is_block_device() {
        return Ok(());
    }
    let what = if kind.is_dir() {
        "a directory"
    } else if kind.is_fifo() {
        "a named pipe"
    } else if kind.is_socket() {
        "a socket"
    } else {
        "a device"
    };
    bail!("{} is not a file but {what}", path.display())
}

fn open_for_writing(path: &Path) -> anyhow::Result<File> {
    check_kind(path)?;
    File::options()
        .read(true)
        .write(true)
        .open(path)
        .with_context(|| format!("cannot open {} for writing", path.display()))
}

fn read_state(files: &SnapshotFiles) -> anyhow::Result<MachineState> {
    let mut bytes = Vec::new();
    // One byte more than may be tells that there is more.
    io::Read::take(files.open(STATE)?, MAX_STATE_BYTES + 1)
        .read_to_end(&mut bytes)
        .with_context(|| format!("cannot read the snapshot's {STATE}"))?;
    Ok(MachineState::decode(&bytes)?)
}
