//! QEMU without an operating system: what an earlier commit, which was killed, may have left
//! in it, and what a restore reads.

use std::fs::File;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::process::{Command, Stdio};

use anyhow::ensure;
use serde_json::json;
use snapstore_tests::qmp::Qmp;
use snapstore_tests::vm::eventually;

use crate::qemu::program;
use crate::{Fixture, Process};

/// The number of the first set through which a commit has the state written.
const FD_SET: u64 = 0x736e_6170;

/// A display's memory is attached to the snapshot, and most of it is a hole.
#[test]
fn a_restore_does_not_read_a_mount_from_end_to_end() -> anyhow::Result<()> {
    let test = "a_restore_does_not_read_a_mount_from_end_to_end";
    let Some(qemu) = program(test) else {
        return Ok(());
    };
    let Some(fixture) = Fixture::new(test)? else {
        return Ok(());
    };
    let socket = fixture.text("qmp.sock");
    let mut machine = Command::new(&qemu);
    machine.args([
        "-display",
        "none",
        "-nodefaults",
        "-accel",
        "tcg",
        "-m",
        "16",
    ]);
    machine.args(["-device", "VGA", "-qmp"]);
    machine.arg(format!("unix:{socket},server=on,wait=off"));
    let mut process = Process::start(machine.stdin(Stdio::null()).stdout(Stdio::null()))?;
    process.wait_for_socket(socket.as_ref())?;
    let cli = &fixture.cli;
    cli.ok(&["commit", "t0", "--qmp", &socket])?;
    cli.ok(&[
        "restore",
        "t0",
        "--with",
        "qemu",
        "--exec",
        &qemu.display().to_string(),
    ])?;
    let mut mounts = std::fs::read_dir(fixture.path("run/mounts"))?;
    let mount = mounts.find_map(|it| Some(it.ok()?.path()).filter(|path| path.is_dir()));
    let mount = mount.unwrap_or_default().display().to_string();
    let used = cli.json(&["show", "--mount", &mount])?;
    let files = used["files"].as_array().cloned().unwrap_or_default();
    let regions = files.iter().find(|it| it["name"] == "regions.bin");
    let cached = regions.and_then(|it| it["cached_bytes"].as_u64());
    ensure!(cached < Some(4 << 20), "{used}");
    assert_eq!(used["reads_large"], false, "{used}");
    Ok(())
}

/// QEMU closes what was handed to it when the last client leaves, and one that watches does not.
#[test]
fn what_a_killed_commit_left_in_qemu_is_not_written_to() -> anyhow::Result<()> {
    let test = "what_a_killed_commit_left_in_qemu_is_not_written_to";
    let Some(qemu) = program(test) else {
        return Ok(());
    };
    let Some(fixture) = Fixture::new(test)? else {
        return Ok(());
    };
    let sockets = ["qmp.sock", "watch.sock"].map(|name| fixture.text(name));
    let mut machine = Command::new(qemu);
    machine.args([
        "-display",
        "none",
        "-nodefaults",
        "-accel",
        "tcg",
        "-m",
        "16",
    ]);
    for socket in &sockets {
        machine.arg("-qmp");
        machine.arg(format!("unix:{socket},server=on,wait=off"));
    }
    let mut process = Process::start(machine.stdin(Stdio::null()).stdout(Stdio::null()))?;
    for socket in &sockets {
        process.wait_for_socket(socket.as_ref())?;
    }
    let mut watching = Qmp::connect(sockets[1].as_ref())?;
    let left = fixture.path("left");
    let add = json!({"fdset-id": FD_SET});
    watching.run_with("add-fd", &add, Some(&File::create(&left)?))?;
    let none = json!({});
    assert_eq!(watching.run("query-fdsets", &none)?[0]["fdset-id"], FD_SET);
    for tag in ["t0", "t1"] {
        fixture.cli.ok(&["commit", tag, "--qmp", &sockets[0]])?;
        let state = fixture.shown(tag, "vmstate")?;
        ensure!(state.len() > 1000, "{} bytes of state", state.len());
        assert_eq!(
            watching.run("query-fdsets", &none)?,
            json!([]),
            "a set is left"
        );
    }
    // Which of two files of a set QEMU writes to is for it to choose: there are never two.
    for step in 1.. {
        if watching.run("query-fdsets", &none)? == json!([]) {
            watching.run_with("add-fd", &add, Some(&File::create(&left)?))?;
        }
        let cli = fixture.cli.clone();
        let cli = cli.with_env("SNAPSTORE_KILL_AT_MONITOR_STEP", &step.to_string());
        let output = cli.run(&["commit", "killed", "--qmp", &sockets[0]])?;
        let found = watching.run("query-fdsets", &none)?;
        let sets = found.as_array().into_iter().flatten();
        let mut files = sets.map(|set| set["fds"].as_array().map_or(0, Vec::len));
        ensure!(
            files.all(|files| files == 1),
            "killed at step {step}: {found}"
        );
        if output.status.success() {
            break;
        }
        ensure!(output.status.code().is_none(), "it failed: {output:?}");
    }
    assert_eq!(left.metadata()?.len(), 0, "it went elsewhere");
    Ok(())
}

