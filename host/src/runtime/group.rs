//! The control group of a machine: written down before it is made, and removed by whoever
//! clears away after the machine.

use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use snapstore_vmm::confine::remove_group;

use super::files::remove_if_there;
use super::vm_dir::VmDir;

impl VmDir {
    /// Writes down where the machine's control group is about to be.
    pub fn record_group(&self, dir: &Path) -> io::Result<()> {
        fs::write(self.group_path(), dir.as_os_str().as_bytes())
    }

    /// Ends what is left in the control group of a machine that has ended, and removes it.
    /// The caller holds the machine's name.
    pub(super) fn remove_group(&self) -> io::Result<()> {
        let recorded = match fs::read(self.group_path()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => PathBuf::from(std::ffi::OsString::from_vec(other?)),
        };
        if let Err(error) = remove_group(&recorded) {
            tracing::warn!(%error, group = %recorded.display(), "a control group is left");
        }
        remove_if_there(&self.group_path())
    }

    /// The same of one that has ended badly, whose supervisor could not.
    pub(super) fn clear_group(&self) -> anyhow::Result<()> {
        if self.group_path().exists()
            && !self.is_running()
            && let Some(claim) = self.reclaim()?
        {
            claim.vm.remove_group()?;
        }
        Ok(())
    }

    fn group_path(&self) -> PathBuf {
        self.dir.join("cgroup")
    }
}
