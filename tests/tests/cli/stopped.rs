//! Commands that a signal stops: they end by that signal, soon, and leave no trace.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Stdio};

use anyhow::{Context as _, ensure};
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use snapstore_tests::harness::{noise, skipped};

use crate::{Fixture, PAGE, list};

fn with_base() -> anyhow::Result<Fixture> {
    let fixture = Fixture::new()?;
    fixture.commit("base", &noise(1, 8 * PAGE), &[])?;
    fixture.file("next", &noise(2, 8 * PAGE))?;
    Ok(fixture)
}

/// All files of a store but of its index.
fn trace(fixture: &Fixture) -> anyhow::Result<Vec<std::path::PathBuf>> {
    let mut all = Vec::new();
    for name in [".", "packs", "tags", "leases"] {
        all.extend(list(&fixture.cli.store().join(name))?);
    }
    Ok(all)
}

fn pid(child: &Child) -> anyhow::Result<Pid> {
    Pid::from_raw(i32::try_from(child.id())?).context("no process")
}

fn is_ignored(signal: Signal) -> anyhow::Result<bool> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = u64::from_str_radix(ignored.context("no SigIgn")?.trim(), 16)?;
    Ok(ignored >> (signal.as_raw() - 1) & 1 == 1)
}

/// At each of its durable steps.
fn stopped_at_each_step(arguments: &[&str], signal: Signal) -> anyhow::Result<(u32, u32)> {
    let (mut stopped, mut done) = (0, 0);
    for step in 1..40 {
        let fixture = with_base()?;
        fixture.cli.ok(&[
            "commit",
            "old",
            "--no-parent",
            "--memory",
            &fixture.path("next"),
        ])?;
        fixture.cli.ok(&["rm", "old"])?;
        let before = trace(&fixture)?;
        let child = fixture
            .cli
            .command(arguments)?
            .current_dir(fixture.dir.path())
            .env("SNAPSTORE_STOP_AT_STEP", step.to_string())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        let pid = pid(&child)?;
        let Some((_, status)) = waitpid(Some(pid), WaitOptions::UNTRACED)? else {
            anyhow::bail!("nothing to wait for");
        };
        if !status.stopped() {
            // It has fewer steps.
            ensure!(status.exit_status() == Some(0), "step {step}: {status:?}");
            break;
        }
        kill_process(pid, signal)?;
        kill_process(pid, Signal::CONT)?;
        let output = child.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(!said.contains("panicked"), "step {step}: {said}");
        if output.status.success() {
            done += 1;
        } else {
            ensure!(
                output.status.signal() == Some(signal.as_raw()),
                "step {step}: {output:?}"
            );
            ensure!(said.contains("cancelled"), "step {step}: {said}");
            if arguments[0] == "commit" {
                ensure!(trace(&fixture)? == before, "step {step} left a trace");
            }
            stopped += 1;
        }
        ensure!(
            list(&fixture.cli.store().join("leases"))?.is_empty(),
            "a lease is left"
        );
        ensure!(fixture.memory("base")? == noise(1, 8 * PAGE), "base");
        fixture.cli.ok(&["gc"])?;
        fixture.cli.ok(&["verify", "--read-data"])?;
    }
    Ok((stopped, done))
}

#[test]
fn a_commit() -> anyhow::Result<()> {
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        if is_ignored(signal)? {
            // As SIGHUP is by what nohup(1) starts, and SIGINT by what a script starts in
            // the background; then it stays so.
            let reason = format!("{signal:?} is ignored where the tests run");
            skipped("stopped::a_commit", &reason);
            continue;
        }
        let commit = ["commit", "new", "--memory", "next"];
        let (stopped, done) = stopped_at_each_step(&commit, signal)?;
        ensure!(stopped > 1, "{stopped} stopped");
        ensure!(
            done > 1,
            "{done} done: a commit that is nearly done is done"
        );
    }
    Ok(())
}

#[test]
fn a_collection() -> anyhow::Result<()> {
    let (stopped, done) = stopped_at_each_step(&["gc"], Signal::TERM)?;
    ensure!(stopped + done > 3, "{stopped} stopped, {done} done");
    Ok(())
}

