//! The processes that machines run in. A hidden command reads what to start and
//! forks once a machine; it links no store code into what runs afterwards.

use std::fs::{self, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rustix::io::retry_on_intr;
use serde::{Deserialize, Serialize};
use snapstore_vmm::agent::{AGENT_PORT, AgentClient, AgentError};
use snapstore_vmm::control::{Identity, Origin, RunState, Status, Vm};
use snapstore_vmm::{Console, Ending};

use crate::background;
use crate::exit;
use crate::logging::say;
use crate::vms::build::{What, build};
use crate::vms::networks::NetSpec;
use crate::vms::runtime::{Claim, Runtime};

/// The hidden command's name.
pub const COMMAND: &str = "vm-host";

/// What to start, as the hidden command reads it.
#[derive(Serialize, Deserialize)]
pub struct Spec {
    /// One machine for each.
    pub names: Vec<String>,
    pub what: What,
    /// The network interfaces of each.
    pub nets: Vec<Vec<NetSpec>>,
    pub origin: Origin,
    /// Whether they begin to run at once.
    pub run: bool,
    /// Whether they begin to run at a byte for each on standard input, and end with it if
    /// none comes: whoever starts them may be killed meanwhile.
    #[serde(default)]
    pub run_on_word: bool,
    /// Whether they pause when their guests say that they are ready.
    pub stop_at_ready: bool,
}

/// What each machine's process writes to standard output, one line, once it
/// answers or cannot.
#[derive(Serialize, Deserialize)]
pub struct Announcement {
    pub name: String,
    /// How it began, or why it did not.
    pub outcome: Result<Status, Failure>,
}

#[derive(Serialize, Deserialize)]
pub struct Failure {
    pub message: String,
    pub exit_code: u8,
}

/// `snapstore vm-host`
pub fn run() -> anyhow::Result<ExitCode> {
    let line = io::stdin().lines().next().transpose()?.unwrap_or_default();
    let spec: Spec = serde_json::from_str(&line).context("what to start is not valid")?;
    snapstore_vmm::fork_each(spec.names.len(), |number| machine_process(&spec, number))?;
    Ok(ExitCode::SUCCESS)
}

/// The life of one machine's process.
fn machine_process(spec: &Spec, number: usize) -> u8 {
    let began = Instant::now();
    let name = &spec.names[number];
    match start(spec, number, began) {
        Ok((vm, listener, claim)) => live(&vm, listener, claim),
        Err(error) => {
            let failure = Failure {
                message: exit::message(&error),
                exit_code: exit::code(&error),
            };
            // Without a reader there is nobody to tell.
            let _ = announce(name, Err(failure));
            exit::FAILED
        }
    }
}

fn start(
    spec: &Spec,
    number: usize,
    began: Instant,
) -> anyhow::Result<(Arc<Vm>, UnixListener, Claim)> {
    background::detach()?;
    let claim = Runtime::open()?.vm(&spec.names[number])?.claim()?;
    let nets = spec.nets.get(number).map_or(&[][..], Vec::as_slice);
    let started = start_claimed(spec, nets, &claim, began);
    match started {
        Ok((vm, listener)) => Ok((vm, listener, claim)),
        Err(error) => {
            claim.release(None)?;
            Err(error)
        }
    }
}

fn start_claimed(
    spec: &Spec,
    nets: &[NetSpec],
    claim: &Claim,
    began: Instant,
) -> anyhow::Result<(Arc<Vm>, UnixListener)> {
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(claim.vm.log())
        .with_context(|| format!("cannot open {}", claim.vm.log().display()))?;
    rustix::stdio::dup2_stderr(&log)?;
    snapstore_vmm::end_on_lost_memory()?;
    let console = Arc::new(Console::new());
    let (machine, start) = build(&spec.what, nets, &claim.vm, &console)?;
    let identity = Identity {
        name: claim.vm.name.clone(),
        origin: spec.origin.clone(),
        start,
    };
    let vm = Vm::new(machine, console, identity, began);
    let socket = claim.vm.socket();
    let listener = UnixListener::bind(&socket)
        .with_context(|| format!("cannot listen at {}", socket.display()))?;
    // Only this user can get to it anyhow.
    fs::set_permissions(&socket, Permissions::from_mode(0o600))
        .with_context(|| format!("cannot protect {}", socket.display()))?;
    stop_on_signal(&vm)?;
    if spec.stop_at_ready {
        vm.machine().stop_at_ready();
    }
    // As it is now: it may end before anyone could ask.
    let mut status = vm.status();
    if spec.run {
        vm.machine().resume()?;
        status.state = RunState::Running;
    }
    announce(&claim.vm.name, Ok(status))?;
    detach_output()?;
    if spec.run_on_word || spec.stop_at_ready {
        heed_starter(&vm, spec)?;
    }
    if matches!(spec.what, What::Restore { .. }) {
        refresh_guest(&vm, claim.vm.vsock())?;
    }
    Ok((vm, listener))
}

/// Lets the machine run when who started it says so, and ends it if they are gone. Once
/// they are, nobody lets a guest go on that stops when it is ready.
fn heed_starter(vm: &Arc<Vm>, spec: &Spec) -> anyhow::Result<()> {
    let vm = vm.clone();
    let (run_on_word, stop_at_ready) = (spec.run_on_word, spec.stop_at_ready);
    std::thread::Builder::new()
        .name("start".to_owned())
        .spawn(move || {
            match run_on_word.then(has_word) {
                // It may have ended meanwhile, which its owner will see.
                Some(true) => drop(vm.machine().resume()),
                Some(false) => vm.machine().stop(),
                None => {}
            }
            if stop_at_ready {
                while has_word() {}
                vm.pass_ready_unless_awaited();
            }
        })
        .context("cannot start a thread")?;
    Ok(())
}

/// Whether the starter has said a word, once it has or is gone.
fn has_word() -> bool {
    // Not through a buffer, which would take the words for other machines, too.
    let mut word = [0];
    retry_on_intr(|| rustix::io::read(rustix::stdio::stdin(), &mut word)).is_ok_and(|got| got > 0)
}

fn live(vm: &Arc<Vm>, listener: UnixListener, claim: Claim) -> u8 {
    let ending = vm.serve(listener).unwrap_or_else(|error| Ending::Failed {
        reason: error.to_string(),
    });
    let reason = (!ending.is_orderly()).then(|| ending.to_string());
    if let Some(reason) = &reason {
        say!("error: {reason}");
    }
    if let Err(error) = claim.release(reason.as_deref()) {
        say!("warning: cannot clear the machine's directory: {error}");
    }
    if ending.is_orderly() { 0 } else { exit::FAILED }
}

fn announce(name: &str, outcome: Result<Status, Failure>) -> io::Result<()> {
    let announcement = Announcement {
        name: name.to_owned(),
        outcome,
    };
    let mut line = serde_json::to_vec(&announcement)?;
    line.push(b'\n');
    // One write: a pipe takes lines of several processes whole.
    let mut out = io::stdout();
    out.write_all(&line)?;
    out.flush()
}

/// Lets go of the pipe to who started this.
fn detach_output() -> anyhow::Result<()> {
    let null = OpenOptions::new().write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdout(&null)?;
    Ok(())
}

fn stop_on_signal(vm: &Arc<Vm>) -> anyhow::Result<()> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    let mut signals = signal_hook::iterator::Signals::new([SIGHUP, SIGINT, SIGTERM])
        .context("cannot watch for signals")?;
    let vm = vm.clone();
    std::thread::spawn(move || {
        for _ in signals.forever() {
            vm.machine().stop();
        }
    });
    Ok(())
}

