//! What the server of a mount has of whoever called `mount`: nothing.

use anyhow::Context as _;
use snapstore_tests::harness::{noise, skipped};
use snapstore_tests::inherited::{has_nothing_of_its_caller, run_from_a_bad_caller};

use crate::{Fixture, PAGE};

#[test]
fn a_server_has_nothing_of_its_caller() -> anyhow::Result<()> {
    let Some(mut fixture) = Fixture::new("a_server_has_nothing_of_its_caller")? else {
        return Ok(());
    };
    fixture.commit("base", &noise(1, 8 * PAGE), &[])?;
    let dir = fixture.mountpoint("mnt")?.display().to_string();
    let file = fixture.path("callers-file");
    let mut command = fixture.cli.command(&["mount", "base", &dir, "--json"])?;
    let answer = run_from_a_bad_caller(&mut command, &file)?;
    let answer: serde_json::Value = serde_json::from_slice(&answer)?;
    let pid = answer["server_pid"].as_u64().context("no server_pid")?;
    has_nothing_of_its_caller(u32::try_from(pid)?, &file)
}

/// A server of root's cannot do what it never does; it serves, and undoes its mount.
#[test]
fn every_thread_of_a_server_of_roots_is_filtered() -> anyhow::Result<()> {
    let test = "every_thread_of_a_server_of_roots_is_filtered";
    let Some(mut fixture) = Fixture::new(test)? else {
        return Ok(());
    };
    if !rustix::process::geteuid().is_root() {
        skipped(test, "users undo mounts by a program that is setuid");
        return Ok(());
    }
    fixture.commit("base", &noise(1, 8 * PAGE), &[])?;
    let dir = fixture.mountpoint("mnt")?;
    let shown = dir.display().to_string();
    let answer = fixture.cli.json(&["mount", "base", &shown])?;
    anyhow::ensure!(std::fs::read(dir.join("memory.bin"))? == noise(1, 8 * PAGE));
    let pid = answer["server_pid"].as_u64().context("no server_pid")?;
    let mut threads = 0;
    for thread in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread may end between the two looks.
        let Ok(status) = std::fs::read_to_string(thread?.path().join("status")) else {
            continue;
        };
        anyhow::ensure!(status.contains("Seccomp:\t2\n"), "{status}");
        anyhow::ensure!(status.contains("NoNewPrivs:\t1\n"), "{status}");
        threads += 1;
    }
    anyhow::ensure!(threads > 1, "{threads} threads");
    fixture.cli.ok(&["umount", &shown])?;
    Ok(())
}
