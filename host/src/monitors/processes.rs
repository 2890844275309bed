//! The process that starts machines of another monitor, waits for their ends and settles
//! what they leave.
//!
//! Each monitor's process inherits the lock of its machine's name, a pin of the snapshot and
//! the lock of its mount, so that all three last as long as it.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use rustix::fs::{major, minor};
use rustix::io::{FdFlags, fcntl_setfd};
use serde::{Deserialize, Serialize};
use snapstore_vmm::confine::keep_only;

use super::adapter::{Kind, Launch, Restorer, Started};
use super::known;
use super::record::Record;
use crate::background;
use crate::error::{ChildFailure, NotFound};
use crate::runtime::{NameLock, Runtime, VmDir};
use crate::spec::FAILED;
use crate::start::end;
use crate::supervisor::{ignore_signals, let_go_of_starter, supervise};

/// The hidden command that starts machines of other monitors and supervises them.
pub const COMMAND: &str = "monitor-host";
/// How long a monitor may take until it listens.
const STARTING: Duration = Duration::from_secs(30);
const RETRY: Duration = Duration::from_millis(2);

/// How the processes of a monitor are started, told to load, and told from one another.
#[derive(Serialize, Deserialize)]
pub(super) struct Spec {
    pub kind: Kind,
    pub program: PathBuf,
    pub version: String,
    pub names: Vec<String>,
    pub snapshot: String,
    pub tag: String,
    pub mount: PathBuf,
    pub shared_memory: Option<i32>,
    /// The writable view with the clones' disks.
    pub view: Option<PathBuf>,
    pub overlay_dir: PathBuf,
    pub taps: Vec<Vec<String>>,
    pub run: bool,
    pub kept: Vec<i32>,
}

/// What each machine's start says, a line of standard output.
#[derive(Serialize, Deserialize)]
pub(super) struct Announcement {
    pub name: String,
    pub outcome: Result<Record, ChildFailure>,
}

/// The hidden command: its spec is a line of standard input.
pub fn run_from_stdin() -> anyhow::Result<u8> {
    let line = io::stdin().lines().next().transpose()?.unwrap_or_default();
    let spec: Spec = serde_json::from_str(&line).context("what to start is not valid")?;
    let kept = keep_only(&spec.kept)?;
    background::detach()?;
    ignore_signals()?;
    let runtime = Runtime::open()?;
    let mut machines = BTreeMap::new();
    match start_all(&spec, &runtime, &kept, &mut machines) {
        Ok(records) => {
            for record in records {
                announce(&record.name.clone(), Ok(record))?;
            }
        }
        Err((name, error)) => {
            for (_, vm) in machines {
                end(&vm).ok();
            }
            announce(&name, Err(ChildFailure::of(&error)))?;
            return Ok(FAILED);
        }
    }
    drop(kept);
    let_go_of_starter()?;
    supervise(machines)
}

fn announce(name: &str, outcome: Result<Record, ChildFailure>) -> anyhow::Result<()> {
    let mut line = serde_json::to_vec(&Announcement {
        name: name.to_owned(),
        outcome,
    })?;
    line.push(b'\n');
    let mut out = io::stdout();
    out.write_all(&line)?;
    out.flush()?;
    Ok(())
}

/// Starts the processes side by side, then has one after the other load its state.
fn start_all(
    spec: &Spec,
    runtime: &Runtime,
    kept: &[OwnedFd],
    machines: &mut BTreeMap<i32, VmDir>,
) -> Result<Vec<Record>, (String, anyhow::Error)> {
    let restorer = known::restorer(spec.kind);
    for fd in kept {
        fcntl_setfd(fd, FdFlags::empty()).map_err(|error| (String::new(), error.into()))?;
    }
    let mut begun = Vec::with_capacity(spec.names.len());
    for (number, name) in spec.names.iter().enumerate() {
        let begin = || -> anyhow::Result<_> {
            let vm = runtime.vm(name)?;
            let claim = vm.claim()?;
            let dir = vm.monitor_dir();
            fs::create_dir(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
            let view = spec.view_of(number);
            let about = spec.started(number, &dir, view.as_deref());
            match begin(spec, restorer.as_ref(), &about, &claim) {
                Ok((launch, child)) => Ok((vm, dir, launch, child)),
                Err(error) => {
                    claim.release(None)?;
                    Err(error)
                }
            }
        };
        let (vm, dir, launch, child) = begin().map_err(|error| (name.clone(), error))?;
        let pid = i32::try_from(child.id()).unwrap_or(i32::MAX);
        machines.insert(pid, vm.clone());
        begun.push((vm, dir, launch, child));
    }
    let mut records = Vec::with_capacity(begun.len());
    for (number, (vm, dir, launch, mut child)) in begun.into_iter().enumerate() {
        let view = spec.view_of(number);
        let started = spec.started(number, &dir, view.as_deref());
        let loaded = wait_until_listens(&mut child, &launch.api)
            .and_then(|()| restorer.load(&started, &launch, child.id()))
            .and_then(|()| record(spec, &vm, &dir, &launch, child.id()))
            .map_err(|error| with_last_words(error, &mut child, &vm));
        records.push(loaded.map_err(|error| (vm.name.clone(), error))?);
    }
    Ok(records)
}

impl Spec {
    /// A machine's directory in the writable view.
    fn view_of(&self, number: usize) -> Option<PathBuf> {
        let view = self.view.as_ref();
        view.map(|view| view.join(number.to_string()))
    }

    fn started<'a>(&'a self, number: usize, dir: &'a Path, view: Option<&'a Path>) -> Started<'a> {
        Started {
            name: &self.names[number],
            dir,
            mount: &self.mount,
            shared_memory: self.shared_memory,
            view,
            overlay_dir: &self.overlay_dir,
            taps: &self.taps[number],
            run: self.run,
        }
    }
}

