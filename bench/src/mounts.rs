//! Mounts of the product and of the trivial server, for one run each.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, ensure};
use rustix::mount::{UnmountFlags, unmount};

use crate::serve_ram;
use snapstore_tests::harness::Cli;

/// A mount that is gone when this is.
#[derive(Debug)]
pub struct Mount {
    dir: PathBuf,
    server: Server,
}

#[derive(Debug)]
enum Server {
    Product(Cli),
    Ram(Child),
    Gone,
}

impl Mount {
    /// Mounts a snapshot with the product.
    ///
    /// # Errors
    /// If that fails.
    pub fn product(cli: &Cli, tag: &str, dir: &Path, options: &[&str]) -> anyhow::Result<Self> {
        fs::create_dir_all(dir)?;
        let shown = dir.to_str().context("a path in UTF-8")?;
        cli.ok(&[&["mount", tag, shown], options].concat())?;
        Ok(Self {
            dir: dir.to_owned(),
            server: Server::Product(cli.clone()),
        })
    }

    /// The same without anything that earlier mounts have recorded: what is read of this
    /// one was asked for.
    ///
    /// # Errors
    /// If that fails.
    pub fn unrecorded(cli: &Cli, tag: &str, dir: &Path, options: &[&str]) -> anyhow::Result<Self> {
        match fs::remove_dir_all(cli.store().join("working-sets")) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        Self::product(cli, tag, dir, options)
    }

    /// Mounts a file with the trivial server, in a process of its own.
    ///
    /// # Errors
    /// If that fails.
    pub fn ram(file: &Path, dir: &Path, read_ahead: u32) -> anyhow::Result<Self> {
        Self::of_ram(file, dir, read_ahead, "ro")
    }

    /// The same, and what is written to it is thrown away.
    ///
    /// # Errors
    /// If that fails.
    pub fn discarding(file: &Path, dir: &Path, read_ahead: u32) -> anyhow::Result<Self> {
        let mount = Self::of_ram(file, dir, read_ahead, "rw")?;
        // As the product does: else who stores to a mapping waits for the server.
        fs::write(mount.tunable("strict_limit")?, "0")?;
        Ok(mount)
    }

    fn of_ram(file: &Path, dir: &Path, read_ahead: u32, access: &str) -> anyhow::Result<Self> {
        fs::create_dir_all(dir)?;
        let mut child = Command::new(std::env::current_exe()?)
            .arg("serve-ram")
            .args([file, dir])
            .args([&read_ahead.to_string(), access])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        let out = child.stdout.take().context("its output is a pipe")?;
        let mount = Self {
            dir: dir.to_owned(),
            server: Server::Ram(child),
        };
        let mut line = String::new();
        BufReader::new(out).read_line(&mut line)?;
        ensure!(
            line.trim() == serve_ram::READY,
            "the trivial server did not start"
        );
        Ok(mount)
    }

    /// The memory in the mount.
    #[must_use]
    pub fn memory(&self) -> PathBuf {
        self.dir.join(serve_ram::FILE)
    }

    /// How far the kernel reads ahead in this mount, in bytes.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub fn read_ahead(&self) -> anyhow::Result<u32> {
        let kib = fs::read_to_string(self.tunable("read_ahead_kb")?)?;
        Ok(kib.trim().parse::<u32>()? << 10)
    }

    fn tunable(&self, name: &str) -> anyhow::Result<PathBuf> {
        let device = fs::metadata(&self.dir)?.dev();
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        Ok(format!("/sys/class/bdi/{major}:{minor}/{name}").into())
    }

    /// Unmounts; returns the seconds it took.
    ///
    /// # Errors
    /// If that fails.
    pub fn unmount(mut self) -> anyhow::Result<f64> {
        let start = Instant::now();
        match std::mem::replace(&mut self.server, Server::Gone) {
            Server::Product(cli) => {
                cli.ok(&["umount", self.dir.to_str().context("a path in UTF-8")?])?;
            }
            Server::Ram(mut child) => {
                let status = Command::new("fusermount3")
                    .arg("-u")
                    .arg(&self.dir)
                    .status()?;
                ensure!(status.success(), "cannot unmount {}", self.dir.display());
                child.wait()?;
            }
            Server::Gone => {}
        }
        Ok(start.elapsed().as_secs_f64())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // After an error: the mount goes, and with it its server.
        if !matches!(self.server, Server::Gone) {
            let _ = unmount(&self.dir, UnmountFlags::DETACH);
        }
    }
}
