//! Starting and ending machines: their names and their processes.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Signal, pidfd_send_signal};
use snapstore_vmm::control::{Client, Request, Status};

use crate::error::{Busy, ChildFailure};
use crate::readable::is_readable_within;
use crate::runtime::{Reservation, Runtime, VmDir, forget};
use crate::spec::{Announcement, Spec};
use crate::starter::Starter;

/// Requests to machines that are under way at the same time.
const MAX_THREADS: usize = 64;

/// What lets machines run that wait for it; without it they end. As long as it is
/// there, a guest may stop when it is ready.
pub struct StartSignal(UnixStream);

impl StartSignal {
    /// To so many machines.
    pub fn give(&mut self, machines: usize) -> anyhow::Result<()> {
        self.0
            .write_all(&vec![b'g'; machines])
            .context("the machines have ended before they could run")
    }
}

/// Starts what the spec says, by a process that was started for it. The machines inherit `kept`, which stays open as
/// long as they live. Either all are started or none.
pub fn start(
    runtime: &Runtime,
    starter: Starter,
    spec: &Spec,
    kept: &[BorrowedFd<'_>],
) -> anyhow::Result<(Vec<Status>, StartSignal)> {
    let (mut host, socket) = starter.order(spec, kept, runtime)?;
    let word = StartSignal(socket);
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
        return Err(ChildFailure {
            message: format!("{}: {}", failed.name, failure.message),
            class: failure.class,
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
    if !is_readable_within(&output, SILENT_FOR) {
        tracing::warn!(
            "waiting for {}: no process of a machine has answered yet; `snapstore ps` lists them, \
             `snapstore stop NAME` ends one",
            spec.names.join(", ")
        );
    }
    for line in BufReader::new(output).lines() {
        announced.push(serde_json::from_str::<Announcement>(&line?)?);
    }
    Ok(announced)
}

/// For how long starting machines are waited for without a word.
const SILENT_FOR: Duration = Duration::from_secs(3);

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
                if vm.process().is_some() {
                    return Ok(());
                }
                if Instant::now() > deadline {
                    return Err(error);
                }
            }
            done => return done,
        }
    }
}

/// Waits until a machine that has said how it ended has given back its name. `process` is
/// the one that it had.
pub fn wait_until_free(vm: &VmDir, process: Option<&OwnedFd>) -> anyhow::Result<()> {
    let deadline = Instant::now() + KILLED_PATIENCE;
    if let Some(process) = process {
        is_gone(process, KILLED_PATIENCE)?;
    }
    // Its supervisor is at it.
    while vm.is_running() && vm.process().is_none() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// Asks a machine to end, as whoever has its socket or may signal it can. Returns whether
/// there was somebody to ask.
fn ask_to_end(vm: &VmDir, process: Option<&OwnedFd>) -> anyhow::Result<bool> {
    // Another monitor's has no such socket.
    if let Some(process) = process.filter(|_| vm.monitor_dir().exists()) {
        return ask_by_signal(process);
    }
    let asked = Client::connect(&vm.socket())
        .map(|client| client.with_patience(ANSWER_PATIENCE))
        .and_then(|mut client| client.ending(&Request::Stop));
    match (asked, process) {
        (Ok(_), _) => Ok(true),
        // It ended by itself just now, or is still starting.
        (Err(snapstore_vmm::Error::NoMachine { .. }), _) => Ok(false),
        // It takes no clients, or does not answer.
        (Err(_), Some(process)) => ask_by_signal(process),
        (Err(snapstore_vmm::Error::File { .. }), None) => Ok(false),
        (Err(error), None) => Err(error.into()),
    }
}

fn ask_by_signal(process: &OwnedFd) -> anyhow::Result<bool> {
    match pidfd_send_signal(process, Signal::TERM) {
        Ok(()) | Err(Errno::SRCH) => Ok(true),
        Err(error) => Err(error).context("cannot signal a machine's process"),
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
const FORGET_PATIENCE: Duration = Duration::from_secs(10);
/// How long a name may be taken by nobody who says who they are.
const PATIENCE: Duration = Duration::from_secs(30);

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