/// Starts the process of one machine.
fn begin(
    spec: &Spec,
    restorer: &dyn Restorer,
    about: &Started<'_>,
    claim: &NameLock,
) -> anyhow::Result<(Launch, Child)> {
    let launch = restorer.launch(about)?;
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .open(claim.vm.log())
        .with_context(|| format!("cannot create {}", claim.vm.log().display()))?;
    let inherited = launch.fds.iter().map(|fd| fd.as_fd());
    let inherited: Vec<BorrowedFd<'_>> = inherited.chain([claim.lock()]).collect();
    for fd in &inherited {
        fcntl_setfd(fd, FdFlags::empty())?;
    }
    let child = Command::new(&spec.program)
        .args(&launch.arguments)
        .current_dir(about.dir)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("cannot start {}", spec.program.display()));
    // The next one has its own.
    for fd in &inherited {
        fcntl_setfd(fd, FdFlags::CLOEXEC)?;
    }
    let child = child?;
    claim.name_process(i32::try_from(child.id())?)?;
    Ok((launch, child))
}

fn wait_until_listens(child: &mut Child, api: &Path) -> anyhow::Result<()> {
    let deadline = Instant::now() + STARTING;
    loop {
        if let Some(status) = child.try_wait()? {
            bail!("the monitor ended before it listened ({status})");
        }
        if api.exists() {
            match super::wire::Wire::connect(api) {
                Ok(_) => return Ok(()),
                Err(error) if error.is::<NotFound>() => {}
                Err(error) => return Err(error),
            }
        }
        ensure!(
            Instant::now() < deadline,
            "the monitor does not listen at {}",
            api.display()
        );
        std::thread::sleep(RETRY);
    }
}

fn record(
    spec: &Spec,
    vm: &VmDir,
    dir: &Path,
    launch: &Launch,
    pid: u32,
) -> anyhow::Result<Record> {
    let shared_memory = match spec.shared_memory {
        None => None,
        Some(fd) => {
            let found = fs::metadata(format!("/proc/self/fd/{fd}"))?;
            Some(((major(found.dev()), minor(found.dev())), found.ino()))
        }
    };
    let mut paths = BTreeMap::from([("log".to_owned(), vm.log())]);
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path != launch.api
            && let Some(name) = path.file_name().and_then(|name| name.to_str())
        {
            paths.insert(name.to_owned(), path);
        }
    }
    let record = Record {
        name: vm.name.clone(),
        monitor: spec.kind,
        version: spec.version.clone(),
        pid,
        since: super::peer::Peer::of(pid)?.since,
        snapshot: spec.snapshot.clone(),
        tag: spec.tag.clone(),
        memory_bytes: launch.memory_bytes,
        cpus: launch.cpus,
        shared_memory,
        api: launch.api.clone(),
        paths,
    };
    record.write(vm)?;
    Ok(record)
}

/// What the monitor said before it ended is the reason why it could not be told anything.
fn with_last_words(error: anyhow::Error, child: &mut Child, vm: &VmDir) -> anyhow::Error {
    let deadline = Instant::now() + Duration::from_millis(200);
    while matches!(child.try_wait(), Ok(None)) && Instant::now() < deadline {
        std::thread::sleep(RETRY);
    }
    let log = File::open(vm.log()).map(io::read_to_string);
    let Ok(Ok(log)) = log else {
        return error;
    };
    let lines: Vec<&str> = log.lines().rev().take(5).collect();
    let words: Vec<&str> = lines.into_iter().rev().collect();
    match words.is_empty() {
        true => error,
        false => error.context(format!("the monitor said: {}", words.join("; "))),
    }
}
