//! The user's terminal as a machine's serial line.

use std::io::{self, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rustix::termios::{OptionalActions, Termios};
use snapstore_host::message;
use snapstore_host::runtime::{KILLED, VmDir};
use snapstore_host::start::{StartSignal, wait_until_free};
use snapstore_vmm::Ending;
use snapstore_vmm::control::{Client, Request};

use crate::exit;

/// Ctrl-]: leaves the serial line, as in telnet.
const ESCAPE: u8 = 0x1d;

/// A visitor whose input has ended leaves once the guest has printed nothing for so long,
/// and after this time in any case: what it was asked it has answered by then.
const SILENCE: Duration = Duration::from_secs(1);
const LAST_WORDS: Duration = Duration::from_secs(10);

/// Why the terminal is attached.
pub enum Attach {
    /// The machine was started here: signals to this process end it.
    AsOwner {
        /// What lets it run from now on.
        word: StartSignal,
        /// Whether it is to.
        run: bool,
    },
    /// Only to look.
    AsVisitor,
}

/// How a user has left a machine's serial line.
pub enum DetachReason {
    /// The machine runs on.
    ByUser,
    /// It has ended.
    WithMachine(Ending),
}

impl DetachReason {
    /// The exit code that it stands for.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::ByUser => ExitCode::SUCCESS,
            Self::WithMachine(ending) if ending.is_orderly() => ExitCode::SUCCESS,
            Self::WithMachine(_) => ExitCode::from(exit::FAILED),
        }
    }
}

/// Connects standard input and output to the machine's serial line until the
/// machine ends or the user leaves. Without anybody to see its output, a machine
/// that was started here is ended.
pub fn attach(vm: &VmDir, role: Attach) -> anyhow::Result<DetachReason> {
    let mut waiter = vm.connect()?;
    let process = vm.process();
    let (line, early) = vm.connect()?.console(true)?;
    // Asked now: the answer waits here even if the machine's process does not.
    let waiter = std::thread::spawn(move || waiter.ending(&Request::Wait));
    let is_owner = matches!(role, Attach::AsOwner { .. });
    // Kept until this has come to its end: without it nobody waits for the guest.
    let mut _kept = None;
    if let Attach::AsOwner { mut word, run } = role {
        stop_on_signal(vm)?;
        if run {
            word.give(1)?;
        }
        _kept = Some(word);
    }
    let raw = RawTerminal::enter();
    if raw.is_some() {
        let _ = write!(
            io::stderr(),
            "Attached to {}; Ctrl-] leaves it running.\r\n",
            vm.name
        );
    }
    let talk = Arc::new(Talk::default());
    forward_input(line.try_clone()?, talk.clone(), is_owner);
    let shown = show(&line, &early, &talk);
    drop(raw);
    if talk.left.load(Ordering::Acquire) {
        say(&format!(
            "\nLeft {0} running; `snapstore console {0}` comes back, `snapstore stop {0}` ends it.",
            vm.name
        ));
        return Ok(DetachReason::ByUser);
    }
    let mut lost = None;
    match shown {
        Err(error) if is_owner => {
            stop(&vm.socket());
            let why = format!("its output cannot be shown: {}", message(&error));
            say(&format!("{}: {why}", vm.name));
            // A reader that went away has seen what it wanted.
            let went_away = error
                .chain()
                .filter_map(|cause| cause.downcast_ref::<io::Error>())
                .any(|cause| cause.kind() == io::ErrorKind::BrokenPipe);
            lost = (!went_away).then_some(Ending::Failed { reason: why });
        }
        shown => shown?,
    }
    let answer = waiter.join().expect("the waiter does not panic");
    let ending = answer.unwrap_or_else(|_| Ending::Failed {
        reason: vm.ending().unwrap_or_else(|| KILLED.to_owned()),
    });
    if ending.is_orderly() {
        say(&format!("{}: {ending}", vm.name));
    } else {
        say(&format!("error: {}: {ending}", vm.name));
    }
    // Whoever waits for this command may use the name again.
    wait_until_free(vm, process.as_ref())?;
    Ok(DetachReason::WithMachine(lost.unwrap_or(ending)))
}

