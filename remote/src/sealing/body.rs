//! What an encrypted object looks like.
//!
//! ```text
//!      0   8  magic SNAPSEAL
//!      8   4  format version, 1
//!     12   4  check: of the domain's key and the object's key
//!     16      blocks, each of 16 KiB of what is in it, the last one of what is left (1 to 16 KiB;
//!             of an empty object 0):
//!             12  nonce; its lowest bit is 1 in the last block
//!              n  AES-256-GCM, with the block's number (8 bytes) as what is authenticated, too
//!             16  its tag
//! ```
//! From the domain's key and the object's key (with the tag's name in clear) come 68 bytes: the AES key, the
//! key of nonces, and the check. So no object can stand for another one, and no block for
//! another one of its object. That an object has ended is said by the last block: one that was cut,
//! or to which something was added, has no last block, or has one that is not last.
//!
//! A nonce is the keyed BLAKE3 of the block's number, of whether it is the last one, and of its bytes. The
//! same bytes under the same key are the same object, which a write that is tried again
//! needs. Other bytes under the same key, which copies of a machine write that draw the same
//! names, have other nonces: with a counter, both keys of this object would be open.
//!
//! The first 16 bytes are not authenticated: they only say what is wrong. Each block can be read
//! without them and without the others. Numbers are little-endian.

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

use crate::sealing::key::DomainKey;

/// What all encrypted objects begin with.
pub const MAGIC: [u8; 8] = *b"SNAPSEAL";
/// All objects that are in clear begin so, and encrypted ones, too.
const IN_CLEAR_MAGIC: &[u8] = b"SNAP";
const VERSION: u32 = 1;
/// Before the first block.
pub const HEAD_LEN: usize = 16;
/// What is in a block.
pub const BLOCK_LEN: usize = 16 << 10;
const NONCE_LEN: usize = 12;
const TAG_LEN: usize = 16;
/// A block as it is stored.
pub const STORED_LEN: usize = NONCE_LEN + BLOCK_LEN + TAG_LEN;

/// Objects of a remote that is not encrypted.
pub const IN_CLEAR: &str = "it is not encrypted, as everything in an encrypted remote is";
/// As an object of another domain.
pub const OTHER_KEY: &str = "it was encrypted with another key, or under another name";
/// As one of a later version.
pub const NEWER: &str = "a newer snapstore has encrypted it";
const NOT_SEALED: &str = "it is no encrypted object";
const TOO_SHORT: &str = "it is too short for an encrypted object";
const CHANGED: &str = "a block of it is not what was encrypted there: it was changed, or is of \
    another object";
const NO_END: &str =
    "its end is missing, or it has more than one: it was cut, or something was added";

/// Encrypts and decrypts one object.
pub struct Body {
    aead: LessSafeKey,
    nonces: [u8; 32],
    check: [u8; 4],
}

impl Body {
    /// Of the object with this key, by the key of all objects.
    pub fn of(objects: &[u8; 32], key: &str) -> Self {
        let mut keys = [0; 68];
        let mut hasher = blake3::Hasher::new_keyed(objects);
        hasher.update(key.as_bytes());
        hasher.finalize_xof().fill(&mut keys);
        let (aead, rest) = keys.split_at(32);
        let (nonces, check) = rest.split_at(32);
        let aead = UnboundKey::new(&AES_256_GCM, aead).expect("it has 32 bytes");
        Self {
            aead: LessSafeKey::new(aead),
            nonces: nonces.try_into().expect("32 bytes"),
            check: check.try_into().expect("4 bytes"),
        }
    }

    /// The object.
    pub fn seal(&self, bytes: &[u8]) -> Vec<u8> {
        let count = bytes.len().div_ceil(BLOCK_LEN).max(1);
        let per_block = NONCE_LEN + TAG_LEN;
        let mut sealed = Vec::with_capacity(HEAD_LEN + bytes.len() + count * per_block);
        sealed.extend_from_slice(&MAGIC);
        sealed.extend_from_slice(&VERSION.to_le_bytes());
        sealed.extend_from_slice(&self.check);
        for number in 0..count {
            let from = number * BLOCK_LEN;
            let block = &bytes[from..bytes.len().min(from + BLOCK_LEN)];
            let nonce = self.nonce(number as u64, number + 1 == count, block);
            sealed.extend_from_slice(&nonce);
            let at = sealed.len();
            sealed.extend_from_slice(block);
            let tag = self.aead.seal_in_place_separate_tag(
                Nonce::assume_unique_for_key(nonce),
                Aad::from((number as u64).to_le_bytes()),
                &mut sealed[at..],
            );
            sealed.extend_from_slice(tag.expect("a block is short").as_ref());
        }
        sealed
    }

    fn nonce(&self, number: u64, is_last: bool, block: &[u8]) -> [u8; NONCE_LEN] {
        let mut hasher = blake3::Hasher::new_keyed(&self.nonces);
        hasher.update(&number.to_le_bytes());
        hasher.update(&[u8::from(is_last)]).update(block);
        let hash = hasher.finalize();
        let mut nonce: [u8; NONCE_LEN] = *hash.as_bytes().first_chunk().expect("12 of 32");
        nonce[0] = nonce[0] & !1 | u8::from(is_last);
        nonce
    }

    /// All that is in an object.
    pub fn open(&self, mut sealed: Vec<u8>) -> Result<Vec<u8>, &'static str> {
        let Some((head, blocks)) = sealed.split_first_chunk_mut::<HEAD_LEN>() else {
            return Err(TOO_SHORT);
        };
        if head[..8] != MAGIC {
            let is_clear = head.starts_with(IN_CLEAR_MAGIC) && head[12..] != self.check;
            return Err(if is_clear { IN_CLEAR } else { NOT_SEALED });
        }
        let (is_this_version, is_checked) = (
            head[8..12] == VERSION.to_le_bytes(),
            head[12..] == self.check,
        );
        match (is_this_version, is_checked) {
            (true, true) => {}
            (true, false) => return Err(OTHER_KEY),
            // A later version derives another check.
            (false, false) => return Err(NEWER),
            (false, true) => return Err(CHANGED),
        }
        self.open_blocks(0, blocks, true)
    }

    /// What is in blocks, of which the first one has this number. If they are the object's
    /// end, the last one has to say so.
    pub fn open_blocks(
        &self,
        first: u64,
        stored: &mut [u8],
        is_end: bool,
    ) -> Result<Vec<u8>, &'static str> {
        let count = stored.len().div_ceil(STORED_LEN);
        if count == 0 {
            return Err(TOO_SHORT);
        }
        let mut opened = Vec::with_capacity(count * BLOCK_LEN);
        for (at, block) in stored.chunks_mut(STORED_LEN).enumerate() {
            let Some((nonce, block)) = block.split_first_chunk_mut::<NONCE_LEN>() else {
                return Err(NO_END);
            };
            let (is_last, is_final) = (nonce[0] & 1 == 1, at + 1 == count);
            if is_last && !is_final || is_final && is_end && !is_last {
                return Err(NO_END);
            }
            let nonce = Nonce::assume_unique_for_key(*nonce);
            let number = Aad::from((first + at as u64).to_le_bytes());
            let block = self.aead.open_in_place(nonce, number, block);
            opened.extend_from_slice(block.map_err(|_| CHANGED)?);
        }
        Ok(opened)
    }
}

/// What the keys of all objects come from.
pub fn objects_key(domain: &DomainKey) -> [u8; 32] {
    domain.derive("snapstore 2026-11-29 remote 1: objects")
}
