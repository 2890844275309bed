//! A caller with things that nothing in the background may keep, and a look at
//! whether something did.

use std::fs;
use std::os::fd::AsRawFd as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};

/// A variable that no process in the background may know.
const SECRET: &str = "SNAPSTORE_TESTS_SECRET";

/// Runs the command as a caller would that has a descriptor open (on `file`), a
/// secret in its environment, a umask of its own, and ignores and blocks signals.
///
/// # Errors
/// If it cannot be started, or fails.
pub fn run_from_a_bad_caller(command: &mut Command, file: &Path) -> anyhow::Result<Vec<u8>> {
    let file = fs::File::create(file)?;
    let fd = file.as_raw_fd();
    command.env(SECRET, "secret").stderr(Stdio::piped());
    // SAFETY: only system calls that are async-signal-safe, on values that live here.
    unsafe {
        command.pre_exec(move || {
            libc::fcntl(fd, libc::F_SETFD, 0);
            libc::umask(0o007);
            for signal in [libc::SIGHUP, libc::SIGCHLD, libc::SIGUSR1, libc::SIGTERM] {
                libc::signal(signal, libc::SIG_IGN);
            }
            let mut set = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            libc::sigaddset(&raw mut set, libc::SIGUSR2);
            libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
            Ok(())
        });
    }
    let output = command.output()?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(output.stdout)
}

/// Whether a process has nothing of that caller.
///
/// # Errors
/// It has; the message tells what.
pub fn has_nothing_of_its_caller(pid: u32, file: &Path) -> anyhow::Result<()> {
    let proc = Path::new("/proc").join(pid.to_string());
    let environment = fs::read(proc.join("environ"))?;
    ensure!(
        !String::from_utf8_lossy(&environment).contains(SECRET),
        "the environment"
    );
    for entry in fs::read_dir(proc.join("fd"))? {
        // One that it opened and closed meanwhile is none of the caller's.
        let Ok(target) = fs::read_link(entry?.path()) else {
            continue;
        };
        ensure!(target != file, "the descriptor of {}", file.display());
    }
    ensure!(
        fs::read_link(proc.join("cwd"))? == Path::new("/"),
        "the directory"
    );
    let status = fs::read_to_string(proc.join("status"))?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.map(str::trim).context("a field of its status")
    };
    ensure!(field("Umask:")? == "0022", "the umask");
    let mask = |name| Ok::<_, anyhow::Error>(u64::from_str_radix(field(name)?, 16)?);
    // Rust ignores SIGPIPE itself, glibc its own two below the real-time signals (posix_spawn(3)),
    // and a machine that of a file which may not become longer.
    let expected = [libc::SIGPIPE, libc::SIGXFSZ, 32, 33].map(|signal| 1_u64 << (signal - 1));
    let expected = expected.iter().fold(0, |all, bit| all | bit);
    ensure!(mask("SigIgn:")? & !expected == 0, "ignored signals");
    ensure!(mask("SigBlk:")? == 0, "blocked signals");
    ensure!(
        field("NSsid:")?.split_whitespace().last() == field("NSpid:")?.split_whitespace().last(),
        "the session"
    );
    Ok(())
}
