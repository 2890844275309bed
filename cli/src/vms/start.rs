//! Starting machines: names, processes, and what their user sees of it.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};
use std::process::{Child, ChildStdin, ExitCode, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Signal, pidfd_send_signal};
use serde_json::json;
use snapstore_store::Store;
use snapstore_vmm::control::{Client, Request, RunState, Status};

use crate::args::StartArgs;
use crate::background;
use crate::commands::commit_vm::{Wanted, commit};
use crate::context::Context;
use crate::exit::{self, Busy, Elsewhere};
use crate::format::{millis, size};
use crate::logging::say;
use crate::vms::host::{self, Announcement, Spec};
use crate::vms::runtime::{RUNTIME_DIR, Reservation, Runtime, VmDir, forget};
use crate::vms::terminal::{self, Left};

/// Requests to machines that are under way at the same time.
const MAX_THREADS: usize = 64;

/// What `--no-confine` gives up.
const UNCONFINED: &str = "warning: not confined: a guest that breaks out of its machine has this \
                          user's rights, files, network and processes";

/// Starts what the spec says. The machines inherit `kept`, which stays open as
/// long as they live. Either all are started or none.
pub fn start(
    context: &Context,
    runtime: &Runtime,
    args: &StartArgs,
    mut spec: Spec,
    kept: &[BorrowedFd<'_>],
    when_ready: Option<Wanted>,
) -> anyhow::Result<ExitCode> {
    let vms: Vec<VmDir> = spec
        .names
        .iter()
        .map(|name| runtime.vm(name))
        .collect::<Result<_, _>>()?;
    // Several begin to run together, and only once all of them can; one that is
    // attached, once its user can see what it does.
    spec.confine = !args.no_confine;
    if args.no_confine {
        say!("{UNCONFINED}");
    }
    let later = spec.run && (vms.len() > 1 || !args.detach);
    spec.run &= !later;
    spec.run_on_word = later;
    // Opened before anything runs: what is wrong with it is said now.
    let when_ready = when_ready
        .map(|wanted| Ok::<_, anyhow::Error>((context.open_or_create_default()?, wanted)))
        .transpose()?;
    spec.kept = kept.iter().map(|fd| fd.as_raw_fd()).collect();
    let (started, word) = launch(runtime, &spec, kept)?;
    for status in &started {
        let confinement = status.confinement.as_ref();
        let confinement = confinement.map_or_else(|| "none".to_owned(), ToString::to_string);
        tracing::info!(name = status.name, confinement);
    }
    let ready =
        when_ready.map(|(store, wanted)| commit_when_ready(store, &vms[0], wanted, !args.detach));
    if args.detach {
        if let Some(ready) = ready {
            let committed = ready.join().expect("it does not panic");
            committed.map_err(|error| still_there(error, &vms[0]))?;
        }
        return report(context, started, word, later);
    }
    let [vm] = vms.as_slice() else {
        unreachable!("several machines are only restored with --detach");
    };
    let run = later;
    let left = terminal::attach(vm, terminal::Attach::AsOwner { word, run })?;
    let Some(ready) = ready else {
        return Ok(left.exit_code());
    };
    if matches!(left, Left::ByUser) && !ready.is_finished() {
        say!("error: it is not committed when it is ready: this command had to wait for that");
        return Ok(ExitCode::from(exit::FAILED));
    }
    // Why it failed has been said.
    match ready.join().expect("it does not panic") {
        Ok(()) => Ok(left.exit_code()),
        Err(_) => Ok(ExitCode::from(exit::FAILED)),
    }
}

/// An error of a machine that was started, and goes on.
fn still_there(error: anyhow::Error, vm: &VmDir) -> anyhow::Error {
    if !vm.is_running() {
        return error;
    }
    Elsewhere {
        message: format!(
            "{}; {1} still runs: `snapstore stop {1}` ends it",
            exit::message(&error),
            vm.name
        ),
        exit_code: exit::code(&error),
    }
    .into()
}

/// Commits the machine in a thread once its guest is ready, and lets it go on.
fn commit_when_ready(
    store: Store,
    vm: &VmDir,
    wanted: Wanted,
    attached: bool,
) -> JoinHandle<anyhow::Result<()>> {
    let vm = vm.clone();
    std::thread::spawn(move || {
        // The guest stands still as long as this client is there.
        let mut client = None;
        let committed = Client::connect(&vm.socket())
            .and_then(|connected| client.insert(connected).order(&Request::WaitReady))
            .map_err(anyhow::Error::from)
            .and_then(|()| commit(&store, &vm, &wanted));
        // An attached user's command goes on; else the command itself fails.
        if attached && let Err(error) = &committed {
            say!(
                "error: {} is not committed: {}",
                wanted.tag,
                exit::message(error)
            );
        }
        // Whatever became of the commit, the guest goes on.
        let resumed = client.map_or(Ok(()), |mut client| client.order(&Request::Resume));
        // What failed first tells why.
        committed?;
        Ok(resumed?)
    })
}

/// What lets machines run that wait for it; without it they end. As long as it is
/// there, a guest may stop when it is ready.
pub struct Word(ChildStdin);

impl Word {
    /// To so many machines.
    pub fn give(&mut self, machines: usize) -> anyhow::Result<()> {
        self.0
            .write_all(&vec![b'g'; machines])
            .context("the machines have ended before they could run")
    }
}

fn launch(
    runtime: &Runtime,
    spec: &Spec,
    kept: &[BorrowedFd<'_>],
) -> anyhow::Result<(Vec<Status>, Word)> {
    for fd in kept {
        background::hand_on(*fd)?;
    }
    let mut host = background::command()?
        .arg(host::COMMAND)
        // Of a machine's process: one heap for all of its threads, and what its
        // start freed goes back to the system (mallopt(3)).
        .env("MALLOC_ARENA_MAX", "1")
        .env("MALLOC_TRIM_THRESHOLD_", "0")
        .env("MALLOC_TOP_PAD_", "0")
        .env(RUNTIME_DIR, runtime.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start the machines' processes")?;
    let mut input = host.stdin.take().context("no pipe to the new process")?;
    let mut line = serde_json::to_vec(spec)?;
    line.push(b'\n');
    input.write_all(&line)?;
    let word = Word(input);
    let announced = announcements(&mut host, spec)?;
    let error = match all_started(spec, &announced) {
        Ok(started) => return Ok((started, word)),
        Err(error) => error,
    };
    drop(word);
    for started in announced.iter().filter(|by| by.outcome.is_ok()) {
        // What failed first is told.
        if let Err(error) = runtime.vm(&started.name).and_then(|vm| end(&vm)) {
            tracing::warn!(%error, name = started.name, "a machine that was started stays");
        }
    }
    Err(error)
}

/// How they began, or the first failure.
fn all_started(spec: &Spec, announced: &[Announcement]) -> anyhow::Result<Vec<Status>> {
    // What failed first kept others from starting.
    let failed = announced.iter().find(|by| by.outcome.is_err());
    if let Some((failed, Err(failure))) = failed.map(|by| (by, &by.outcome)) {
        return Err(Elsewhere {
            message: format!("{}: {}", failed.name, failure.message),
            exit_code: failure.exit_code,
        }
        .into());
    }
    let mut started = Vec::with_capacity(spec.names.len());
    for name in &spec.names {
        let Some(announcement) = announced.iter().find(|by| by.name == *name) else {
            anyhow::bail!(
                "the process of the machine {name} ended before it answered; \
                 `snapstore ps` tells what it said, or the system's log (memory?)"
            );
        };
        started.extend(announcement.outcome.as_ref().ok().cloned());
    }
    Ok(started)
}

/// What the machines say until the last of them has said something or died.
fn announcements(host: &mut Child, spec: &Spec) -> anyhow::Result<Vec<Announcement>> {
    let output = host.stdout.take().context("no pipe from the new process")?;
    let mut announced = Vec::with_capacity(spec.names.len());
    for line in BufReader::new(output).lines() {
        announced.push(serde_json::from_str::<Announcement>(&line?)?);
    }
    Ok(announced)
}

/// What was started, for those who do not attach; lets it run if it waits for that.
fn report(
    context: &Context,
    mut started: Vec<Status>,
    mut word: Word,
    later: bool,
) -> anyhow::Result<ExitCode> {
    if later {
        word.give(started.len())?;
        for status in &mut started {
            status.state = RunState::Running;
        }
    }
    let value = json!({"machines": started});
    context.answer(&value, || describe_all(&started))?;
    Ok(ExitCode::SUCCESS)
}

/// Asks something of machines side by side, since each may take its time; the
/// answers are in the machines' order.
pub fn for_each<T: Send>(
    vms: &[VmDir],
    ask: impl Fn(&VmDir) -> anyhow::Result<T> + Sync,
) -> anyhow::Result<Vec<T>> {
    let threads = vms.len().clamp(1, MAX_THREADS);
    let share = vms.len().div_ceil(threads).max(1);
    let ask = &ask;
    std::thread::scope(|scope| {
        let workers: Vec<_> = vms
            .chunks(share)
            .map(|share| scope.spawn(move || share.iter().map(ask).collect::<Vec<_>>()))
            .collect();
        workers
            .into_iter()
            .flat_map(|worker| worker.join().expect("a worker does not panic"))
            .collect()
    })
}

/// Ends a machine and waits until its process is gone, or forgets one that has
/// ended. One that does not end when it is asked to is killed: its process may be stopped,
/// or hang in memory that the server of its mount does not give.
pub fn end(vm: &VmDir) -> anyhow::Result<()> {
    let began = Instant::now();
    let mut asked = false;
    while vm.is_running() {
        let process = vm.process();
        if !asked {
            asked = ask_to_end(vm, process.as_ref())?;
        }
        if let Some(process) = process {
            let patience = if asked {
                ASKED_PATIENCE
            } else {
                UNASKED_PATIENCE
            };
            if !is_gone(&process, patience.saturating_sub(began.elapsed()))? {
                tracing::warn!(
                    name = vm.name,
                    "it does not end when it is asked to: it is killed"
                );
                match pidfd_send_signal(&process, Signal::KILL) {
                    Ok(()) | Err(Errno::SRCH) => {}
                    Err(error) => return Err(error).context("cannot kill a machine's process"),
                }
                if !is_gone(&process, KILLED_PATIENCE)? {
                    return Err(stays(vm));
                }
            }
        } else if began.elapsed() > PATIENCE {
            return Err(vm.is_starting());
        } else {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    if !vm.exists() {
        return Ok(());
    }
    let deadline = Instant::now() + FORGET_PATIENCE;
    loop {
        match forget(vm) {
            // Its supervisor is at it, or somebody has used the name again: that is
            // another machine.
            Err(error) if error.is::<Busy>() => {
                if vm.process().is_some() || Instant::now() > deadline {
                    return Ok(());
                }
            }
            done => return done,
        }
    }
}

/// Asks a machine to end, as whoever has its socket or may signal it can. Returns whether
/// there was somebody to ask.
fn ask_to_end(vm: &VmDir, process: Option<&OwnedFd>) -> anyhow::Result<bool> {
    let asked = Client::connect(&vm.socket())
        .map(|client| client.with_patience(ANSWER_PATIENCE))
        .and_then(|mut client| client.ending(&Request::Stop));
    match (asked, process) {
        (Ok(_), _) => Ok(true),
        // It ended by itself just now, or is still starting.
        (Err(snapstore_vmm::Error::NoMachine { .. }), _) => Ok(false),
        // It takes no clients, or does not answer.
        (Err(_), Some(process)) => match pidfd_send_signal(process, Signal::TERM) {
            Ok(()) | Err(Errno::SRCH) => Ok(true),
            Err(error) => Err(error).context("cannot signal a machine's process"),
        },
        (Err(snapstore_vmm::Error::File { .. }), None) => Ok(false),
        (Err(error), None) => Err(error.into()),
    }
}

/// Whether the process has given back its memory and its descriptors, among them what
/// keeps snapshots and mounts. Its name may be free earlier.
fn is_gone(process: &OwnedFd, patience: Duration) -> anyhow::Result<bool> {
    let deadline = Instant::now() + patience;
    loop {
        let left = Timespec::try_from(deadline.saturating_duration_since(Instant::now()))?;
        let mut fds = [PollFd::new(process, PollFlags::IN)];
        match poll(&mut fds, Some(&left)) {
            Err(Errno::INTR) => {}
            other => return Ok(other.context("cannot wait for a machine's process")? > 0),
        }
    }
}

fn stays(vm: &VmDir) -> anyhow::Error {
    Busy(format!(
        "{} is killed, but its process waits in the kernel, for a mount whose server does not \
         answer or for a disk; it ends with that",
        vm.name
    ))
    .into()
}

/// How long a machine may take to end that was asked to, in all.
const ASKED_PATIENCE: Duration = Duration::from_millis(1500);
/// How long one that is starting may take until it can be asked.
const UNASKED_PATIENCE: Duration = Duration::from_millis(1500);
/// How long it may take to answer that it has ended.
const ANSWER_PATIENCE: Duration = Duration::from_millis(1200);
/// How long the kernel may take to end a process that was killed.
const KILLED_PATIENCE: Duration = Duration::from_secs(5);
/// How long others may be clearing away what is left of a machine.
const FORGET_PATIENCE: Duration = Duration::from_secs(1);
/// How long a name may be taken by nobody who says who they are.
const PATIENCE: Duration = Duration::from_secs(30);

/// A line for each of a few machines, one line for many.
fn describe_all(started: &[Status]) -> String {
    const MANY: usize = 5;
    let [first, .., last] = started else {
        return started.iter().map(describe).collect();
    };
    let first_number = started.iter().find_map(|status| number_of(&status.name));
    let in_a_row = started
        .iter()
        .zip(first_number.unwrap_or(1)..)
        .all(|(status, number)| number_of(&status.name) == Some(number));
    if started.len() < MANY || !in_a_row {
        return started.iter().map(describe).collect::<Vec<_>>().join("\n");
    }
    format!(
        "{} machines: {} to {}, each with {} of memory",
        started.len(),
        first.name,
        last.name,
        size(first.memory_bytes),
    )
}

/// What a name ends in after its last dot.
fn number_of(name: &str) -> Option<u64> {
    name.rsplit_once('.')?.1.parse().ok()
}

fn describe(status: &Status) -> String {
    let total: f64 = status.start.values().sum();
    format!(
        "{} {}: process {}, {} of memory, {}; started in {}",
        status.name,
        if status.state == RunState::Paused {
            "is paused"
        } else {
            "runs"
        },
        status.pid,
        size(status.memory_bytes),
        match status.cpus {
            1 => "1 vCPU".to_owned(),
            cpus => format!("{cpus} vCPUs"),
        },
        millis(total),
    )
}

/// Names for `count` machines called after `base`: itself if one is wanted and
/// it is free, else the first free ones of `base.1`, `base.2` and so on. They are this
/// command's as long as the reservations live.
///
/// For a name that its user chose for one machine, there is no other.
pub fn free_names(
    runtime: &Runtime,
    base: &str,
    is_chosen: bool,
    count: usize,
) -> anyhow::Result<(Vec<String>, Vec<Reservation>)> {
    if count == 1 {
        match runtime.vm(base)?.reserve()? {
            Some(reservation) => return Ok((vec![base.to_owned()], vec![reservation])),
            None if is_chosen => {
                return Err(Busy(format!(
                    "a machine named {base} runs, or is about to; choose another name, or \
                     `snapstore stop {base}`"
                ))
                .into());
            }
            None => {}
        }
    }
    let (mut names, mut reservations) = (Vec::new(), Vec::new());
    for number in 1_u64.. {
        let name = format!("{base}.{number}");
        if let Some(reservation) = runtime.vm(&name)?.reserve()? {
            names.push(name);
            reservations.push(reservation);
        }
        if names.len() == count {
            break;
        }
    }
    Ok((names, reservations))
}

/// Borrowed descriptors of what is to be kept.
pub fn borrowed<'a, T: std::os::fd::AsFd + 'a>(
    kept: impl IntoIterator<Item = &'a T>,
) -> Vec<BorrowedFd<'a>> {
    kept.into_iter().map(|fd| fd.as_fd()).collect()
}

/// The exit code that an ending stands for.
pub fn exit_code(ending: &snapstore_vmm::Ending) -> ExitCode {
    if ending.is_orderly() {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(exit::FAILED)
    }
}
