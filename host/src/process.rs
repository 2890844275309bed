//! The process that a machine runs in.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context as _;
use rustix::io::retry_on_intr;
use snapstore_vmm::Console;
use snapstore_vmm::confine::{self, Group, Limits, Preparation, Role, keep_only};
use snapstore_vmm::control::{Heeded, Identity, RunState, Vm};
use snapstore_vmm::virtio::MOST_OVERLAY_LAYERS;

use crate::background;
use crate::build::{MachineSource, Opened, build};
use crate::capped_log;
use crate::error::ChildFailure;
use crate::guest;
use crate::networks::NetSpec;
use crate::runtime::{IN_ORDER, NameLock, Runtime};
use crate::spec::{self, FAILED, NOT_STARTED, Spec, announce};

/// The hidden command that is one machine: its number in the spec, and the descriptors
/// of the spec, of the lock on its name, and of what it keeps open.
pub const COMMAND: &str = "vm-machine";

/// The hidden command.
pub fn run(arguments: &[String]) -> anyhow::Result<u8> {
    let misused = || anyhow::anyhow!("{COMMAND} is for this program's own use");
    let (number, fds) = arguments.split_first().ok_or_else(misused)?;
    let fds: Vec<i32> = fds.iter().map(|fd| fd.parse()).collect::<Result<_, _>>()?;
    let mut fds = keep_only(&fds)?.into_iter();
    let (file, lock) = fds.next().zip(fds.next()).ok_or_else(misused)?;
    let file = File::from(file);
    let mut line = vec![0; usize::try_from(file.metadata()?.len())?];
    file.read_exact_at(&mut line, 0)?;
    drop(file);
    let spec = spec::parse(&String::from_utf8(line)?)?;
    let ended = machine_process(&spec, None, number.parse()?, lock, fds.collect());
    Ok(ended)
}

/// The life of one machine's process; `lock` is the one on its name. `opened` is what whoever
/// forked it has opened ahead.
pub fn machine_process(
    spec: &Spec,
    opened: Option<Opened>,
    number: usize,
    lock: OwnedFd,
    _kept: Vec<OwnedFd>,
) -> u8 {
    let began = Instant::now();
    match start((spec, opened), number, lock, began) {
        // What is kept and the lock stay open until the process ends: whoever finds the
        // lock free ends what is left in its group.
        Ok((vm, claim)) => {
            std::mem::forget(claim);
            live(&vm)
        }
        Err(error) => {
            // Without a reader there is nobody to tell.
            let _ = announce(&spec.names[number], Err(ChildFailure::of(&error)));
            NOT_STARTED
        }
    }
}

fn start(
    (spec, opened): (&Spec, Option<Opened>),
    number: usize,
    lock: OwnedFd,
    began: Instant,
) -> anyhow::Result<(Arc<Vm>, NameLock)> {
    background::detach()?;
    let claim = Runtime::open()?.vm(&spec.names[number])?.adopt(lock);
    claim.name_holder()?;
    let nets = spec.nets.get(number).map_or(&[][..], Vec::as_slice);
    let started = start_claimed((spec, opened), nets, &claim, began);
    match started {
        Ok(vm) => Ok((vm, claim)),
        Err(error) => {
            // Where this process may not any more, its supervisor does.
            if confine::is_confined() {
                std::mem::forget(claim);
            } else {
                claim.release(None)?;
            }
            Err(error)
        }
    }
}