/// Tells the user, if there is still one.
fn say(what: &str) {
    let _ = writeln!(io::stderr(), "{what}");
}

/// What the machine kept of its output, and nothing more.
pub fn print_kept(vm: &VmDir) -> anyhow::Result<()> {
    let kept = vm.connect()?.status()?.console_bytes.min(KEPT_BYTES);
    let (line, early) = vm.connect()?.console(true)?;
    let mut text = early;
    let rest = kept.saturating_sub(text.len() as u64);
    line.take(rest).read_to_end(&mut text)?;
    let mut out = io::stdout().lock();
    exit::output(out.write_all(&text).and_then(|()| out.flush()))
}

/// What a machine keeps of its output at least.
const KEPT_BYTES: u64 = 64 << 10;

/// What the two directions know of each other.
#[derive(Default)]
struct Talk {
    /// The user has left.
    left: AtomicBool,
    /// Bytes that the guest has printed meanwhile.
    printed: AtomicU64,
}

impl Talk {
    /// Until the guest has nothing more to say.
    fn wait_for_silence(&self) {
        let began = Instant::now();
        while began.elapsed() < LAST_WORDS {
            let before = self.printed.load(Ordering::Relaxed);
            std::thread::sleep(SILENCE);
            if self.printed.load(Ordering::Relaxed) == before {
                return;
            }
        }
    }

    fn leave(&self, line: &UnixStream) {
        self.left.store(true, Ordering::Release);
        let _ = line.shutdown(Shutdown::Both);
    }
}

fn show(mut line: &UnixStream, early: &[u8], talk: &Talk) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    exit::output(out.write_all(early).and_then(|()| out.flush()))?;
    let mut bytes = [0; 4096];
    loop {
        match line.read(&mut bytes) {
            Ok(0) => return Ok(()),
            Ok(got) => {
                exit::output(out.write_all(&bytes[..got]).and_then(|()| out.flush()))?;
                talk.printed.fetch_add(got as u64, Ordering::Relaxed);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error).context("the serial line broke"),
        }
    }
}

/// Sends what is typed. The thread ends with the process. At the end of input a visitor
/// leaves; whoever started the machine stays for its output.
fn forward_input(mut line: UnixStream, talk: Arc<Talk>, is_owner: bool) {
    std::thread::spawn(move || {
        let interactive = rustix::termios::isatty(io::stdin());
        let mut bytes = [0; 4096];
        let mut input = io::stdin().lock();
        while let Ok(got @ 1..) = input.read(&mut bytes) {
            let typed = &bytes[..got];
            let end = typed.iter().position(|byte| interactive && *byte == ESCAPE);
            if line.write_all(&typed[..end.unwrap_or(got)]).is_err() {
                return;
            }
            if end.is_some() {
                return talk.leave(&line);
            }
        }
        if !is_owner {
            talk.wait_for_silence();
            talk.leave(&line);
        }
    });
}

fn stop_on_signal(vm: &VmDir) -> anyhow::Result<()> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    let mut signals = signal_hook::iterator::Signals::new([SIGHUP, SIGINT, SIGTERM])
        .context("cannot watch for signals")?;
    let socket = vm.socket();
    std::thread::spawn(move || {
        for _ in signals.forever() {
            stop(&socket);
        }
    });
    Ok(())
}

fn stop(socket: &Path) {
    // If it cannot be reached it has ended.
    let _ = Client::connect(socket).and_then(|mut client| client.ending(&Request::Stop));
}

/// A terminal that hands over every key as it is; as it was once dropped.
struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// `None` if standard input is no terminal.
    fn enter() -> Option<Self> {
        let before = rustix::termios::tcgetattr(io::stdin()).ok()?;
        let mut raw = before.clone();
        raw.make_raw();
        rustix::termios::tcsetattr(io::stdin(), OptionalActions::Now, &raw).ok()?;
        Some(Self { before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _ = rustix::termios::tcsetattr(io::stdin(), OptionalActions::Now, &self.before);
    }
}
