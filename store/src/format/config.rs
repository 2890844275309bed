//! The store's configuration: what the store is made of, and what a program has to
//! know to use it.
//!
//! ```text
//! version 1
//!      0   4  page size in bytes
//! version 2
//!      0   4  page size in bytes
//!      4   4  key scheme: 1 is keyed BLAKE3
//!      8   8  compatible features: who does not know one ignores it
//!     16   8  read-only compatible features: who does not know one may read
//!     24   8  incompatible features: who does not know one does nothing
//!     32  16  random identity of the store
//!     48  32  random secret of its keys
//!     80      more, of versions to come: what a compatible feature adds
//! ```
//! in a sealed file. Numbers are little-endian. In version 2 there is a copy of it,
//! since nothing else tells the secret.

use std::path::Path;

use crate::error::{Damage, Error, Result};
use crate::format::sealed_file::Format;
use crate::page::PageSize;

const MAGIC: [u8; 8] = *b"SNAPCONF";
pub(crate) const VERSION_1: Format = Format {
    magic: MAGIC,
    version: 1,
};
pub(crate) const VERSION_2: Format = Format {
    magic: MAGIC,
    version: 2,
};
const KEYED_BLAKE3: u32 = 1;
const FIXED_LEN: usize = 80;

/// Packs of format 1 are there, and index entries with plain keys: an upgrade has
/// begun and has not ended.
const UPGRADING: u64 = 1;
const KNOWN_INCOMPATIBLE: u64 = UPGRADING;
const KNOWN_READ_ONLY: u64 = 0;

/// The version of the format of a store.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, serde::Serialize)]
pub enum StoreFormat {
    /// That of the first programs.
    #[serde(rename = "1")]
    One,
    /// Feature bits, packs with identities and footers in blocks, keyed keys.
    #[serde(rename = "2")]
    Two,
}

/// The configuration of a store.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Config {
    pub page_size: PageSize,
    pub two: Option<Two>,
}

/// What version 2 has.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Two {
    compatible: u64,
    read_only: u64,
    incompatible: u64,
    store_id: [u8; 16],
    pub secret: [u8; 32],
    rest: Vec<u8>,
}

impl Config {
    /// A new store's.
    pub fn new(page_size: PageSize, format: StoreFormat) -> Result<Self> {
        let two = match format {
            StoreFormat::One => None,
            StoreFormat::Two => Some(Two {
                compatible: 0,
                read_only: 0,
                incompatible: 0,
                store_id: random("store")?,
                secret: random("secret")?,
                rest: Vec::new(),
            }),
        };
        Ok(Self { page_size, two })
    }

    pub fn format(&self) -> StoreFormat {
        match self.two {
            None => StoreFormat::One,
            Some(_) => StoreFormat::Two,
        }
    }

    /// Whether packs of format 1 may be there beside those of format 2.
    pub fn is_upgrading(&self) -> bool {
        self.two
            .as_ref()
            .is_some_and(|two| two.incompatible & UPGRADING != 0)
    }

    /// The same store while it is upgraded, and after that.
    pub fn with_upgrading(&self, upgrading: bool) -> Self {
        let mut config = self.clone();
        if let Some(two) = &mut config.two {
            two.incompatible &= !UPGRADING;
            two.incompatible |= if upgrading { UPGRADING } else { 0 };
        }
        config
    }

    /// The lowest feature that allows reading only.
    pub fn read_only_feature(&self) -> Option<u32> {
        let bits = self.two.as_ref()?.read_only & !KNOWN_READ_ONLY;
        (bits != 0).then(|| bits.trailing_zeros())
    }

    /// Writes it, and before that its copy: the secret is never in one place only.
    pub fn write(&self, path: &Path, copy: &Path) -> Result<()> {
        let Some(two) = &self.two else {
            return VERSION_1.write(path, &self.page_size.as_u32().to_le_bytes());
        };
        let payload = two.encode(self.page_size);
        VERSION_2.write(copy, &payload)?;
        VERSION_2.write(path, &payload)
    }

