//! The process that starts machines, and clears away after them.
//!
//! A machine cannot remove its own directory, since it is confined to it and may only
//! read there; and it cannot say that it was killed. So whoever starts machines stays
//! as long as one of them lives, asks nothing and is asked nothing: it waits for their
//! ends. If it is killed itself, its machines run on; what is left of one that ends is
//! cleared away by the next command that lists machines.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ffi::{CStr, CString, OsString};
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::net::Shutdown;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::Context as _;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::{Errno, FdFlags, fcntl_setfd};
use rustix::process::{WaitOptions, WaitStatus, wait};
use snapstore_vmm::confine::{Groups, keep_only};
use snapstore_vmm::control::Connection;
use snapstore_vmm::state::HostFacts;

use crate::background;
use crate::build::Opened;
use crate::error::ChildFailure;
use crate::look;
use crate::process;
use crate::runtime::{KILLED, NameLock, Runtime, VmDir};
use crate::spec::{FAILED, NOT_STARTED, Ordered, Spec, announce};

/// The very program that runs, whatever has become of its file.
const OWN: &CStr = c"/proc/self/exe";

/// What is said of a machine that made a system call it may not make.
const FORBIDDEN: &str = "it was ended by a forbidden system call: a fault of this program, or an \
                         attack from the guest; its last words are in its log";

/// The hidden command: its standard input is a socket, by which it is asked what to do. It
/// is there before it is known what is to be started.
pub fn run_as_asked() -> anyhow::Result<u8> {
    // Nothing of whoever called the command that started this.
    keep_only(&[])?;
    background::detach()?;
    ignore_signals()?;
    let socket = UnixStream::from(rustix::stdio::stdin().try_clone_to_owned()?);
    let mut starter = Connection::new(socket).with_lines_of_any_length();
    let mut spec: Box<Spec> = loop {
        match starter.receive().context("what to start is not valid")? {
            // There is nothing to start.
            None => return Ok(0),
            Some(Ordered::Look(arguments)) => {
                let arguments: Vec<_> = arguments.into_iter().map(OsString::from).collect();
                // What cannot be seen is not there.
                let answer = look::answer(&arguments).unwrap_or_default();
                starter.send(&answer, &[])?;
            }
            Some(Ordered::Start(spec)) => break spec,
        }
    };
    let kept: Vec<OwnedFd> = std::iter::from_fn(|| starter.take_fd()).collect();
    spec.kept = kept.iter().map(|fd| fd.as_raw_fd()).collect();
    // The machines inherit it, to hear when they may run, and not to say anything.
    let (socket, _) = starter.into_stream();
    socket.shutdown(Shutdown::Write)?;
    drop(socket);
    run(&mut spec, kept)
}

/// Starts the machines of a spec, and returns once they have ended.
fn run(spec: &mut Spec, kept: Vec<OwnedFd>) -> anyhow::Result<u8> {
    let runtime = Runtime::open()?;
    let mut claims = Vec::with_capacity(spec.names.len());
    for name in &spec.names {
        match runtime.vm(name).and_then(|vm| vm.claim()) {
            Ok(claim) => claims.push(claim),
            Err(error) => {
                give_up(name, &error, claims);
                return Ok(FAILED);
            }
        }
    }
    // A single machine looks for itself what it needs, as soon.
    let opened = match claims.len() {
        ..=1 => None,
        _ => {
            // The mount's server may not answer: `stop` has to know whom to end.
            for claim in &claims {
                let _ = claim.name_holder();
            }
            spec.what.open_ahead()
        }
    };
    let mut pids = Vec::with_capacity(claims.len());
    let started = match spec.share_layout {
        true => fork_all(spec, opened, &claims, &mut pids),
        false => {
            // They are told what was found.
            drop(opened);
            execute_all(spec, &claims, &kept, &mut pids)
        }
    };
    drop(kept);
    let unstarted = claims.split_off(pids.len());
    if let (Err(error), Some(first)) = (&started, unstarted.first()) {
        let name = first.vm.name.clone();
        give_up(&name, error, unstarted);
    }
    let_go_of_starter()?;
    // The machines hold their names themselves.
    let vms = claims.into_iter().map(|claim| claim.vm.clone());
    let ended = supervise(pids.into_iter().zip(vms).collect())?;
    started.map(|()| ended)
}

/// Says why a machine does not start, and leaves nothing of those that have no process.
fn give_up(name: &str, error: &anyhow::Error, claims: Vec<NameLock>) {
    // Whoever started this may have been killed: there is nobody to tell.
    let _ = announce(name, Err(ChildFailure::of(error)));
    for claim in claims {
        // What cannot be cleared away is, by the next command that lists machines.
        let _ = claim.release(None);
    }
}

