//! Firecracker: against a double of its API that refuses what its description does not have.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::ensure;
use serde_json::json;
use snapstore_tests::harness::noise;

use crate::{Fixture, PAGE, Process, double, http, set};

const MIB: usize = 1 << 20;

pub struct Double {
    _process: Process,
    pub socket: String,
}

impl Double {
    pub fn boot(
        fixture: &Fixture,
        program: &Path,
        environment: &[(&str, &str)],
    ) -> anyhow::Result<Self> {
        fs::write(fixture.path("root.img"), noise(3, 64 * PAGE))?;
        let config = json!({
            "machine-config": {"mem_size_mib": 4, "vcpu_count": 1, "track_dirty_pages": false},
            "drives": [
                {"drive_id": "root", "path_on_host": "root.img", "is_read_only": false},
            ],
            "network-interfaces": [],
            "vsock": null,
        });
        Self::boot_with(fixture, program, environment, &config)
    }

    pub fn boot_with(
        fixture: &Fixture,
        program: &Path,
        environment: &[(&str, &str)],
        config: &serde_json::Value,
    ) -> anyhow::Result<Self> {
        let path = fixture.text("config.json");
        fs::write(&path, config.to_string())?;
        let socket = fixture.text("api.sock");
        let mut process = Process::start(
            Command::new(program)
                .args(["--api-sock", &socket, "--boot", &path])
                .envs(environment.iter().copied())
                .current_dir(fixture.dir.path()),
        )?;
        process.wait_for_socket(Path::new(&socket))?;
        Ok(Self {
            _process: process,
            socket,
        })
    }
}

pub fn write(socket: &str, page: usize, fill: u8) -> anyhow::Result<()> {
    http(
        socket,
        "PUT",
        "/test/write",
        &json!({"page": page, "fill": fill}),
    )
    .map(drop)
}

pub fn is_running(socket: &str) -> anyhow::Result<bool> {
    Ok(http(socket, "GET", "/", &serde_json::Value::Null)?.contains("Running"))
}

#[test]
fn clones_of_a_machine_of_firecracker_have_what_it_had() -> anyhow::Result<()> {
    let test = "clones_of_a_machine_of_firecracker_have_what_it_had";
    let Some(fixture) = Fixture::new(test)? else {
        return Ok(());
    };
    let Some(program) = double(&fixture, test, "firecracker", &[])? else {
        return Ok(());
    };
    let first = Double::boot(&fixture, &program, &[])?;
    let (mut memory, mut disk) = (vec![0; 4 * MIB], noise(3, 64 * PAGE));
    for (page, fill) in [(0, 1), (9, 2), (63, 3)] {
        write(&first.socket, page, fill)?;
        set(&mut memory, page, fill);
        set(&mut disk, page, fill);
    }
    fixture
        .cli
        .json(&["commit", "t0", "--firecracker", &first.socket])?;
    ensure!(is_running(&first.socket)?, "it does not go on");
    write(&first.socket, 5, 99)?;
    let exec = program.display().to_string();
    // Ten layers, each from a clone of the one before; others of it go another way.
    for layer in 1..=10_usize {
        let (from, tag) = (format!("t{}", layer - 1), format!("t{layer}"));
        let restore = [
            "restore",
            &from,
            "--with",
            "firecracker",
            "--exec",
            &exec,
            "-n",
            "3",
        ];
        let machines = fixture.cli.json(&restore)?;
        assert_eq!(machines["machines"].as_array().map(Vec::len), Some(3));
        let socket = fixture.of_machine(&format!("{from}.1"), "api.sock");
        let other = fixture.of_machine(&format!("{from}.2"), "api.sock");
        write(&other, 50, 200)?;
        let fill = u8::try_from(layer)?;
        for page in [20 + layer, 9] {
            write(&socket, page, fill)?;
            set(&mut memory, page, fill);
            set(&mut disk, page, fill);
        }
        let answer = fixture
            .cli
            .json(&["commit", &tag, "--firecracker", &socket])?;
        assert_eq!(answer["parent_tag"], from.as_str(), "{answer}");
        assert_eq!(answer["images"][0]["changed_pages"], 2, "{answer}");
        ensure!(
            fixture.shown(&tag, "memory.bin")? == memory,
            "layer {layer}: other memory"
        );
        ensure!(
            fixture.shown(&tag, "disk0.img")? == disk,
            "layer {layer}: another disk"
        );
        fixture.cli.ok(&["stop", "--all"])?;
    }
    Ok(())
}

