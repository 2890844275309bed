//! Mounts that are written to and committed.

mod basics;
mod beside;
mod ended;
mod exerciser;
mod kills;
mod owner;
mod refused;
mod told;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde_json::Value;
use snapstore_tests::harness::noise;

use crate::{Fixture, PAGE};

/// Pages of the memory of `base`.
const PAGES: usize = 64;
/// Bytes of its disk: not a whole number of pages.
const DISK: usize = 40 * PAGE + 512;

/// A store with a memory, a disk and a state, as `base`.
fn with_machine(test: &str) -> anyhow::Result<Option<Fixture>> {
    let Some(fixture) = Fixture::new(test)? else {
        return Ok(None);
    };
    let disk = fixture.file("disk", &noise(2, DISK))?;
    let state = fixture.file("state", b"as it was")?;
    let disk = format!("root={disk}");
    fixture.commit(
        "base",
        &base_memory(),
        &["--disk", &disk, "--vmstate", &state],
    )?;
    fs::create_dir(fixture.path("overlays"))?;
    Ok(Some(fixture))
}

/// With a hole in it.
fn base_memory() -> Vec<u8> {
    let mut memory = noise(1, PAGES * PAGE);
    memory[20 * PAGE..30 * PAGE].fill(0);
    memory
}

impl Fixture {
    /// Mounts `base` to be written; returns where, and the server's process.
    fn mount_rw(&mut self, name: &str, more: &[&str]) -> anyhow::Result<(PathBuf, u32)> {
        let dir = self.mountpoint(name)?;
        let shown = dir.display().to_string();
        let pid = self.writable_on(&[more, &["base", &shown]].concat())?;
        Ok((dir, pid))
    }

    /// Goes on with the view that was there.
    fn resume(&self, dir: &Path) -> anyhow::Result<u32> {
        self.writable_on(&["--resume", &dir.display().to_string()])
    }

    fn writable_on(&self, more: &[&str]) -> anyhow::Result<u32> {
        let overlays = self.path("overlays").display().to_string();
        let all = [&["mount", "--rw", "--overlay-dir", &overlays], more].concat();
        let pid = self.cli.json(&all)?["server_pid"].as_u64();
        Ok(u32::try_from(pid.context("no server_pid")?)?)
    }

    fn commit_view(&self, tag: &str, dir: &Path) -> anyhow::Result<Value> {
        self.cli
            .json(&["commit", tag, "--mount", &dir.display().to_string()])
    }

    /// What a tag's snapshot has, as a mount shows it.
    fn shown(&mut self, tag: &str) -> anyhow::Result<Vec<(String, Vec<u8>)>> {
        let (dir, _) = self.mount(Some(tag), &format!("shown-{}", self.mounts.len()))?;
        let mut files = contents(&dir)?;
        files.retain(|(name, _)| name != "manifest.json");
        self.umount(&dir)?;
        Ok(files)
    }

    fn views(&self) -> anyhow::Result<usize> {
        Ok(fs::read_dir(self.path("overlays"))?.count())
    }
}

/// A file, to be read and written.
fn open_both(path: &Path) -> std::io::Result<fs::File> {
    fs::OpenOptions::new().read(true).write(true).open(path)
}

/// All regular files of a directory.
fn contents(dir: &Path) -> anyhow::Result<Vec<(String, Vec<u8>)>> {
    let mut files = Vec::new();
    for name in crate::names(dir)? {
        let path = dir.join(&name);
        if path.is_file() {
            files.push((name, fs::read(path)?));
        }
    }
    Ok(files)
}

fn named<'a>(files: &'a [(String, Vec<u8>)], name: &str) -> Option<&'a [u8]> {
    let mut files = files.iter();
    let found = files.find(|(it, _)| it == name);
    found.map(|(_, bytes)| &bytes[..])
}
