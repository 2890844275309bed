//! Servers that do not answer. Nobody waits for them for ever.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use anyhow::ensure;
use rustix::process::{Signal, kill_process};
use snapstore_tests::harness::program;

use crate::Fixture;
use crate::lifecycle::{process, shows_base, wait_for_end, with_base};

/// Longer than any command waits for a server.
const ENDLESS_SECONDS: &str = "60";

/// A server that stands still, and goes on in the end.
pub struct Standing(u32);

impl Standing {
    pub fn new(pid: u32) -> anyhow::Result<Self> {
        kill_process(process(pid)?, Signal::STOP)?;
        Ok(Self(pid))
    }

    pub fn go_on(&self) -> anyhow::Result<()> {
        Ok(kill_process(process(self.0)?, Signal::CONT)?)
    }
}

impl Drop for Standing {
    fn drop(&mut self) {
        let _ = self.go_on();
    }
}

/// Runs a command that must come to an end.
fn ends(fixture: &Fixture, code: i32, arguments: &[&str]) -> anyhow::Result<String> {
    let Output { status, stderr, .. } = Command::new("timeout")
        .args(["-s", "KILL", ENDLESS_SECONDS])
        .arg(program()?)
        .arg("--store")
        .arg(fixture.cli.store())
        .args(arguments)
        .output()?;
    let said = String::from_utf8_lossy(&stderr).into_owned();
    ensure!(
        status.code() == Some(code),
        "{arguments:?}: {status}: {said}"
    );
    Ok(said)
}

fn shown(dir: &Path) -> String {
    dir.display().to_string()
}

#[test]
fn a_mount_that_hangs_is_busy_and_can_be_detached() -> anyhow::Result<()> {
    let test = "a_mount_that_hangs_is_busy_and_can_be_detached";
    let Some(mut fixture) = with_base(test)? else {
        return Ok(());
    };
    let (dir, pid) = fixture.mount(Some("base"), "mnt")?;
    shows_base(&dir)?;
    let file = fs::File::open(dir.join("memory.bin"))?;
    let standing = Standing::new(pid)?;
    let error = ends(&fixture, 5, &["mount", "base", &shown(&dir)])?;
    ensure!(error.contains("already a mount point"), "{error}");
    let error = ends(&fixture, 5, &["umount", &shown(&dir)])?;
    ensure!(error.contains("--lazy"), "{error}");
    ends(&fixture, 0, &["umount", "--lazy", &shown(&dir)])?;
    ends(&fixture, 0, &["mount", "base", &shown(&dir)])?;
    shows_base(&dir)?;
    standing.go_on()?;
    drop(file);
    wait_for_end(pid)?;
    shows_base(&dir)
}

#[test]
fn a_mount_that_hangs_unused_can_be_unmounted() -> anyhow::Result<()> {
    let Some(mut fixture) = with_base("a_mount_that_hangs_unused_can_be_unmounted")? else {
        return Ok(());
    };
    let (dir, pid) = fixture.mount(Some("base"), "mnt")?;
    let standing = Standing::new(pid)?;
    ends(&fixture, 0, &["umount", &shown(&dir)])?;
    ensure!(fs::read_dir(&dir)?.next().is_none(), "still mounted");
    standing.go_on()?;
    wait_for_end(pid)
}
