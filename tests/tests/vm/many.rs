//! Many machines from one snapshot.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder};
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _};

use anyhow::{Context as _, Result, ensure};
use snapstore_guests::{SPIN, TABLE};
use snapstore_tests::vm::{Lab, eventually, kill};

/// A lab with a snapshot `base` of a `table` guest, which is stopped.
fn with_base(test: &str) -> Result<Option<Lab>> {
    let Some(lab) = Lab::with_mounts(test)? else {
        return Ok(None);
    };
    lab.run("web", TABLE, &[])?;
    lab.wait_for_steps("web", 2)?;
    lab.commit("base", "web")?;
    lab.stop("web")?;
    Ok(Some(lab))
}

#[test]
fn twenty_machines_live_side_by_side() -> Result<()> {
    let Some(lab) = with_base("twenty_machines_live_side_by_side")? else {
        return Ok(());
    };
    let names = lab.restore("base", &["-n", "20"])?;
    let wanted: Vec<_> = (1..=20).map(|number| format!("base.{number}")).collect();
    ensure!(names == wanted, "{names:?}");
    // They were told to run when the command ended; the last one takes a moment.
    let listed = eventually("all run", || {
        let listed = lab.machines()?;
        let run = listed.iter().all(|machine| machine["state"] == "running");
        Ok(run.then_some(listed))
    })?;
    ensure!(listed.len() == 20, "{listed:?}");
    let mut pids = BTreeSet::new();
    for machine in &listed {
        let name = machine["name"].as_str().context("no name")?;
        ensure!(machine["origin"]["tag"] == "base", "{machine}");
        ensure!(machine["pss_bytes"].as_u64() > Some(0), "{machine}");
        pids.insert(machine["pid"].as_u64());
        let dir = fs::metadata(lab.vm_dir(name))?;
        ensure!(dir.mode() & 0o777 == 0o700, "{name}: {:o}", dir.mode());
        let socket = fs::metadata(lab.vm_dir(name).join("control.sock"))?;
        ensure!(socket.file_type().is_socket());
        ensure!(
            socket.mode() & 0o777 == 0o600,
            "{name}: {:o}",
            socket.mode()
        );
    }
    ensure!(pids.len() == 20, "{pids:?}");
    ensure!(lab.mounts()?.len() == 1, "they share one mount");
    for name in &names {
        let at = lab.committed_step("base")?;
        let first = lab.wait_for_steps(name, 1)?[0];
        ensure!(
            first == at || first == at + 1,
            "{name} went on at {first}, not {at}"
        );
    }
    lab.commit("child", "base.7")?;
    lab.finish()?;
    lab.restore("child", &[])?;
    lab.assert_goes_on("child", "child")?;
    lab.finish()
}

#[test]
fn names_that_run_are_passed_over() -> Result<()> {
    let Some(lab) = with_base("names_that_run_are_passed_over")? else {
        return Ok(());
    };
    ensure!(lab.restore("base", &[])? == ["base"]);
    ensure!(lab.restore("base", &[])? == ["base.1"]);
    ensure!(lab.restore("base", &["-n", "2"])? == ["base.2", "base.3"]);
    lab.stop("base.2")?;
    ensure!(lab.restore("base", &["-n", "2"])? == ["base.2", "base.4"]);
    ensure!(lab.restore("base", &["-n", "2", "--name", "w"])? == ["w.1", "w.2"]);
    // But a name that was asked for is that one, or none.
    let said = lab
        .cli
        .fails(5, &["restore", "base", "--detach", "--name", "w.1"])?;
    ensure!(said.contains("w.1"), "{said}");
    lab.finish()
}

#[test]
fn a_name_in_use_is_busy() -> Result<()> {
    let Some(lab) = Lab::new("a_name_in_use_is_busy")? else {
        return Ok(());
    };
    lab.run("web", TABLE, &[])?;
    lab.wait_for_steps("web", 1)?;
    let pid = lab.pid("web")?;
    let kernel = lab.file("kernel", SPIN)?;
    let arguments = [
        "run", "web", "--kernel", &kernel, "--mem", "16M", "--detach",
    ];
    let said = lab.cli.fails(5, &arguments)?;
    ensure!(said.contains("web") && said.contains("runs"), "{said}");
    ensure!(lab.pid("web")? == pid, "another machine took the name");
    // The machine and its supervisor.
    eventually("there is one machine", || {
        Ok((lab.processes()?.len() == 2).then_some(()))
    })?;
    let now = lab.steps("web")?.len();
    lab.wait_for_steps("web", now + 1)?;
    // A killed machine's name is free again.
    kill(pid)?;
    lab.cli.ok(&arguments)?;
    ensure!(lab.machines()?.len() == 1);
    lab.finish()
}

