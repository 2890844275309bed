//! Processes that are killed in the middle of a commit, or of a start.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::Signal;
use snapstore_guests::{SPIN, TABLE, TOUCH, TouchCommand, page_sum};
use snapstore_tests::stopping::Running;
use snapstore_tests::vm::{Lab, eventually, kill, signal};

/// No commit has that many durable steps.
const MOST_STEPS: u32 = 40;
const SIGKILL: i32 = 9;

/// Commits, to be killed before a durable step. Returns whether it came to its
/// end before.
fn commit_until(lab: &Lab, step: u32, tag: &str, vm: &str) -> Result<bool> {
    let cli = lab
        .cli
        .clone()
        .with_env("SNAPSTORE_KILL_AT_STEP", &step.to_string());
    let output = cli.run(&["commit", tag, "--vm", vm])?;
    match (output.status.code(), output.status.signal()) {
        (Some(0), _) => Ok(true),
        (_, Some(SIGKILL)) => Ok(false),
        _ => bail!("{output:?}"),
    }
}

#[test]
fn a_committer_killed_at_any_step_harms_no_machine() -> Result<()> {
    let test = "a_committer_killed_at_any_step_harms_no_machine";
    let Some(lab) = Lab::with_mounts(test)? else {
        return Ok(());
    };
    lab.run("web", TABLE, &[])?;
    lab.wait_for_steps("web", 1)?;
    lab.commit("base", "web")?;
    let mut step = 1;
    loop {
        ensure!(step < MOST_STEPS, "it never ends");
        let last = lab.ps("web")?["origin"].clone();
        let done = commit_until(&lab, step, &format!("killed{step}"), "web")?;
        lab.wait_until_thawed()?;
        if done {
            break;
        }
        ensure!(
            lab.ps("web")?["origin"] == last,
            "it took a dead commit for durable"
        );
        let at = lab.steps("web")?.last().copied().unwrap_or(0);
        lab.wait_beyond("web", at)?;
        // Every other one is followed by another that is killed.
        if step % 2 == 0 {
            let next = lab.commit(&format!("next{step}"), "web")?;
            ensure!(next["parent"] == last["snapshot"], "{next}");
        }
        step += 1;
    }
    ensure!(step > 4, "only {step} durable steps");
    lab.stop("web")?;
    // All there is can be restored, also what was durable and not acknowledged.
    let tags = lab.cli.json(&["tags"])?;
    let tags = tags["tags"].as_array().cloned().unwrap_or_default();
    ensure!(tags.len() >= 3, "{tags:?}");
    for entry in &tags {
        let tag = entry["tag"].as_str().unwrap_or_default();
        lab.restore(tag, &[])?;
        lab.assert_goes_on(tag, tag)?;
        lab.stop(tag)?;
    }
    lab.finish()
}

/// The same with pages whose content tells in which round they were written.
#[test]
fn a_killed_commit_takes_nothing_from_the_next() -> Result<()> {
    let test = "a_killed_commit_takes_nothing_from_the_next";
    let Some(lab) = Lab::with_mounts(test)? else {
        return Ok(());
    };
    let mut machine = "vm".to_owned();
    lab.run(&machine, TOUCH, &[])?;
    lab.commit("base", &machine)?;
    let round = |step: u32| (512 + step * 40, 60, step << 20);
    let mut steps = 0;
    for step in 1..=9 {
        let (first, count, value) = round(step);
        let write = TouchCommand::Write {
            count,
            first,
            value,
        };
        lab.type_in(&machine, &write.encode())?;
        // Each machine only answers to what it was told itself.
        let answers = usize::try_from(if step > 5 { step - 5 } else { step })?;
        eventually("pages are written", || {
            let said = lab.console(&machine)?;
            Ok((said.matches(&format!("w{count}\n")).count() == answers).then_some(()))
        })?;
        if commit_until(&lab, step, &format!("killed{step}"), &machine)? {
            break;
        }
        steps = step;
        lab.wait_until_thawed()?;
        if step == 5 {
            // The second half is of a restored machine.
            lab.commit("half", &machine)?;
            lab.stop(&machine)?;
            "half".clone_into(&mut machine);
            lab.restore(&machine, &[])?;
        }
    }
    ensure!(steps >= 5, "only {steps} durable steps");
    lab.commit("all", &machine)?;
    lab.stop(&machine)?;
    lab.restore("all", &[])?;
    for step in 1..=steps {
        let (first, _, value) = round(step);
        // The next round writes the pages beyond.
        lab.type_in("all", &TouchCommand::Read { count: 40, first }.encode())?;
        lab.wait_for_text("all", &format!("r{:08x}\n", page_sum(40, first, value)))?;
    }
    lab.finish()
}

