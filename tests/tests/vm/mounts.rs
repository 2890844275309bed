//! The mounts that machines read their memory from.

use std::fs;
use std::time::Duration;

use anyhow::{Result, ensure};
use rustix::process::Signal;
use snapstore_guests::{TABLE, TOUCH, TouchCommand, page_sum};
use snapstore_tests::vm::{Lab, eventually, kill, names, runs, signal};

/// Pages that the `touch` guest of these tests wrote before it was committed.
const FIRST: u32 = 512;
const COUNT: u32 = 1500;
const VALUE: u32 = 0x1234_0000;

/// A lab with snapshots `base` of a `table` guest and `touched` of a `touch`
/// guest; both are stopped.
fn with_two(test: &str) -> Result<Option<Lab>> {
    let Some(lab) = Lab::with_mounts(test)? else {
        return Ok(None);
    };
    lab.run("web", TABLE, &[])?;
    lab.run("touch", TOUCH, &[])?;
    let write = TouchCommand::Write {
        count: COUNT,
        first: FIRST,
        value: VALUE,
    };
    lab.type_in("touch", &write.encode())?;
    lab.wait_for_text("touch", &format!("w{COUNT}\n"))?;
    lab.commit("touched", "touch")?;
    lab.wait_for_steps("web", 2)?;
    lab.commit("base", "web")?;
    lab.cli.ok(&["stop", "--all"])?;
    Ok(Some(lab))
}

/// Has the guest read all its pages, most of them for the first time.
fn reads_all(lab: &Lab, name: &str) -> Result<()> {
    let read = TouchCommand::Read {
        count: COUNT,
        first: FIRST,
    };
    lab.type_in(name, &read.encode())?;
    let answer = format!("r{:08x}\n", page_sum(COUNT, FIRST, VALUE));
    lab.wait_for_text(name, &answer)?;
    Ok(())
}

#[test]
fn a_mount_of_the_users_own_is_used_and_left_alone() -> Result<()> {
    let test = "a_mount_of_the_users_own_is_used_and_left_alone";
    let Some(lab) = with_two(test)? else {
        return Ok(());
    };
    for (tag, name) in [(Some("touched"), "one"), (None, "all")] {
        let dir = lab.path(name);
        fs::create_dir(&dir)?;
        let shown = dir.display().to_string();
        let arguments: Vec<&str> = ["mount"].into_iter().chain(tag).chain([&*shown]).collect();
        lab.cli.ok(&arguments)?;
        lab.restore("touched", &["-n", "2"])?;
        ensure!(lab.mounts()? == [dir.clone()], "{:?}", lab.mounts()?);
        ensure!(names(&lab.runtime().join("mounts")).is_empty());
        lab.cli.fails(5, &["umount", &shown])?;
        reads_all(&lab, "touched.1")?;
        lab.cli.ok(&["stop", "--all"])?;
        let memory = match tag {
            Some(_) => dir.join("memory.bin"),
            None => dir.join("touched/memory.bin"),
        };
        ensure!(
            fs::metadata(memory)?.len() == 16 << 20,
            "the mount has ended"
        );
        lab.cli.ok(&["umount", &shown])?;
        fs::remove_dir(dir)?;
    }
    lab.finish()
}

/// Neither one of the user's own nor one that was made for machines holds up the
/// next restore.
#[test]
fn a_mount_that_hangs_holds_up_no_restore() -> Result<()> {
    let Some(lab) = with_two("a_mount_that_hangs_holds_up_no_restore")? else {
        return Ok(());
    };
    let dir = lab.path("own");
    fs::create_dir(&dir)?;
    let shown = dir.display().to_string();
    let own = lab.cli.json(&["mount", "touched", &shown])?["server_pid"].as_u64();
    let own = u32::try_from(own.unwrap_or_default())?;
    signal(own, Signal::STOP)?;
    lab.restore("touched", &[])?;
    reads_all(&lab, "touched")?;
    let server = lab.mount_server()?;
    signal(server, Signal::STOP)?;
    lab.restore("touched", &[])?;
    reads_all(&lab, "touched.1")?;
    lab.cli.ok(&["stop", "touched.1"])?;
    for pid in [own, server] {
        signal(pid, Signal::CONT)?;
    }
    reads_all(&lab, "touched")?;
    lab.cli.ok(&["stop", "--all"])?;
    lab.cli.ok(&["umount", &shown])?;
    fs::remove_dir(dir)?;
    lab.finish()
}

