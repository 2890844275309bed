//! The runtime directory: one directory a machine, `vms/NAME/` with
//!
//! - `lock`, which the machine's process keeps locked (flock(2)) until it ends;
//! - `starter`, which a command that starts the machine keeps locked until it has
//!   started: no two commands choose one name;
//! - `control.sock`, its socket;
//! - `vsock.sock`, the host's end of its guest's sockets, if it has such a device;
//! - `monitor/`, what another monitor has made, if it is a machine of one;
//! - `log`, its process's standard error;
//! - `cgroup`, where its control group is, if it has one;
//! - `ending`, why it ended, if that was not as wanted.
//!
//! A directory whose lock is free is of a machine that has ended. An orderly end
//! leaves none.

mod claim;
mod ending;
mod files;
mod group;
#[cfg(test)]
mod tests;
mod vm_dir;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};

use crate::error::Usage;
use crate::mounts;
pub use claim::{NameLock, Reservation, forget};
pub use ending::{IN_ORDER, KILLED};
pub use files::is_same;
use files::make_private;
pub(crate) use vm_dir::began;
pub use vm_dir::{VSOCK, VmDir};

/// The environment's variable that names the runtime directory.
pub const RUNTIME_DIR: &str = "SNAPSTORE_RUNTIME_DIR";

/// The longest path of a UNIX socket, in bytes (unix(7), with its final zero).
const SOCKET_PATH_BYTES: usize = 107;

/// The directory for what lives no longer than the machine is up.
pub struct Runtime {
    dir: PathBuf,
}

impl Runtime {
    /// The runtime directory of this user, made if it is not there.
    pub fn open() -> anyhow::Result<Self> {
        let dir = std::path::absolute(runtime_dir()).context(
            "cannot find the directory for machines; name one with SNAPSTORE_RUNTIME_DIR",
        )?;
        let runtime = Self { dir };
        // Before there is anything that no machine could use.
        runtime.vm("m")?;
        for part in [&runtime.dir, &runtime.vms_dir(), &runtime.mounts()] {
            make_private(part)?;
        }
        Ok(runtime)
    }

    fn vms_dir(&self) -> PathBuf {
        self.dir.join("vms")
    }

    /// Where mounts that machines share are.
    pub fn mounts(&self) -> PathBuf {
        self.dir.join("mounts")
    }

    /// The directory of a machine of this name, there or not.
    pub fn vm(&self, name: &str) -> anyhow::Result<VmDir> {
        snapstore_store::check_tag(name).map_err(|_| {
            Usage(format!(
                "{name:?} cannot name a machine; use 1 to 128 of the characters \
                 A-Z a-z 0-9 . _ + - @ : =, beginning with a letter or digit"
            ))
        })?;
        let vm = VmDir {
            name: name.to_owned(),
            dir: self.vms_dir().join(name),
        };
        if vm.socket().as_os_str().len() > SOCKET_PATH_BYTES {
            bail!(Usage(format!(
                "{} is too long for a socket's path; choose a shorter name, or a shorter \
                 directory with SNAPSTORE_RUNTIME_DIR",
                vm.socket().display()
            )));
        }
        Ok(vm)
    }

    /// Every machine that left a directory, by name. One that ended in order is cleared
    /// away, if its supervisor could not; so are names of machines that never were, and
    /// mounts of which neither the server nor a machine is left.
    pub fn vms(&self) -> anyhow::Result<Vec<VmDir>> {
        let dir = self.vms_dir();
        let mut vms = Vec::new();
        for entry in fs::read_dir(&dir).with_context(|| format!("cannot list {}", dir.display()))? {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else {
                continue;
            };
            let vm = VmDir {
                name,
                dir: entry.path(),
            };
            if vm.has_ended_in_order() {
                forget(&vm)?;
            } else if vm.exists() || !vm.was_abandoned()? {
                vm.clear_group()?;
                vms.push(vm);
            }
        }
        if let Err(error) = mounts::clear_abandoned(&self.mounts()) {
            tracing::warn!(%error, "a mount that no machine uses is left");
        }
        vms.sort_by(|a, b| natural(&a.name).cmp(&natural(&b.name)));
        Ok(vms)
    }

    /// A running machine of this name.
    pub fn running(&self, name: &str) -> anyhow::Result<VmDir> {
        let vm = self.vm(name)?;
        if vm.is_running() {
            return Ok(vm);
        }
        Err(vm.not_running())
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.dir
    }
}

/// Sorts `base.9` before `base.10`.
fn natural(name: &str) -> (&str, u64, &str) {
    let stem = name.trim_end_matches(|c: char| c.is_ascii_digit());
    let number = name[stem.len()..].parse().unwrap_or(u64::MAX);
    (stem, number, name)
}

/// Where machines and their mounts are to be found.
pub fn runtime_dir() -> PathBuf {
    let from = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    if let Some(dir) = from(RUNTIME_DIR) {
        return PathBuf::from(dir);
    }
    let user = rustix::process::geteuid();
    // Not that of a session: root's would go with its last login, under machines that run.
    if user.is_root() {
        return PathBuf::from("/run/snapstore");
    }
    match from("XDG_RUNTIME_DIR") {
        Some(dir) => PathBuf::from(dir).join("snapstore"),
        None => std::env::temp_dir().join(format!("snapstore-{}", user.as_raw())),
    }
}
