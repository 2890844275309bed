//! Real mounts, served by the program, read by this process and by others.

mod background;
mod content;
mod examined;
mod foreign;
mod hung;
mod lazily;
mod lifecycle;
mod logged;
mod metrics;
mod network;
mod odd_stores;
mod other_user;
mod places;
mod remote;
mod soak;
mod tags;
mod waiting;
mod working_set;
mod writable;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use rustix::io::Errno;
use rustix::mount::UnmountFlags;
use snapstore_tests::harness::{Cli, skipped};
use tempfile::TempDir;

const PAGE: usize = 4096;

/// A store, a directory to mount on, and whatever is mounted there.
struct Fixture {
    dir: TempDir,
    cli: Cli,
    mounts: Vec<PathBuf>,
}

impl Fixture {
    /// `None`, and a line that says so, where mounts are impossible.
    fn new(test: &str) -> anyhow::Result<Option<Self>> {
        if let Err(error) = fs::File::open("/dev/fuse") {
            skipped(test, &format!("/dev/fuse: {error}"));
            return Ok(None);
        }
        let dir = tempfile::tempdir()?;
        let cli = Cli::new(&dir.path().join("store"));
        cli.ok(&["init"])?;
        Ok(Some(Self {
            dir,
            cli,
            mounts: Vec::new(),
        }))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn file(&self, name: &str, bytes: &[u8]) -> anyhow::Result<String> {
        let path = self.path(name);
        fs::write(&path, bytes)?;
        Ok(path.display().to_string())
    }

    fn commit(&self, tag: &str, memory: &[u8], more: &[&str]) -> anyhow::Result<()> {
        let path = self.file("memory", memory)?;
        let arguments = ["commit", tag, "--memory", &path];
        self.cli.ok(&[&arguments[..], more].concat())?;
        Ok(())
    }

    /// A new directory that is unmounted in the end, whatever happens.
    fn mountpoint(&mut self, name: &str) -> anyhow::Result<PathBuf> {
        let dir = self.path(name);
        fs::create_dir(&dir)?;
        self.mounts.push(dir.clone());
        Ok(dir)
    }

    /// Mounts a tag, or all of them. Returns where, and the server's process.
    fn mount(&mut self, tag: Option<&str>, name: &str) -> anyhow::Result<(PathBuf, u32)> {
        let dir = self.mountpoint(name)?;
        let pid = self.mount_on(tag, &dir)?;
        Ok((dir, pid))
    }

    fn mount_on(&self, tag: Option<&str>, dir: &Path) -> anyhow::Result<u32> {
        let shown = dir.display().to_string();
        let arguments: Vec<&str> = ["mount"].into_iter().chain(tag).chain([&*shown]).collect();
        let pid = self.cli.json(&arguments)?["server_pid"].as_u64();
        Ok(u32::try_from(pid.context("no server_pid")?)?)
    }

    fn umount(&self, dir: &Path) -> anyhow::Result<()> {
        self.cli.ok(&["umount", &dir.display().to_string()])?;
        Ok(())
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        for dir in &self.mounts {
            // Fails where nothing is mounted any more, which is as good.
            let _ = rustix::mount::unmount(dir, UnmountFlags::DETACH);
        }
        self.cli.assert_no_server_panicked();
    }
}

/// umount(2). A process that another test is starting has duplicates of what was open here until it
/// begins its program: the mount may be busy for a moment.
fn unmount(dir: &Path, flags: UnmountFlags) -> anyhow::Result<()> {
    let mut attempts = 1000;
    loop {
        match rustix::mount::unmount(dir, flags) {
            Err(Errno::BUSY) if attempts > 0 => attempts -= 1,
            other => return other.context("umount(2)"),
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn names(dir: &Path) -> anyhow::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}
