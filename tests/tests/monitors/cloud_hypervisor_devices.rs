//! Cloud Hypervisor: what clones get instead of devices that lead out of the machine.

use std::fs;

use anyhow::ensure;
use serde_json::{Value, json};
use snapstore_tests::harness::noise;

use crate::cloud_hypervisor::{boot_as, config, is_running};
use crate::{Fixture, PAGE, double, http};

const NAME: &str = "cloud_hypervisor";

#[test]
fn a_clone_has_lines_of_its_own_and_the_version_is_the_programs() -> anyhow::Result<()> {
    let test = "a_clone_has_lines_of_its_own_and_the_version_is_the_programs";
    let Some(fixture) = Fixture::new(test)? else {
        return Ok(());
    };
    let Some(program) = double(&fixture, test, NAME, &[])? else {
        return Ok(());
    };
    fs::write(fixture.path("root.img"), noise(3, 64 * PAGE))?;
    let mut about = config("root.img");
    about["console"] = json!({"mode": "Pty", "file": "/dev/pts/7", "id": "line", "pci_segment": 1});
    about["debug_console"] = json!({"mode": "File", "file": fixture.text("debug"), "iobase": 233});
    let first = boot_as(&fixture, &program, &[], &about)?;
    fs::write(fixture.path("debug"), "said before")?;
    let cli = &fixture.cli;
    cli.ok(&["commit", "t0", "--cloud-hypervisor", &first.socket])?;
    let exec = program.display().to_string();
    let done = cli.run(&[
        "restore",
        "t0",
        "--with",
        "cloud-hypervisor",
        "--exec",
        &exec,
    ])?;
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    ensure!(done.status.success(), "{said}");
    ensure!(!said.contains("was committed from"), "{said}");
    ensure!(
        fs::read_to_string(fixture.path("debug"))? == "said before",
        "the clone writes to the first one's line"
    );
    let socket = fixture.of_machine("t0", "api.sock");
    let said = http(&socket, "GET", "/api/v1/vm.info", &Value::Null)?;
    let said: Value = serde_json::from_str(said.split_once("\r\n\r\n").unwrap_or_default().1)?;
    let lines = &said["config"];
    assert_eq!(
        (&lines["console"]["mode"], &lines["console"]["id"]),
        (&json!("Null"), &json!("line")),
        "{said}"
    );
    assert_eq!(lines["console"]["pci_segment"], 1, "{said}");
    assert_eq!(lines["debug_console"]["iobase"], 233, "{said}");
    assert_eq!(lines["serial"]["mode"], "Socket", "{said}");
    Ok(())
}

#[test]
fn an_interface_that_was_an_open_file_needs_a_tap() -> anyhow::Result<()> {
    let test = "an_interface_that_was_an_open_file_needs_a_tap";
    let Some(fixture) = Fixture::new(test)? else {
        return Ok(());
    };
    let Some(program) = double(&fixture, test, NAME, &[])? else {
        return Ok(());
    };
    fs::write(fixture.path("root.img"), noise(3, 64 * PAGE))?;
    let mut about = config("root.img");
    about["net"] = json!([{"id": "_net0", "tap": null, "fds": [-1, -1], "vhost_user": false}]);
    let first = boot_as(&fixture, &program, &[], &about)?;
    let cli = &fixture.cli;
    cli.ok(&["commit", "t0", "--cloud-hypervisor", &first.socket])?;
    let exec = program.display().to_string();
    let restore = [
        "restore",
        "t0",
        "--with",
        "cloud-hypervisor",
        "--exec",
        &exec,
    ];
    let said = cli.fails(2, &restore)?;
    assert!(said.contains("--net"), "{said}");
    Ok(())
}

#[test]
fn devices_with_a_state_elsewhere_are_refused() -> anyhow::Result<()> {
    let test = "devices_with_a_state_elsewhere_are_refused";
    for (name, device) in [
        ("tpm", json!({"socket": "tpm.sock"})),
        ("generic_vhost_user", json!([{"socket": "gpio.sock"}])),
        (
            "net",
            json!([{"vhost_user": true, "vhost_socket": "net.sock"}]),
        ),
    ] {
        let Some(fixture) = Fixture::new(test)? else {
            return Ok(());
        };
        let Some(program) = double(&fixture, test, NAME, &[])? else {
            return Ok(());
        };
        fs::write(fixture.path("root.img"), noise(3, 64 * PAGE))?;
        let mut about = config("root.img");
        about[name] = device;
        let first = boot_as(&fixture, &program, &[], &about)?;
        let commit = ["commit", "t0", "--cloud-hypervisor", &first.socket];
        let said = fixture.cli.fails(1, &commit)?;
        assert!(said.contains("not committed"), "{name}: {said}");
        ensure!(is_running(&first.socket)?, "{name}: it stands still");
    }
    Ok(())
}