/// How long a restored guest's agent may take to answer.
const AGENT_PATIENCE: Duration = Duration::from_secs(30);

/// Gives a restored guest fresh entropy, the time and the addresses of its network
/// interfaces, through its agent, once it runs. A guest without an agent, or a machine without the device, is left as
/// it is.
fn refresh_guest(vm: &Arc<Vm>, vsock: PathBuf) -> anyhow::Result<()> {
    if !vsock.exists() {
        return Ok(());
    }
    let networks = vm.machine().networks().into_iter();
    let macs: Vec<_> = networks
        .filter_map(|network| Some((network.saved_mac?, network.mac)))
        .collect();
    let vm = vm.clone();
    std::thread::Builder::new()
        .name("refresh".to_owned())
        .spawn(move || {
            if !vm.machine().wait_until_running() {
                return;
            }
            let refreshed = AgentClient::connect(&vsock, AGENT_PORT, AGENT_PATIENCE)
                .and_then(|mut agent| agent.after_restore(&macs));
            match refreshed {
                Ok(()) => {}
                // It was there, and its guest is not as it should be.
                Err(error @ AgentError::Refused { .. }) => {
                    tracing::warn!(%error, "something of the guest is still the snapshot's");
                }
                Err(error) => {
                    tracing::debug!(%error, "something of the guest is still the snapshot's");
                }
            }
        })
        .context("cannot start a thread")?;
    Ok(())
}