/// Begins a commit of a machine with many changed pages and stops it as soon as
/// the machine is frozen. Returns the machine's process and the commit.
fn stopped_commit(lab: &Lab) -> Result<(u32, Running)> {
    lab.run("vm", TOUCH, &["--mem", "256M"])?;
    let write = TouchCommand::Write {
        count: 40_000,
        first: 512,
        value: 5,
    };
    lab.type_in("vm", &write.encode())?;
    lab.wait_for_text("vm", "w40000\n")?;
    let machine = lab.pid("vm")?;
    // Nothing is read of a paused machine before it is frozen: all is left for after.
    lab.cli.ok(&["pause", "vm"])?;
    let commit = Running::start(&lab.cli, &["commit", "tag", "--vm", "vm"], 0)?;
    eventually("it is frozen", || {
        Ok((!lab.frozen()?.is_empty()).then_some(()))
    })?;
    commit.send(Signal::STOP)?;
    lab.cli.ok(&["resume", "vm"])?;
    Ok((machine, commit))
}

#[test]
fn a_machine_killed_while_it_is_read_is_not_committed() -> Result<()> {
    let test = "a_machine_killed_while_it_is_read_is_not_committed";
    let Some(lab) = Lab::with_mounts(test)? else {
        return Ok(());
    };
    let (machine, commit) = stopped_commit(&lab)?;
    kill(machine)?;
    lab.wait_until_thawed()?;
    let output = commit.output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(1), "{output:?}");
    ensure!(said.matches("error:").count() == 1, "{said}");
    if lab.cli.run(&["show", "tag"])?.status.success() {
        // It had read everything already: then it is whole, and says so.
        ensure!(said.contains("is committed"), "{said}");
    } else {
        // Stopped before the machine's answer, or after.
        let known = ["memory", "cannot talk to the machine"];
        ensure!(known.iter().any(|known| said.contains(known)), "{said}");
    }
    lab.stop("vm")?;
    lab.finish()
}

#[test]
fn a_committer_killed_while_it_reads_harms_no_machine() -> Result<()> {
    let test = "a_committer_killed_while_it_reads_harms_no_machine";
    let Some(lab) = Lab::with_mounts(test)? else {
        return Ok(());
    };
    let (_, commit) = stopped_commit(&lab)?;
    // While it is stopped the guest goes on, and nobody else may commit.
    let read = TouchCommand::Read {
        count: 100,
        first: 512,
    };
    lab.type_in("vm", &read.encode())?;
    lab.wait_for_text("vm", &format!("r{:08x}\n", page_sum(100, 512, 5)))?;
    let said = lab.cli.fails(5, &["commit", "other", "--vm", "vm"])?;
    ensure!(said.contains(&format!("process {}", commit.id())), "{said}");
    drop(commit);
    lab.wait_until_thawed()?;
    lab.commit("other", "vm")?;
    lab.stop("vm")?;
    lab.restore("other", &[])?;
    let read = TouchCommand::Read {
        count: 40_000,
        first: 512,
    };
    lab.type_in("other", &read.encode())?;
    lab.wait_for_text("other", &format!("r{:08x}\n", page_sum(40_000, 512, 5)))?;
    lab.finish()
}

/// All that was to be read had been: the snapshot is whole, and the user is told
/// that the machine does not know of it.
#[test]
fn a_machine_killed_after_it_was_read_is_committed() -> Result<()> {
    let test = "a_machine_killed_after_it_was_read_is_committed";
    let Some(lab) = Lab::with_mounts(test)? else {
        return Ok(());
    };
    lab.run("web", TABLE, &[])?;
    lab.wait_for_steps("web", 2)?;
    let commit = Running::start(&lab.cli, &["commit", "last", "--vm", "web"], 1)?;
    ensure!(commit.is_stopped()?);
    kill(lab.pid("web")?)?;
    let output = commit.output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(1), "{output:?}");
    ensure!(said.contains("last is committed"), "{said}");
    lab.stop("web")?;
    lab.restore("last", &[])?;
    lab.assert_goes_on("last", "last")?;
    lab.finish()
}

