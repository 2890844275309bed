//! Commits that fail leave the machine as it was, and its next commit whole.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt as _;

use anyhow::{Result, ensure};
use rustix::fs::{FlockOperation, flock};
use rustix::process::Signal;
use serde_json::json;
use snapstore_guests::{TABLE, TOUCH, TouchCommand, page_sum};
use snapstore_tests::crashing::SmallDisk;
use snapstore_tests::harness::{Cli, skipped};
use snapstore_tests::stopping::Running;
use snapstore_tests::vm::Lab;

/// A lab with a running `table` guest `web` that was committed as `base`.
fn with_machine(test: &str) -> Result<Option<Lab>> {
    let Some(lab) = Lab::with_mounts(test)? else {
        return Ok(None);
    };
    lab.run("web", TABLE, &[])?;
    lab.wait_for_steps("web", 2)?;
    lab.commit("base", "web")?;
    Ok(Some(lab))
}

/// The machine runs, and its next commit is a child of `base` with all in it.
fn next_is_whole(lab: &Lab) -> Result<()> {
    lab.wait_until_thawed()?;
    ensure!(lab.ps("web")?["state"] == "running");
    ensure!(lab.ps("web")?["last_commit"]["tag"] == "base");
    let at = lab.steps("web")?.last().copied().unwrap_or(0);
    lab.wait_beyond("web", at + 1)?;
    let next = lab.commit("next", "web")?;
    ensure!(next["parent_tag"] == "base", "{next}");
    lab.stop("web")?;
    lab.restore("next", &[])?;
    lab.assert_goes_on("next", "next")?;
    lab.finish()
}

#[test]
fn a_tag_that_exists_does_not_disturb_the_machine() -> Result<()> {
    let test = "a_tag_that_exists_does_not_disturb_the_machine";
    let Some(lab) = with_machine(test)? else {
        return Ok(());
    };
    let said = lab.cli.fails(1, &["commit", "base", "--vm", "web"])?;
    ensure!(
        said.contains("base") && said.contains("--replace"),
        "{said}"
    );
    lab.cli.fails(2, &["commit", "no/tag", "--vm", "web"])?;
    lab.cli
        .fails(2, &["commit", "x", "--vm", "web", "--memory", "file"])?;
    // Moving the tag is a commit like any other.
    let before = lab.committed_step("base")?;
    lab.wait_beyond("web", before + 1)?;
    lab.cli
        .ok(&["commit", "base", "--vm", "web", "--replace"])?;
    ensure!(lab.committed_step("base")? > before);
    next_is_whole(&lab)
}

#[test]
fn a_busy_store_does_not_disturb_the_machine() -> Result<()> {
    let test = "a_busy_store_does_not_disturb_the_machine";
    let Some(lab) = with_machine(test)? else {
        return Ok(());
    };
    let lock = File::options()
        .write(true)
        .open(lab.cli.store().join("locks/publish"))?;
    flock(&lock, FlockOperation::LockExclusive)?;
    let commit = ["commit", "late", "--vm", "web", "--lock-timeout", "0.3"];
    lab.cli.fails(5, &commit)?;
    // Nor does one that waits.
    let waiting = Running::start(&lab.cli, &["commit", "late", "--vm", "web"], 0)?;
    snapstore_tests::vm::eventually("it waits", || {
        Ok(has_frozen_memory(waiting.id())?.then_some(()))
    })?;
    let at = lab.steps("web")?.last().copied().unwrap_or(0);
    lab.wait_beyond("web", at + 2)?;
    ensure!(!waiting.has_ended()?, "it did not wait");
    let said = lab.cli.fails(5, &["commit", "other", "--vm", "web"])?;
    ensure!(said.contains(&waiting.id().to_string()), "{said}");
    drop(waiting);
    drop(lock);
    lab.cli.fails(3, &["show", "late"])?;
    next_is_whole(&lab)
}

