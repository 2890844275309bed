//! Starting machines of other monitors from a snapshot, and clearing away after them.
//!
//! As with this program's own machines, a process starts them, waits for their ends and
//! settles what they leave; each monitor's process inherits the lock of its machine's name,
//! a pin of the snapshot and the lock of its mount, so that all three last as long as it.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use rustix::fs::{major, minor};
use rustix::io::{FdFlags, fcntl_setfd};
use serde::{Deserialize, Serialize};
use snapstore_store::{ImageRole, NotPinned, Snapshot, Store};
use snapstore_vmm::confine::keep_only;

use super::adapter::{
    CPU, DESCRIPTION, Kind, Launch, MONITOR, Restorer, SharedMemory, Started, VERSION,
};
use super::cpu;
use super::known;
use super::record::Record;
use crate::background;
use crate::build::Overlays;
use crate::error::{ChildFailure, NotFound, Usage};
use crate::mounts;
use crate::networks::{self, NetSpec};
use crate::runtime::{NameLock, Runtime, VmDir};
use crate::spec::FAILED;
use crate::start::{borrowed, end, free_names};
use crate::supervisor::{ignore_signals, let_go_of_starter, supervise};

/// The hidden command that starts machines of other monitors and supervises them.
pub const COMMAND: &str = "monitor-host";
/// How long a monitor may take until it listens.
const STARTING: Duration = Duration::from_secs(30);
const RETRY: Duration = Duration::from_millis(2);
/// The longest answer of a monitor that is asked for its version.
const LONGEST_VERSION_BYTES: usize = 64 << 10;

/// What is to be restored.
pub struct MonitorRestore<'a> {
    /// A tag, or the beginning of a snapshot id.
    pub snapshot: &'a str,
    /// With which monitor.
    pub kind: Kind,
    /// Its program; looked for in PATH without it.
    pub program: Option<&'a Path>,
    /// What to call the machine; several get numbers. The tag without it.
    pub name: Option<&'a str>,
    /// How many machines.
    pub count: usize,
    /// The taps of their network interfaces, in their order.
    pub nets: &'a [NetSpec],
    /// Where what guests write to their disks is kept.
    pub overlays: Overlays,
    /// Whether their guests run at once.
    pub run: bool,
    /// Whether pages that are likely to be touched are read before they are.
    pub prefetch: bool,
}

/// A machine that was started, as its record says.
pub type RestoredMachine = Record;

/// How the processes of a monitor are started, told to load, and told from one another.
#[derive(Serialize, Deserialize)]
struct Spec {
    kind: Kind,
    program: PathBuf,
    version: String,
    names: Vec<String>,
    snapshot: String,
    tag: String,
    mount: PathBuf,
    shared_memory: Option<i32>,
    /// The writable view with the clones' disks.
    view: Option<PathBuf>,
    overlay_dir: PathBuf,
    taps: Vec<Vec<String>>,
    run: bool,
    kept: Vec<i32>,
}

/// What each machine's start says, a line of standard output.
#[derive(Serialize, Deserialize)]
struct Announcement {
    name: String,
    outcome: Result<Record, ChildFailure>,
}

/// Machines that run, and what the user should know of them.
pub struct Restored {
    /// In the order of their names.
    pub machines: Vec<RestoredMachine>,
    /// What differs from where the snapshot was made.
    pub remarks: Vec<String>,
    /// Why the snapshot may be collected under the machines, if it may.
    pub not_pinned: Option<NotPinned>,
}

/// Restores machines: all of them run, or none. `tell` is told what differs from where the
/// snapshot was made before anything is started.
pub fn restore(
    runtime: &Runtime,
    store: &Store,
    wanted: &MonitorRestore<'_>,
    tell: impl Fn(&str),
) -> anyhow::Result<Restored> {
    let restorer = known::restorer(wanted.kind);
    let (id, pin) = store.pin(wanted.snapshot)?;
    let not_pinned = pin.not_pinned();
    let snapshot = store.snapshot(&id.to_string())?;
    check_kind(&snapshot, wanted)?;
    let base = wanted.name.unwrap_or(wanted.snapshot);
    let (names, reserved) = free_names(runtime, base, wanted.name.is_some(), wanted.count)?;
    let nets = networks::of_machines(wanted.nets, &names)?;
    let mounted = mounts::find_or_start(runtime, store, &mounts::Shown::here(id), wanted.prefetch)?;
    let program = match wanted.program {
        Some(path) => path.to_owned(),
        None => restorer.program(&mounted.dir)?,
    };
    let program = found(&program)?;
    let version = version(restorer.as_ref(), &program)?;
    let remarks = remarks(&snapshot, wanted.kind, &version);
    for remark in &remarks {
        tell(remark);
    }
    let shared = restorer.memory(&version, &snapshot)?;
    let has_disk = snapshot.manifest().images.iter();
    let has_disk = has_disk.filter(|it| it.role == ImageRole::Disk).count() > 0;
    let view = match restorer.writes_to_view() && has_disk {
        true => Some(mounts::start_writable(
            runtime,
            store,
            id,
            wanted.count,
            wanted.overlays.dir(),
        )?),
        false => None,
    };
    let mut kept: Vec<OwnedFd> = vec![pin.into_fd()];
    let (view, view_lock) = view.map(|view| (view.dir, view.users_lock)).unzip();
    kept.extend(view_lock.flatten().map(OwnedFd::from));
    kept.extend(mounted.users_lock.map(OwnedFd::from));
    let shared_memory = shared.map(|SharedMemory(file)| {
        let number = file.as_raw_fd();
        kept.push(file.into());
        number
    });
    let spec = Spec {
        kind: wanted.kind,
        program,
        version,
        names,
        snapshot: id.to_string(),
        tag: wanted.snapshot.to_owned(),
        mount: mounted.dir,
        shared_memory,
        view,
        overlay_dir: wanted.overlays.dir().to_owned(),
        taps: nets
            .into_iter()
            .map(|nets| nets.into_iter().map(|net| net.tap).collect())
            .collect(),
        run: wanted.run,
        kept: kept.iter().map(|fd| fd.as_raw_fd()).collect(),
    };
    let machines = start(runtime, &spec, &borrowed(&kept))?;
    drop(reserved);
    Ok(Restored {
        machines,
        remarks,
        not_pinned,
    })
}

