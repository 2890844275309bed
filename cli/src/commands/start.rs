//! Starting machines, and what their user sees of it.

use std::os::fd::BorrowedFd;
use std::process::ExitCode;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::bail;
use serde_json::json;
use snapstore_host::commit::{CommitTarget, commit};
use snapstore_host::runtime::{Reservation, Runtime, VmDir};
use snapstore_host::start::{self, StartSignal};
use snapstore_host::starter::Starter;
use snapstore_host::{ChildFailure, Spec, class, message};
use snapstore_store::Store;
use snapstore_vmm::control::{Client, Request, RunState, Status};

use crate::args::StartArgs;
use crate::context::Context;
use crate::exit;
use crate::format::{millis, size};
use crate::logging::say;
use crate::progress::{Bar, Unit};
use crate::terminal::{self, DetachReason};

/// What `--no-confine` gives up.
const UNCONFINED: &str = "warning: not confined: a guest that breaks out of its machine has this \
                          user's rights, files, network and processes";

/// Starts what the spec says. The machines inherit `kept`, which stays open as
/// long as they live. Either all are started or none. `reserved` are their names.
pub fn start(
    context: &Context,
    (runtime, starter): (&Runtime, Starter),
    args: &StartArgs,
    mut spec: Spec,
    kept: &[BorrowedFd<'_>],
    reserved: Vec<Reservation>,
    when_ready: Option<CommitTarget>,
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
    let awaits_reseed = spec.require_reseed && spec.run;
    let later = spec.run && (vms.len() > 1 || !args.detach);
    spec.run &= !later;
    spec.run_on_word = later;
    // Opened before anything runs: what is wrong with it is said now.
    let when_ready = when_ready
        .map(|wanted| Ok::<_, anyhow::Error>((context.open_or_create_default()?, wanted)))
        .transpose()?;
    let (started, word) = start::start(runtime, starter, &spec, kept)?;
    // The machines hold their names. An attached one's is free as soon as it has ended.
    drop(reserved);
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
        return report(context, started, word, later, awaits_reseed.then_some(&vms));
    }
    let [vm] = vms.as_slice() else {
        unreachable!("several machines are only restored with --detach");
    };
    let run = later;
    let left = terminal::attach(vm, terminal::Attach::AsOwner { word, run })?;
    let Some(ready) = ready else {
        return Ok(left.exit_code());
    };
    if matches!(left, DetachReason::ByUser) && !ready.is_finished() {
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
    // One that is just ending still has its name, and takes no clients.
    if !vm.is_running() || vm.connect().is_err() {
        return error;
    }
    ChildFailure {
        message: format!(
            "{}; {1} still runs: `snapstore stop {1}` ends it",
            message(&error),
            vm.name
        ),
        class: class(&error),
    }
    .into()
}

/// Commits the machine in a thread once its guest is ready, and lets it go on.
fn commit_when_ready(
    store: Store,
    vm: &VmDir,
    wanted: CommitTarget,
    attached: bool,
) -> JoinHandle<anyhow::Result<()>> {
    let vm = vm.clone();
    std::thread::spawn(move || {
        // The guest stands still as long as this client is there.
        let mut client = None;
        let committed = Client::connect(&vm.socket())
            .and_then(|connected| client.insert(connected).order(&Request::WaitReady))
            .map_err(anyhow::Error::from)
            .and_then(|()| commit(&store, &vm, &wanted, &Bar::new(Unit::Bytes)));
        // An attached user's command goes on; else the command itself fails.
        if attached && let Err(error) = &committed {
            say!("error: {} is not committed: {}", wanted.tag, message(error));
        }
        // Whatever became of the commit, the guest goes on.
        let resumed = client.map_or(Ok(()), |mut client| client.order(&Request::Resume));
        // What failed first tells why.
        committed?;
        Ok(resumed?)
    })
}

/// What was started, for those who do not attach; lets it run if it waits for that.
fn report(
    context: &Context,
    mut started: Vec<Status>,
    mut word: StartSignal,
    later: bool,
    until_reseeded: Option<&Vec<VmDir>>,
) -> anyhow::Result<ExitCode> {
    if later {
        word.give(started.len())?;
        for status in &mut started {
            status.state = RunState::Running;
        }
    }
    if let Some(vms) = until_reseeded {
        for (vm, status) in vms.iter().zip(&mut started) {
            wait_until_reseeded(vm)?;
            status.reseeded = true;
        }
    }
    let value = json!({"machines": started});
    context.answer(&value, || describe_all(&started))?;
    Ok(ExitCode::SUCCESS)
}

/// Waits for a machine that ends unless its guest takes fresh entropy in time.
fn wait_until_reseeded(vm: &VmDir) -> anyhow::Result<()> {
    let deadline = Instant::now() + RESEED_PATIENCE;
    while Instant::now() < deadline {
        let status = vm.connect().map(|mut client| client.status());
        if matches!(status, Ok(Ok(status)) if status.reseeded) {
            return Ok(());
        }
        // Why it has ended is known when its process has gone.
        if !vm.is_running() {
            let ending = vm.ending();
            let ending = ending.unwrap_or_else(|| "it ended in order".to_owned());
            bail!("{}: {ending}", vm.name);
        }
        std::thread::sleep(RESEED_POLL);
    }
    bail!(
        "{0} does not tell whether its guest was reseeded; `snapstore ps {0}` shows its state",
        vm.name
    )
}

/// Longer than a machine lets its guest run that takes no entropy.
const RESEED_PATIENCE: Duration = Duration::from_secs(60);
/// How often a machine is asked whether its guest has taken entropy.
const RESEED_POLL: Duration = Duration::from_millis(20);

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