/// The kernel may end a frozen copy when memory is short.
#[test]
fn a_frozen_copy_that_is_killed_fails_its_commit_only() -> Result<()> {
    let test = "a_frozen_copy_that_is_killed_fails_its_commit_only";
    let Some(lab) = Lab::with_mounts(test)? else {
        return Ok(());
    };
    let (_, commit) = stopped_commit(&lab)?;
    for frozen in lab.frozen()? {
        signal(frozen, Signal::KILL)?;
    }
    lab.wait_until_thawed()?;
    let output = commit.output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    let known = lab.cli.run(&["show", "tag"])?.status.success();
    ensure!(known == output.status.success(), "{output:?}");
    ensure!(known || said.contains("memory"), "{said}");
    // The machine notices in a moment that nobody commits it any more.
    eventually("it is committed", || {
        let output = lab.cli.run(&["commit", "other", "--vm", "vm"])?;
        match output.status.code() {
            Some(0) => Ok(Some(())),
            Some(5) => Ok(None),
            _ => bail!("{output:?}"),
        }
    })?;
    lab.stop("vm")?;
    lab.restore("other", &[])?;
    let read = TouchCommand::Read {
        count: 40_000,
        first: 512,
    };
    lab.type_in("other", &read.encode())?;
    lab.wait_for_text("other", &format!("r{:08x}\n", page_sum(40_000, 512, 5)))?;
    lab.finish()
}

/// When memory is short, the kernel ends the copy and not its machine: a commit can be
/// done again.
#[test]
fn a_frozen_copy_is_the_first_to_go_when_memory_is_short() -> Result<()> {
    let test = "a_frozen_copy_is_the_first_to_go_when_memory_is_short";
    let Some(lab) = Lab::with_mounts(test)? else {
        return Ok(());
    };
    lab.run("vm", TOUCH, &["--mem", "256M"])?;
    let write = TouchCommand::Write {
        count: 40_000,
        first: 512,
        value: 5,
    };
    lab.type_in("vm", &write.encode())?;
    lab.wait_for_text("vm", "w40000\n")?;
    let score = |pid: u32| std::fs::read_to_string(format!("/proc/{pid}/oom_score_adj"));
    lab.cli.ok(&["pause", "vm"])?;
    let commit = Running::start(&lab.cli, &["commit", "tag", "--vm", "vm"], 0)?;
    let frozen = eventually("it is frozen", || Ok(lab.frozen()?.first().copied()))?;
    eventually("the copy volunteers", || {
        Ok((score(frozen)?.trim() == "1000").then_some(()))
    })?;
    let machine = score(lab.pid("vm")?)?;
    ensure!(machine.trim() != "1000", "the machine does, too");
    let output = commit.output()?;
    ensure!(output.status.success(), "{output:?}");
    lab.finish()
}

/// Machines that begin together run together, or not at all.
#[test]
fn a_starter_that_is_killed_leaves_no_machine_that_stands_still() -> Result<()> {
    let test = "a_starter_that_is_killed_leaves_no_machine_that_stands_still";
    let Some(lab) = Lab::with_mounts(test)? else {
        return Ok(());
    };
    lab.run("web", SPIN, &[])?;
    lab.commit("base", "web")?;
    lab.stop("web")?;
    // How long it takes on this machine as it is now.
    let began = std::time::Instant::now();
    lab.restore("base", &["-n", "3"])?;
    let whole = began.elapsed();
    lab.cli.ok(&["stop", "--all"])?;
    let mut ran = 0;
    for round in 0..100 {
        // It may become busier meanwhile; some have to be started.
        if round >= 25 && ran > 0 {
            break;
        }
        let mut starter = lab
            .cli
            .command(&["restore", "base", "-n", "3", "--detach"])?
            .stdout(std::process::Stdio::null())
            .spawn()?;
        std::thread::sleep(whole * round / 20);
        starter.kill()?;
        starter.wait()?;
        let some = eventually("all run, or none is there", || {
            let (machines, processes) = (lab.machines()?, lab.processes()?);
            let all_run = machines.iter().all(|vm| vm["state"] == "running");
            Ok(match (machines.len(), processes.len()) {
                // With the mount's server and the machines' supervisor.
                (3, 5) if all_run => Some(true),
                (0, 0) => Some(false),
                _ => None,
            })
        })?;
        ran += usize::from(some);
        lab.cli.ok(&["stop", "--all"])?;
    }
    ensure!(ran > 0, "none was started in time");
    lab.finish()
}

