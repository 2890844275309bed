//! What a snapshot says of its machine: read as what anybody may have written.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, ensure};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::adapter::DESCRIPTION;

const FORMAT: u64 = 1;
/// The longest that is read.
pub(super) const LONGEST_BYTES: u64 = 1 << 20;

/// The description in a mounted snapshot. Its format is looked at first: one of a newer
/// version is told as that, whatever else it holds.
pub(super) fn description<T: DeserializeOwned>(mount: &Path) -> anyhow::Result<T> {
    let path = mount.join(DESCRIPTION);
    let unreadable = || format!("cannot read {}", path.display());
    let length = fs::metadata(&path).with_context(unreadable)?.len();
    ensure!(
        length <= LONGEST_BYTES,
        "{} is too long for a description of a machine",
        path.display()
    );
    let bytes = fs::read(&path).with_context(unreadable)?;
    parsed(&bytes, &path)
}

/// The same of what was read at `path`.
pub(super) fn parsed<T: DeserializeOwned>(bytes: &[u8], path: &Path) -> anyhow::Result<T> {
    let none = || format!("{} is no description of a machine", path.display());
    let about: Value = serde_json::from_slice(bytes).with_context(none)?;
    let format = about["format"].as_u64().with_context(none)?;
    ensure!(
        format == FORMAT,
        "the snapshot's description of its machine is of the format {format}, which this version \
         does not know; use a newer one"
    );
    serde_json::from_value(about).with_context(none)
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Deserialize, PartialEq, Debug)]
    struct About {
        name: String,
    }

    fn read(bytes: &[u8]) -> Result<About, String> {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(DESCRIPTION), bytes).unwrap();
        description(dir.path()).map_err(|error| format!("{error:#}"))
    }

    #[test]
    fn a_newer_one_is_told_before_it_is_understood() {
        let name = "web".to_owned();
        assert_eq!(read(br#"{"format": 1, "name": "web"}"#), Ok(About { name }));
        let newer = read(br#"{"format": 2, "names": ["web"]}"#).unwrap_err();
        assert!(newer.contains("format 2"), "{newer}");
        for odd in [&b"{}"[..], b"x", br#"{"format": 1}"#] {
            let error = read(odd).unwrap_err();
            assert!(error.contains("is no description"), "{error}");
        }
    }

    #[test]
    fn a_long_one_is_not_read() {
        let mut long = br#"{"format": 1, "name": "web"}"#.to_vec();
        long.resize(LONGEST_BYTES as usize + 1, b' ');
        let error = read(&long).unwrap_err();
        assert!(error.contains("too long"), "{error}");
    }
}