/// Whether a process was handed a machine's frozen memory, which is another process's
/// or an unnamed file.
fn has_frozen_memory(pid: u32) -> Result<bool> {
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        // What was closed meanwhile is not it.
        let target = fs::read_link(entry?.path()).unwrap_or_default();
        let target = target.to_string_lossy();
        if target.starts_with("/memfd:snapstore pages") || target.ends_with("/mem") {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The store of a machine may be any; a wrong one has not its origin.
#[test]
fn a_store_without_the_origin_is_refused() -> Result<()> {
    let Some(lab) = with_machine("a_store_without_the_origin_is_refused")? else {
        return Ok(());
    };
    let runtime = lab.runtime().display().to_string();
    let other = Cli::new(&lab.path("other")).with_env("SNAPSTORE_RUNTIME_DIR", &runtime);
    other.ok(&["init"])?;
    let output = other.run(&["commit", "wrong", "--vm", "web"])?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success(), "{output:?}");
    ensure!(said.matches("error:").count() == 1, "{said}");
    next_is_whole(&lab)
}

#[test]
fn a_full_store_does_not_disturb_the_machine() -> Result<()> {
    let test = "a_full_store_does_not_disturb_the_machine";
    let Some(mut lab) = Lab::with_mounts(test)? else {
        return Ok(());
    };
    let disk = match SmallDisk::mount(128 << 20) {
        Ok(disk) => disk,
        Err(error) => {
            skipped(test, &format!("no filesystem of its own: {error}"));
            return Ok(());
        }
    };
    lab.use_store(&disk.path().join("store"))?;
    lab.run("web", TABLE, &[])?;
    lab.wait_for_steps("web", 2)?;
    lab.commit("base", "web")?;
    lab.wait_beyond("web", 4)?;
    // From not even room for a page to room for all but the last steps.
    for free in [0, 8 << 10, 32 << 10, 64 << 10, 96 << 10, 128 << 10] {
        disk.leave_free(free)?;
        let output = lab.cli.run(&["commit", "next", "--vm", "web"])?;
        lab.wait_until_thawed()?;
        let said = String::from_utf8_lossy(&output.stderr);
        if output.status.success() {
            fs::remove_file(disk.path().join("ballast"))?;
            lab.cli.ok(&["rm", "next"])?;
            break;
        }
        ensure!(
            output.status.code() == Some(1),
            "{free} bytes free: {output:?}"
        );
        ensure!(said.contains("space"), "{said}");
        lab.steps("web")?;
    }
    let _ = fs::remove_file(disk.path().join("ballast"));
    lab.cli.fails(3, &["show", "next"])?;
    let at = lab.steps("web")?.last().copied().unwrap_or(0);
    lab.wait_beyond("web", at + 1)?;
    lab.commit("next", "web")?;
    lab.stop("web")?;
    lab.restore("next", &[])?;
    lab.assert_goes_on("next", "next")?;
    lab.finish()
}

/// What a failed commit read is read by the next.
#[test]
fn a_failed_commit_takes_nothing_from_the_next() -> Result<()> {
    let test = "a_failed_commit_takes_nothing_from_the_next";
    let Some(lab) = Lab::with_mounts(test)? else {
        return Ok(());
    };
    lab.run("vm", TOUCH, &[])?;
    let write = |first: u32, count: u32, value: u32| -> Result<()> {
        let write = TouchCommand::Write {
            count,
            first,
            value,
        };
        let before = lab.console("vm")?.matches("\nw").count();
        lab.type_in("vm", &write.encode())?;
        snapstore_tests::vm::eventually("pages are written", || {
            Ok((lab.console("vm")?.matches("\nw").count() > before).then_some(()))
        })
    };
    write(512, 100, 1)?;
    lab.commit("base", "vm")?;
    write(600, 100, 2)?;
    for _ in 0..3 {
        // The machine notices a moment later that the one before has gone.
        snapstore_tests::vm::eventually("a freeze", || {
            let mut control = lab.connect("vm")?;
            let reply = control.ask(&json!({"request": "freeze"}))?;
            ensure!(
                reply["reply"] == "frozen" || reply["kind"] == "busy",
                "{reply}"
            );
            Ok((reply["reply"] == "frozen").then_some(()))
        })?;
    }
    write(800, 5, 3)?;
    // One that becomes durable while another freeze has begun cannot be: busy.
    let next = snapstore_tests::vm::eventually("a commit", || Ok(lab.commit("next", "vm").ok()))?;
    let read = next["read_bytes"].as_u64().unwrap_or(0) / 4096;
    ensure!((105..=109).contains(&read), "{next}");
    lab.stop("vm")?;
    lab.restore("next", &[])?;
    for (first, count, value) in [(512, 88, 1), (600, 100, 2), (800, 5, 3)] {
        lab.type_in("next", &TouchCommand::Read { count, first }.encode())?;
        let answer = format!("r{:08x}\n", page_sum(count, first, value));
        lab.wait_for_text("next", &answer)?;
    }
    lab.finish()
}

/// What a commit counts on is set aside by a repair that began before it: it reads once more.
#[test]
fn a_commit_that_a_repair_overtakes_is_made_once_more() -> Result<()> {
    const COUNT: u32 = 20_000;
    let test = "a_commit_that_a_repair_overtakes_is_made_once_more";
    let Some(lab) = Lab::with_mounts(test)? else {
        return Ok(());
    };
    let write = TouchCommand::Write {
        count: COUNT,
        first: 512,
        value: 5,
    };
    for name in ["first", "second"] {
        lab.run(name, TOUCH, &["--mem", "128M"])?;
        lab.type_in(name, &write.encode())?;
        lab.wait_for_text(name, &format!("w{COUNT}\n"))?;
    }
    lab.commit("first", "first")?;
    lab.stop("first")?;
    let packs = fs::read_dir(lab.cli.store().join("packs"))?;
    let packs: Vec<_> = packs.collect::<Result<_, _>>()?;
    for pack in packs {
        let mut bytes = fs::read(pack.path())?;
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::set_permissions(pack.path(), fs::Permissions::from_mode(0o644))?;
        fs::write(pack.path(), bytes)?;
    }
    let repair = Running::start(&lab.cli, &["repair"], 1)?;
    ensure!(!repair.has_ended()?, "it was not stopped");
    // The second one holds the same, and stores it no more.
    let arguments = ["commit", "second", "--vm", "second", "-v"];
    let commit = Running::start(&lab.cli, &arguments, 1)?;
    ensure!(!commit.has_ended()?, "it was not stopped");
    repair.send(Signal::CONT)?;
    repair.output()?;
    commit.send(Signal::CONT)?;
    let output = commit.output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{output:?}");
    ensure!(
        said.contains("read once more"),
        "nothing overtook it: {said}"
    );
    lab.stop("second")?;
    lab.restore("second", &["--name", "again"])?;
    let read = TouchCommand::Read {
        count: COUNT,
        first: 512,
    };
    lab.type_in("again", &read.encode())?;
    let sum = page_sum(COUNT, 512, 5);
    lab.wait_for_text("again", &format!("r{sum:08x}\n"))?;
    // What was lost is of this one only.
    lab.cli.ok(&["rm", "first"])?;
    lab.finish()
}
