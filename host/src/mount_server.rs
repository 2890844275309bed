//! A mount's server in a process of its own: starting it, and what it says once
//! the mount is usable, or why it is not.
//!
//! It says so on its standard output, and then lets go of that: `ready`, or
//! `failed` and an exit code, on a line of its own; then what its user should know.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use snapstore_store::Store;

use crate::background;
use crate::error::{ChildFailure, ErrorClass};
use crate::monitors::Kind;

const READY: &str = "ready";
const FAILED: &str = "failed";

/// A server whose mount is usable.
pub struct Server {
    /// Its process.
    pub pid: u32,
    /// Where it logs.
    pub log: PathBuf,
    /// What is to be known of the mount.
    pub notes: Vec<String>,
}

/// What the server owes to whoever started it.
#[derive(Default)]
pub struct Announcement {
    notes: Vec<String>,
}

impl Announcement {
    /// Adds what the user should know.
    pub fn note(&mut self, note: String) {
        self.notes.push(note);
    }

    /// Tells the waiting parent, then lets go of its pipe, whose place `null` takes.
    ///
    /// # Errors
    /// There is no parent any more.
    pub fn ready(self, null: &File) -> anyhow::Result<()> {
        let mut text = format!("{READY}\n");
        for note in self.notes {
            text += &format!("{note}\n");
        }
        let mut out = io::stdout();
        let told = out.write_all(text.as_bytes()).and_then(|()| out.flush());
        rustix::stdio::dup2_stdout(null)?;
        told.context("whoever started this server is gone")
    }

    /// Tells the waiting parent why there is no mount.
    pub fn failed(self, failure: &ChildFailure) {
        let class = serde_json::to_string(&failure.class).unwrap_or_default();
        let text = format!("{FAILED} {class}\n{}\n", failure.message);
        let mut out = io::stdout();
        let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    }
}

/// What a server is to show, and how.
#[derive(Clone, Debug)]
pub struct ServerRequest {
    /// A tag, the beginning of a snapshot id, or a tag of a remote; every tag without it.
    pub snapshot: Option<String>,
    /// How a remote is read, if it is one of a remote.
    pub remote: Option<RemoteReading>,
    /// The mount point.
    pub dir: PathBuf,
    /// Whether other users may read the mount.
    pub allow_other: bool,
    /// How much the kernel reads around a fault.
    pub read_ahead_bytes: u64,
    /// Threads that answer the kernel.
    pub threads: u8,
    /// What is read before it is asked for.
    pub reading: Reading,
    /// The mount ends once nobody holds a shared lock on this file.
    pub while_locked: Option<PathBuf>,
    /// The name of the layout of its files.
    pub layout: Option<Kind>,
    /// For a mount that can be written.
    pub writable: Option<Writing>,
}

/// What a server reads of its own accord, and what it learns from what is asked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Reading {
    /// Whether what was touched first in earlier mounts is read before it is asked for.
    pub ahead: bool,
    /// The bytes of the memory that machines map from this mount, if they have the others
    /// from elsewhere.
    pub part: Option<Vec<Range<u64>>>,
}

impl Reading {
    /// As a user wants it.
    #[must_use]
    pub fn wanted(prefetch: bool) -> Self {
        Self {
            ahead: prefetch,
            part: None,
        }
    }

    /// The image that a part is of.
    pub const PART_OF: &str = "memory";

    /// A part as a server reads it from its standard input, a range a line: there may be
    /// more of them than fit into arguments.
    fn part_text(part: &[Range<u64>]) -> String {
        let lines = part.iter().map(|it| format!("{} {}\n", it.start, it.end));
        lines.collect()
    }

    /// The part that whoever started this server has written to its standard input, of
    /// which it lets go then.
    pub fn read_part() -> anyhow::Result<Vec<Range<u64>>> {
        let text = io::read_to_string(io::stdin()).context("cannot read standard input")?;
        let null = File::open("/dev/null")?;
        rustix::stdio::dup2_stdin(&null)?;
        let range = |line: &str| -> Option<Range<u64>> {
            let (start, end) = line.split_once(' ')?;
            Some(start.parse().ok()?..end.parse().ok()?)
        };
        let part: Option<Vec<_>> = text.lines().map(range).collect();
        part.context("standard input is no list of ranges")
    }
}