/// A process for each that begins with a copy of this one. `pids` has those that there are,
/// also if that fails.
fn fork_all(
    spec: &Spec,
    opened: Option<Opened>,
    claims: &[NameLock],
    pids: &mut Vec<i32>,
) -> anyhow::Result<()> {
    if claims.len() > 1 {
        HostFacts::ask_ahead();
    }
    // Each child has its own, as of everything else.
    let opened = Cell::new(opened);
    let numbers: Vec<i32> = claims.iter().map(|claim| raw(claim.lock())).collect();
    let child = |number: usize| {
        let opened = opened.take();
        let own = opened.as_ref().map(Opened::fds);
        let own = own.as_ref().map_or(&[][..], |fds| &fds[..]);
        // The others' names are not this one's to hold.
        let held = [own, &spec.kept, &[numbers[number]]].concat();
        match keep_only(&held) {
            Ok(mut held) => {
                // They are those of `opened`.
                held.drain(..own.len()).for_each(std::mem::forget);
                let lock = held.pop().expect("there is one at least");
                process::machine_process(spec, opened, number, lock, held)
            }
            Err(_) => NOT_STARTED,
        }
    };
    let forked = snapstore_vmm::fork_each(spec.names.len(), child, pids);
    for (pid, claim) in pids.iter().zip(claims) {
        let _ = claim.name_process(*pid);
    }
    Ok(forked?)
}

/// A process for each that executes this program anew: no two have the same layout of
/// their addresses. `pids` as of [`fork_all`].
fn execute_all(
    spec: &Spec,
    claims: &[NameLock],
    kept: &[OwnedFd],
    pids: &mut Vec<i32>,
) -> anyhow::Result<()> {
    let file = memfd_create("spec", MemfdFlags::empty()).context("cannot pass on the machines")?;
    let mut file = File::from(file);
    file.write_all(&serde_json::to_vec(spec)?)?;
    for fd in kept {
        fcntl_setfd(fd, FdFlags::empty())?;
    }
    let groups = spec.confine.then(Groups::find).flatten();
    for (number, claim) in claims.iter().enumerate() {
        fcntl_setfd(claim.lock(), FdFlags::empty())?;
        let fds = [file.as_fd(), claim.lock()].into_iter();
        let fds = fds.chain(kept.iter().map(|fd| fd.as_fd()));
        let arguments: Vec<CString> = [OWN.to_str()?, process::COMMAND, &number.to_string()]
            .map(ToOwned::to_owned)
            .into_iter()
            .chain(fds.map(|fd| raw(fd).to_string()))
            .map(CString::new)
            .collect::<Result<_, _>>()?;
        let make = |groups: &Groups| groups.make(&claim.vm.name, |dir| claim.vm.record_group(dir));
        let group = groups.as_ref().and_then(make);
        let pid = snapstore_vmm::execute_in(group, OWN, &arguments)?;
        // As it does itself, if it comes to that: who stops or kills it early has to know it.
        let _ = claim.name_process(pid);
        pids.push(pid);
        fcntl_setfd(claim.lock(), FdFlags::CLOEXEC)?;
    }
    Ok(())
}

fn raw(fd: BorrowedFd<'_>) -> i32 {
    fd.as_raw_fd()
}

/// Whoever ends a session or a service ends its machines: they hear it themselves.
pub(crate) fn ignore_signals() -> anyhow::Result<()> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    for signal in [SIGHUP, SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::new(AtomicBool::new(false)))
            .context("cannot ignore signals")?;
    }
    Ok(())
}

/// Keeps none of the pipes to whoever started this: their ends are seen by others.
pub(crate) fn let_go_of_starter() -> anyhow::Result<()> {
    let null = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    Ok(())
}

pub(crate) fn supervise(mut machines: BTreeMap<i32, VmDir>) -> anyhow::Result<u8> {
    while !machines.is_empty() {
        let (pid, status) = match wait(WaitOptions::empty()) {
            Ok(Some(ended)) => ended,
            Ok(None) | Err(Errno::INTR) => continue,
            Err(error) => return Err(error).context("cannot wait for machines"),
        };
        if let Some(vm) = machines.remove(&pid.as_raw_nonzero().get()) {
            // Nobody reads what this says. `ps` shows what is left of the machine.
            let _ = settle(&vm, status);
        }
    }
    Ok(0)
}

/// Leaves of a machine what `ps` needs to say how it ended.
fn settle(vm: &VmDir, status: WaitStatus) -> anyhow::Result<()> {
    let Some(claim) = vm.reclaim()? else {
        return Ok(());
    };
    let released = match (status.terminating_signal(), status.exit_status()) {
        (Some(signal), _) => claim.release(Some(&killed_by(signal))),
        (None, Some(0)) => claim.release(None),
        (None, Some(code)) if code == i32::from(NOT_STARTED) => claim.release(None),
        // It has said why, in its log.
        _ => claim.release_with_log(),
    };
    Ok(released?)
}

fn killed_by(signal: i32) -> String {
    match signal {
        signal_hook::consts::SIGSYS => FORBIDDEN.to_owned(),
        signal_hook::consts::SIGKILL => KILLED.to_owned(),
        signal => format!("{KILLED} by signal {signal}"),
    }
}
