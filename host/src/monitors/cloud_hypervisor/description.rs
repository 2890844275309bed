//! What a snapshot of a machine of Cloud Hypervisor says of it, beside its images, and what both
//! who commits and who restores know.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What it calls itself in messages.
pub const NAME: &str = "Cloud Hypervisor";
/// What all paths of its interface begin with.
pub const PREFIX: &str = "/api/v1";
/// The name of the configuration in its own snapshots.
pub const CONFIG: &str = "config.json";
/// The state of CPUs and devices.
pub const DEVICES: &str = "state.json";
/// The guest's memory.
pub const MEMORY: &str = "memory-ranges";

/// What a snapshot says of its machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Description {
    /// Which description this is: 1.
    pub format: u32,
    /// The machine's working directory.
    pub directory: PathBuf,
    /// Its configuration, as Cloud Hypervisor wrote it.
    pub config: Value,
    /// For each of its disks the image, if the guest writes to it.
    pub disks: Vec<Option<String>>,
}

/// The network interfaces of a configuration.
pub fn interfaces(config: &Value) -> impl Iterator<Item = &Value> {
    config["net"].as_array().into_iter().flatten()
}
