//! The small files that say what a view is: each replaced as a whole, with a check of what it
//! says, since a flipped bit in one of them could leave out what was written.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use snapstore_overlay::step;

use crate::error::{Result, cannot};

/// Records of the first version have no check.
pub(super) const FIRST: u32 = 1;
pub(super) const CHECKED: u32 = 2;

pub(super) fn first() -> u32 {
    FIRST
}

/// What such a file says.
pub(super) trait Record: Serialize + DeserializeOwned {
    fn version(&self) -> u32;
}

#[derive(Serialize, Deserialize)]
struct Checked<T> {
    #[serde(flatten)]
    value: T,
    /// The BLAKE3 of the rest, as this program writes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    check: Option<String>,
}

fn check_of<T: Record>(value: &T) -> serde_json::Result<String> {
    let bytes = serde_json::to_vec(value)?;
    Ok(blake3::hash(&bytes).to_hex().to_string())
}

/// What the bytes of such a file say, or what is wrong with them. What a later version wrote
/// is not checked.
pub(super) fn parse<T: Record>(bytes: &[u8]) -> std::result::Result<T, String> {
    let told = |error: serde_json::Error| error.to_string();
    let Checked { value, check } = serde_json::from_slice::<Checked<T>>(bytes).map_err(told)?;
    match (check, value.version()) {
        (_, version) if version > CHECKED => Ok(value),
        (None, FIRST) => Ok(value),
        (Some(check), _) if check == check_of(&value).map_err(told)? => {
            // A name that is missing may stand for what it would say.
            let check = Some(check);
            let written = serde_json::to_vec(&Checked {
                value: &value,
                check,
            });
            match written.map_err(told)? == bytes {
                true => Ok(value),
                false => Err("it is not as it was written".to_owned()),
            }
        }
        _ => Err("its checksum does not fit".to_owned()),
    }
}

/// Writes a file, which is there as a whole or not at all, and has it on the disk.
pub(super) fn replace<T: Record>(dir: &Path, name: &str, value: &T) -> Result<()> {
    let path = dir.join(name);
    let new = dir.join(format!("{name}.new"));
    let written = check_of(value)
        .and_then(|check| {
            let check = Some(check);
            serde_json::to_vec(&Checked { value, check })
        })
        .map_err(io::Error::from)
        .and_then(|bytes| {
            step("write what a view is made from");
            let mut file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&new)?;
            file.write_all(&bytes)?;
            // Before the name leads to it: else a power cut could leave it empty.
            file.sync_all()?;
            step("replace what a view is made from");
            fs::rename(&new, &path)
        });
    written.map_err(|error| cannot("write", &path, error))?;
    sync_dir(dir)
}

/// Has the names of a directory on the disk.
pub(super) fn sync_dir(dir: &Path) -> Result<()> {
    step("sync a directory of a view");
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(|error| cannot("sync", dir, error))
}
