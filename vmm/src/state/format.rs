//! A machine state as bytes.
//!
//! All numbers are little-endian.
//!
//! ```text
//! offset   size  what
//! 0           8  "SNAPVMST"
//! 8           4  version of the format, 1
//! 12          8  N, the length of the content in bytes, at most 16 MiB
//! 20          N  content: a MachineState in postcard's wire format, KVM's
//!                structures as the bytes of the kernel's ABI
//! 20 + N     32  BLAKE3-256 of all bytes before
//! ```
//!
//! There is one valid form per state. Reading goes from the outside to the
//! inside, and each step relies on the ones before: magic, version, length,
//! checksum, content, then every size and count in the content. A change of any
//! structure in the content, of its fields or of their order is a new version.

use super::{MachineState, StateError};
use crate::Result;

const MAGIC: [u8; 8] = *b"SNAPVMST";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 20;
const CHECKSUM_BYTES: usize = blake3::OUT_LEN;
const MAX_CONTENT_BYTES: u64 = 16 << 20;

/// The longest encoded state in bytes: whoever reads one from a file need not
/// allocate more.
pub const MAX_STATE_BYTES: u64 = MAX_CONTENT_BYTES + HEADER_BYTES as u64 + CHECKSUM_BYTES as u64;

impl MachineState {
    /// The state as bytes.
    pub fn encode(&self) -> Vec<u8> {
        let content = self.content();
        let mut bytes = Vec::with_capacity(HEADER_BYTES + content.len() + CHECKSUM_BYTES);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&(content.len() as u64).to_le_bytes());
        bytes.extend_from_slice(&content);
        let checksum = blake3::hash(&bytes);
        bytes.extend_from_slice(checksum.as_bytes());
        bytes
    }

    /// The state of the bytes that [`MachineState::encode`] gave.
    ///
    /// # Errors
    /// A [`StateError`] for bytes that are not exactly one whole, valid state,
    /// [`Error::MemorySize`](crate::Error::MemorySize) and
    /// [`Error::Cpus`](crate::Error::Cpus) for a machine that cannot be. Never
    /// panics, and allocates at most a small multiple of the bytes' length.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let content = verified_content(bytes)?;
        let (state, rest) = postcard::take_from_bytes::<Self>(content)
            .map_err(|source| StateError::Malformed { source })?;
        state.validate()?;
        if !rest.is_empty() {
            return Err(StateError::TrailingBytes {
                extra: rest.len() as u64,
            }
            .into());
        }
        // Postcard and the KVM bindings also read overlong numbers and structures
        // of another length. Two byte strings would then be one state.
        if state.content() != content {
            return Err(StateError::NotCanonical.into());
        }
        Ok(state)
    }

    fn content(&self) -> Vec<u8> {
        postcard::to_stdvec(self).expect("every list of a state knows its length")
    }
}

/// The content of the bytes, after everything around it was checked.
fn verified_content(bytes: &[u8]) -> Result<&[u8], StateError> {
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
    let found = u32::from_le_bytes(*version);
    if found != VERSION {
        return Err(StateError::Version {
            found,
            supported: VERSION,
        });
    }
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
    Ok(content)
}

#[cfg(test)]
mod tests;
