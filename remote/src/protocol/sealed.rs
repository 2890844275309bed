//! Small objects that are checked before they are parsed.
//!
//! ```text
//!      0   8  magic, one per kind
//!      8   4  format version, 1; of some heads 2
//!     12   4  length n of the payload
//!     16   n  payload
//!   16+n  32  BLAKE3 of the object's key and all bytes before this field
//! ```
//! The key is part of the checksum: an object that was copied over another one is
//! found out. Numbers are little-endian.

use crate::protocol::error::Error;

const HEAD_LEN: usize = 16;
const HASH_LEN: usize = 32;
const VERSION: u32 = 1;

/// Why an object cannot be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Malformed {
    /// No version wrote it so.
    Wrong(&'static str),
    /// A newer version did.
    Newer(u32),
}

impl Malformed {
    /// The error that names the object.
    #[must_use]
    pub fn of(self, key: &str) -> Error {
        let key = key.to_owned();
        match self {
            Self::Wrong(reason) => Error::Damaged { key, reason },
            Self::Newer(version) => Error::Newer { key, version },
        }
    }
}

/// The bytes of an object.
#[must_use]
pub fn seal(magic: [u8; 8], key: &str, payload: &[u8]) -> Vec<u8> {
    seal_as(VERSION, magic, key, payload)
}

/// The same of an object of which there are several versions.
#[must_use]
pub fn seal_as(version: u32, magic: [u8; 8], key: &str, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).expect("sealed objects are far below 4 GiB");
    let mut bytes = Vec::with_capacity(HEAD_LEN + payload.len() + HASH_LEN);
    bytes.extend_from_slice(&magic);
    bytes.extend_from_slice(&version.to_le_bytes());
    bytes.extend_from_slice(&len.to_le_bytes());
    bytes.extend_from_slice(payload);
    let hash = checksum(key, &bytes);
    bytes.extend_from_slice(&hash);
    bytes
}

/// The payload of an object.
///
/// # Errors
/// If it is not what its writer made, or of a newer version.
pub fn unseal<'a>(magic: [u8; 8], key: &str, bytes: &'a [u8]) -> Result<&'a [u8], Malformed> {
    Ok(unseal_up_to(VERSION, magic, key, bytes)?.1)
}

/// The same of an object of which there are so many versions: which one it is, and its
/// payload.
///
/// # Errors
/// As [`unseal`].
pub fn unseal_up_to<'a>(
    newest: u32,
    magic: [u8; 8],
    key: &str,
    bytes: &'a [u8],
) -> Result<(u32, &'a [u8]), Malformed> {
    let body = bytes.len().checked_sub(HASH_LEN);
    let body = body.filter(|len| *len >= HEAD_LEN);
    let (body, hash) = bytes.split_at(body.ok_or(Malformed::Wrong("it is too short"))?);
    if checksum(key, body) != hash {
        return Err(Malformed::Wrong(
            "its checksum is not that of its bytes and its key",
        ));
    }
    if body[..8] != magic {
        return Err(Malformed::Wrong(
            "it has the magic number of something else",
        ));
    }
    let field = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|byte| body[at + byte]));
    let version = field(8);
    if !(VERSION..=newest).contains(&version) {
        return Err(Malformed::Newer(version));
    }
    if usize::try_from(field(12)) != Ok(body.len() - HEAD_LEN) {
        return Err(Malformed::Wrong("its length is not the one it tells"));
    }
    Ok((version, &body[HEAD_LEN..]))
}

fn checksum(key: &str, bytes: &[u8]) -> [u8; HASH_LEN] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(key.as_bytes()).update(&[0]).update(bytes);
    hasher.finalize().into()
}

/// Takes fields off the front of a payload.
pub(crate) struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    pub fn take(&mut self, len: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self
            .0
            .split_at_checked(len)
            .ok_or(Malformed::Wrong("it ends too early"))?;
        self.0 = rest;
        Ok(taken)
    }

    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        Ok(self.take(N)?.try_into().expect("as many were taken"))
    }

    pub fn u32(&mut self) -> Result<u32, Malformed> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    /// A number of things that take at least so many bytes each: never more than there
    /// can be.
    pub fn count(&mut self, least_bytes: usize) -> Result<usize, Malformed> {
        let count = self.u32()? as usize;
        match count.checked_mul(least_bytes) {
            Some(bytes) if bytes <= self.0.len() => Ok(count),
            _ => Err(Malformed::Wrong("it counts more than it holds")),
        }
    }

    pub fn end(&self) -> Result<(), Malformed> {
        match self.0 {
            [] => Ok(()),
            _ => Err(Malformed::Wrong("more follows than there should")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flipped_bit_every_cut_and_every_other_key_is_found() {
        let magic = *b"SNAPTEST";
        let sealed = seal(magic, "a/b", b"payload");
        assert_eq!(unseal(magic, "a/b", &sealed), Ok(&b"payload"[..]));
        assert!(unseal(magic, "a/c", &sealed).is_err());
        assert!(unseal(*b"SNAPELSE", "a/b", &sealed).is_err());
        for len in 0..sealed.len() {
            assert!(unseal(magic, "a/b", &sealed[..len]).is_err());
        }
        for bit in 0..sealed.len() * 8 {
            let mut flipped = sealed.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(unseal(magic, "a/b", &flipped).is_err(), "bit {bit}");
        }
    }
}
