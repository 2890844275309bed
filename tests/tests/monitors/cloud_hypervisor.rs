//! Cloud Hypervisor: against a double of its API that refuses what its description does not
//! have.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::ensure;
use serde_json::{Value, json};
use snapstore_tests::harness::noise;

use crate::{Fixture, PAGE, Process, double, http, set};

const MIB: usize = 1 << 20;

pub struct Double {
    _process: Process,
    pub socket: String,
}

fn boot(fixture: &Fixture, program: &Path, environment: &[(&str, &str)]) -> anyhow::Result<Double> {
    fs::write(fixture.path("root.img"), noise(3, 64 * PAGE))?;
    boot_with(fixture, program, environment, "root.img")
}

/// A qcow2 image of version 2 that has nothing of its own.
fn empty_qcow2(backing: &str, size_bytes: u64) -> Vec<u8> {
    const CLUSTER: usize = 1 << 16;
    let mut image = Vec::new();
    image.extend(0x5146_49fb_u32.to_be_bytes());
    image.extend(2_u32.to_be_bytes());
    image.extend(72_u64.to_be_bytes());
    image.extend((backing.len() as u32).to_be_bytes());
    image.extend(16_u32.to_be_bytes());
    image.extend(size_bytes.to_be_bytes());
    image.extend(0_u32.to_be_bytes());
    image.extend(1_u32.to_be_bytes());
    image.extend((CLUSTER as u64).to_be_bytes()); // the first table
    image.resize(72, 0);
    image.extend(backing.as_bytes());
    image.resize(2 * CLUSTER, 0);
    image
}

fn boot_with(
    fixture: &Fixture,
    program: &Path,
    environment: &[(&str, &str)],
    disk: &str,
) -> anyhow::Result<Double> {
    boot_as(fixture, program, environment, &config(disk))
}

/// A machine with a disk, as Cloud Hypervisor describes one.
pub fn config(disk: &str) -> Value {
    json!({
        "cpus": {"boot_vcpus": 1, "max_vcpus": 1},
        "memory": {"size": 4 * MIB, "thp": true, "shared": false},
        "disks": [{"path": disk, "readonly": false, "id": "_disk0"}],
        "net": null,
        "serial": {"mode": "Tty"},
        "console": {"mode": "Off"},
        "payload": {"kernel": "vmlinux"},
    })
}

pub fn boot_as(
    fixture: &Fixture,
    program: &Path,
    environment: &[(&str, &str)],
    config: &Value,
) -> anyhow::Result<Double> {
    let path = fixture.text("config.json");
    fs::write(&path, config.to_string())?;
    let socket = fixture.text("api.sock");
    let mut process = Process::start(
        Command::new(program)
            .args(["--api-socket", &socket, "--boot", &path])
            .envs(environment.iter().copied())
            .current_dir(fixture.dir.path()),
    )?;
    process.wait_for_socket(Path::new(&socket))?;
    Ok(Double {
        _process: process,
        socket,
    })
}

fn write(socket: &str, page: usize, fill: u8) -> anyhow::Result<()> {
    let body = json!({"page": page, "fill": fill});
    http(socket, "PUT", "/api/v1/test.write", &body).map(drop)
}

pub fn is_running(socket: &str) -> anyhow::Result<bool> {
    Ok(http(socket, "GET", "/api/v1/vm.info", &Value::Null)?.contains("Running"))
}

fn layers(test: &str, environment: &[(&str, &str)]) -> anyhow::Result<()> {
    let Some(fixture) = Fixture::new(test)? else {
        return Ok(());
    };
    let Some(program) = double(&fixture, test, "cloud_hypervisor", environment)? else {
        return Ok(());
    };
    let is_mapped = environment.is_empty();
    let first = boot(&fixture, &program, &[])?;
    let (mut memory, mut disk) = (vec![0; 4 * MIB], noise(3, 64 * PAGE));
    for (page, fill) in [(0, 1), (9, 2), (63, 3)] {
        write(&first.socket, page, fill)?;
        set(&mut memory, page, fill);
        set(&mut disk, page, fill);
    }
    let commit = ["commit", "t0", "--cloud-hypervisor", &first.socket];
    fixture.cli.json(&commit)?;
    ensure!(is_running(&first.socket)?, "it does not go on");
    write(&first.socket, 5, 99)?;
    let exec = program.display().to_string();
    for layer in 1..=4_usize {
        let (from, tag) = (format!("t{}", layer - 1), format!("t{layer}"));
        let with = ["--with", "cloud-hypervisor", "--exec", &exec, "-n", "3"];
        let machines = fixture
            .cli
            .json(&[&["restore", &from], &with[..]].concat())?;
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
            .json(&["commit", &tag, "--cloud-hypervisor", &socket])?;
        assert_eq!(answer["parent_tag"], from.as_str(), "{answer}");
        let changed = answer["images"].as_array().cloned().unwrap_or_default();
        for image in changed.iter().filter(|image| image["role"] != "file") {
            assert_eq!(image["changed_pages"], 2, "{answer}");
        }
        if is_mapped {
            // The clusters of the disk, and two pages of memory.
            assert!(
                answer["read_bytes"].as_u64() < Some(MIB as u64 / 2),
                "{answer}"
            );
        }
        let shown = fixture.shown(&tag, "memory.bin")?;
        ensure!(shown == memory, "layer {layer}: other memory");
        let shown = fixture.shown(&tag, "disk0.img")?;
        ensure!(shown == disk, "layer {layer}: another disk");
        fixture.cli.ok(&["stop", "--all"])?;
    }
    Ok(())
}

