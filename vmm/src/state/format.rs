//! A machine state as bytes.
//!
//! All numbers are little-endian.
//!
//! ```text
//! offset   size  what
//! 0           8  "SNAPVMST"
//! 8           4  version of the format, 1 or 2
//! 12          8  N, the length of the content in bytes, at most 16 MiB
//! 20          N  content: of version 2 payloads (`payload.rs`), of version 1 one
//!                structure (`version1.rs`)
//! 20 + N     32  BLAKE3-256 of all bytes before
//! ```
//!
//! All versions have this frame: bytes whose checksum matches and whose version is
//! not known were made by a newer snapstore, and are not damaged. Version 2 is
//! written, version 1 is read for ever.
//!
//! There is one valid form per state and version. Reading goes from the outside to
//! the inside, and each step relies on the ones before: magic, length, checksum,
//! version, the list of payloads, each payload, then every size and count in it.

mod kinds;
mod parts;
mod payload;
mod version1;
mod virtio;
mod wire;

#[cfg(test)]
pub(crate) use virtio::through_its_bytes;

use super::{MachineState, StateError};
use crate::Result;

const MAGIC: [u8; 8] = *b"SNAPVMST";
const VERSION: u32 = 2;
const HEADER_BYTES: usize = 20;
const CHECKSUM_BYTES: usize = blake3::OUT_LEN;
const MAX_CONTENT_BYTES: u64 = 16 << 20;

/// The longest encoded state in bytes: whoever reads one from a file need not
/// allocate more.
pub const MAX_STATE_BYTES: u64 = MAX_CONTENT_BYTES + HEADER_BYTES as u64 + CHECKSUM_BYTES as u64;

impl MachineState {
    /// The state as bytes.
    pub fn encode(&self) -> Vec<u8> {
        framed(VERSION, &payload::write(&kinds::payloads(self)))
    }

    /// The state of the bytes that [`MachineState::encode`] gave, of this version of
    /// the format or an older one.
    ///
    /// # Errors
    /// [`StateError::Version`] and [`StateError::NewerPayload`] for what a newer
    /// program wrote, another [`StateError`] for bytes that are not exactly one whole,
    /// valid state, [`Error::MemorySize`](crate::Error::MemorySize) and
    /// [`Error::Cpus`](crate::Error::Cpus) for a machine that cannot be. Never
    /// panics, and allocates at most a small multiple of the bytes' length.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let (version, content) = verified(bytes)?;
        let state = match version {
            1 => version1::decode(content)?,
            VERSION => kinds::decode(payload::read(content)?, kinds::KINDS)?,
            found => {
                return Err(StateError::Version {
                    found,
                    supported: VERSION,
                }
                .into());
            }
        };
        state.validate()?;
        Ok(state)
    }
}

/// The content with everything that belongs around it.
fn framed(version: u32, content: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES + content.len() + CHECKSUM_BYTES);
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&version.to_le_bytes());
    bytes.extend_from_slice(&(content.len() as u64).to_le_bytes());
    bytes.extend_from_slice(content);
    let checksum = blake3::hash(&bytes);
    bytes.extend_from_slice(checksum.as_bytes());
    bytes
}

/// The version and the content of the bytes, after everything around it was checked.
fn verified(bytes: &[u8]) -> Result<(u32, &[u8]), StateError> {
    if !bytes.starts_with(&MAGIC[..bytes.len().min(MAGIC.len())]) {
        return Err(StateError::NotAState);
    }
    let truncated = |expected: u64| StateError::Truncated {
        found: bytes.len() as u64,
        expected,
    };
    let short = || truncated((HEADER_BYTES + CHECKSUM_BYTES) as u64);
    let after_magic = bytes.get(MAGIC.len()..).ok_or_else(short)?;
    let (version, after_version) = after_magic.split_first_chunk().ok_or_else(short)?;
    let (length, body) = after_version.split_first_chunk().ok_or_else(short)?;
    let length = u64::from_le_bytes(*length);
    if length > MAX_CONTENT_BYTES {
        return Err(StateError::TooLarge {
            bytes: length,
            limit: MAX_CONTENT_BYTES,
        });
    }
    let expected = HEADER_BYTES as u64 + length + CHECKSUM_BYTES as u64;
    if expected > bytes.len() as u64 {
        return Err(truncated(expected));
    }
    if expected < bytes.len() as u64 {
        return Err(StateError::TrailingBytes {
            extra: bytes.len() as u64 - expected,
        });
    }
    let (content, checksum) = body
        .split_last_chunk::<CHECKSUM_BYTES>()
        .ok_or_else(short)?;
    let covered = &bytes[..HEADER_BYTES + content.len()];
    // blake3::Hash compares in constant time, plain bytes would do as well.
    if blake3::hash(covered) != blake3::Hash::from_bytes(*checksum) {
        return Err(StateError::Checksum);
    }
    Ok((u32::from_le_bytes(*version), content))
}

#[cfg(test)]
mod tests;