    /// Reads the configuration at `path`; `None` if there is none.
    ///
    /// # Errors
    /// [`Error::Newer`] for a version, a feature or a key scheme that is not known;
    /// [`Error::Damaged`].
    pub fn read(path: &Path) -> Result<Option<Self>> {
        let Some((version, payload)) = VERSION_2.read_versioned(path)? else {
            return Ok(None);
        };
        let malformed = || Damage::File {
            path: path.to_owned(),
            reason: "malformed",
        };
        if version == 1 {
            let bytes: [u8; 4] = payload.try_into().map_err(|_| malformed())?;
            let page_size = page_size(bytes).ok_or_else(malformed)?;
            return Ok(Some(Self {
                page_size,
                two: None,
            }));
        }
        let (fixed, rest) = payload
            .split_first_chunk::<FIXED_LEN>()
            .ok_or_else(malformed)?;
        let page_size = page_size(array(&fixed[..4])).ok_or_else(malformed)?;
        let two = Two {
            compatible: u64::from_le_bytes(array(&fixed[8..16])),
            read_only: u64::from_le_bytes(array(&fixed[16..24])),
            incompatible: u64::from_le_bytes(array(&fixed[24..32])),
            store_id: array(&fixed[32..48]),
            secret: array(&fixed[48..80]),
            rest: rest.to_vec(),
        };
        let unknown = two.incompatible & !KNOWN_INCOMPATIBLE;
        if unknown != 0 {
            let bit = unknown.trailing_zeros();
            return Err(Error::newer(path, "incompatible feature bit", bit));
        }
        match u32::from_le_bytes(array(&fixed[4..8])) {
            KEYED_BLAKE3 => {}
            scheme => return Err(Error::newer(path, "key scheme", scheme)),
        }
        Ok(Some(Self {
            page_size,
            two: Some(two),
        }))
    }
}

impl Two {
    fn encode(&self, page_size: PageSize) -> Vec<u8> {
        let mut payload = page_size.as_u32().to_le_bytes().to_vec();
        payload.extend_from_slice(&KEYED_BLAKE3.to_le_bytes());
        for bits in [self.compatible, self.read_only, self.incompatible] {
            payload.extend_from_slice(&bits.to_le_bytes());
        }
        payload.extend_from_slice(&self.store_id);
        payload.extend_from_slice(&self.secret);
        payload.extend_from_slice(&self.rest);
        payload
    }
}

fn page_size(bytes: [u8; 4]) -> Option<PageSize> {
    PageSize::from_bytes(u64::from(u32::from_le_bytes(bytes))).ok()
}

/// Bytes that nobody else has. In the simulator they depend on what they are for
/// alone, so that a history happens again as it did.
pub(crate) fn random<const N: usize>(purpose: &str) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    if cfg!(feature = "sim") {
        blake3::Hasher::new_derive_key("snapstore simulator")
            .update(purpose.as_bytes())
            .finalize_xof()
            .fill(&mut bytes);
        return Ok(bytes);
    }
    fill_random(&mut bytes)?;
    Ok(bytes)
}

/// Fills `bytes` from the kernel's generator.
pub(crate) fn fill_random(mut bytes: &mut [u8]) -> Result<()> {
    use rustix::rand::{GetRandomFlags, getrandom};
    while !bytes.is_empty() {
        let count = getrandom(&mut *bytes, GetRandomFlags::empty())
            .map_err(|errno| Error::io("get random bytes from", "the kernel", errno.into()))?;
        bytes = &mut bytes[count..];
    }
    Ok(())
}

fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.try_into().expect("the caller slices exactly")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(change: impl FnOnce(&mut Two)) -> Result<Option<Config>> {
        let dir = tempfile::tempdir().unwrap();
        let (path, copy) = (dir.path().join("config"), dir.path().join("copy"));
        let mut config = Config::new(PageSize::KIB_16, StoreFormat::Two).unwrap();
        change(config.two.as_mut().unwrap());
        config.write(&path, &copy).unwrap();
        let found = Config::read(&path);
        if let Ok(found) = &found {
            assert!(*found == Some(config));
            assert!(*found == Config::read(&copy).unwrap());
        }
        found
    }

    #[test]
    fn what_is_written_is_read_and_the_rest_is_kept() {
        let config = written(|two| two.rest = vec![1, 2, 3]).unwrap().unwrap();
        assert_eq!(config.format(), StoreFormat::Two);
        assert_eq!(config.read_only_feature(), None);
        assert!(!config.is_upgrading());
        assert!(config.with_upgrading(true).is_upgrading());
    }

    #[test]
    fn version_1_is_the_page_size() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config");
        let config = Config::new(PageSize::KIB_4, StoreFormat::One).unwrap();
        config.write(&path, &dir.path().join("copy")).unwrap();
        assert!(!dir.path().join("copy").exists());
        let found = Config::read(&path).unwrap().unwrap();
        assert!(found == config);
        let payload = VERSION_1.read(&path).unwrap().unwrap();
        assert_eq!(payload, [0, 16, 0, 0]);
    }

    #[test]
    fn each_set_of_features_is_answered_in_its_way() {
        assert!(written(|two| two.compatible = 1 << 7).unwrap().is_some());
        let reads = written(|two| two.read_only = 1 << 9).unwrap().unwrap();
        assert_eq!(reads.read_only_feature(), Some(9));
        let Err(error) = written(|two| two.incompatible = 1 << 63) else {
            panic!("it is opened");
        };
        assert!(matches!(error, Error::Newer { version: 63, .. }));
        let text = error.to_string();
        assert!(text.contains("incompatible feature bit 63"), "{text}");
    }
}