#[test]
fn what_waits_for_a_lock() -> anyhow::Result<()> {
    for (lock, arguments) in [
        ("publish", &["commit", "new", "--memory", "next"][..]),
        ("publish", &["tag", "base", "new"]),
        ("publish", &["rm", "base"]),
        ("collect", &["gc"]),
        ("collect", &["verify"]),
        ("collect", &["stats"]),
        ("collect", &["map", "base"]),
        ("collect", &["report", "-o", "report.html"]),
    ] {
        let fixture = with_base()?;
        let before = trace(&fixture)?;
        let held = File::create(fixture.cli.store().join("locks").join(lock))?;
        flock(&held, FlockOperation::LockExclusive)?;
        let mut child = fixture
            .cli
            .command(arguments)?
            .current_dir(fixture.dir.path())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        // It says so when it has waited for a second.
        let mut said = [0; 200];
        let read = child.stderr.as_mut().context("stderr")?.read(&mut said)?;
        ensure!(read > 0, "{arguments:?} has ended");
        ensure!(
            String::from_utf8_lossy(&said).contains("waiting"),
            "{arguments:?}"
        );
        kill_process(pid(&child)?, Signal::TERM)?;
        let output = child.wait_with_output()?;
        let ended = output.status.signal();
        ensure!(
            ended == Some(Signal::TERM.as_raw()),
            "{arguments:?}: {output:?}"
        );
        ensure!(trace(&fixture)? == before, "{arguments:?} left a trace");
    }
    Ok(())
}

/// Named pipes that nobody else has opened.
#[test]
fn what_waits_for_the_other_end_of_a_pipe() -> anyhow::Result<()> {
    for arguments in [
        &["export", "base", "-o", "pipe"][..],
        &["import", "pipe"],
        &["report", "-o", "pipe"],
        &["metrics", "--output", "pipe"],
    ] {
        let fixture = with_base()?;
        let before = trace(&fixture)?;
        let pipe = fixture.dir.path().join("pipe");
        let made = std::process::Command::new("mkfifo").arg(&pipe).status()?;
        ensure!(made.success(), "mkfifo: {made}");
        let child = fixture
            .cli
            .command(arguments)?
            .current_dir(fixture.dir.path())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        // It has got as far as it gets: it sleeps, and takes no time.
        let pid = pid(&child)?;
        let stat = format!("/proc/{}/stat", pid.as_raw_nonzero());
        let times = || -> anyhow::Result<String> {
            let stat = std::fs::read_to_string(&stat)?;
            let fields: Vec<&str> = stat.split(' ').collect();
            Ok(fields[13..15].join(" "))
        };
        let mut last = times()?;
        loop {
            std::thread::sleep(std::time::Duration::from_millis(500));
            let now = times()?;
            if now == last {
                break;
            }
            last = now;
        }
        kill_process(pid, Signal::TERM)?;
        let output = child.wait_with_output()?;
        ensure!(
            output.status.signal() == Some(Signal::TERM.as_raw()),
            "{arguments:?}: {output:?}"
        );
        ensure!(trace(&fixture)? == before, "{arguments:?} left a trace");
    }
    Ok(())
}

/// As under nohup(1).
#[test]
fn a_signal_that_is_ignored_stays_ignored() -> anyhow::Result<()> {
    let fixture = with_base()?;
    let held = File::create(fixture.cli.store().join("locks/publish"))?;
    flock(&held, FlockOperation::LockExclusive)?;
    let mut child = std::process::Command::new("sh")
        .args(["-c", "trap '' HUP; exec \"$@\"", "sh"])
        .arg(snapstore_tests::harness::program()?)
        .arg("--store")
        .arg(fixture.cli.store())
        .args(["tag", "base", "new"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let read = child
        .stderr
        .as_mut()
        .context("stderr")?
        .read(&mut [0; 200])?;
    ensure!(read > 0, "it has ended");
    kill_process(pid(&child)?, Signal::HUP)?;
    drop(held);
    ensure!(child.wait()?.success(), "it was stopped");
    fixture.cli.ok(&["show", "new"])?;
    Ok(())
}