#[test]
fn clones_that_map_the_image_are_committed_by_what_they_changed() -> anyhow::Result<()> {
    layers(
        "clones_that_map_the_image_are_committed_by_what_they_changed",
        &[],
    )
}

#[test]
fn clones_that_copy_the_image_are_committed_whole() -> anyhow::Result<()> {
    let environment = [("DOUBLE_COPIES", "1")];
    layers(
        "clones_that_copy_the_image_are_committed_whole",
        &environment,
    )
}

#[test]
fn a_snapshot_that_cloud_hypervisor_refuses_leaves_the_guest_running() -> anyhow::Result<()> {
    let test = "a_snapshot_that_cloud_hypervisor_refuses_leaves_the_guest_running";
    let Some(fixture) = Fixture::new(test)? else {
        return Ok(());
    };
    let Some(program) = double(&fixture, test, "cloud_hypervisor", &[])? else {
        return Ok(());
    };
    let first = boot(&fixture, &program, &[("DOUBLE_FAILS", "snapshot")])?;
    let commit = ["commit", "x", "--cloud-hypervisor", &first.socket];
    let said = fixture.cli.fails(1, &commit)?;
    assert!(said.contains("no space left"), "{said}");
    ensure!(is_running(&first.socket)?, "it stands still");
    fixture.cli.fails(3, &["show", "x"])?;
    Ok(())
}

/// What it says of a qcow2 image when it is paused is older than the guest's memory.
#[test]
fn a_qcow2_disk_is_committed_only_where_a_pause_writes_its_tables() -> anyhow::Result<()> {
    let test = "a_qcow2_disk_is_committed_only_where_a_pause_writes_its_tables";
    let Some(fixture) = Fixture::new(test)? else {
        return Ok(());
    };
    for (version, is_taken) in [("53.0", false), ("54.0", true)] {
        let environment = [("DOUBLE_VERSION", version)];
        let Some(program) = double(&fixture, test, "cloud_hypervisor", &environment)? else {
            return Ok(());
        };
        let base = noise(3, 64 * PAGE);
        fs::write(fixture.path("base.img"), &base)?;
        fs::write(
            fixture.path("top.qcow2"),
            empty_qcow2(&fixture.text("base.img"), base.len() as u64),
        )?;
        let first = boot_with(&fixture, &program, &environment, "top.qcow2")?;
        write(&first.socket, 9, 2)?;
        let tag = format!("t{is_taken}");
        let commit = ["commit", &tag, "--cloud-hypervisor", &first.socket];
        if is_taken {
            fixture.cli.json(&commit)?;
            let mut disk = base;
            set(&mut disk, 9, 2);
            ensure!(fixture.shown(&tag, "disk0.img")? == disk, "another disk");
        } else {
            let said = fixture.cli.fails(1, &commit)?;
            assert!(
                said.contains("qcow2") && said.contains("raw disk"),
                "{said}"
            );
            fixture.cli.fails(3, &["show", &tag])?;
        }
        ensure!(is_running(&first.socket)?, "it stands still");
        drop(first);
        fs::remove_file(fixture.path("api.sock"))?;
    }
    Ok(())
}

/// The snapshot is there or not, as the answer says; the guest goes on at the second try.
#[test]
fn a_guest_that_is_not_resumed_at_once_goes_on_later() -> anyhow::Result<()> {
    let test = "a_guest_that_is_not_resumed_at_once_goes_on_later";
    let Some(fixture) = Fixture::new(test)? else {
        return Ok(());
    };
    let Some(program) = double(&fixture, test, "cloud_hypervisor", &[])? else {
        return Ok(());
    };
    let first = boot(&fixture, &program, &[("DOUBLE_FAILS", "resume")])?;
    let commit = ["commit", "x", "--cloud-hypervisor", &first.socket];
    let done = fixture.cli.run(&commit)?;
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(said.contains("may stand still"), "{said}");
    // A disk that was cloned is committed after the guest was to go on.
    let is_there = fixture.cli.run(&["show", "x"])?.status.success();
    assert_eq!(is_there, done.status.success(), "{said}");
    let began = std::time::Instant::now();
    while !is_running(&first.socket)? {
        ensure!(began.elapsed().as_secs() < 60, "nobody has tried again");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    Ok(())
}
