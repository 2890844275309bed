//! `/dev/kvm`, `/dev/fuse` and what belongs to them.

use std::fs::OpenOptions;
use std::io;
use std::path::Path;

use super::check::{Check, read};

pub(super) fn checks() -> Vec<Check> {
    let mut checks = vec![kvm()];
    checks.extend(fuse());
    checks
}

const NO_MACHINES: &str = "machines cannot run; the store and mounts work without";

fn kvm() -> Check {
    const KVM: &str = "/dev/kvm";
    match OpenOptions::new().read(true).write(true).open(KVM) {
        Ok(_) => Check::ok("kvm", format!("{KVM} can be used ({})", kind())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Check::error(
            "kvm",
            format!("there is no {KVM}"),
            NO_MACHINES,
            "switch virtualisation on in the firmware, or nested virtualisation for this guest, \
             then `modprobe kvm_intel` or `modprobe kvm_amd`",
        ),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Check::error(
            "kvm",
            format!("{KVM} is not for this user"),
            NO_MACHINES,
            "`usermod -aG kvm USER`, then log in again",
        ),
        Err(error) => Check::error("kvm", format!("{KVM}: {error}"), NO_MACHINES, ""),
    }
}

/// Which module does it, and whether guests may have guests.
fn kind() -> String {
    for module in ["kvm_intel", "kvm_amd", "kvm_pvm"] {
        let dir = Path::new("/sys/module").join(module);
        if dir.exists() {
            let nested = read(dir.join("parameters/nested"));
            return match nested.as_deref() {
                Some("Y" | "1") => format!("{module}, guests may have guests"),
                _ => module.to_owned(),
            };
        }
    }
    "built into the kernel".to_owned()
}

fn fuse() -> Vec<Check> {
    const FUSE: &str = "/dev/fuse";
    const NO_MOUNTS: &str = "nothing can be mounted, and no machine restored";
    let device = match OpenOptions::new().read(true).write(true).open(FUSE) {
        Ok(_) => Check::ok("fuse", format!("{FUSE} can be used")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Check::error(
            "fuse",
            format!("there is no {FUSE}"),
            NO_MOUNTS,
            "`modprobe fuse`",
        ),
        Err(error) => Check::error(
            "fuse",
            format!("{FUSE}: {error}"),
            NO_MOUNTS,
            format!("`chmod 666 {FUSE}`"),
        ),
    };
    let mut checks = vec![device];
    if !rustix::process::geteuid().is_root() {
        let paths = std::env::var_os("PATH").unwrap_or_default();
        let found = std::env::split_paths(&paths)
            .map(|dir| dir.join("fusermount3"))
            .find(|path| path.is_file());
        checks.push(match found {
            Some(path) => Check::ok("fusermount3", path.display().to_string()),
            None => Check::error(
                "fusermount3",
                "there is no fusermount3 in PATH",
                "only root can mount",
                "`apt-get install fuse3`",
            ),
        });
    }
    checks
}