#[test]
fn a_mount_for_machines_ends_with_the_last_of_them() -> Result<()> {
    let test = "a_mount_for_machines_ends_with_the_last_of_them";
    let Some(lab) = with_two(test)? else {
        return Ok(());
    };
    lab.restore("touched", &[])?;
    let server = lab.mount_server()?;
    lab.restore("touched", &["-n", "2"])?;
    ensure!(lab.mount_server()? == server, "a second server");
    kill(lab.pid("touched")?)?;
    lab.stop("touched.1")?;
    reads_all(&lab, "touched.2")?;
    ensure!(runs(server));
    // Another snapshot's mount is another.
    lab.restore("base", &[])?;
    ensure!(lab.mounts()?.len() == 2);
    kill(lab.pid("touched.2")?)?;
    eventually("the server ends", || Ok((!runs(server)).then_some(())))?;
    eventually("it is unmounted", || {
        Ok((lab.mounts()?.len() == 1).then_some(()))
    })?;
    lab.wait_for_steps("base", 2)?;
    lab.finish()
}

/// Machines that start while the mount of those before them ends.
#[test]
fn a_mount_that_is_just_ending_is_not_used() -> Result<()> {
    let Some(lab) = with_two("a_mount_that_is_just_ending_is_not_used")? else {
        return Ok(());
    };
    // One that is killed may have its name for a moment longer: then the next one gets another.
    for _ in 0..10 {
        let names = lab.restore("touched", &[])?;
        kill(lab.pid(&names[0])?)?;
    }
    let names = lab.restore("touched", &[])?;
    reads_all(&lab, &names[0])?;
    lab.finish()
}

#[test]
fn machines_keep_what_they_read_from() -> Result<()> {
    let Some(lab) = with_two("machines_keep_what_they_read_from")? else {
        return Ok(());
    };
    lab.restore("touched", &["-n", "2"])?;
    lab.cli.ok(&["rm", "touched"])?;
    lab.cli.ok(&["gc"])?;
    reads_all(&lab, "touched.1")?;
    // Its origin has no tag any more.
    let child = lab.commit("child", "touched.1")?;
    ensure!(
        child["parent_tag"] != "touched" && !child["parent"].is_null(),
        "{child}"
    );
    lab.cli.ok(&["stop", "--all"])?;
    lab.assert_nothing_left()?;
    lab.cli.ok(&["gc"])?;
    lab.cli.ok(&["verify", "--read-data"])?;
    lab.restore("child", &[])?;
    reads_all(&lab, "child")?;
    lab.finish()
}

#[test]
fn machines_keep_what_they_read_from_in_a_mount_of_all_tags() -> Result<()> {
    let test = "machines_keep_what_they_read_from_in_a_mount_of_all_tags";
    let Some(lab) = with_two(test)? else {
        return Ok(());
    };
    let dir = lab.path("all");
    fs::create_dir(&dir)?;
    let shown = dir.display().to_string();
    lab.cli.ok(&["mount", &shown])?;
    lab.restore("touched", &[])?;
    ensure!(lab.mounts()? == [dir]);
    lab.cli.ok(&["rm", "touched"])?;
    lab.cli.ok(&["gc"])?;
    reads_all(&lab, "touched")?;
    lab.commit("child", "touched")?;
    lab.cli.ok(&["gc"])?;
    lab.cli.ok(&["stop", "--all"])?;
    lab.cli.ok(&["umount", &shown])?;
    lab.cli.ok(&["gc"])?;
    lab.restore("child", &[])?;
    reads_all(&lab, "child")?;
    lab.finish()
}

/// The parent of the next commit is kept for a machine that booted, too.
#[test]
fn a_machine_keeps_the_parent_of_its_next_commit() -> Result<()> {
    let test = "a_machine_keeps_the_parent_of_its_next_commit";
    let Some(lab) = with_two(test)? else {
        return Ok(());
    };
    lab.run("web", TABLE, &[])?;
    lab.wait_for_steps("web", 1)?;
    let first = lab.commit("first", "web")?;
    lab.cli.ok(&["rm", "first"])?;
    lab.cli.ok(&["gc"])?;
    lab.wait_beyond("web", 3)?;
    let second = lab.commit("second", "web")?;
    ensure!(second["parent"] == first["id"], "{second}");
    lab.cli.ok(&["rm", "second"])?;
    lab.cli.ok(&["gc"])?;
    lab.wait_beyond("web", 5)?;
    lab.commit("third", "web")?;
    lab.stop("web")?;
    lab.cli.ok(&["gc"])?;
    lab.cli.ok(&["verify", "--read-data"])?;
    lab.restore("third", &[])?;
    lab.assert_goes_on("third", "third")?;
    lab.finish()
}

/// Once nobody needs it, it goes.
#[test]
fn ended_machines_keep_nothing() -> Result<()> {
    let Some(lab) = with_two("ended_machines_keep_nothing")? else {
        return Ok(());
    };
    lab.restore("touched", &[])?;
    lab.commit("child", "touched")?;
    kill(lab.pid("touched")?)?;
    lab.cli.ok(&["stop", "--all"])?;
    lab.assert_nothing_left()?;
    lab.cli.ok(&["rm", "base", "touched", "child"])?;
    lab.cli.ok(&["gc"])?;
    let left = names(&lab.cli.store().join("packs"));
    ensure!(left.is_empty(), "{left:?}");
    ensure!(names(&lab.cli.store().join("leases")).is_empty());
    lab.finish()
}

