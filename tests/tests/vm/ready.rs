//! Commits at the instruction at which a guest says that it is ready.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Result, ensure};
use snapstore_guests::READY;
use snapstore_tests::vm::{Lab, eventually};

/// A command that starts a machine named `r`, to be committed as `t`.
fn command(lab: &Lab, more: &[&str]) -> Result<Command> {
    let kernel = lab.file("kernel", READY)?;
    let arguments = [
        &["run", "r", "--kernel", &kernel, "--mem", "16M"],
        &["--commit-when", "ready", "--tag", "t"][..],
        more,
    ];
    let mut command = lab.cli.command(&arguments.concat())?;
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    Ok(command)
}

/// Such a command, whose machine waits.
fn start(lab: &Lab, more: &[&str]) -> Result<Child> {
    let child = command(lab, more)?.spawn()?;
    eventually("the machine waits", || {
        let said = lab.cli.run(&["console", "r", "--print"])?.stdout;
        Ok(String::from_utf8_lossy(&said)
            .contains("waiting")
            .then_some(()))
    })?;
    Ok(child)
}

#[test]
fn a_guest_is_committed_when_it_is_ready_and_goes_on() -> Result<()> {
    let Some(lab) = Lab::new("a_guest_is_committed_when_it_is_ready_and_goes_on")? else {
        return Ok(());
    };
    let starter = start(&lab, &["--detach"])?;
    lab.cli.fails(3, &["show", "t"])?;
    lab.type_in("r", b"r")?;
    let output = starter.wait_with_output()?;
    ensure!(output.status.success(), "{output:?}");
    lab.wait_for_text("r", "after")?;
    // Of the next instruction on, nothing had happened.
    lab.restore("t", &["--name", "again", "--paused"])?;
    ensure!(!lab.console("again")?.contains("after"));
    lab.cli.ok(&["resume", "again"])?;
    lab.wait_for_text("again", "after")?;
    lab.finish()
}

#[test]
fn a_guest_that_nobody_waits_for_goes_on_when_it_is_ready() -> Result<()> {
    let Some(lab) = Lab::new("a_guest_that_nobody_waits_for_goes_on_when_it_is_ready")? else {
        return Ok(());
    };
    let mut starter = start(&lab, &["--detach"])?;
    starter.kill()?;
    starter.wait()?;
    lab.type_in("r", b"r")?;
    lab.wait_for_text("r", "after")?;
    lab.cli.fails(3, &["show", "t"])?;
    // Nor does a pause hold it up, or is it held up by one.
    lab.cli.ok(&["pause", "r"])?;
    lab.cli.ok(&["resume", "r"])?;
    lab.finish()
}

/// Whenever it is killed, the guest runs on, or there is none.
#[test]
fn a_starter_that_is_killed_early_holds_no_guest_up() -> Result<()> {
    let Some(lab) = Lab::new("a_starter_that_is_killed_early_holds_no_guest_up")? else {
        return Ok(());
    };
    let mut ran = 0;
    for round in 0..20 {
        let mut starter = command(&lab, &["--detach"])?.spawn()?;
        eventually("it is there", || {
            Ok(lab.vm_dir("r").join("control.sock").exists().then_some(()))
        })?;
        std::thread::sleep(Duration::from_millis(round));
        starter.kill()?;
        starter.wait()?;
        let waits = eventually("it waits, or is gone", || {
            let said = lab.cli.run(&["console", "r", "--print"])?;
            Ok(match said.status.code() {
                Some(3) => Some(false),
                _ => String::from_utf8_lossy(&said.stdout)
                    .contains("waiting")
                    .then_some(true),
            })
        })?;
        if waits {
            ran += 1;
            lab.type_in("r", b"r")?;
            lab.wait_for_text("r", "after")?;
            lab.stop("r")?;
        }
    }
    ensure!(ran > 0, "none was started in time");
    lab.finish()
}

#[test]
fn a_guest_that_ends_before_it_is_ready_is_a_failure() -> Result<()> {
    let Some(lab) = Lab::new("a_guest_that_ends_before_it_is_ready_is_a_failure")? else {
        return Ok(());
    };
    for more in [&["--detach"][..], &[]] {
        let starter = start(&lab, more)?;
        lab.type_in("r", b"x")?;
        let output = starter.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(1), "{more:?}: {output:?}");
        ensure!(said.contains("error: ") && said.contains("reset"), "{said}");
        lab.cli.fails(3, &["show", "t"])?;
        // The command may end a moment before the machine's process does.
        lab.assert_nothing_left()?;
    }
    lab.finish()
}

#[test]
fn a_machine_that_cannot_be_committed_is_not_booted_for_it() -> Result<()> {
    let Some(lab) = Lab::new("a_machine_that_cannot_be_committed_is_not_booted_for_it")? else {
        return Ok(());
    };
    let (kernel, disk) = (lab.file("kernel", READY)?, lab.file("disk", &[0; 4096])?);
    let disk = format!("{disk}:direct");
    let said = lab.cli.fails(
        2,
        &[
            "run",
            "r",
            "--kernel",
            &kernel,
            "--mem",
            "16M",
            "--detach",
            "--disk",
            &disk,
            "--commit-when",
            "ready",
            "--tag",
            "t",
        ],
    )?;
    ensure!(said.contains(":direct"), "{said}");
    ensure!(lab.machines()?.is_empty());
    lab.finish()
}
