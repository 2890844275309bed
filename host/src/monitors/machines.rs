//! Restoring machines of other monitors from a snapshot: what is looked up and made ready
//! before a process of its own (`processes`) starts and supervises them, as with this
//! program's own machines.

use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use snapstore_store::{ImageRole, NotPinned, Snapshot, Store};

use super::adapter::{CPU, DESCRIPTION, Kind, MONITOR, Restorer, SharedMemory, VERSION};
use super::cpu;
use super::known;
use super::processes::{Announcement, COMMAND, Spec};
use super::record::Record;
use crate::background;
use crate::build::Overlays;
use crate::error::{ChildFailure, NotFound, Usage};
use crate::mount_server::Reading;
use crate::mounts;
use crate::networks::{self, NetSpec};
use crate::runtime::Runtime;
use crate::snapshot_files::{SnapshotFiles, gone};
use crate::start::{borrowed, end, free_names};

/// How long a monitor may take to say its version, and how often it is looked whether it has.
const VERSION_PATIENCE: Duration = Duration::from_secs(30);
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
    let reading = Reading::wanted(wanted.prefetch);
    let mounted = mounts::find_or_start(runtime, store, &mounts::Shown::here(id), reading, None)?;
    let files = SnapshotFiles::hold(&mounted.dir, &id.to_string())?;
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
    if !files.is_still_there() {
        // They may have begun from something else.
        for name in &spec.names {
            end(&runtime.vm(name)?)?;
        }
        return Err(gone(&spec.mount, &spec.snapshot));
    }
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
    let deadline = Instant::now() + VERSION_PATIENCE;
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
