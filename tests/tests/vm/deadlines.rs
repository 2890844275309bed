//! Whatever a machine waits for, whoever controls it is answered.
//!
//! A command that does not end within a minute hangs; how long it took is printed.

use std::process::{Child, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rustix::process::Signal;
use snapstore_guests::{SPIN, TABLE, TOUCH, TouchCommand, page_sum};
use snapstore_tests::vm::{Lab, eventually, kill, runs, signal};

const HANGS: Duration = Duration::from_secs(60);
const FIRST: u32 = 512;
const COUNT: u32 = 3000;
const VALUE: u32 = 77;

/// What a command said, if it ended.
fn answered(lab: &Lab, arguments: &[&str]) -> Result<Output> {
    let began = Instant::now();
    let mut command = lab.cli.command(arguments)?;
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child: Child = command.spawn()?;
    while child.try_wait()?.is_none() {
        if began.elapsed() > HANGS {
            child.kill()?;
            child.wait()?;
            anyhow::bail!("{arguments:?} hangs");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    println!("{arguments:?} took {:?}", began.elapsed());
    Ok(child.wait_with_output()?)
}

fn read() -> Vec<u8> {
    TouchCommand::Read {
        count: COUNT,
        first: FIRST,
    }
    .encode()
}

fn answer() -> String {
    format!("r{:08x}\n", page_sum(COUNT, FIRST, VALUE))
}

/// Two machines of one snapshot whose pages are only in its mount.
fn restored(test: &str) -> Result<Option<Lab>> {
    let Some(lab) = Lab::with_mounts(test)? else {
        return Ok(None);
    };
    lab.run("touch", TOUCH, &[])?;
    let write = TouchCommand::Write {
        count: COUNT,
        first: FIRST,
        value: VALUE,
    };
    lab.type_in("touch", &write.encode())?;
    lab.wait_for_text("touch", &format!("w{COUNT}\n"))?;
    lab.commit("touched", "touch")?;
    lab.stop("touch")?;
    lab.restore("touched", &["-n", "2"])?;
    Ok(Some(lab))
}

/// Whether a vCPU waits inside a page fault. One whose guest waits for input sleeps and
/// can be interrupted (S in proc(5)); a fault waits in a way that only SIGKILL ends (D),
/// and as long as its server is stopped, it is the same wait at each look.
fn waits_for_a_page(pid: u32) -> bool {
    let look = |thread: &str| {
        let dir = format!("/proc/{pid}/task/{thread}");
        let stat = std::fs::read_to_string(format!("{dir}/stat")).ok()?;
        let (name, after) = stat.rsplit_once(") ")?;
        let status = std::fs::read_to_string(format!("{dir}/status")).ok()?;
        let switches = status.lines().filter(|line| line.contains("ctxt_switches"));
        let waits = name.contains("(vcpu") && after.starts_with('D');
        waits.then(|| switches.collect::<String>())
    };
    snapstore_tests::vm::names(format!("/proc/{pid}/task").as_ref())
        .iter()
        .any(|thread| {
            let first = look(thread);
            let is_same = |_| {
                std::thread::sleep(Duration::from_millis(5));
                look(thread) == first
            };
            first.is_some() && (0..10).all(is_same)
        })
}

/// Their server is stopped, and the first one waits for a page of it.
fn hung(test: &str) -> Result<Option<(Lab, u32)>> {
    let Some(lab) = restored(test)? else {
        return Ok(None);
    };
    // Both have what they need to wait for input: all of their loop has been run once.
    for name in ["touched.1", "touched.2"] {
        for count in [1, 2] {
            let read = TouchCommand::Read {
                count,
                first: FIRST,
            };
            lab.type_in(name, &read.encode())?;
            lab.wait_for_text(name, &format!("r{:08x}\n", page_sum(count, FIRST, VALUE)))?;
        }
    }
    let server = lab.mount_server()?;
    signal(server, Signal::STOP)?;
    lab.type_in("touched.1", &read())?;
    let pid = lab.pid("touched.1")?;
    eventually("a vCPU waits for its page", || {
        Ok(waits_for_a_page(pid).then_some(()))
    })?;
    Ok(Some((lab, server)))
}

fn stops(lab: &Lab, name: &str) -> Result<()> {
    let pid = lab.pid(name)?;
    stops_process(lab, name, pid)
}

fn stops_process(lab: &Lab, name: &str, pid: u32) -> Result<()> {
    let output = answered(lab, &["stop", name])?;
    ensure!(output.status.success(), "{output:?}");
    ensure!(!runs(pid), "{name} runs on");
    ensure!(!lab.vm_dir(name).exists(), "something of {name} is left");
    Ok(())
}

#[test]
fn a_machine_whose_mount_lives_is_stopped() -> Result<()> {
    let Some(lab) = restored("a_machine_whose_mount_lives_is_stopped")? else {
        return Ok(());
    };
    stops(&lab, "touched.1")?;
    stops(&lab, "touched.2")?;
    lab.assert_nothing_left()
}

#[test]
fn a_machine_whose_mount_hangs_is_stopped() -> Result<()> {
    let Some((lab, server)) = hung("a_machine_whose_mount_hangs_is_stopped")? else {
        return Ok(());
    };
    stops(&lab, "touched.1")?;
    stops(&lab, "touched.2")?;
    signal(server, Signal::CONT)?;
    lab.assert_nothing_left()
}

#[test]
fn a_machine_whose_mount_is_dead_is_stopped() -> Result<()> {
    let Some(lab) = restored("a_machine_whose_mount_is_dead_is_stopped")? else {
        return Ok(());
    };
    let pids = (lab.pid("touched.1")?, lab.pid("touched.2")?);
    kill(lab.mount_server()?)?;
    stops_process(&lab, "touched.2", pids.1)?;
    // It may have noticed, and be gone.
    let _ = lab.type_in("touched.1", &read());
    stops_process(&lab, "touched.1", pids.0)?;
    // Nobody is left who would clear the mount away but who lists machines.
    lab.cli.ok(&["ps"])?;
    lab.assert_nothing_left()
}

#[test]
fn a_machine_whose_process_is_stopped_is_stopped() -> Result<()> {
    let Some(lab) = Lab::new("a_machine_whose_process_is_stopped_is_stopped")? else {
        return Ok(());
    };
    lab.run("web", SPIN, &["--cpus", "2"])?;
    lab.run("other", SPIN, &[])?;
    let pid = lab.pid("web")?;
    signal(pid, Signal::STOP)?;
    // Nor does it keep others from being stopped.
    let output = answered(&lab, &["stop", "--all"])?;
    ensure!(output.status.success(), "{output:?}");
    ensure!(!runs(pid), "it runs on");
    lab.assert_nothing_left()
}

#[test]
fn pause_and_commit_of_a_machine_that_waits_for_a_page_give_up() -> Result<()> {
    let test = "pause_and_commit_of_a_machine_that_waits_for_a_page_give_up";
    let Some((lab, server)) = hung(test)? else {
        return Ok(());
    };
    for arguments in [
        &["pause", "touched.1"][..],
        &["commit", "tag", "--vm", "touched.1"],
    ] {
        let output = answered(&lab, arguments)?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(5), "{output:?}");
        ensure!(said.contains("does not stop"), "{said}");
    }
    // One that waits for nothing is paused and goes on.
    for command in ["pause", "resume"] {
        let output = answered(&lab, &[command, "touched.2"])?;
        ensure!(output.status.success(), "{output:?}");
    }
    signal(server, Signal::CONT)?;
    // It went on as if nobody had asked.
    lab.wait_for_text("touched.1", &answer())?;
    lab.cli.ok(&["pause", "touched.1"])?;
    lab.cli.ok(&["resume", "touched.1"])?;
    lab.commit("tag", "touched.1")?;
    lab.finish()
}

#[test]
fn a_paused_machine_is_resumed_though_its_mount_hangs() -> Result<()> {
    let test = "a_paused_machine_is_resumed_though_its_mount_hangs";
    let Some(lab) = restored(test)? else {
        return Ok(());
    };
    lab.cli.ok(&["pause", "touched.1"])?;
    let server = lab.mount_server()?;
    signal(server, Signal::STOP)?;
    lab.type_in("touched.1", &read())?;
    let output = answered(&lab, &["resume", "touched.1"])?;
    ensure!(output.status.success(), "{output:?}");
    // Once more is nothing to do.
    let output = answered(&lab, &["resume", "touched.1"])?;
    ensure!(output.status.success(), "{output:?}");
    signal(server, Signal::CONT)?;
    lab.wait_for_text("touched.1", &answer())?;
    lab.finish()
}

#[test]
fn commands_to_a_machine_whose_process_is_stopped_are_answered() -> Result<()> {
    let test = "commands_to_a_machine_whose_process_is_stopped_are_answered";
    let Some(lab) = Lab::new(test)? else {
        return Ok(());
    };
    lab.run("web", TABLE, &[])?;
    lab.wait_for_steps("web", 1)?;
    let pid = lab.pid("web")?;
    signal(pid, Signal::STOP)?;
    for command in ["pause", "resume"] {
        let output = answered(&lab, &[command, "web"])?;
        ensure!(!output.status.success(), "{output:?}");
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(said.contains("does not answer"), "{said}");
    }
    let output = answered(&lab, &["ps"])?;
    ensure!(output.status.success(), "{output:?}");
    signal(pid, Signal::CONT)?;
    lab.cli.ok(&["resume", "web"])?;
    lab.commit("tag", "web")?;
    lab.finish()
}