/// How a snapshot is read that stays in a remote.
#[derive(Clone, Debug)]
pub struct RemoteReading {
    /// The id that the tag has to name, if that is to be so.
    pub id: Option<String>,
    /// How long a read waits for a remote that does not answer.
    pub timeout: Duration,
    /// The most that is kept of what was read.
    pub cache_limit_bytes: u64,
    /// Whether all of it is read in the end, as far as the limit allows.
    pub fills: bool,
}

impl RemoteReading {
    fn arguments(&self) -> Vec<std::ffi::OsString> {
        let mut arguments: Vec<std::ffi::OsString> = vec![
            "--remote-timeout".into(),
            self.timeout.as_secs().to_string().into(),
            "--cache-limit".into(),
            self.cache_limit_bytes.to_string().into(),
        ];
        if self.fills {
            arguments.push("--fill".into());
        }
        if let Some(id) = &self.id {
            arguments.extend(["--of-snapshot".into(), id.into()]);
        }
        arguments
    }
}

/// How a mount can be written.
#[derive(Clone, Debug)]
pub struct Writing {
    /// How many clones, each a directory; without it the mount's root is the only one.
    pub count: Option<u32>,
    /// Who has the files; without it this user, or who had those that it goes on with.
    pub owner: Option<(u32, u32)>,
    /// Their mode; without it as the program does, or as it was.
    pub mode: Option<u32>,
    /// Where what is written is kept.
    pub overlay_dir: PathBuf,
    /// The most of it for each clone; without it none, or as it was.
    pub limit_bytes: Option<u64>,
    /// Goes on with the view that was there.
    pub resume: bool,
    /// What is in no commit goes with the mount, however that ends in order.
    pub discard: bool,
}

impl Writing {
    /// Where what is written is kept, unless its user wants otherwise: where a filesystem
    /// on a disk is, which outlives a boot.
    pub const OVERLAY_DIR: &str = "/var/tmp";

    fn arguments(&self) -> anyhow::Result<Vec<std::ffi::OsString>> {
        let mut arguments: Vec<std::ffi::OsString> = vec![
            "--rw".into(),
            "--overlay-dir".into(),
            std::path::absolute(&self.overlay_dir)?.into(),
        ];
        if let Some((uid, gid)) = self.owner {
            arguments.extend(["--owner".into(), format!("{uid}:{gid}").into()]);
        }
        if let Some(mode) = self.mode {
            arguments.extend(["--mode".into(), format!("{mode:o}").into()]);
        }
        if let Some(count) = self.count {
            arguments.extend(["--count".into(), count.to_string().into()]);
        }
        if let Some(limit) = self.limit_bytes {
            arguments.extend(["--overlay-limit".into(), limit.to_string().into()]);
        }
        if self.resume {
            arguments.push("--resume".into());
        }
        if self.discard {
            arguments.push("--discard".into());
        }
        Ok(arguments)
    }
}

impl ServerRequest {
    /// How much the kernel reads around a fault, unless its user wants otherwise.
    pub const READ_AHEAD_BYTES: u64 = 16 << 10;
    /// Threads that answer the kernel, unless its user wants otherwise.
    pub const THREADS: u8 = 2;

    /// Every tag, for this user alone.
    pub fn new(dir: &Path) -> Self {
        Self {
            snapshot: None,
            remote: None,
            dir: dir.to_owned(),
            allow_other: false,
            read_ahead_bytes: Self::READ_AHEAD_BYTES,
            threads: Self::THREADS,
            reading: Reading::wanted(true),
            while_locked: None,
            layout: None,
            writable: None,
        }
    }
}

/// What the servers of a store's mounts have to say.
pub fn log_path(store: &Path) -> PathBuf {
    store.join("mounts.log")
}

/// Starts a server and waits until the mount is usable.
pub fn launch(store: &Store, request: &ServerRequest) -> anyhow::Result<Server> {
    let mut child = server_command(store, request)?
        .stdin(match request.reading.part {
            Some(_) => Stdio::piped(),
            None => Stdio::null(),
        })
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot start the mount's server")?;
    if let (Some(mut input), Some(part)) = (child.stdin.take(), &request.reading.part) {
        // One that has ended says why.
        let _ = input.write_all(Reading::part_text(part).as_bytes());
    }
    let out = child.stdout.take().context("no pipe to a new process")?;
    wait_for(out, child.id(), log_path(store.path()), || child.wait())
}

