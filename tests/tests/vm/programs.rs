//! The program that machines run in: a small one of their own, or the whole one where that
//! was put somewhere alone.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use snapstore_guests::TABLE;
use snapstore_tests::harness::{copy_program, program};
use snapstore_tests::vm::Lab;

/// The file name of the program that a process runs.
fn runs(pid: u32) -> Result<String> {
    let path = fs::read_link(format!("/proc/{pid}/exe"))?;
    let name = path.file_name().context("a program without a name")?;
    Ok(name.to_string_lossy().into_owned())
}

fn parent(pid: u32) -> Result<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("PPid:"));
    Ok(line.context("no parent")?.trim().parse()?)
}

#[test]
fn machines_run_in_a_small_program() -> Result<()> {
    let Some(lab) = Lab::with_mounts("machines_run_in_a_small_program")? else {
        return Ok(());
    };
    lab.run("web", TABLE, &[])?;
    lab.wait_for_steps("web", 2)?;
    lab.commit("base", "web")?;
    lab.restore("base", &["--name", "executed"])?;
    lab.restore("base", &["--name", "forked", "--share-layout"])?;
    for name in ["web", "executed", "forked"] {
        let pid = lab.pid(name)?;
        ensure!(runs(pid)? == "snapstore-machine", "{name}: {}", runs(pid)?);
        let parent = parent(pid)?;
        ensure!(runs(parent)? == "snapstore-machine", "{}", runs(parent)?);
    }
    lab.finish()
}

#[test]
fn the_program_alone_runs_machines_too() -> Result<()> {
    let Some(mut lab) = Lab::with_mounts("the_program_alone_runs_machines_too")? else {
        return Ok(());
    };
    let alone = lab.path("alone");
    fs::create_dir(&alone)?;
    copy_program(&program()?, &alone.join("snapstore"))?;
    lab.cli = lab.cli.clone().with_program(&alone.join("snapstore"));
    lab.run("web", TABLE, &[])?;
    lab.wait_for_steps("web", 2)?;
    ensure!(runs(lab.pid("web")?)? == "snapstore");
    lab.commit("base", "web")?;
    lab.restore("base", &["--name", "again"])?;
    lab.assert_goes_on("again", "base")?;
    // As it is installed: programs for users apart from those for none.
    let lib = lab.path("lib/snapstore");
    fs::create_dir_all(&lib)?;
    let machine = program()?.with_file_name("snapstore-machine");
    copy_program(machine.as_ref(), &lib.join("snapstore-machine"))?;
    lab.restore("base", &["--name", "installed"])?;
    ensure!(runs(lab.pid("installed")?)? == "snapstore-machine");
    lab.finish()
}

/// The two speak a language that changes: a mixed installation says so.
#[test]
fn a_machine_program_of_another_version_says_so() -> Result<()> {
    let program = program()?.with_file_name("snapstore-machine");
    for of in [None, Some("0.0.1")] {
        let mut command = std::process::Command::new(&program);
        command.arg("vm-host").env_remove("SNAPSTORE_MACHINE_OF");
        command.envs(of.map(|of| ("SNAPSTORE_MACHINE_OF", of)));
        let output = command.output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(2), "{output:?}");
        ensure!(said.contains("of its own version"), "{said}");
        ensure!(said.contains("install both together"), "{said}");
        ensure!(of.is_none_or(|of| said.contains(of)), "{said}");
    }
    Ok(())
}

/// Who would have started machines waits for a word; of a command that fails before there is
/// one it is gone when the command returns.
#[test]
fn nobody_waits_for_machines_that_are_not_started() -> Result<()> {
    let test = "nobody_waits_for_machines_that_are_not_started";
    let Some(lab) = Lab::with_mounts(test)? else {
        return Ok(());
    };
    lab.run("web", TABLE, &[])?;
    lab.wait_for_steps("web", 2)?;
    lab.commit("base", "web")?;
    lab.stop("web")?;
    lab.assert_nothing_left()?;
    for arguments in [
        &["restore", "nothing", "--detach"][..],
        &["restore", "base", "--name", "a/b", "--detach"],
        &["run", "web", "--kernel", "/nowhere/at/all", "--detach"],
    ] {
        let output = lab.cli.run(arguments)?;
        ensure!(!output.status.success(), "{output:?}");
        let processes = lab.processes()?;
        ensure!(processes.is_empty(), "{arguments:?} left {processes:?}");
    }
    lab.finish()
}