#[test]
fn a_snapshot_that_firecracker_refuses_leaves_the_guest_running() -> anyhow::Result<()> {
    let test = "a_snapshot_that_firecracker_refuses_leaves_the_guest_running";
    let Some(fixture) = Fixture::new(test)? else {
        return Ok(());
    };
    let Some(program) = double(&fixture, test, "firecracker", &[])? else {
        return Ok(());
    };
    let double = Double::boot(&fixture, &program, &[("DOUBLE_FAILS", "create")])?;
    let commit = ["commit", "x", "--firecracker", &double.socket];
    let said = fixture.cli.fails(1, &commit)?;
    assert!(said.contains("no space left"), "{said}");
    ensure!(is_running(&double.socket)?, "it stands still");
    fixture.cli.fails(3, &["show", "x"])?;
    // One that was paused before is not resumed.
    http(&double.socket, "PATCH", "/vm", &json!({"state": "Paused"}))?;
    fixture.cli.fails(1, &commit)?;
    ensure!(!is_running(&double.socket)?, "it was not ours to resume");
    Ok(())
}

#[test]
fn snapshots_of_another_monitor_are_refused() -> anyhow::Result<()> {
    let test = "snapshots_of_another_monitor_are_refused";
    let Some(fixture) = Fixture::new(test)? else {
        return Ok(());
    };
    let Some(program) = double(&fixture, test, "firecracker", &[])? else {
        return Ok(());
    };
    let double = Double::boot(&fixture, &program, &[])?;
    fixture
        .cli
        .ok(&["commit", "x", "--firecracker", &double.socket])?;
    let said = fixture.cli.fails(2, &["restore", "x", "--with", "qemu"])?;
    assert!(said.contains("--with firecracker"), "{said}");
    let said = fixture.cli.fails(2, &["restore", "x"])?;
    assert!(said.contains("another monitor"), "{said}");
    // Nor is what another program says of itself taken for it.
    let said = fixture.cli.fails(
        1,
        &[
            "restore",
            "x",
            "--with",
            "firecracker",
            "--exec",
            "/bin/true",
        ],
    )?;
    assert!(said.contains("is not Firecracker"), "{said}");
    Ok(())
}

#[test]
fn too_many_disks_are_told_before_the_guest_is_paused() -> anyhow::Result<()> {
    let test = "too_many_disks_are_told_before_the_guest_is_paused";
    let Some(fixture) = Fixture::new(test)? else {
        return Ok(());
    };
    let Some(program) = double(&fixture, test, "firecracker", &[])? else {
        return Ok(());
    };
    let drive = |number: usize| {
        fs::write(fixture.path(&format!("d{number}.img")), [0; PAGE])?;
        anyhow::Ok(json!({
            "drive_id": format!("d{number}"), "path_on_host": format!("d{number}.img"),
            "is_read_only": false,
        }))
    };
    let drives = (0..254).map(drive).collect::<anyhow::Result<Vec<_>>>()?;
    let config = json!({
        "machine-config": {"mem_size_mib": 4, "vcpu_count": 1, "track_dirty_pages": false},
        "drives": drives, "network-interfaces": [], "vsock": null,
    });
    let fails = [("DOUBLE_FAILS", "pause")];
    let double = Double::boot_with(&fixture, &program, &fails, &config)?;
    let commit = ["commit", "x", "--firecracker", &double.socket];
    let said = fixture.cli.fails(2, &commit)?;
    assert!(said.contains("257 files"), "{said}");
    // So are labels, with those that the commit adds.
    let labels: Vec<String> = (0..1022)
        .map(|number| format!("--label=l{number}=x"))
        .collect();
    let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
    fs::remove_file(&double.socket)?;
    let double = Double::boot(&fixture, &program, &fails)?;
    let commit = ["commit", "x", "--firecracker", &double.socket];
    let said = fixture.cli.fails(2, &[&commit[..], &labels].concat())?;
    assert!(said.contains("1025 labels"), "{said}");
    ensure!(is_running(&double.socket)?, "it stands still");
    Ok(())
}

