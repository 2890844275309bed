//! Small files that are replaced whole and checked before they are parsed:
//! the store's configuration, tags, and the collector's state.
//!
//! ```text
//! offset  size  field
//!      0     8  magic, one per kind of file
//!      8     4  format version, u32
//!     12     4  payload length n, u32, at most 16 MiB
//!     16     n  payload
//!   16+n    32  BLAKE3 of the file's name and all bytes before this field
//! ```
//! The file's name is part of the checksum, so a tag that was copied over
//! another one is found out. Numbers are little-endian. All versions have this
//! frame: where the checksum matches, a version that is not known is a newer
//! one's, not damage.

use std::io::Read as _;
use std::path::Path;

use crate::durable;
use crate::error::{Damage, Error, IoContext as _, Result, cannot_read};
use crate::regular::{self, Opened};
use crate::sim::{self, Fault, StepKind};

const HEADER_LEN: usize = 16;
const HASH_LEN: usize = 32;
const MAX_PAYLOAD_LEN: u64 = 16 << 20;

/// A kind of sealed file.
pub(crate) struct Format {
    pub magic: [u8; 8],
    pub version: u32,
}

impl Format {
    /// Replaces `path` by a sealed file with this payload, durably.
    pub fn write(&self, path: &Path, payload: &[u8]) -> Result<()> {
        durable::replace_file(path, &self.encode(path, payload))
    }

    /// The bytes of a sealed file with this payload.
    pub fn encode(&self, path: &Path, payload: &[u8]) -> Vec<u8> {
        let len = u32::try_from(payload.len()).expect("payloads stay far below 4 GiB");
        let mut bytes = Vec::with_capacity(HEADER_LEN + payload.len() + HASH_LEN);
        bytes.extend_from_slice(&self.magic);
        bytes.extend_from_slice(&self.version.to_le_bytes());
        bytes.extend_from_slice(&len.to_le_bytes());
        bytes.extend_from_slice(payload);
        let hash = checksum(path, &bytes);
        bytes.extend_from_slice(&hash);
        bytes
    }

    /// The payload of the sealed file at `path`; `None` if there is no such file.
    pub fn read(&self, path: &Path) -> Result<Option<Vec<u8>>> {
        let Some((version, payload)) = self.read_versioned(path)? else {
            return Ok(None);
        };
        if version == self.version {
            return Ok(Some(payload));
        }
        Err(never_was(path))
    }

    /// The version, this one or one before, and the payload.
    ///
    /// # Errors
    /// [`Error::Damaged`], also for what the disk cannot read; [`Error::Denied`];
    /// [`Error::Newer`].
    pub fn read_versioned(&self, path: &Path) -> Result<Option<(u32, Vec<u8>)>> {
        sim::before(StepKind::ReadFile, path).context("read", path)?;
        let damaged = |reason| Damage::File {
            path: path.to_owned(),
            reason,
        };
        let file = match regular::open(path) {
            Ok(Opened::File(file)) => file,
            Ok(Opened::Absent) => return Ok(None),
            Ok(Opened::Odd(reason)) => return Err(damaged(reason).into()),
            Err(error) => return Err(cannot_read("open", path, error, damaged)),
        };
        let mut bytes = Vec::new();
        let limit = MAX_PAYLOAD_LEN + (HEADER_LEN + HASH_LEN) as u64 + 1;
        let read = file.take(limit).read_to_end(&mut bytes);
        read.map_err(|error| cannot_read("read", path, error, damaged))?;
        self.decode(path, &bytes).map(Some)
    }

    /// The version and the payload in the bytes of a sealed file.
    fn decode(&self, path: &Path, bytes: &[u8]) -> Result<(u32, Vec<u8>)> {
        let damaged = |reason| {
            Error::from(Damage::File {
                path: path.to_owned(),
                reason,
            })
        };
        if bytes.len() < HEADER_LEN + HASH_LEN {
            return Err(damaged("too short"));
        }
        let (body, hash) = bytes.split_at(bytes.len() - HASH_LEN);
        if checksum(path, body) != hash && !sim::on(Fault::SealNotChecked) {
            return Err(damaged("wrong checksum"));
        }
        if body[..8] != self.magic {
            return Err(damaged("wrong magic number"));
        }
        let version = read_u32(body, 8);
        if version > self.version {
            return Err(Error::newer(path, "format version", version));
        }
        if version == 0 {
            return Err(never_was(path));
        }
        if read_u32(body, 12) as usize != body.len() - HEADER_LEN {
            return Err(damaged("wrong length"));
        }
        Ok((version, body[HEADER_LEN..].to_vec()))
    }
}

fn never_was(path: &Path) -> Error {
    Damage::File {
        path: path.to_owned(),
        reason: "a format version that there never was",
    }
    .into()
}

fn checksum(path: &Path, body: &[u8]) -> [u8; 32] {
    use std::os::unix::ffi::OsStrExt as _;
    let name = path.file_name().unwrap_or_default();
    let mut hasher = blake3::Hasher::new();
    hasher.update(name.as_bytes());
    hasher.update(&[0]);
    hasher.update(body);
    hasher.finalize().into()
}

fn read_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORMAT: Format = Format {
        magic: *b"SNAPTEST",
        version: 1,
    };

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        assert!(FORMAT.read(&path).unwrap().is_none());
        FORMAT.write(&path, b"payload").unwrap();
        assert_eq!(FORMAT.read(&path).unwrap().unwrap(), b"payload");
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_damage() {
        let path = Path::new("dir/file");
        let good = FORMAT.encode(path, b"payload");
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1 << (at % 8);
            assert!(matches!(
                FORMAT.decode(path, &bad),
                Err(Error::Damaged(Damage::File { .. }))
            ));
            assert!(FORMAT.decode(path, &good[..at]).is_err());
        }
        assert!(FORMAT.decode(Path::new("dir/other"), &good).is_err());
    }
    #[test]
    fn a_version_that_is_not_known_is_newer_or_never_was() {
        let path = Path::new("dir/file");
        let version = |version| Format { version, ..FORMAT }.encode(path, b"payload");
        let error = FORMAT.decode(path, &version(7)).unwrap_err();
        assert!(matches!(error, Error::Newer { version: 7, .. }), "{error}");
        let message = error.to_string();
        assert!(message.contains("dir/file has format version 7, made by a newer"));
        let error = FORMAT.decode(path, &version(0)).unwrap_err();
        assert!(matches!(error, Error::Damaged(_)), "{error}");
        // With a wrong checksum it is damage, whatever version it seems to have.
        let mut bad = version(7);
        bad[20] ^= 1;
        let error = FORMAT.decode(path, &bad).unwrap_err();
        assert!(matches!(error, Error::Damaged(_)), "{error}");
    }
}