/// Forks the server off this process, which has one thread and has not opened the store, and
/// waits until the mount is usable. `serve` is its life: it owes an [`Announcement`], and
/// returns its exit code. That is a program's start faster than [`launch`].
pub fn fork(store: &Path, serve: impl FnOnce() -> u8) -> anyhow::Result<Server> {
    let (out, theirs) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).context("cannot make a pipe")?;
    let pid = snapstore_vmm::fork_one(|| match become_server(theirs) {
        Ok(()) => serve(),
        Err(error) => {
            Announcement::default().failed(&ChildFailure::of(&error));
            FORK_FAILED
        }
    })?;
    wait_for(File::from(out), pid.unsigned_abs(), log_path(store), || {
        let pid = rustix::process::Pid::from_raw(pid);
        let ended = rustix::process::waitpid(pid, rustix::process::WaitOptions::empty())?;
        let status = ended.map_or(0, |(_, status)| status.as_raw());
        Ok(ExitStatus::from_raw(status))
    })
}

/// The exit code of a server that could not begin.
const FORK_FAILED: u8 = 1;

/// In the process that was forked off: it has nothing of its caller but this pipe.
fn become_server(pipe: OwnedFd) -> anyhow::Result<()> {
    // First: an error is told there.
    rustix::stdio::dup2_stdout(&pipe)?;
    let null = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    drop((pipe, null));
    background::forget_caller()?;
    background::detach()
}

/// Waits for what a server announces, and how it ended if it did not.
fn wait_for(
    mut out: impl io::Read,
    pid: u32,
    log: PathBuf,
    wait: impl FnOnce() -> io::Result<ExitStatus>,
) -> anyhow::Result<Server> {
    let mut answer = Vec::new();
    out.read_to_end(&mut answer)
        .context("cannot wait for the mount's server")?;
    let answer = String::from_utf8_lossy(&answer);
    let (word, rest) = answer.split_once('\n').unwrap_or((&answer, ""));
    if word == READY {
        return Ok(Server {
            pid,
            log,
            notes: rest.lines().map(str::to_owned).collect(),
        });
    }
    let class = word
        .strip_prefix(FAILED)
        .and_then(|it| serde_json::from_str::<ErrorClass>(it.trim()).ok());
    let ended = wait();
    match class {
        Some(class) => {
            ended.context("cannot wait for the mount's server")?;
            let message = rest.trim_end().to_owned();
            Err(ChildFailure { message, class }.into())
        }
        None => Err(silent_end(ended, &log)),
    }
}

/// What to say of a server that has ended without a word.
fn silent_end(ended: io::Result<ExitStatus>, log: &Path) -> anyhow::Error {
    let ended = match ended {
        Ok(status) => status.to_string(),
        Err(error) => error.to_string(),
    };
    anyhow::anyhow!(
        "the mount's server has ended before the mount was usable ({ended}); {} may tell why, \
         or the system's log (memory?)",
        log.display()
    )
}

fn server_command(store: &Store, request: &ServerRequest) -> anyhow::Result<Command> {
    let mut command = background::command()?;
    command
        .arg("--store")
        .arg(store.path())
        .args(["mount", "--foreground", "--announce"])
        .args(["--read-ahead", &request.read_ahead_bytes.to_string()])
        .args(["--threads", &request.threads.to_string()]);
    if request.allow_other {
        command.arg("--allow-other");
    }
    if !request.reading.ahead {
        command.arg("--no-prefetch");
    }
    if request.reading.part.is_some() {
        command.arg("--part");
    }
    if let Some(lock) = &request.while_locked {
        command.arg("--while-locked").arg(lock);
    }
    if let Some(layout) = request.layout {
        command.args(["--layout", layout.name()]);
    }
    if let Some(remote) = &request.remote {
        command.args(remote.arguments());
    }
    if let Some(writable) = &request.writable {
        command.args(writable.arguments()?);
    }
    command.arg("--").args(&request.snapshot);
    command.arg(std::path::absolute(&request.dir)?);
    Ok(command)
}
