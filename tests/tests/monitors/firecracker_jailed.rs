//! Firecracker in a chroot, as its jailer has it: what it is told are paths in there, and its
//! process is another user's, in another mount namespace.

use std::fs;
use std::os::unix::fs::{chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::ensure;
use serde_json::{Value, json};
use snapstore_tests::harness::{noise, skipped};

use crate::firecracker::{is_running, write};
use crate::{Fixture, PAGE, Process, double, http, set};

const MIB: usize = 1 << 20;
/// The user of the jailer's options `--uid` and `--gid`.
const USER: u32 = 12345;

struct Jail {
    _process: Process,
    socket: String,
}

fn in_jail(program: &Path, dir: &Path, more: &[&str]) -> anyhow::Result<Jail> {
    chown(dir, Some(USER), Some(USER))?;
    let mut process = Process::start(
        Command::new(program)
            .args(["--api-sock", "api.sock"])
            .args(more)
            .env("DOUBLE_JAIL", dir)
            .env("DOUBLE_USER", USER.to_string()),
    )?;
    let socket = dir.join("api.sock");
    process.wait_for_socket(&socket)?;
    Ok(Jail {
        _process: process,
        socket: socket.display().to_string(),
    })
}

/// What commits leave in a chroot.
fn left(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let entries = fs::read_dir(dir)?.collect::<Result<Vec<_>, _>>()?;
    let paths = entries.into_iter().map(|entry| entry.path());
    let is_ours = |path: &PathBuf| path.display().to_string().contains("/.snapstore-");
    Ok(paths.filter(is_ours).collect())
}

fn load(socket: &str, dir: &str) -> anyhow::Result<()> {
    let load = json!({
        "snapshot_path": format!("{dir}/vmstate"),
        "mem_backend": {"backend_type": "File", "backend_path": format!("{dir}/memory.bin")},
        "track_dirty_pages": true, "resume_vm": true,
    });
    http(socket, "PUT", "/snapshot/load", &load).map(drop)
}

#[test]
fn a_machine_in_a_jail_is_committed_and_its_clones_are() -> anyhow::Result<()> {
    let test = "a_machine_in_a_jail_is_committed_and_its_clones_are";
    let Some(fixture) = Fixture::new(test)? else {
        return Ok(());
    };
    if !rustix::process::geteuid().is_root() {
        skipped(test, "only root can make a jail");
        return Ok(());
    }
    let Some(program) = double(&fixture, test, "firecracker", &[])? else {
        return Ok(());
    };
    let first_dir = fixture.path("first");
    fs::create_dir(&first_dir)?;
    let (mut memory, mut disk) = (vec![0; 4 * MIB], noise(3, 64 * PAGE));
    fs::write(first_dir.join("root.img"), &disk)?;
    chown(first_dir.join("root.img"), Some(USER), Some(USER))?;
    let config = json!({
        "machine-config": {"mem_size_mib": 4, "vcpu_count": 1, "track_dirty_pages": false},
        "drives": [{"drive_id": "root", "path_on_host": "root.img", "is_read_only": false}],
        "network-interfaces": [], "vsock": null,
    });
    fs::write(first_dir.join("config.json"), config.to_string())?;
    // As a commit leaves it that is killed.
    fs::write(first_dir.join(".snapstore-4194305-memory"), "left")?;
    let first = in_jail(&program, &first_dir, &["--boot", "config.json"])?;
    write(&first.socket, 9, 2)?;
    set(&mut memory, 9, 2);
    set(&mut disk, 9, 2);
    let commit = |tag: &str, socket: &str| -> anyhow::Result<Value> {
        fixture.cli.json(&["commit", tag, "--firecracker", socket])
    };
    commit("t0", &first.socket)?;
    ensure!(is_running(&first.socket)?, "it does not go on");
    ensure!(left(&first_dir)?.is_empty(), "{:?}", left(&first_dir)?);
    ensure!(fixture.shown("t0", "memory.bin")? == memory, "other memory");
    ensure!(fixture.shown("t0", "disk0.img")? == disk, "another disk");

    // One clone's jail has a view of its own, the other sees a clone of a common one.
    let overlays = fixture.text("overlays");
    fs::create_dir(&overlays)?;
    let owner = format!("{USER}:{USER}");
    let rw = [
        "mount",
        "--rw",
        "--owner",
        &owner,
        "--overlay-dir",
        &overlays,
    ];
    let alone = fixture.path("alone");
    let view = alone.join("vm");
    let common = fixture.path("vms");
    let bound = fixture.path("bound");
    for dir in [&alone, &view, &common, &bound, &bound.join("vm")] {
        fs::create_dir(dir)?;
    }
    let (view, vms) = (view.display().to_string(), common.display().to_string());
    fixture.cli.ok(&[&rw[..], &["t0", &view]].concat())?;
    fixture
        .cli
        .ok(&[&rw[..], &["-n", "3", "t0", &vms]].concat())?;
    rustix::mount::mount_bind(common.join("2"), bound.join("vm"))?;
    let answers = ["alone", "bound"].map(|name| -> anyhow::Result<Value> {
        let dir = fixture.path(name);
        symlink("vm/disk0.img", dir.join("root.img"))?;
        let jail = in_jail(&program, &dir, &[])?;
        load(&jail.socket, "vm")?;
        write(&jail.socket, 20, 5)?;
        let answer = commit(name, &jail.socket)?;
        ensure!(is_running(&jail.socket)?, "it does not go on");
        ensure!(left(&dir)?.is_empty(), "{:?}", left(&dir)?);
        Ok(answer)
    });
    rustix::mount::unmount(bound.join("vm"), rustix::mount::UnmountFlags::DETACH)?;
    for dir in [&view, &vms] {
        fixture.cli.ok(&["umount", dir])?;
    }
    set(&mut memory, 20, 5);
    set(&mut disk, 20, 5);
    for (answer, tag) in answers.into_iter().zip(["alone", "bound"]) {
        let answer = answer?;
        assert_eq!(answer["parent_tag"], "t0", "{answer}");
        for image in &answer["images"].as_array().cloned().unwrap_or_default()[..2] {
            assert_eq!(image["changed_pages"], 1, "{answer}");
        }
        // Nothing was read but what was written.
        let read = answer["read_bytes"].as_u64();
        assert!(read <= Some(8 * PAGE as u64), "{answer}");
        ensure!(fixture.shown(tag, "memory.bin")? == memory, "{tag}");
        ensure!(fixture.shown(tag, "disk0.img")? == disk, "{tag}");
    }
    Ok(())
}
