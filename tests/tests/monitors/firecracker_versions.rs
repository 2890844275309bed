//! Firecracker's versions: what each is asked for, and what clones find of its disks.

use std::fs;

use anyhow::ensure;
use serde_json::{Value, json};
use snapstore_tests::harness::noise;

use crate::firecracker::{Double, is_running, write};
use crate::{Fixture, PAGE, double, http};

fn config(huge_pages: &str, drives: &Value) -> Value {
    json!({
        "machine-config": {
            "mem_size_mib": 4, "vcpu_count": 1, "track_dirty_pages": false,
            "huge_pages": huge_pages,
        },
        "drives": drives,
        "network-interfaces": [],
        "vsock": null,
    })
}

#[test]
fn each_version_is_asked_for_what_it_knows() -> anyhow::Result<()> {
    let test = "each_version_is_asked_for_what_it_knows";
    for (version, huge_pages, then) in [
        ("1.12.1", "None", "None"),
        ("1.13.1", "None", "None"),
        ("1.16.1", "None", "None"),
        // A fault of a clone would read 2 MiB.
        ("1.17.0-dev", "Transparent", "None"),
        ("1.17.0", "2M", "None"),
    ] {
        let Some(fixture) = Fixture::new(test)? else {
            return Ok(());
        };
        let set = [("DOUBLE_VERSION", version)];
        let Some(program) = double(&fixture, test, "firecracker", &set)? else {
            return Ok(());
        };
        fs::write(fixture.path("root.img"), noise(3, 64 * PAGE))?;
        let drives = json!([
            {"drive_id": "root", "path_on_host": "root.img", "is_read_only": false},
        ]);
        let mut about = config(huge_pages, &drives);
        about["vsock"] = json!({"guest_cid": 3, "uds_path": fixture.text("vsock.sock")});
        let first = Double::boot_with(&fixture, &program, &[], &about)?;
        let cli = &fixture.cli;
        cli.ok(&["commit", "t0", "--firecracker", &first.socket])?;
        let exec = program.display().to_string();
        cli.ok(&["restore", "t0", "--with", "firecracker", "--exec", &exec])?;
        let socket = fixture.of_machine("t0", "api.sock");
        let said = http(&socket, "GET", "/vm/config", &Value::Null)?;
        ensure!(
            said.contains("\"track_dirty_pages\": true"),
            "{version}: {said}"
        );
        let expected = format!("\"huge_pages\": \"{then}\"");
        ensure!(said.contains(&expected), "{version}: {said}");
        write(&socket, 9, 9)?;
        let answer = cli.json(&["commit", "t1", "--firecracker", &socket])?;
        assert_eq!(
            answer["images"][0]["changed_pages"], 1,
            "{version}: {answer}"
        );
    }
    Ok(())
}

#[test]
fn memory_of_huge_pages_is_refused_by_versions_that_cannot_map_it() -> anyhow::Result<()> {
    let test = "memory_of_huge_pages_is_refused_by_versions_that_cannot_map_it";
    let Some(fixture) = Fixture::new(test)? else {
        return Ok(());
    };
    let set = [("DOUBLE_VERSION", "1.14.1")];
    let Some(program) = double(&fixture, test, "firecracker", &set)? else {
        return Ok(());
    };
    let first = Double::boot_with(&fixture, &program, &[], &config("2M", &json!([])))?;
    let cli = &fixture.cli;
    cli.ok(&["commit", "t0", "--firecracker", &first.socket])?;
    let exec = program.display().to_string();
    let restore = ["restore", "t0", "--with", "firecracker", "--exec", &exec];
    let said = cli.fails(2, &restore)?;
    assert!(said.contains("huge pages"), "{said}");
    Ok(())
}

#[test]
fn clones_find_disks_that_are_only_read() -> anyhow::Result<()> {
    let test = "clones_find_disks_that_are_only_read";
    let Some(fixture) = Fixture::new(test)? else {
        return Ok(());
    };
    let Some(program) = double(&fixture, test, "firecracker", &[])? else {
        return Ok(());
    };
    fs::create_dir(fixture.path("shared"))?;
    fs::write(fixture.path("shared/tools.img"), noise(4, 8 * PAGE))?;
    fs::write(fixture.path("root.img"), noise(3, 64 * PAGE))?;
    let drives = json!([
        {"drive_id": "root", "path_on_host": "root.img", "is_read_only": false},
        {"drive_id": "tools", "path_on_host": "shared/tools.img", "is_read_only": true},
    ]);
    let first = Double::boot_with(&fixture, &program, &[], &config("None", &drives))?;
    let cli = &fixture.cli;
    cli.ok(&["commit", "t0", "--firecracker", &first.socket])?;
    let exec = program.display().to_string();
    // Also of a clone whose directory is gone by then.
    for layer in 0..2 {
        let from = format!("t{layer}");
        cli.ok(&[
            "restore",
            &from,
            "--with",
            "firecracker",
            "--exec",
            &exec,
            "-n",
            "2",
        ])?;
        let socket = fixture.of_machine(&format!("{from}.2"), "api.sock");
        ensure!(is_running(&socket)?, "it does not run");
        let tag = format!("t{}", layer + 1);
        cli.ok(&["commit", &tag, "--firecracker", &socket])?;
        cli.ok(&["stop", "--all"])?;
    }
    Ok(())
}

#[test]
fn a_disk_that_no_clone_would_find_is_told_at_the_commit() -> anyhow::Result<()> {
    let test = "a_disk_that_no_clone_would_find_is_told_at_the_commit";
    let Some(fixture) = Fixture::new(test)? else {
        return Ok(());
    };
    let Some(program) = double(&fixture, test, "firecracker", &[])? else {
        return Ok(());
    };
    fs::create_dir(fixture.path("below"))?;
    fs::write(fixture.path("root.img"), noise(3, 64 * PAGE))?;
    let drives = json!([
        {"drive_id": "root", "path_on_host": "below/../root.img", "is_read_only": false},
    ]);
    let first = Double::boot_with(&fixture, &program, &[], &config("None", &drives))?;
    let commit = ["commit", "t0", "--firecracker", &first.socket];
    let said = fixture.cli.fails(2, &commit)?;
    assert!(said.contains("working directory"), "{said}");
    ensure!(is_running(&first.socket)?, "it stands still");
    Ok(())
}