/// Whatever keeps one of several from starting, none is left running.
#[test]
fn several_start_or_none() -> Result<()> {
    let Some(lab) = with_base("several_start_or_none")? else {
        return Ok(());
    };
    // A directory that others can enter is not taken for a machine's.
    DirBuilder::new().mode(0o755).create(lab.vm_dir("base.3"))?;
    let said = lab
        .cli
        .fails(1, &["restore", "base", "-n", "5", "--detach"])?;
    ensure!(said.contains("base.3"), "{said}");
    fs::remove_dir(lab.vm_dir("base.3"))?;
    ensure!(lab.machines()?.is_empty(), "{:?}", lab.machines()?);
    lab.assert_nothing_left()?;

    // A file in the place of a machine's directory.
    fs::write(lab.vm_dir("base.1"), b"")?;
    lab.cli
        .fails(1, &["restore", "base", "-n", "3", "--detach"])?;
    ensure!(lab.machines()?.is_empty(), "{:?}", lab.machines()?);
    fs::remove_file(lab.vm_dir("base.1"))?;
    lab.assert_nothing_left()?;
    ensure!(lab.restore("base", &["-n", "3"])?.len() == 3);
    lab.finish()
}

#[test]
fn two_that_restore_at_once_get_different_names_or_none() -> Result<()> {
    let test = "two_that_restore_at_once_get_different_names_or_none";
    let Some(lab) = with_base(test)? else {
        return Ok(());
    };
    for _ in 0..3 {
        let arguments = ["restore", "base", "-n", "4", "--detach", "--json"];
        let mut children = Vec::new();
        for _ in 0..2 {
            let mut command = lab.cli.command(&arguments)?;
            command.stdout(std::process::Stdio::piped());
            command.stderr(std::process::Stdio::piped());
            children.push(command.spawn()?);
        }
        let mut started = 0;
        for child in children {
            let output = child.wait_with_output()?;
            match output.status.code() {
                Some(0) => started += 4,
                Some(5) => {}
                _ => anyhow::bail!("{output:?}"),
            }
        }
        // A machine answers just before its vCPUs are let go.
        eventually("they run", || {
            let listed = lab.machines()?;
            ensure!(listed.len() == started, "{started}: {listed:?}");
            let all_run = listed.iter().all(|it| it["state"] == "running");
            Ok(all_run.then_some(()))
        })?;
        lab.cli.ok(&["stop", "--all"])?;
    }
    lab.finish()
}

#[test]
fn stopping_some_leaves_the_others() -> Result<()> {
    let Some(lab) = with_base("stopping_some_leaves_the_others")? else {
        return Ok(());
    };
    lab.restore("base", &["-n", "4"])?;
    lab.cli.ok(&["stop", "base.1", "base.3"])?;
    let left: Vec<_> = lab
        .machines()?
        .iter()
        .map(|it| it["name"].clone())
        .collect();
    ensure!(left == ["base.2", "base.4"], "{left:?}");
    // One that is not there any more keeps no other from being stopped.
    lab.cli.fails(3, &["stop", "base.2", "base.1"])?;
    ensure!(lab.machines()?.len() == 1);
    let stopped = lab.cli.json(&["stop", "--all"])?;
    ensure!(
        stopped["stopped"] == serde_json::json!(["base.4"]),
        "{stopped}"
    );
    lab.finish()
}

#[test]
fn killed_machines_are_listed_as_dead_and_forgotten_when_stopped() -> Result<()> {
    let test = "killed_machines_are_listed_as_dead_and_forgotten_when_stopped";
    let Some(lab) = with_base(test)? else {
        return Ok(());
    };
    lab.restore("base", &["-n", "2"])?;
    kill(lab.pid("base.1")?)?;
    let reason = lab.wait_for_death("base.1")?;
    ensure!(reason.contains("killed"), "{reason}");
    let said = lab.cli.fails(3, &["pause", "base.1"])?;
    ensure!(said.contains("base.1"), "{said}");
    lab.stop("base.1")?;
    eventually("it is forgotten", || {
        Ok((lab.machines()?.len() == 1).then_some(()))
    })?;
    lab.wait_for_steps("base.2", 2)?;
    lab.finish()
}

/// One that waits for those that are started with it is not paused: nobody has to resume it.
#[test]
fn machines_that_are_about_to_run_are_starting() -> Result<()> {
    let Some(lab) = with_base("machines_that_are_about_to_run_are_starting")? else {
        return Ok(());
    };
    let arguments = ["restore", "base", "--detach", "-n", "12"];
    let mut restore = lab.cli.command(&arguments)?.spawn()?;
    let mut seen = BTreeSet::new();
    while restore.try_wait()?.is_none() {
        for number in 1..=12 {
            let Ok(mut control) = lab.connect(&format!("base.{number}")) else {
                continue;
            };
            if let Ok(status) = control.ask(&serde_json::json!({"request": "status"})) {
                seen.insert(status["state"].to_string());
            }
        }
    }
    ensure!(restore.wait()?.success());
    println!("seen: {seen:?}");
    seen.remove("\"starting\"");
    seen.remove("\"running\"");
    ensure!(seen.is_empty(), "{seen:?}");
    for number in 1..=12 {
        ensure!(lab.ps(&format!("base.{number}"))?["state"] == "running");
    }
    // As nobody is about to let this one run.
    lab.restore("base", &["--name", "still", "--paused"])?;
    ensure!(lab.ps("still")?["state"] == "paused");
    lab.finish()
}
