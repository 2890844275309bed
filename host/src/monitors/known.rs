//! The adapters that there are.

use std::path::Path;

use super::adapter::{Kind, Monitor, Restorer};
use super::cloud_hypervisor::{CloudHypervisor, CloudHypervisorRestorer};
use super::firecracker::{Firecracker, FirecrackerRestorer};
use super::qemu::{Qemu, QemuRestorer};

/// Connects to a monitor that runs.
pub fn connect(kind: Kind, socket: &Path) -> anyhow::Result<Box<dyn Monitor>> {
    Ok(match kind {
        Kind::Qemu => Box::new(Qemu::connect(socket)?),
        Kind::Firecracker => Box::new(Firecracker::connect(socket)?),
        Kind::CloudHypervisor => Box::new(CloudHypervisor::connect(socket)?),
    })
}

/// What starts machines of this monitor.
pub fn restorer(kind: Kind) -> Box<dyn Restorer> {
    match kind {
        Kind::Qemu => Box::new(QemuRestorer),
        Kind::Firecracker => Box::new(FirecrackerRestorer),
        Kind::CloudHypervisor => Box::new(CloudHypervisorRestorer),
    }
}
