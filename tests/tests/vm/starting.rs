//! Machines that do not start leave nothing: neither those that got no process, nor those
//! whose command was killed meanwhile.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _, chown};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use rustix::fs::{FlockOperation, flock};
use serde_json::{Value, json};
use snapstore_tests::harness::copy_program;
use snapstore_tests::vm::{Lab, names};

/// A user without processes.
const NOBODY_ELSE: u32 = 1_234_567;

/// The program where every user may execute it, with that of machines beside it.
fn program(lab: &Lab) -> Result<PathBuf> {
    let dir = lab.path("bin");
    let built = PathBuf::from(lab.cli.command(&[])?.get_program());
    if !dir.exists() {
        DirBuilder::new().mode(0o755).create(&dir)?;
        for name in ["snapstore", "snapstore-machine"] {
            copy_program(&built.with_file_name(name), &dir.join(name))?;
        }
    }
    Ok(dir.join("snapstore"))
}

/// The process that starts machines, of a user who may have so many; it has no orders yet.
fn starter(
    lab: &Lab,
    runtime: &Path,
    user: Option<u32>,
    processes: &str,
) -> Result<(Child, UnixStream)> {
    // Shells differ in how that is called.
    const LIMITED: &str =
        r#"ulimit -u "$1" 2>/dev/null || ulimit -p "$1" 2>/dev/null; exec "$0" vm-host"#;
    let (ours, theirs) = UnixStream::pair()?;
    let mut command = Command::new("sh");
    command
        .args(["-c", LIMITED])
        .arg(program(lab)?)
        .arg(processes)
        .env("SNAPSTORE_RUNTIME_DIR", runtime)
        .stdin(OwnedFd::from(theirs))
        .stdout(Stdio::piped());
    if let Some(user) = user {
        command.uid(user);
    }
    Ok((command.spawn()?, ours))
}

/// Tells it to start `a` and `b`, which cannot be.
fn order(starter: &mut UnixStream, share_layout: bool) -> Result<()> {
    let spec = json!({
        "names": ["a", "b"],
        "what": {"restore": {"dir": "/no/such/mount", "snapshot": "00"}},
        "overlays": {"dir": "/tmp", "limit_bytes": null},
        "nets": [[], []],
        "origin": {"snapshot": null, "tag": null},
        "run": false,
        "stop_at_ready": false,
        "kept": [],
        "confine": false,
        "share_layout": share_layout,
    });
    starter.write_all(format!("{}\n", json!({"Start": spec})).as_bytes())?;
    Ok(())
}

#[test]
fn machines_for_which_there_is_no_process_leave_nothing() -> Result<()> {
    let test = "machines_for_which_there_is_no_process_leave_nothing";
    let Some(lab) = Lab::new(test)? else {
        return Ok(());
    };
    let user = rustix::process::geteuid().is_root().then_some(NOBODY_ELSE);
    fs::set_permissions(lab.path(""), Permissions::from_mode(0o711))?;
    for share_layout in [false, true] {
        // None of them can have a process, or the first one only.
        for processes in ["1", "2"] {
            let runtime = lab.path(&format!("{share_layout}{processes}"));
            DirBuilder::new().mode(0o700).create(&runtime)?;
            chown(&runtime, user, None)?;
            let (mut child, mut socket) = starter(&lab, &runtime, user, processes)?;
            order(&mut socket, share_layout)?;
            let output = child.stdout.take().context("no pipe")?;
            let mut told = String::new();
            for line in BufReader::new(output).lines() {
                let announced: Value = serde_json::from_str(&line?)?;
                ensure!(!announced["outcome"]["Err"].is_null(), "{announced}");
                told += &announced.to_string();
            }
            child.wait()?;
            ensure!(told.contains("start a machine's process"), "{told}");
            let left = names(&runtime.join("vms"));
            ensure!(left.is_empty(), "{share_layout} {processes}: {left:?}");
        }
    }
    lab.finish()
}

#[test]
fn machines_whose_command_was_killed_leave_nothing() -> Result<()> {
    let Some(lab) = Lab::new("machines_whose_command_was_killed_leave_nothing")? else {
        return Ok(());
    };
    let (mut child, mut socket) = starter(&lab, &lab.runtime(), None, "unlimited")?;
    drop(child.stdout.take());
    // Somebody has the second name.
    let mut builder = DirBuilder::new();
    builder
        .mode(0o700)
        .recursive(true)
        .create(lab.vm_dir("b"))?;
    let held = File::create(lab.vm_dir("b").join("lock"))?;
    flock(&held, FlockOperation::LockExclusive)?;
    order(&mut socket, false)?;
    child.wait()?;
    let left = names(&lab.runtime().join("vms"));
    ensure!(left.iter().eq(["b"]), "{left:?}");
    fs::remove_dir_all(lab.vm_dir("b"))?;
    lab.finish()
}