#[test]
fn what_killed_commands_and_servers_leave_goes_when_machines_are_listed() -> Result<()> {
    let test = "what_killed_commands_and_servers_leave_goes_when_machines_are_listed";
    let Some(lab) = with_two(test)? else {
        return Ok(());
    };
    lab.restore("base", &[])?;
    let server = lab.mount_server()?;
    kill(server)?;
    lab.stop("base")?;
    // As a command leaves it that was killed before there was a machine.
    let abandoned = lab.vm_dir("never");
    fs::create_dir(&abandoned)?;
    fs::set_permissions(
        &abandoned,
        std::os::unix::fs::PermissionsExt::from_mode(0o700),
    )?;
    fs::write(abandoned.join("starter"), "")?;
    // As a server does that ends after its lock is gone, and before its directory is.
    fs::create_dir(lab.runtime().join("mounts").join("0".repeat(64)))?;
    ensure!(lab.machines()?.is_empty());
    ensure!(lab.mounts()?.is_empty(), "{:?}", lab.mounts()?);
    lab.assert_nothing_left()
}

#[test]
fn a_machine_that_is_still_starting_is_listed() -> Result<()> {
    let test = "a_machine_that_is_still_starting_is_listed";
    let Some(lab) = Lab::new(test)? else {
        return Ok(());
    };
    ensure!(lab.machines()?.is_empty());
    // As a command does that is about to start one.
    let dir = lab.vm_dir("slow");
    fs::create_dir(&dir)?;
    fs::set_permissions(&dir, std::os::unix::fs::PermissionsExt::from_mode(0o700))?;
    let starter = fs::File::create(dir.join("starter"))?;
    rustix::fs::flock(&starter, rustix::fs::FlockOperation::LockExclusive)?;
    let listed = lab.machines()?;
    ensure!(listed.len() == 1, "{listed:?}");
    ensure!(listed[0]["name"] == "slow" && listed[0]["state"] == "starting");
    let shown = lab.cli.ok(&["ps"])?;
    ensure!(
        shown.contains("slow") && shown.contains("starting"),
        "{shown}"
    );
    // And its name is taken.
    let kernel = lab.file("kernel", TABLE)?;
    lab.cli
        .fails(5, &["run", "slow", "--kernel", &kernel, "--detach"])?;
    drop(starter);
    ensure!(lab.machines()?.is_empty(), "its command is gone");
    lab.finish()
}

/// A mount is found by its path, and its user may undo it and mount something else there
/// before a machine has opened anything. Whatever the moment, what runs is the snapshot that
/// was asked for.
#[test]
fn a_mount_that_is_changed_meanwhile_is_not_taken_for_the_other() -> Result<()> {
    let test = "a_mount_that_is_changed_meanwhile_is_not_taken_for_the_other";
    let Some(lab) = Lab::with_mounts(test)? else {
        return Ok(());
    };
    lab.run("web", TABLE, &[])?;
    lab.wait_for_steps("web", 2)?;
    lab.commit("early", "web")?;
    let late = lab.committed_step("early")? + 20;
    lab.wait_beyond("web", late)?;
    lab.commit("late", "web")?;
    lab.stop("web")?;
    let dir = lab.path("mount");
    fs::create_dir(&dir)?;
    let shown = dir.display().to_string();
    // Below the mount lie plain copies of the other's files.
    lab.cli.ok(&["mount", "late", &shown])?;
    let files = ["manifest.json", "memory.bin", "vmstate"];
    let copies: Vec<Vec<u8>> = files
        .iter()
        .map(|name| fs::read(dir.join(name)))
        .collect::<Result<_, _>>()?;
    lab.cli.ok(&["umount", &shown])?;
    for (name, bytes) in files.iter().zip(&copies) {
        fs::write(dir.join(name), bytes)?;
    }
    for round in 0..ROUNDS {
        lab.cli.ok(&["mount", "early", &shown])?;
        let mut restore = lab
            .cli
            .command(&["restore", "early", "--name", "again", "--detach"])?;
        let mut restore = restore.spawn()?;
        std::thread::sleep(STEP * round);
        lab.cli.ok(&["umount", "--lazy", &shown])?;
        if round % 2 == 0 {
            lab.cli.ok(&["mount", "late", &shown])?;
        }
        ensure!(restore.wait()?.success(), "round {round}");
        let step = lab.wait_for_steps("again", 1)?[0];
        ensure!(
            step < late,
            "round {round}: it went on at {step}, as of late"
        );
        lab.stop("again")?;
        if round % 2 == 0 {
            lab.cli.ok(&["umount", &shown])?;
        }
    }
    lab.finish()
}

/// How often a mount is changed, each time a little later after a restore began.
const ROUNDS: u32 = 30;
const STEP: Duration = Duration::from_micros(1500);
