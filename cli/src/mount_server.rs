//! A mount's server in a process of its own: starting it, and what it says once
//! the mount is usable, or why it is not.
//!
//! It says so on its standard output, and then lets go of that: `ready`, or
//! `failed` and an exit code, on a line of its own; then what its user should know.

use std::fs::OpenOptions;
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};

use anyhow::Context as _;
use snapstore_store::Store;

use crate::args::MountArgs;
use crate::background;
use crate::commands::mount::log_path;
use crate::exit::{self, Elsewhere};

const READY: &str = "ready";
const FAILED: &str = "failed";

/// A server whose mount is usable.
pub struct Server {
    pub pid: u32,
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

    /// Tells the waiting parent, then lets go of its pipe.
    pub fn ready(self) -> anyhow::Result<()> {
        let mut text = format!("{READY}\n");
        for note in self.notes {
            text += &format!("{note}\n");
        }
        let mut out = io::stdout();
        // Without a parent the mount is there all the same.
        let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
        let null = OpenOptions::new().write(true).open("/dev/null")?;
        rustix::stdio::dup2_stdout(&null)?;
        Ok(())
    }

    /// Tells the waiting parent why there is no mount.
    pub fn failed(self, error: &anyhow::Error) -> ExitCode {
        let code = exit::code(error);
        let text = format!("{FAILED} {code}\n{}\n", exit::message(error));
        let mut out = io::stdout();
        let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
        ExitCode::from(code)
    }
}

/// Starts a server and waits until the mount is usable.
pub fn launch(store: &Store, args: &MountArgs, dir: &Path) -> anyhow::Result<Server> {
    let mut child = server_command(store, args, dir)?
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot start the mount's server")?;
    let mut answer = Vec::new();
    if let Some(mut out) = child.stdout.take() {
        out.read_to_end(&mut answer)
            .context("cannot wait for the mount's server")?;
    }
    let answer = String::from_utf8_lossy(&answer);
    let (word, rest) = answer.split_once('\n').unwrap_or((&answer, ""));
    let log = log_path(store.path());
    if word == READY {
        return Ok(Server {
            pid: child.id(),
            log,
            notes: rest.lines().map(str::to_owned).collect(),
        });
    }
    let code = word
        .strip_prefix(FAILED)
        .and_then(|it| it.trim().parse().ok());
    match code {
        Some(exit_code) => {
            child.wait().context("cannot wait for the mount's server")?;
            let message = rest.trim_end().to_owned();
            Err(Elsewhere { message, exit_code }.into())
        }
        None => Err(silent_end(&mut child, &log)),
    }
}

/// What to say of a server that has ended without a word.
fn silent_end(child: &mut Child, log: &Path) -> anyhow::Error {
    let ended = match child.wait() {
        Ok(status) => status.to_string(),
        Err(error) => error.to_string(),
    };
    anyhow::anyhow!(
        "the mount's server has ended before the mount was usable ({ended}); {} may tell why, \
         or the system's log (memory?)",
        log.display()
    )
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