/// Memory that a guest has not touched is a hole of its file. To read it through the process
/// would fill it: the host would hold all of a guest's memory after its first commit.
#[test]
fn holes_of_shared_memory_stay_holes() -> anyhow::Result<()> {
    let test = "holes_of_shared_memory_stay_holes";
    let Some(qemu) = program(test) else {
        return Ok(());
    };
    let Some(fixture) = Fixture::new(test)? else {
        return Ok(());
    };
    let socket = fixture.text("qmp.sock");
    let mut machine = Command::new(&qemu);
    machine.args(["-display", "none", "-nodefaults", "-accel", "tcg"]);
    machine.args(["-machine", "pc,memory-backend=ram", "-m", "256"]);
    machine.args(["-object", "memory-backend-memfd,id=ram,size=256M,share=on"]);
    machine.args(["-qmp", &format!("unix:{socket},server=on,wait=off")]);
    let mut process = Process::start(machine.stdin(Stdio::null()).stdout(Stdio::null()))?;
    process.wait_for_socket(socket.as_ref())?;
    let pid = process.0.id();
    let memory = eventually("it has memory", || memory_file(pid))?;
    let used = || anyhow::Ok(memory.metadata()?.blocks() * 512);
    let before = eventually("the firmware runs", || {
        Ok(Some(used()?).filter(|used| *used > 0))
    })?;
    ensure!(before < 64 << 20, "{before} bytes at first");
    fixture.cli.ok(&["commit", "t0", "--qmp", &socket])?;
    // The firmware runs on, and may touch a little.
    ensure!(used()? < before + (16 << 20), "{before}, then {}", used()?);
    // All that it has is in the snapshot: nothing of it changes while it is paused.
    Qmp::connect(socket.as_ref())?.run("stop", &json!({}))?;
    fixture.cli.ok(&["commit", "t1", "--qmp", &socket])?;
    let mut held = vec![0; 256 << 20];
    memory.read_exact_at(&mut held, 0)?;
    ensure!(
        held.iter().any(|byte| *byte != 0),
        "the firmware wrote nothing"
    );
    ensure!(fixture.shown("t1", "memory.bin")? == held, "other bytes");
    Ok(())
}

/// The file that a process has its guest's memory in.
fn memory_file(pid: u32) -> anyhow::Result<Option<File>> {
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        let path = entry?.path();
        let to = std::fs::read_link(&path).unwrap_or_default();
        if to.to_string_lossy().starts_with("/memfd:memory-backend") {
            return Ok(Some(File::open(path)?));
        }
    }
    Ok(None)
}
