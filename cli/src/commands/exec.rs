//! `snapstore exec`

use std::io::{self, Write as _};
use std::os::fd::AsFd as _;
use std::process::ExitCode;

use serde_json::json;
use snapstore_vmm::agent::{AGENT_PORT, AgentClient, Exec, Exit, Stream};

use crate::args::ExecArgs;
use crate::context::Context;
use crate::exit;
use crate::vms::runtime::Runtime;

pub fn run(context: &Context, args: &ExecArgs) -> anyhow::Result<ExitCode> {
    let vm = Runtime::open()?.running(&args.name)?;
    let agent = AgentClient::connect(&vm.vsock(), AGENT_PORT, args.wait)?;
    let exec = Exec {
        command: args.command.clone(),
        timeout_seconds: args.timeout,
        ..Exec::default()
    };
    let stdin = io::stdin();
    let stdin = args.interactive.then(|| stdin.as_fd());
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let ended = agent.exec(&exec, stdin, &mut |stream, bytes| {
        if context.json() {
            match stream {
                Stream::Stdout => stdout.extend_from_slice(bytes),
                Stream::Stderr => stderr.extend_from_slice(bytes),
            }
            return Ok(());
        }
        match stream {
            Stream::Stdout => {
                let mut out = io::stdout().lock();
                out.write_all(bytes)?;
                out.flush()
            }
            Stream::Stderr => io::stderr().write_all(bytes),
        }
    })?;
    let value = json!({
        "exit_code": ended.code,
        "signal": ended.signal,
        "timed_out": ended.timed_out,
        "stdout": String::from_utf8_lossy(&stdout),
        "stderr": String::from_utf8_lossy(&stderr),
    });
    context.answer(&value, String::new)?;
    if ended.timed_out {
        eprintln!("error: the command was killed: its time was over");
    }
    Ok(ExitCode::from(code(&ended)))
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