/// What a process has open of files that are no other's: copies that were made for it.
fn own_bytes(pid: u64) -> anyhow::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let link = entry?.path();
        let is_removed = fs::read_link(&link)?
            .to_string_lossy()
            .ends_with(" (deleted)");
        let found = fs::metadata(&link)?;
        if found.is_file() && is_removed {
            bytes += found.blocks() * 512;
        }
    }
    Ok(bytes)
}

fn bytes_under(dir: &Path) -> anyhow::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        bytes += match entry.metadata()? {
            found if found.is_dir() => bytes_under(&entry.path())?,
            found => found.blocks() * 512,
        };
    }
    Ok(bytes)
}

#[test]
fn clones_copy_no_disk_and_what_they_write_goes_with_them() -> anyhow::Result<()> {
    let test = "clones_copy_no_disk_and_what_they_write_goes_with_them";
    let Some(fixture) = Fixture::new(test)? else {
        return Ok(());
    };
    let Some(program) = double(&fixture, test, "firecracker", &[])? else {
        return Ok(());
    };
    let first = Double::boot(&fixture, &program, &[])?;
    // Much more than what a clone may take.
    let mut disk = noise(5, 32 * MIB);
    fs::write(fixture.path("root.img"), &disk)?;
    fixture
        .cli
        .ok(&["commit", "t0", "--firecracker", &first.socket])?;
    let overlays = fixture.path("overlays");
    fs::create_dir(&overlays)?;
    let (exec, place) = (
        program.display().to_string(),
        overlays.display().to_string(),
    );
    let restore = ["restore", "t0", "--with", "firecracker", "--exec", &exec];
    let more = ["-n", "3", "--overlay-dir", &place];
    fixture.cli.ok(&[&restore[..], &more].concat())?;
    let listed = fixture.cli.json(&["ps"])?;
    let machines = listed["machines"].as_array().cloned().unwrap_or_default();
    assert_eq!(machines.len(), 3, "{listed}");
    for machine in &machines {
        let pid = machine["pid"].as_u64().unwrap_or_default();
        assert_eq!(own_bytes(pid)?, 0, "{machine}");
    }
    let before = bytes_under(&overlays)?;
    ensure!(before < MIB as u64 / 2, "{before} bytes for three clones");
    let socket = fixture.of_machine("t0.2", "api.sock");
    write(&socket, 9, 7)?;
    set(&mut disk, 9, 7);
    let grown = bytes_under(&overlays)? - before;
    ensure!(
        grown < MIB as u64 / 2,
        "a page that was written takes {grown} bytes"
    );
    for (tag, page) in [("t1", 9), ("t2", 11)] {
        write(&socket, page, 7)?;
        set(&mut disk, page, 7);
        let answer = fixture
            .cli
            .json(&["commit", tag, "--firecracker", &socket])?;
        // Nothing of the disk is read but what was written to it.
        let read = answer["read_bytes"].as_u64();
        assert!(read < Some(MIB as u64), "{answer}");
        ensure!(fixture.shown(tag, "disk0.img")? == disk, "another disk");
    }
    fixture.cli.ok(&["stop", "--all"])?;
    let began = std::time::Instant::now();
    while fs::read_dir(&overlays)?.next().is_some() {
        ensure!(began.elapsed().as_secs() < 60, "the view is left");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    Ok(())
}
