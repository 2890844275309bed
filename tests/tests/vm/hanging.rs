//! A machine whose process hangs: who waits for it is told what for, and what to do.

use std::os::unix::net::UnixListener;
use std::process::{Output, Stdio};

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use snapstore_guests::TABLE;
use snapstore_tests::vm::Lab;

fn signal(lab: &Lab, name: &str, signal: Signal) -> Result<()> {
    let pid = i32::try_from(lab.pid(name)?)?;
    kill_process(Pid::from_raw(pid).context("no process")?, signal)?;
    Ok(())
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr].concat()).into_owned()
}

#[test]
fn whoever_waits_says_what_for() -> Result<()> {
    let Some(lab) = Lab::new("whoever_waits_says_what_for")? else {
        return Ok(());
    };
    lab.run("web", TABLE, &[])?;
    lab.wait_for_steps("web", 1)?;
    let pid = lab.pid("web")?;
    // As of a machine with an agent, which a stopped process does not serve.
    let _vsock = UnixListener::bind(lab.vm_dir("web").join("vsock.sock"))?;
    let waiting = format!("the machine's process {pid} is stopped");
    for arguments in [
        &["pause", "web"][..],
        &["commit", "late", "--vm", "web"],
        &["exec", "web", "--wait", "3", "--", "true"],
    ] {
        signal(&lab, "web", Signal::STOP)?;
        let mut command = lab.cli.command(arguments)?;
        let command = command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn()?;
        if arguments[0] == "exec" {
            let output = child.wait_with_output()?;
            let said = said(&output);
            ensure!(
                said.contains("waiting for the agent in the guest of web"),
                "{said}"
            );
            ensure!(said.contains("does not answer; `snapstore stop`"), "{said}");
            ensure!(output.status.code() == Some(5), "{}: {said}", output.status);
            signal_pid(pid, Signal::CONT)?;
            continue;
        }
        // It says so while it waits, and goes on when the machine does.
        let (mut child, told) = told_until(child, &waiting)?;
        ensure!(told.contains("kill -CONT"), "{told}");
        signal_pid(pid, Signal::CONT)?;
        let status = child.wait()?;
        ensure!(status.success(), "{arguments:?}: {status}");
        if arguments[0] == "pause" {
            lab.cli.ok(&["resume", "web"])?;
        }
    }
    // What does not wait for long says it at once.
    signal_pid(pid, Signal::STOP)?;
    let listed = lab.cli.ok(&["ps"])?;
    ensure!(listed.contains("not answering"), "{listed}");
    lab.cli.ok(&["stop", "web"])?;
    lab.finish()
}

fn signal_pid(pid: u32, signal: Signal) -> Result<()> {
    kill_process(
        Pid::from_raw(i32::try_from(pid)?).context("no process")?,
        signal,
    )?;
    Ok(())
}

/// What a command says on standard error up to these words.
fn told_until(
    mut child: std::process::Child,
    words: &str,
) -> Result<(std::process::Child, String)> {
    use std::io::{BufRead as _, BufReader};
    let stderr = child.stderr.take().context("no standard error")?;
    let mut told = String::new();
    for line in BufReader::new(stderr).lines() {
        told += &line?;
        if told.contains(words) {
            return Ok((child, told));
        }
    }
    anyhow::bail!("it ended and did not say {words:?}: {told}")
}
