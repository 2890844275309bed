//! Processes that outlive the command that started them, the servers of mounts
//! and machines, keep nothing of whoever called that command: no descriptors,
//! no environment but what is listed here, no terminal, directory, umask, or
//! signals that are ignored or blocked.
//!
//! The command calls [`tidy`] when it begins, and starts such a process with
//! [`command`]; the process calls [`detach`] before it does anything else. A
//! descriptor is handed on with [`hand_on`]. A process that is forked off instead calls
//! [`forget_caller`] first.

use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

use anyhow::Context as _;
use rustix::fs::Mode;
use rustix::io::FdFlags;

use crate::runtime::RUNTIME_DIR;

/// What is kept of the environment: where programs and libraries are found, what
/// the runtime directory depends on, and what a developer asks for.
const KEPT: &[&str] = &[
    "PATH",
    "LD_LIBRARY_PATH",
    "HOME",
    "TMPDIR",
    "XDG_RUNTIME_DIR",
    RUNTIME_DIR,
    "RUST_LOG",
    LOG_FORMAT,
    "RUST_BACKTRACE",
    "SNAPSTORE_TRUST_LOCKS",
    "SNAPSTORE_PRETEND_FILESYSTEM",
    // Of builds with debug assertions (store/src/durable.rs, overlay/src/step.rs,
    // fuse/src/writable/state.rs, overlay/src/disk.rs, vmm/src/signals.rs).
    "SNAPSTORE_KILL_AT_STEP",
    "SNAPSTORE_KILL_AT_OVERLAY_STEP",
    "SNAPSTORE_BOOT_ID",
    "SNAPSTORE_NO_OVERLAY_SYNC",
    "SNAPSTORE_STOP_AT_STEP",
    "SNAPSTORE_PANIC_IN",
];

/// The environment's variable that tells how a program of ours logs: what a command is
/// told by an option, those that it starts in the background are told by this.
pub const LOG_FORMAT: &str = "SNAPSTORE_LOG_FORMAT";

/// How the programs log that this one starts.
static FORMAT: OnceLock<String> = OnceLock::new();

/// Has the programs that are started from now on log in this format.
pub fn set_log_format(name: &str) {
    let _ = FORMAT.set(name.to_owned());
}

/// Files that this program makes in the background are their owner's to write.
const UMASK: Mode = Mode::from_raw_mode(0o022);

/// At the beginning of every command: none of the programs that it starts gets
/// the caller's descriptors, and it learns how they end.
pub fn tidy() -> anyhow::Result<()> {
    snapstore_vmm::keep_descriptors_from_children()?;
    snapstore_vmm::heed_children();
    Ok(())
}

/// The program of machines, their supervisor, and whoever looks at a mount: it is smaller
/// than this one, so that it starts faster and each machine takes less memory.
const MACHINE_PROGRAM: &str = "snapstore-machine";
/// Where it is, from the directory of this program.
const MACHINE_PLACES: [&str; 2] = ["", "../lib/snapstore"];
/// The environment's variable that tells the program of machines the version of the one
/// that starts it: they speak a language that changes.
pub const MACHINE_OF: &str = "SNAPSTORE_MACHINE_OF";

/// This program, to be started in the background with other arguments. Paths that
/// it is given are absolute: no directory of the caller's stays in use.
pub fn command() -> anyhow::Result<Command> {
    Ok(in_background(Command::new(own_program()?)))
}

/// As [`command`], for a hidden command that needs no store: the program of machines, or
/// this one, which has the same commands, if it was put somewhere alone.
pub fn machine_command() -> anyhow::Result<Command> {
    let own = own_program()?;
    let machine = own.parent().and_then(|directory| {
        let places = MACHINE_PLACES.map(|place| directory.join(place).join(MACHINE_PROGRAM));
        places.into_iter().find(|path| path.is_file())
    });
    let mut command = in_background(Command::new(machine.unwrap_or(own)));
    command.env(MACHINE_OF, env!("CARGO_PKG_VERSION"));
    Ok(command)
}

fn in_background(mut command: Command) -> Command {
    let kept = KEPT
        .iter()
        .filter_map(|name| Some((name, std::env::var_os(name)?)));
    command.env_clear().envs(kept).current_dir("/");
    if let Some(format) = FORMAT.get() {
        command.env(LOG_FORMAT, format);
    }
    command
}

/// The path of this program.
pub fn own_program() -> anyhow::Result<PathBuf> {
    std::env::current_exe().context("cannot find this program's own file")
}

/// Leaves an inheritable descriptor to the programs that are started from now on.
pub fn hand_on(fd: BorrowedFd<'_>) -> anyhow::Result<()> {
    rustix::io::fcntl_setfd(fd, FdFlags::empty()).context("cannot hand on a descriptor")
}

/// In a process that was forked off this one and has not executed a program: keeps of its
/// caller what such a program would have, which are the standard descriptors and a part of
/// the environment.
pub fn forget_caller() -> anyhow::Result<()> {
    snapstore_vmm::confine::keep_only(&[])?;
    Ok(snapstore_vmm::forget_environment(KEPT)?)
}

/// In the process that was started: a session of its own, without a terminal, so
/// that the caller's signals are not for it; nothing ignored or blocked; files are
/// made as if nobody had called it.
pub fn detach() -> anyhow::Result<()> {
    rustix::process::setsid().context("cannot detach from the terminal")?;
    snapstore_vmm::reset_signals()?;
    rustix::process::umask(UMASK);
    rustix::process::chdir("/").context("cannot leave the working directory")
}
