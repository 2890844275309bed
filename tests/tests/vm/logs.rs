//! What a guest makes its machine say, as often as it likes, is bounded.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use snapstore_tests::harness::Cli;
use snapstore_tests::vm::{Lab, eventually, kill};
use snapstore_vmm::virtio::virtio_address;

/// The most that a log holds (docs/SECURITY-MODEL.md), in bytes.
const LOG_BYTES: u64 = 1 << 20;

/// A guest that breaks its first virtio device again and again: it enables a queue that
/// is nowhere in memory, and resets the device. An ELF kernel, since only those have devices.
fn breaker() -> Vec<u8> {
    let base = u32::try_from(virtio_address(0)).expect("below 4 GiB");
    // Status, features, the queue's number, size and address, and ready (virtio 1.2, 4.2.2).
    let writes = [
        (0x70, 0),
        (0x70, 1),
        (0x70, 3),
        (0x24, 1),
        (0x20, 1),
        (0x70, 11),
        (0x30, 0),
        (0x38, 8),
        (0x84, u32::MAX),
        (0x44, 1),
    ];
    // mov ebx, base
    let mut code = vec![0xbb];
    code.extend(base.to_le_bytes());
    for (register, value) in writes {
        // mov dword [rbx + register], value
        code.extend([0xc7, 0x83]);
        code.extend(u32::to_le_bytes(register));
        code.extend(u32::to_le_bytes(value));
    }
    // jmp to the beginning
    let back = -i32::try_from(code.len() + 5).expect("it is short");
    code.push(0xe9);
    code.extend(back.to_le_bytes());
    elf(&code)
}

/// An ELF kernel of one segment that is entered at its beginning.
fn elf(code: &[u8]) -> Vec<u8> {
    const ADDRESS: u64 = 2 << 20;
    const OFFSET: u64 = 64 + 56;
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    // Executable, x86-64, version 1; entry, program headers, no sections.
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for number in [ADDRESS, 64, 0] {
        file.extend(number.to_le_bytes());
    }
    file.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 64, 0, 0, 0, 0, 0]);
    // One to load, which is read, written and executed.
    file.extend([1, 0, 0, 0, 7, 0, 0, 0]);
    let length = code.len() as u64;
    for number in [OFFSET, ADDRESS, ADDRESS, length, length, 4096] {
        file.extend(number.to_le_bytes());
    }
    file.extend(code);
    file
}

#[test]
fn a_guest_cannot_fill_the_log() -> Result<()> {
    let Some(lab) = Lab::new("a_guest_cannot_fill_the_log")? else {
        return Ok(());
    };
    lab.run("web", &breaker(), &[])?;
    std::thread::sleep(Duration::from_secs(2));
    let log = fs::read_to_string(lab.vm_dir("web").join("log"))?;
    ensure!(log.lines().count() < 20, "{log}");
    ensure!(lab.ps("web")?["state"] == "running");
    lab.stop("web")?;
    lab.assert_nothing_left()
}

/// Also where someone has asked to be told each time.
#[test]
fn a_log_that_is_full_is_begun_anew() -> Result<()> {
    let Some(mut lab) = Lab::new("a_log_that_is_full_is_begun_anew")? else {
        return Ok(());
    };
    lab.cli = Cli::new(lab.cli.store())
        .with_env(
            "SNAPSTORE_RUNTIME_DIR",
            &lab.runtime().display().to_string(),
        )
        .with_env("RUST_LOG", "debug");
    lab.run("web", &breaker(), &[])?;
    let path = lab.vm_dir("web").join("log");
    eventually("the log is begun anew", || {
        ensure!(fs::metadata(&path)?.len() <= LOG_BYTES, "it is too long");
        let log = fs::read_to_string(&path)?;
        ensure!(log.contains("a driver broke its device") || log.is_empty());
        Ok(log.contains("it was full").then_some(()))
    })?;
    let until = Instant::now() + Duration::from_secs(2);
    while Instant::now() < until {
        ensure!(fs::metadata(&path)?.len() <= LOG_BYTES, "it is too long");
    }
    ensure!(lab.ps("web")?["state"] == "running");
    lab.stop("web")?;
    lab.assert_nothing_left()
}

/// A log of JSON has an object a line, and is not taken for what its process said at its end.
#[test]
fn a_machines_log_can_be_json() -> Result<()> {
    let Some(mut lab) = Lab::new("a_machines_log_can_be_json")? else {
        return Ok(());
    };
    lab.cli = lab.cli.clone().with_env("RUST_LOG", "debug");
    lab.run("web", &breaker(), &["--log-format", "json"])?;
    let path = lab.vm_dir("web").join("log");
    let log = eventually("its driver broke its device", || {
        let log = fs::read_to_string(&path)?;
        let is_there = log.contains("a driver broke its device") && log.ends_with('\n');
        Ok(is_there.then_some(log))
    })?;
    for line in log.lines() {
        let event: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
        ensure!(
            event["timestamp"].is_string() && event["fields"].is_object(),
            "{line}"
        );
    }
    kill(lab.pid("web")?)?;
    let listed = eventually("it has ended", || {
        let listed = lab.cli.json(&["ps"])?;
        Ok(listed["machines"][0]["ending"]
            .is_string()
            .then_some(listed))
    })?;
    let ending = listed["machines"][0]["ending"].as_str().unwrap_or_default();
    ensure!(
        !ending.contains('{') && ending.contains("killed"),
        "{ending}"
    );
    ensure!(listed["machines"][0]["state"] == "dead", "{listed}");
    ensure!(lab.cli.ok(&["ps", "-o", "{name} {state}"])? == "web dead\n");
    lab.cli.ok(&["stop", "web"])?;
    lab.assert_nothing_left()
}
