//! Guests that do what no guest should.

use anyhow::{Result, ensure};
use snapstore_guests::{HALT, MMIO, PORTS, SPIN, TABLE, TRIPLE};
use snapstore_tests::vm::{Lab, eventually};

/// Runs a guest attached, without input. Returns exit code, output and messages.
fn attached(lab: &Lab, name: &str, guest: &[u8]) -> Result<(Option<i32>, String, String)> {
    let kernel = lab.file(name, guest)?;
    let output = lab
        .cli
        .run(&["run", name, "--kernel", &kernel, "--mem", "16M"])?;
    Ok((
        output.status.code(),
        String::from_utf8_lossy(&output.stdout).into_owned(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    ))
}

#[test]
fn a_guest_may_write_to_every_port() -> Result<()> {
    let Some(lab) = Lab::new("a_guest_may_write_to_every_port")? else {
        return Ok(());
    };
    let (code, printed, said) = attached(&lab, "ports", PORTS)?;
    ensure!(code == Some(0), "{code:?} {said}");
    for line in ["every port", "every string", "done"] {
        ensure!(printed.contains(line), "{printed:?}");
    }
    ensure!(said.contains("the guest reset the machine"), "{said}");
    lab.finish()
}

#[test]
fn a_guest_may_touch_addresses_without_memory() -> Result<()> {
    let Some(lab) = Lab::new("a_guest_may_touch_addresses_without_memory")? else {
        return Ok(());
    };
    let (code, printed, said) = attached(&lab, "mmio", MMIO)?;
    ensure!(code == Some(0), "{code:?} {said}");
    for line in [
        "scattered",
        "registers",
        "edges",
        "instructions",
        "controllers",
        "done",
    ] {
        ensure!(printed.contains(line), "{line}: {printed:?}");
    }
    lab.finish()
}

#[test]
fn a_triple_fault_is_a_bad_end() -> Result<()> {
    let Some(lab) = Lab::new("a_triple_fault_is_a_bad_end")? else {
        return Ok(());
    };
    let (code, printed, said) = attached(&lab, "triple", TRIPLE)?;
    ensure!(code == Some(1), "{code:?} {said}");
    ensure!(printed.contains("triple guest 1"), "{printed:?}");
    ensure!(said.contains("triple fault"), "{said}");
    let reason = lab.wait_for_death("triple")?;
    ensure!(reason.contains("triple fault"), "{reason}");
    let said = lab.cli.fails(3, &["commit", "tag", "--vm", "triple"])?;
    ensure!(said.contains("triple fault"), "{said}");
    lab.stop("triple")?;
    ensure!(lab.machines()?.is_empty());
    lab.finish()
}

/// Guests that end before anyone could look.
#[test]
fn a_guest_that_ends_at_once_is_seen_to_end() -> Result<()> {
    let Some(lab) = Lab::new("a_guest_that_ends_at_once_is_seen_to_end")? else {
        return Ok(());
    };
    // mov dx, 0x3f8; mov al, '!'; out dx, al; mov al, 0xfe; out 0x64, al; hlt
    let resets = [
        0x66, 0xba, 0xf8, 3, 0xb0, b'!', 0xee, 0xb0, 0xfe, 0xe6, 0x64, 0xf4,
    ];
    // The same, but a fault without an IDT instead of the reset.
    let faults = [
        &resets[..7],
        &[
            0x6a, 0, 0x6a, 0, 0xbc, 0, 0, 0x20, 0, 0x0f, 1, 0x1c, 0x24, 0x0f, 0x0b,
        ],
    ]
    .concat();
    for _ in 0..10 {
        let (code, printed, said) = attached(&lab, "resets", &resets)?;
        ensure!(
            code == Some(0) && printed == "!",
            "{code:?} {printed:?} {said}"
        );
        let (code, printed, said) = attached(&lab, "faults", &faults)?;
        ensure!(
            code == Some(1) && printed == "!",
            "{code:?} {printed:?} {said}"
        );
        ensure!(said.contains("triple fault"), "{said}");
        lab.run("detached", &resets, &[])?;
    }
    lab.finish()
}

#[test]
fn a_halted_machine_is_said_to_be_halted() -> Result<()> {
    let Some(lab) = Lab::with_mounts("a_halted_machine_is_said_to_be_halted")? else {
        return Ok(());
    };
    lab.run("halt", HALT, &["--cpus", "2"])?;
    let is_halted = |name: &str| {
        eventually("it halts", || {
            Ok((lab.ps(name)?["state"] == "halted").then_some(()))
        })
    };
    is_halted("halt")?;
    ensure!(lab.console("halt")?.ends_with("halting\n"));
    lab.cli.ok(&["pause", "halt"])?;
    ensure!(lab.ps("halt")?["state"] == "paused");
    lab.cli.ok(&["resume", "halt"])?;
    is_halted("halt")?;
    lab.commit("halted", "halt")?;
    is_halted("halt")?;
    lab.stop("halt")?;
    lab.restore("halted", &[])?;
    is_halted("halted")?;
    ensure!(lab.console("halted")?.is_empty(), "it ran on");
    lab.finish()
}

#[test]
fn a_spinning_machine_obeys() -> Result<()> {
    let Some(lab) = Lab::with_mounts("a_spinning_machine_obeys")? else {
        return Ok(());
    };
    lab.run("spin", SPIN, &["--cpus", "2"])?;
    lab.wait_for_text("spin", "spinning\n")?;
    ensure!(lab.ps("spin")?["state"] == "running");
    lab.cli.ok(&["pause", "spin"])?;
    ensure!(lab.ps("spin")?["state"] == "paused");
    lab.cli.ok(&["resume", "spin"])?;
    lab.commit("spinning", "spin")?;
    ensure!(lab.ps("spin")?["state"] == "running");
    lab.stop("spin")?;
    lab.restore("spinning", &[])?;
    ensure!(lab.ps("spinning")?["state"] == "running");
    lab.finish()
}

#[test]
fn what_cannot_be_booted_is_refused() -> Result<()> {
    let Some(lab) = Lab::new("what_cannot_be_booted_is_refused")? else {
        return Ok(());
    };
    let good = lab.file("good", TABLE)?;
    let empty = lab.file("empty", b"")?;
    let large = lab.file("large", &vec![0x90; 16 << 20])?;
    let nowhere = lab.path("nowhere").display().to_string();
    let dir = lab.path("").display().to_string();
    for (kernel, mem, cpus, code, word) in [
        (&empty, "16M", "1", 1, "empty"),
        (&large, "16M", "1", 1, "large"),
        (&nowhere, "16M", "1", 1, "nowhere"),
        (&dir, "16M", "1", 1, "directory"),
        (&good, "0", "1", 2, "memory"),
        (&good, "4095", "1", 2, "memory"),
        (&good, "16383K", "0", 2, "memory"),
        (&good, "16M", "0", 2, "vCPU"),
        (&good, "16M", "65", 2, "vCPU"),
        (&good, "16M", "4294967295", 2, "vCPU"),
        (&good, "1000T", "1", 2, "memory"),
    ] {
        let more = ["--kernel", kernel, "--mem", mem, "--cpus", cpus, "--detach"];
        let said = lab.cli.fails(code, &[&["run", "vm"], &more[..]].concat())?;
        ensure!(said.matches("error:").count() == 1, "{more:?}: {said}");
        ensure!(said.contains(word), "{more:?}: {said}");
        ensure!(lab.machines()?.is_empty(), "{more:?} left a machine");
    }
    // A flat program has no devices.
    let more = ["--kernel", &good, "--disk", &large, "--detach"];
    let said = lab.cli.fails(1, &[&["run", "vm"], &more[..]].concat())?;
    ensure!(said.contains("--disk"), "{said}");
    lab.assert_nothing_left()
}