/// That the snapshot is one of this monitor.
fn check_kind(snapshot: &Snapshot, wanted: &MonitorRestore<'_>) -> anyhow::Result<()> {
    let manifest = snapshot.manifest();
    let name = wanted.snapshot;
    let kind = wanted.kind;
    match manifest.labels.get(MONITOR) {
        Some(monitor) if monitor == kind.name() => {}
        Some(monitor) => bail!(Usage(format!(
            "{name} was committed from another monitor, and {kind} cannot load its state; use \
             --with {monitor}"
        ))),
        None => bail!(Usage(format!(
            "{name} does not say which monitor it was committed from; a snapshot for --with is \
             made with `snapstore commit TAG` and the option that names the monitor's socket"
        ))),
    }
    ensure!(
        manifest.image(DESCRIPTION).is_some(),
        "{name} has no {DESCRIPTION}, which describes its machine; commit the machine anew"
    );
    Ok(())
}

/// What is not as it was where the snapshot was made.
fn remarks(snapshot: &Snapshot, kind: Kind, version: &str) -> Vec<String> {
    let labels = &snapshot.manifest().labels;
    let mut remarks = Vec::new();
    if let Some(before) = labels.get(VERSION).filter(|before| *before != version) {
        remarks.push(format!(
            "the snapshot was committed from {kind} {before}, and this is {version}: the guest may \
             not go on as it was"
        ));
    }
    let here = cpu::name();
    if let Some(before) = labels.get(CPU).filter(|before| **before != here) {
        remarks.push(format!(
            "the snapshot was committed on another CPU ({before}; this one is {here}): a guest \
             that uses what this one lacks will crash"
        ));
    }
    remarks
}

/// The program's file, as PATH leads to it.
fn found(program: &Path) -> anyhow::Result<PathBuf> {
    if program.components().count() > 1 {
        ensure!(
            program.is_file(),
            NotFound(format!("there is no program {}", program.display()))
        );
        return Ok(std::path::absolute(program)?);
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|dir| dir.join(program));
    let mut found = found.filter(|path| path.is_file());
    found.next().ok_or_else(|| {
        NotFound(format!(
            "there is no {} in PATH; name the monitor's program with --exec",
            program.display()
        ))
        .into()
    })
}

/// What the program says of its version. One that says nothing within a while is ended.
fn version(restorer: &dyn Restorer, program: &Path) -> anyhow::Result<String> {
    let mut child = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot start {}", program.display()))?;
    let out = child.stdout.take().context("no pipe to the monitor")?;
    let reader = std::thread::spawn(move || {
        let mut said = Vec::new();
        let most = u64::try_from(LONGEST_VERSION_BYTES).unwrap_or(u64::MAX);
        io::Read::read_to_end(&mut io::Read::take(out, most), &mut said).map(|_| said)
    });
    let deadline = Instant::now() + STARTING;
    while child.try_wait()?.is_none() {
        if Instant::now() > deadline {
            child.kill()?;
            child.wait()?;
            bail!("{} --version does not come to an end", program.display());
        }
        std::thread::sleep(RETRY);
    }
    let said = reader.join().ok().and_then(Result::ok).unwrap_or_default();
    let said = String::from_utf8_lossy(&said);
    restorer.version(&said).with_context(|| {
        format!(
            "{} is not {}: asked for its version it says {:?}",
            program.display(),
            restorer.kind(),
            said.lines().next().unwrap_or_default()
        )
    })
}

/// Has a process start them.
fn start(
    runtime: &Runtime,
    spec: &Spec,
    kept: &[BorrowedFd<'_>],
) -> anyhow::Result<Vec<RestoredMachine>> {
    for fd in kept {
        background::hand_on(*fd)?;
    }
    let mut host = background::command()?
        .arg(COMMAND)
        .env(crate::runtime::RUNTIME_DIR, runtime.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start the machines' supervisor")?;
    let mut line = serde_json::to_vec(spec)?;
    line.push(b'\n');
    let mut input = host.stdin.take().context("no pipe to the new process")?;
    input.write_all(&line)?;
    let output = host.stdout.take().context("no pipe from the new process")?;
    let mut started = Vec::with_capacity(spec.names.len());
    for line in BufReader::new(output).lines() {
        let announced: Announcement = serde_json::from_str(&line?)?;
        match announced.outcome {
            Ok(record) => started.push(record),
            Err(failure) => bail!(ChildFailure {
                message: format!("{}: {}", announced.name, failure.message),
                class: failure.class,
            }),
        }
    }
    ensure!(
        started.len() == spec.names.len(),
        "the process that starts the machines ended before they ran; `snapstore ps` tells what is \
         left of them"
    );
    Ok(started)
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