/// Everything that the machine needs is opened; then its process gives up what it does
/// not need, and only then are there threads that a guest could reach.
fn start_claimed(
    (spec, opened): (&Spec, Option<Opened>),
    nets: &[NetSpec],
    claim: &NameLock,
    began: Instant,
) -> anyhow::Result<Arc<Vm>> {
    capped_log::begin(&claim.vm.log())
        .with_context(|| format!("cannot open {}", claim.vm.log().display()))?;
    let null = OpenOptions::new().write(true).open("/dev/null")?;
    // Sockets there are named as they are once that directory is the root.
    rustix::process::chdir(claim.vm.dir()).context("cannot enter the machine's directory")?;
    snapstore_vmm::end_on_lost_memory()?;
    snapstore_vmm::end_on_panic();
    snapstore_vmm::forbid_merging();
    snapstore_vmm::outlive_long_files()?;
    let console = Arc::new(Console::new());
    let preparation = spec.confine.then(Preparation::new).transpose()?;
    // Before there is memory that counts.
    let mut group = spec
        .confine
        .then(|| Group::enter(&claim.vm.name, |dir| claim.vm.record_group(dir)));
    let what = (&spec.what, opened.as_ref());
    let (machine, start) = build(what, nets, &spec.overlays, &console)?;
    if let Some(opened) = opened {
        opened.close();
    }
    let listener = listen(&claim.vm.socket())?;
    let limits = Limits {
        cpus: u64::try_from(machine.cpus()).unwrap_or(u64::MAX),
        memory_bytes: machine.memory_bytes(),
        disk_bytes: machine
            .largest_disk_bytes()
            .saturating_mul(MOST_OVERLAY_LAYERS),
    };
    let confinement = preparation
        .map(|preparation| preparation.confine(claim.vm.dir(), &limits, group.as_mut()))
        .transpose()?
        .map(|confinement| confine::Confinement {
            shares_layout: spec.share_layout,
            ..confinement
        });
    // A confined process cannot leave it: its supervisor clears it away.
    if let Some(group) = group {
        group.keep();
    }
    let identity = Identity {
        name: claim.vm.name.clone(),
        origin: spec.origin.clone(),
        start,
        confinement,
        will_run: spec.run || spec.run_on_word,
    };
    let heeded = Heeded {
        end: signalled()?,
        word: match spec.run_on_word && !spec.stop_at_ready {
            true => Some(rustix::stdio::stdin().try_clone_to_owned()?),
            false => None,
        },
    };
    let vm = Vm::new(machine.start()?, console, identity, began);
    if spec.stop_at_ready {
        vm.machine().stop_at_ready();
    }
    // As it is now: it may end before anyone could ask.
    let mut status = vm.status();
    vm.listen(listener, heeded)
        .context("cannot start a thread")?;
    if spec.stop_at_ready {
        watch_starter(&vm, spec.run_on_word)?;
    }
    guest::attend(
        &vm,
        matches!(spec.what, MachineSource::Restore { .. }),
        spec.require_reseed,
    )?;
    // All threads are there, and have entered theirs.
    confine::enter(Role::Main);
    if spec.run {
        vm.machine().resume()?;
        status.state = RunState::Running;
    }
    announce(&claim.vm.name, Ok(status))?;
    // Lets go of the pipe to who started this.
    rustix::stdio::dup2_stdout(&null)?;
    Ok(vm)
}

fn listen(socket: &Path) -> anyhow::Result<UnixListener> {
    let listener = UnixListener::bind(socket)
        .with_context(|| format!("cannot listen at {}", socket.display()))?;
    // Only this user can get to it anyhow.
    fs::set_permissions(socket, Permissions::from_mode(0o600))
        .with_context(|| format!("cannot protect {}", socket.display()))?;
    Ok(listener)
}

/// For a guest that stops when it is ready. Lets the machine run when who started it says so,
/// and ends it if they are gone; once they are later, nobody lets the guest go on.
fn watch_starter(vm: &Arc<Vm>, run_on_word: bool) -> anyhow::Result<()> {
    let vm = vm.clone();
    std::thread::Builder::new()
        .name("start".to_owned())
        .spawn(move || {
            confine::enter(Role::Watch);
            match run_on_word.then(has_word) {
                // It may have ended meanwhile, which its owner will see.
                Some(true) => drop(vm.machine().resume()),
                Some(false) => vm.machine().stop(),
                None => {}
            }
            while has_word() {}
            vm.skip_ready_unless_awaited();
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

/// Why it ended is said in its log; what is left of it is its supervisor's to clear away.
fn live(vm: &Arc<Vm>) -> u8 {
    let ending = vm.wait();
    if ending.is_orderly() {
        say_last(&format!("{IN_ORDER}{ending}"));
        return 0;
    }
    say_last(&format!("error: {ending}"));
    FAILED
}

/// The last line of the machine's log, which is this process's standard error. One that
/// cannot be written is lost.
fn say_last(line: &str) {
    let _ = io::stderr().write_all(format!("{line}\n").as_bytes());
}

/// What can be read once this process has got a signal that ends it.
fn signalled() -> anyhow::Result<OwnedFd> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    let (ours, theirs) = UnixStream::pair().context("cannot watch for signals")?;
    for signal in [SIGHUP, SIGINT, SIGTERM] {
        let theirs = theirs.try_clone()?;
        signal_hook::low_level::pipe::register(signal, theirs)
            .context("cannot watch for signals")?;
    }
    Ok(ours.into())
}
