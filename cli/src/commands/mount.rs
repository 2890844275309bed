//! `snapstore mount`: in the foreground, or through a copy of this program that
//! detaches once the mount is usable.

use std::fs::OpenOptions;
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::Context as _;
use serde_json::json;
use snapstore_fuse::{MountOptions, What, mount, unmount};
use snapstore_store::Store;

use crate::args::MountArgs;
use crate::background;
use crate::context::Context;
use crate::exit::Elsewhere;
use crate::vms::mounts::lock_dir;

/// What the detached server writes once the mount is usable.
const READY: &str = "ready\n";

pub fn run(context: &Context, args: &MountArgs) -> anyhow::Result<ExitCode> {
    let (what, dir) = match args.what.as_slice() {
        [dir] => (What::AllTags, dir),
        [name, dir] => (What::Snapshot(name.clone()), dir),
        _ => unreachable!("clap accepts one or two values"),
    };
    let dir = PathBuf::from(dir);
    if args.foreground {
        serve(context, args, &what, &dir)
    } else {
        start_server(context, args, &what, &dir)
    }
}

fn serve(context: &Context, args: &MountArgs, what: &What, dir: &Path) -> anyhow::Result<ExitCode> {
    let options = MountOptions {
        threads: usize::from(args.threads),
        read_ahead_bytes: u32::try_from(args.read_ahead).unwrap_or(u32::MAX),
        allow_other: args.allow_other,
    };
    let mounted = mount(context.open()?, what, dir, &options)?;
    unmount_on_signal(dir)?;
    if let Some(lock) = &args.while_locked {
        unmount_when_unused(lock, dir)?;
    }
    if args.announce {
        announce()?;
    }
    mounted.wait()?;
    if let Some(lock) = &args.while_locked {
        let _undoing = lock_parent(lock)?;
        // It was made for this mount. If this fails the next one uses it.
        let _ = std::fs::remove_dir(dir);
    }
    Ok(ExitCode::SUCCESS)
}

/// Tells the waiting parent, then lets go of its pipe.
fn announce() -> anyhow::Result<()> {
    let mut out = io::stdout();
    out.write_all(READY.as_bytes())?;
    out.flush()?;
    let null = OpenOptions::new().write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdout(&null)?;
    Ok(())
}

/// Ctrl-C and SIGTERM unmount instead of leaving a dead mount point.
fn unmount_on_signal(dir: &Path) -> anyhow::Result<()> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    let mut signals = signal_hook::iterator::Signals::new([SIGHUP, SIGINT, SIGTERM])
        .context("cannot watch for signals")?;
    let dir = dir.to_owned();
    std::thread::spawn(move || {
        for _ in signals.forever() {
            if let Err(error) = unmount(&dir, true) {
                tracing::error!(%error, "unmounting");
            }
        }
    });
    Ok(())
}

/// Unmounts once nobody holds the shared lock on this file any more: the kernel
/// drops it with its last holder, however that ends. The file goes before the
/// lock on it does, so that whoever then gets the lock can tell; and the mount
/// goes under the directory's lock, so that whoever makes the next one does not
/// find this one on its way out.
fn unmount_when_unused(lock: &Path, dir: &Path) -> anyhow::Result<()> {
    let file =
        std::fs::File::open(lock).with_context(|| format!("cannot open {}", lock.display()))?;
    let (lock, dir) = (lock.to_owned(), dir.to_owned());
    std::thread::spawn(move || {
        let locked = loop {
            match rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive) {
                Err(rustix::io::Errno::INTR) => {}
                other => break other,
            }
        };
        let undoing = lock_parent(&lock);
        if let Err(error) = &undoing {
            tracing::error!(%error, "undoing the mount");
        }
        let ended = locked
            .map_err(io::Error::from)
            .and_then(|()| std::fs::remove_file(&lock));
        if let Err(error) = ended {
            tracing::error!(%error, "watching for the last user of the mount");
        }
        if let Err(error) = unmount(&dir, true) {
            tracing::error!(%error, "unmounting");
        }
    });
    Ok(())
}

fn lock_parent(lock: &Path) -> anyhow::Result<std::fs::File> {
    lock_dir(lock.parent().context("a lock is a file of a directory")?)
}

/// Starts this program again as the server, and waits until the mount is usable
/// or the server says why not.
fn start_server(
    context: &Context,
    args: &MountArgs,
    what: &What,
    dir: &Path,
) -> anyhow::Result<ExitCode> {
    // Looked up here first, so that the commonest errors come without a detour.
    let store = context.open()?;
    if let What::Snapshot(name) = what {
        store.resolve(name)?;
    }
    snapstore_fuse::prepare(dir)?;
    let server = launch(&store, args, dir)?;
    let shown = dir.display().to_string();
    let tag = match what {
        What::Snapshot(name) => Some(name.as_str()),
        What::AllTags => None,
    };
    let value = json!({"dir": shown, "snapshot": tag, "server_pid": server.pid, "log": server.log});
    context.answer(&value, || match tag {
        Some(tag) => format!("Mounted {tag} on {shown}."),
        None => format!("Mounted all tags on {shown}."),
    })?;
    Ok(ExitCode::SUCCESS)
}

/// A mount's server in a process of its own.
pub struct Server {
    pub pid: u32,
    pub log: PathBuf,
}

/// What the servers of a store's mounts have to say.
pub fn log_path(store: &Path) -> PathBuf {
    store.join("mounts.log")
}

/// Starts a server and waits until the mount is usable.
pub fn launch(store: &Store, args: &MountArgs, dir: &Path) -> anyhow::Result<Server> {
    let log_path = log_path(store.path());
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&log_path)
        .with_context(|| format!("cannot open {}", log_path.display()))?;
    let log_start = log.metadata()?.len();
    let mut child = server_command(store, args, dir)?
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .context("cannot start the mount's server")?;
    let mut answer = String::new();
    if let Some(mut out) = child.stdout.take() {
        out.read_to_string(&mut answer)?;
    }
    if answer == READY {
        return Ok(Server {
            pid: child.id(),
            log: log_path,
        });
    }
    let status = child.wait()?;
    let said = read_from(&log_path, log_start).unwrap_or_default();
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Err(Elsewhere {
        message: said.trim().trim_start_matches("error: ").to_owned(),
        exit_code: code.unwrap_or(crate::exit::FAILED),
    }
    .into())
}

fn server_command(store: &Store, args: &MountArgs, dir: &Path) -> anyhow::Result<Command> {
    let mut command = background::command()?;
    command
        .arg("--store")
        .arg(store.path())
        .args(["mount", "--foreground", "--announce"])
        .args(["--read-ahead", &args.read_ahead.to_string()])
        .args(["--threads", &args.threads.to_string()]);
    if args.allow_other {
        command.arg("--allow-other");
    }
    if let Some(lock) = &args.while_locked {
        command.arg("--while-locked").arg(lock);
    }
    command.arg("--").args(&args.what[..args.what.len() - 1]);
    command.arg(std::path::absolute(dir)?);
    Ok(command)
}

fn read_from(path: &Path, start: u64) -> io::Result<String> {
    use std::os::unix::fs::FileExt as _;
    let file = std::fs::File::open(path)?;
    let len = file.metadata()?.len().saturating_sub(start).min(64 << 10);
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    file.read_exact_at(&mut bytes, start)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
