//! Mounts whose server dies under running machines.

use std::process::Stdio;

use anyhow::{Result, ensure};
use rustix::process::Signal;
use snapstore_guests::{TOUCH, TouchCommand, page_sum};
use snapstore_tests::vm::{Lab, eventually, kill, runs, signal};

const FIRST: u32 = 512;
const COUNT: u32 = 3000;
const VALUE: u32 = 77;

fn with_touched(test: &str) -> Result<Option<Lab>> {
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
    Ok(Some(lab))
}

fn read(first: u32, count: u32) -> Vec<u8> {
    TouchCommand::Read { count, first }.encode()
}

fn restores_again(lab: &Lab) -> Result<()> {
    lab.restore("touched", &["--name", "again"])?;
    lab.type_in("again", &read(FIRST, COUNT))?;
    let answer = format!("r{:08x}\n", page_sum(COUNT, FIRST, VALUE));
    lab.wait_for_text("again", &answer)?;
    lab.finish()
}

#[test]
fn a_machine_whose_server_dies_ends_with_the_reason() -> Result<()> {
    let test = "a_machine_whose_server_dies_ends_with_the_reason";
    let Some(lab) = with_touched(test)? else {
        return Ok(());
    };
    lab.restore("touched", &["-n", "2"])?;
    lab.type_in("touched.1", &read(FIRST, 10))?;
    let answer = format!("r{:08x}\n", page_sum(10, FIRST, VALUE));
    lab.wait_for_text("touched.1", &answer)?;
    let attached = lab
        .cli
        .command(&["console", "touched.1"])?
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let machine = lab.pid("touched.1")?;
    kill(lab.mount_server()?)?;
    lab.type_in("touched.1", &read(FIRST, COUNT))?;
    let reason = lab.wait_for_death("touched.1")?;
    ensure!(reason.contains("memory can no longer be read"), "{reason}");
    eventually("its process ends", || Ok((!runs(machine)).then_some(())))?;
    let output = attached.wait_with_output()?;
    ensure!(output.status.code() == Some(1), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(said.contains("memory can no longer be read"), "{said}");
    // Not one answer that was made up from pages that were not there.
    let printed = String::from_utf8_lossy(&output.stdout);
    let answers: Vec<_> = printed
        .lines()
        .filter(|line| line.starts_with('r'))
        .collect();
    ensure!(
        answers.iter().all(|line| *line == answer.trim()),
        "{printed}"
    );
    let said = lab.cli.fails(3, &["console", "touched.1", "--print"])?;
    ensure!(said.contains("memory can no longer be read"), "{said}");
    lab.stop("touched.1")?;

    // One that touches nothing new does not know yet.
    ensure!(lab.ps("touched.2")?["state"] == "running");
    lab.stop("touched.2")?;
    restores_again(&lab)
}

/// KVM may say of code that it cannot fetch what it says of code that it cannot emulate.
#[test]
fn a_machine_that_never_got_its_code_ends_with_the_reason() -> Result<()> {
    let test = "a_machine_that_never_got_its_code_ends_with_the_reason";
    let Some(lab) = with_touched(test)? else {
        return Ok(());
    };
    lab.restore("touched", &["--paused", "--no-prefetch"])?;
    kill(lab.mount_server()?)?;
    lab.cli.ok(&["resume", "touched"])?;
    let reason = lab.wait_for_death("touched")?;
    ensure!(
        reason.starts_with("guest memory can no longer be read"),
        "{reason}"
    );
    lab.stop("touched")?;
    restores_again(&lab)
}

/// What the machine wrote is its own: a commit needs no server.
#[test]
fn a_machine_whose_server_died_can_still_be_committed() -> Result<()> {
    let test = "a_machine_whose_server_died_can_still_be_committed";
    let Some(lab) = with_touched(test)? else {
        return Ok(());
    };
    lab.restore("touched", &[])?;
    let write = TouchCommand::Write {
        count: 100,
        first: FIRST,
        value: 9,
    };
    lab.type_in("touched", &write.encode())?;
    lab.wait_for_text("touched", "w100\n")?;
    kill(lab.mount_server()?)?;
    lab.commit("saved", "touched")?;
    lab.stop("touched")?;
    lab.restore("saved", &[])?;
    lab.type_in("saved", &read(FIRST, 100))?;
    let answer = format!("r{:08x}\n", page_sum(100, FIRST, 9));
    lab.wait_for_text("saved", &answer)?;
    lab.type_in("saved", &read(FIRST + 100, COUNT - 100))?;
    let answer = format!("r{:08x}\n", page_sum(COUNT - 100, FIRST + 100, VALUE));
    lab.wait_for_text("saved", &answer)?;
    lab.stop("saved")?;
    restores_again(&lab)
}

/// While a server hangs its machines wait; they go on when it does.
#[test]
fn a_machine_waits_for_a_server_that_is_stopped() -> Result<()> {
    let test = "a_machine_waits_for_a_server_that_is_stopped";
    let Some(lab) = with_touched(test)? else {
        return Ok(());
    };
    lab.restore("touched", &[])?;
    let server = lab.mount_server()?;
    signal(server, Signal::STOP)?;
    lab.type_in("touched", &read(FIRST, COUNT))?;
    // It answers, though its guest stands still.
    ensure!(lab.ps("touched")?["state"] == "running");
    signal(server, Signal::CONT)?;
    let answer = format!("r{:08x}\n", page_sum(COUNT, FIRST, VALUE));
    lab.wait_for_text("touched", &answer)?;
    lab.finish()
}

/// A machine that can never come out of a page fault is ended nevertheless.
#[test]
fn a_machine_that_waits_for_its_server_can_be_killed() -> Result<()> {
    let test = "a_machine_that_waits_for_its_server_can_be_killed";
    let Some(lab) = with_touched(test)? else {
        return Ok(());
    };
    lab.restore("touched", &[])?;
    let machine = lab.pid("touched")?;
    let server = lab.mount_server()?;
    signal(server, Signal::STOP)?;
    lab.type_in("touched", &read(FIRST, COUNT))?;
    signal(machine, Signal::KILL)?;
    signal(server, Signal::CONT)?;
    eventually("the machine ends", || Ok((!runs(machine)).then_some(())))?;
    lab.stop("touched")?;
    lab.assert_nothing_left()?;
    restores_again(&lab)
}
