//! The demonstration's directory, and its mounts: nothing of either is left
//! behind, however it ends.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::Context as _;

/// How long a server may take to let go of the store after the last unmount.
const PATIENCE: Duration = Duration::from_millis(100);
const ATTEMPTS: usize = 20;

/// A directory with a store and a mount point.
pub struct Workspace {
    dir: PathBuf,
    store: PathBuf,
    keep: bool,
}

impl Workspace {
    /// Without `dir` a temporary directory, which goes at the end unless `keep`.
    pub fn create(dir: Option<&Path>, keep: bool) -> anyhow::Result<Self> {
        let (dir, keep) = match dir {
            Some(dir) => {
                let dir = std::path::absolute(dir)?;
                fs::create_dir_all(&dir)
                    .with_context(|| format!("cannot create {}", dir.display()))?;
                (dir, true)
            }
            None => {
                let name = format!("snapstore-demo-{}", std::process::id());
                let dir = std::path::absolute(std::env::temp_dir())?.join(name);
                // Not create_dir_all: the name must be free.
                fs::create_dir(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
                (dir, keep)
            }
        };
        let store = dir.join("store");
        Ok(Self { dir, store, keep })
    }

    pub fn store(&self) -> &Path {
        &self.store
    }

    /// Where the demonstration's machines are found.
    pub fn runtime(&self) -> PathBuf {
        self.dir.join("run")
    }

    /// The directory of all this.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn is_kept(&self) -> bool {
        self.keep
    }

    /// An empty directory to mount on.
    pub fn mount_dir(&self) -> anyhow::Result<PathBuf> {
        let dir = self.dir.join("mnt");
        fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        Ok(dir)
    }
}

impl Drop for Workspace {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        // The mount point goes first and only if it is empty: what is below it
        // while something is still mounted is not ours to delete.
        let _ = fs::remove_dir(self.dir.join("mnt"));
        for _ in 0..ATTEMPTS {
            match fs::remove_dir_all(&self.dir) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {}
                _ => return,
            }
            std::thread::sleep(PATIENCE);
        }
        eprintln!("warning: could not remove {}", self.dir.display());
    }
}

/// A mount that ends with this value at the latest.
pub struct Mount {
    dir: PathBuf,
    program: PathBuf,
}

impl Mount {
    /// Whatever is or will be mounted at `dir` by the program.
    pub fn at(dir: PathBuf, program: &Path) -> Self {
        let program = program.to_owned();
        Self { dir, program }
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Nothing is mounted any more, unless this ends before its time.
        let _ = Command::new(&self.program)
            .args(["umount", "--lazy"])
            .arg(&self.dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
    }
}