/// How often a machine is killed while it starts, each time a little later.
const MOMENTS: u32 = 40;
const MOMENT: Duration = Duration::from_micros(150);

/// The process of a machine as soon as it is known, while `starter` lives.
fn starting(lab: &Lab, name: &str, starter: &mut Child) -> Result<Option<u32>> {
    let lock = lab.vm_dir(name).join("lock");
    while starter.try_wait()?.is_none() {
        let said = fs::read_to_string(&lock).unwrap_or_default();
        // Both words, or it is just being written.
        if let Some((pid, _)) = said.split_once(' ').filter(|_| said.ends_with('\n')) {
            return Ok(Some(pid.parse()?));
        }
    }
    Ok(None)
}

/// While it confines itself a machine has a child for a moment, which holds all that it holds.
#[test]
fn a_machine_killed_while_it_starts_leaves_nothing() -> Result<()> {
    let test = "a_machine_killed_while_it_starts_leaves_nothing";
    let Some(lab) = Lab::with_mounts(test)? else {
        return Ok(());
    };
    lab.run("web", TABLE, &[])?;
    lab.wait_for_steps("web", 1)?;
    lab.commit("base", "web")?;
    lab.stop("web")?;
    for moment in 0..MOMENTS {
        let name = format!("m{moment}");
        let mut restore = lab
            .cli
            .command(&["restore", "base", "--name", &name, "--detach"])?;
        let mut restore = restore.stderr(Stdio::null()).spawn()?;
        if let Some(pid) = starting(&lab, &name, &mut restore)? {
            std::thread::sleep(MOMENT * moment);
            // It is this test's, and may have ended already.
            let _ = kill(pid);
        }
        restore.wait()?;
        lab.cli.ok(&["stop", "--all"])?;
    }
    lab.assert_nothing_left()?;
    lab.finish()
}

#[test]
fn a_machine_stopped_while_it_starts_is_told_and_can_be_ended() -> Result<()> {
    let test = "a_machine_stopped_while_it_starts_is_told_and_can_be_ended";
    let Some(lab) = Lab::with_mounts(test)? else {
        return Ok(());
    };
    lab.run("web", TABLE, &[])?;
    lab.wait_for_steps("web", 1)?;
    lab.commit("base", "web")?;
    lab.stop("web")?;
    let mut met = 0;
    for moment in 0..MOMENTS {
        let mut restore = lab.cli.command(&["restore", "base", "--detach"])?;
        let mut restore = restore.stderr(Stdio::piped()).spawn()?;
        let stopped = starting(&lab, "base", &mut restore)?;
        if let Some(pid) = stopped {
            std::thread::sleep(MOMENT / 2 * moment);
            if signal(pid, Signal::STOP).is_err() {
                restore.wait()?;
                continue;
            }
        }
        let mut said = BufReader::new(restore.stderr.take().context("no pipe")?);
        let mut line = String::new();
        // Its end, if the machine had answered.
        said.read_line(&mut line)?;
        if line.contains("waiting for base") {
            met += 1;
            lab.cli.ok(&["stop", "base"])?;
            ensure!(!restore.wait()?.success(), "it was ended");
            lab.assert_nothing_left()?;
        } else {
            ensure!(restore.wait()?.success(), "{line}");
            lab.cli.ok(&["stop", "--all"])?;
        }
        if met == 3 {
            return lab.finish();
        }
    }
    bail!("{met} of {MOMENTS} machines were stopped in time")
}
