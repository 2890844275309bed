//! `snapstore exec`

use std::io::{self, Write as _};
use std::os::fd::AsFd as _;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::bail;
use serde_json::json;
use snapstore_host::runtime::{Runtime, VmDir};
use snapstore_vmm::agent::{self, AGENT_PORT, AgentClient, AgentError, Exec, Exit, Stream};
use snapstore_vmm::control::RunState;

use crate::args::ExecArgs;
use crate::context::Context;
use crate::exit::{self, NoCommand};
use crate::logging::say;

pub fn run(context: &Context, args: &ExecArgs) -> anyhow::Result<ExitCode> {
    let runtime = Runtime::open()?;
    let vm = runtime.running(&args.name)?;
    let agent = connect(&runtime, &vm, args.wait)?;
    let exec = Exec {
        command: args.command.clone(),
        timeout_seconds: args.timeout,
        ..Exec::default()
    };
    let stdin = io::stdin();
    let stdin = args.interactive.then(|| stdin.as_fd());
    let (mut stdout, mut stderr) = (Kept::default(), Kept::default());
    let ended = agent.exec(&exec, stdin, &mut |stream, bytes| {
        if context.json() {
            match stream {
                Stream::Stdout => stdout.add(bytes),
                Stream::Stderr => stderr.add(bytes),
            }
            return Ok(());
        }
        match stream {
            Stream::Stdout => {
                let mut out = io::stdout().lock();
                out.write_all(bytes)?;
                out.flush()
            }
            // As with other commands, what they have to say may be lost.
            Stream::Stderr => {
                let _ = io::stderr().write_all(bytes);
                Ok(())
            }
        }
    });
    let command = args.command.first().map_or("", String::as_str);
    let ended = ended.or_else(|error| Err(explained(error, &runtime, &args.name, command)?))?;
    let value = json!({
        "exit_code": ended.code,
        "signal": ended.signal,
        "timed_out": ended.timed_out,
        "stdout": String::from_utf8_lossy(&stdout.bytes),
        "stderr": String::from_utf8_lossy(&stderr.bytes),
        "stdout_omitted_bytes": stdout.omitted_bytes,
        "stderr_omitted_bytes": stderr.omitted_bytes,
    });
    context.answer(&value, String::new)?;
    if stdout.omitted_bytes + stderr.omitted_bytes > 0 {
        say!("warning: of its output only the first 16 MiB are told; leave --json out to have all");
    }
    if ended.timed_out {
        say!("error: the command was killed: its time was over");
    }
    Ok(ExitCode::from(code(&ended)))
}

/// The most of a command's output, and of its error output, that is kept for one answer.
const MOST_BYTES: usize = 16 << 20;

/// For how long the agent is waited for without a word.
const SILENT_FOR: Duration = Duration::from_secs(1);
/// How long a machine may take to say whether it is paused.
const ANSWER_PATIENCE: Duration = Duration::from_secs(1);

/// Output that is told in one piece: a guest may write without end.
#[derive(Default)]
struct Kept {
    bytes: Vec<u8>,
    omitted_bytes: u64,
}

impl Kept {
    fn add(&mut self, bytes: &[u8]) {
        let room = MOST_BYTES - self.bytes.len();
        let (kept, omitted) = bytes.split_at(room.min(bytes.len()));
        self.bytes.extend_from_slice(kept);
        self.omitted_bytes += omitted.len() as u64;
    }
}

/// The agent of a guest that may still boot, or have to notice that it was restored.
pub fn connect(runtime: &Runtime, vm: &VmDir, wait: Duration) -> anyhow::Result<AgentClient> {
    if !vm.vsock().exists() && vm.is_running() {
        bail!(
            "{} has no vsock device, by which the agent in a guest answers: `snapstore run` gives \
             one to machines that boot Linux",
            vm.name
        );
    }
    let began = Instant::now();
    let attempt = |patience| {
        AgentClient::connect_while(&vm.vsock(), AGENT_PORT, patience, || vm.is_running())
    };
    let mut connected = attempt(wait.min(SILENT_FOR));
    let left = wait.saturating_sub(began.elapsed());
    if connected.is_err() && vm.is_running() && !left.is_zero() {
        let seconds = wait.as_secs();
        tracing::warn!(
            "waiting for the agent in the guest of {}; this gives up after {seconds} s (--wait)",
            vm.name
        );
        connected = attempt(left);
    }
    let error = match connected {
        Ok(agent) => return Ok(agent),
        Err(error) => error,
    };
    // One that has ended answers nobody any more.
    runtime.running(&vm.name)?;
    let status = vm.connect()?.with_patience(ANSWER_PATIENCE).status();
    if let Err(error @ snapstore_vmm::Error::NoAnswer { .. }) = status {
        return Err(error.into());
    }
    if status.is_ok_and(|status| status.state == RunState::Paused) {
        bail!(
            "{0} is paused, so its guest answers nobody; `snapstore resume {0}` lets it run",
            vm.name
        );
    }
    Err(error.into())
}

/// What a command that could not be run to its end came to, with its name. An error is
/// that of a machine that has ended.
pub fn explained(
    error: AgentError,
    runtime: &Runtime,
    machine: &str,
    command: &str,
) -> anyhow::Result<anyhow::Error> {
    match error {
        AgentError::Refused {
            kind: agent::ErrorKind::NotFound,
            message,
        } => Ok(NoCommand(format!(
            "{machine} has no command {command}: {message}; name one of its PATH, or give its \
             whole path"
        ))
        .into()),
        AgentError::Connection(_) => {
            runtime.running(machine)?;
            Ok(error.into())
        }
        error => Ok(error.into()),
    }
}

/// As a shell would give it.
fn code(ended: &Exit) -> u8 {
    let code = match (ended.code, ended.signal) {
        (Some(code), _) => u8::try_from(code).ok(),
        (None, Some(signal)) => u8::try_from(128 + signal).ok(),
        (None, None) => None,
    };
    code.unwrap_or(exit::FAILED)
}
