//! The process that starts machines, and clears away after them.
//!
//! A machine cannot remove its own directory, since it is confined to it and may only
//! read there; and it cannot say that it was killed. So whoever starts machines stays
//! as long as one of them lives, asks nothing and is asked nothing: it waits for their
//! ends. If it is killed itself, its machines run on; what is left of one that ends is
//! cleared away by the next command that lists machines.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::Context as _;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::{Errno, FdFlags, fcntl_setfd};
use rustix::process::{WaitOptions, WaitStatus, wait};
use snapstore_vmm::confine::{Groups, keep_only};

use crate::background;
use crate::error::ChildFailure;
use crate::process;
use crate::runtime::{KILLED, NameLock, Runtime, VmDir};
use crate::spec::{self, FAILED, NOT_STARTED, Spec, announce};

/// The hidden command that starts machines and supervises them.
pub const COMMAND: &str = "vm-host";

/// The very program that runs, whatever has become of its file.
const OWN: &CStr = c"/proc/self/exe";

/// What is said of a machine that made a system call it may not make.
const FORBIDDEN: &str = "it was ended by a forbidden system call: a fault of this program, or an \
                         attack from the guest; its last words are in its log";

/// The hidden command: its spec is a line of standard input.
pub fn run_from_stdin() -> anyhow::Result<u8> {
    let line = io::stdin().lines().next().transpose()?.unwrap_or_default();
    run(&spec::parse(&line)?, &line)
}

/// Starts the machines of a spec, and returns once they have ended. `line` is the spec
/// as it was read.
fn run(spec: &Spec, line: &str) -> anyhow::Result<u8> {
    // Nothing of whoever called the command that started this.
    let kept = keep_only(&spec.kept)?;
    background::detach()?;
    ignore_signals()?;
    let runtime = Runtime::open()?;
    let mut claims = Vec::with_capacity(spec.names.len());
    for name in &spec.names {
        match runtime.vm(name).and_then(|vm| vm.claim()) {
            Ok(claim) => claims.push(claim),
            Err(error) => {
                announce(name, Err(ChildFailure::of(&error)))?;
                return give_up(claims);
            }
        }
    }
    let pids = if spec.share_layout {
        fork_all(spec, &claims)?
    } else {
        execute_all(line, spec.confine, &claims, &kept)?
    };
    drop(kept);
    let_go_of_starter()?;
    // The machines hold their names themselves.
    let vms = claims.into_iter().map(|claim| claim.vm.clone());
    supervise(pids.into_iter().zip(vms).collect())
}

/// Without one of its names, none of the machines starts.
fn give_up(claims: Vec<NameLock>) -> anyhow::Result<u8> {
    for claim in claims {
        claim.release(None)?;
    }
    Ok(FAILED)
}

/// A process for each that begins with a copy of this one.
fn fork_all(spec: &Spec, claims: &[NameLock]) -> anyhow::Result<Vec<i32>> {
    let numbers: Vec<i32> = claims.iter().map(|claim| raw(claim.lock())).collect();
    let child = |number: usize| {
        // The others' names are not this one's to hold.
        let held = [&spec.kept[..], &[numbers[number]]].concat();
        match keep_only(&held) {
            Ok(mut held) => {
                let lock = held.pop().expect("there is one at least");
                process::machine_process(spec, number, lock, held)
            }
            Err(_) => NOT_STARTED,
        }
    };
    Ok(snapstore_vmm::fork_each(spec.names.len(), child)?)
}

/// A process for each that executes this program anew: no two have the same layout of
/// their addresses.
fn execute_all(
    line: &str,
    confine: bool,
    claims: &[NameLock],
    kept: &[OwnedFd],
) -> anyhow::Result<Vec<i32>> {
    let file = memfd_create("spec", MemfdFlags::empty()).context("cannot pass on the machines")?;
    let mut file = File::from(file);
    file.write_all(line.as_bytes())?;
    for fd in kept {
        fcntl_setfd(fd, FdFlags::empty())?;
    }
    let groups = confine.then(Groups::find).flatten();
    let mut pids = Vec::with_capacity(claims.len());
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
        pids.push(snapstore_vmm::execute_in(group, OWN, &arguments)?);
        fcntl_setfd(claim.lock(), FdFlags::CLOEXEC)?;
    }
    Ok(pids)
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
