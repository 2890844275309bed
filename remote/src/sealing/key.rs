//! The key of a domain: one line of text in a file that only its owner may read.
//!
//! ```text
//! snapstore-key-1 HEX      HEX: 64 hexadecimal digits, 32 random bytes
//! ```

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;

use crate::error::{Error, Result};

const BEGINS: &str = "snapstore-key-1 ";
const LEN: usize = 32;
/// A line of a key with its end.
const FILE_LEN: usize = BEGINS.len() + 2 * LEN + 1;

/// The key of a domain.
#[derive(Clone)]
pub struct DomainKey([u8; LEN]);

/// A log is no place for it.
impl fmt::Debug for DomainKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }
}

impl DomainKey {
    /// The key in a file.
    ///
    /// # Errors
    /// [`Error::Key`]; also if others than its owner may read it.
    pub fn read(path: &Path) -> Result<Self> {
        let failed = |error: io::Error| of(path, error.to_string());
        // What waits for a writer is no file, and is not waited for.
        let flags = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
        let file = OpenOptions::new().read(true).custom_flags(flags).open(path);
        let file = file.map_err(failed)?;
        let found = file.metadata().map_err(failed)?;
        if !found.is_file() {
            return Err(of(path, "it is no file"));
        }
        if found.permissions().mode() & 0o077 != 0 {
            let path_shown = path.display();
            return Err(of(
                path,
                format!("others may read or change it: `chmod 600 {path_shown}` mends that"),
            ));
        }
        let mut text = Vec::with_capacity(FILE_LEN + 1);
        let mut part = file.take(FILE_LEN as u64 + 1);
        part.read_to_end(&mut text).map_err(failed)?;
        Self::parse(&text).ok_or_else(|| {
            let why = "it is none that `snapstore remote key` has made, or it was changed";
            of(path, why)
        })
    }

    /// Makes a key in a new file.
    ///
    /// # Errors
    /// [`Error::Key`], also if there is a file: a key that is written over is lost, and what was
    /// written with it.
    pub fn make(path: &Path) -> Result<()> {
        let mut key = [0; LEN];
        for half in key.chunks_exact_mut(16) {
            let random = crate::random().map_err(|error| of(path, error.to_string()))?;
            half.copy_from_slice(&random.to_le_bytes());
        }
        let text = format!("{BEGINS}{}\n", blake3::Hash::from_bytes(key).to_hex());
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path);
        let mut file = file.map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => of(path, "it exists, and no key is written over"),
            _ => of(path, error.to_string()),
        })?;
        let above = match path.parent() {
            Some(above) if above != Path::new("") => above,
            _ => Path::new("."),
        };
        // First what it holds, then that it is there: else there could be an empty one.
        file.write_all(text.as_bytes())
            .and_then(|()| file.sync_all())
            .and_then(|()| File::open(above)?.sync_all())
            .map_err(|error| of(path, error.to_string()))
    }

    fn parse(text: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(text).ok()?;
        let digits = text.strip_suffix('\n').unwrap_or(text);
        let digits = digits.strip_prefix(BEGINS)?;
        let key = blake3::Hash::from_hex(digits).ok()?;
        Some(Self(*key.as_bytes()))
    }

    /// A key for one use of it, which tells nothing of the others.
    pub fn derive(&self, what_for: &str) -> [u8; LEN] {
        blake3::derive_key(what_for, &self.0)
    }

    #[cfg(test)]
    pub(crate) fn of_bytes(bytes: [u8; LEN]) -> Self {
        Self(bytes)
    }
}

fn of(path: &Path, why: impl Into<String>) -> Error {
    Error::Key {
        path: path.to_owned(),
        why: why.into(),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_key_is_made_once_and_read_by_its_owner_alone() -> Result<(), Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("key");
        DomainKey::make(&path)?;
        assert_eq!(fs::metadata(&path)?.permissions().mode() & 0o777, 0o600);
        let key = DomainKey::read(&path)?;
        let text = fs::read(&path)?;
        assert!(DomainKey::make(&path).is_err());
        assert_eq!(fs::read(&path)?, text);
        let other = dir.path().join("other");
        DomainKey::make(&other)?;
        assert_ne!(DomainKey::read(&other)?.0, key.0);
        for mode in [0o640, 0o604, 0o620, 0o602] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
            let error = DomainKey::read(&path).err().ok_or("it was read")?;
            let told = error.to_string();
            assert!(told.contains("chmod 600"), "{mode:o}: {told}");
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o400))?;
        DomainKey::read(&path)?;
        Ok(())
    }

    #[test]
    fn what_is_no_key_is_none() {
        let good = format!("{BEGINS}{}\n", "a5".repeat(32));
        assert!(DomainKey::parse(good.as_bytes()).is_some());
        let shorter = &good[..good.len() - 3];
        for wrong in ["", "\n", shorter, &good[1..], &format!("{good}\n")] {
            assert!(DomainKey::parse(wrong.as_bytes()).is_none(), "{wrong:?}");
        }
    }
}
