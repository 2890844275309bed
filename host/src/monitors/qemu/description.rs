//! What a snapshot of a machine of QEMU says of it, beside its images.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::regions::Region;

/// The attached file with what the guest sees beside its memory.
pub const REGIONS: &str = "regions.bin";
/// What a snapshot of a machine says of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Description {
    /// Which description this is: 1.
    pub format: u32,
    /// The versioned type of the machine, such as `pc-q35-7.2`.
    pub machine: String,
    /// The program that ran.
    pub program: PathBuf,
    /// Its arguments, without its name.
    pub arguments: Vec<String>,
    /// Its working directory.
    pub directory: PathBuf,
    /// The id of the object that is the guest's memory; none if QEMU made it by itself.
    pub memory_backend: Option<String>,
    /// The guest's memory in bytes.
    pub memory_bytes: u64,
    /// How many vCPUs it had.
    pub cpus: u32,
    /// The disks that the guest writes to.
    pub disks: Vec<Disk>,
    /// What the guest sees beside its memory.
    pub regions: Vec<Region>,
}

/// A disk that the guest writes to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Disk {
    /// The image of the snapshot.
    pub image: String,
    /// What QEMU calls it.
    pub device: String,
    /// The files it consisted of, as QEMU named them, the topmost first.
    pub files: Vec<String>,
}
