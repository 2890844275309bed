//! What a snapshot of a machine of Firecracker says of it, beside its images.

use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

/// What a snapshot says of its machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Description {
    /// Which description this is: 1.
    pub format: u32,
    /// The machine's working directory.
    pub directory: PathBuf,
    /// The guest's memory in bytes.
    pub memory_bytes: u64,
    /// How many vCPUs it has.
    pub cpus: Option<u32>,
    /// How large the pages of the guest's memory are to be, as Firecracker has it.
    #[serde(default)]
    pub huge_pages: Option<String>,
    /// The disks that the guest writes to.
    pub disks: Vec<Disk>,
    /// Those that it only reads, at paths in its working directory.
    #[serde(default)]
    pub read_only: Vec<ReadOnly>,
    /// The ids of its network interfaces.
    pub interfaces: Vec<String>,
    /// The socket of its vsock device.
    pub vsock: Option<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Disk {
    pub id: String,
    pub image: String,
    /// As Firecracker has it.
    pub path: String,
}

/// A disk that all clones read where it is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ReadOnly {
    /// As Firecracker has it.
    pub path: String,
    /// Where it is, whatever becomes of the working directory.
    pub file: PathBuf,
}

/// Whether a path leads to something in the directory that it is looked for in.
pub fn is_below(path: &Path) -> bool {
    path.components()
        .all(|part| matches!(part, Component::Normal(_) | Component::CurDir))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_out_of_the_working_directory_are_known() {
        assert!(is_below(Path::new("disks/root.img")) && is_below(Path::new("./root.img")));
        assert!(!is_below(Path::new("../root.img")) && !is_below(Path::new("/root.img")));
    }
}
