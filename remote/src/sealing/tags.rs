//! Names of tags, as they stand in the keys of an encrypted bucket's objects.
//!
//! ```text
//! 16       keyed BLAKE3 of the tag, padded with zeros to a multiple of 32 bytes
//! 32 x n   the padded tag, XOR the keyed BLAKE3 (extended output) of these 16 bytes
//! ```
//! in base 32 (RFC 4648, the alphabet 0-9a-v, without padding), of 77 to 231 letters. A tag has always the
//! same name, so that its records are found; who has no key learns how many there are, and their
//! lengths in steps of 32. Who has it reads the tag from it, so a listing is enough to name all.

use crate::sealing::key::DomainKey;

const HASH_LEN: usize = 16;
const STEP: usize = 32;
const DIGITS: &[u8; 32] = b"0123456789abcdefghijklmnopqrstuv";

/// Hides names of tags.
pub struct Tags {
    hashes: [u8; 32],
    streams: [u8; 32],
}

impl Tags {
    pub fn of(domain: &DomainKey) -> Self {
        Self {
            hashes: domain.derive("snapstore 2026-11-29 remote 1: hashes of tags"),
            streams: domain.derive("snapstore 2026-11-29 remote 1: names of tags"),
        }
    }

    /// What stands for a tag.
    pub fn hide(&self, tag: &str) -> String {
        let mut padded = tag.as_bytes().to_vec();
        padded.resize(padded.len().div_ceil(STEP).max(1) * STEP, 0);
        let hash = blake3::keyed_hash(&self.hashes, &padded);
        let mut name = hash.as_bytes()[..HASH_LEN].to_vec();
        self.xor(&name, &mut padded);
        name.extend_from_slice(&padded);
        digits_of(&name)
    }

    /// The tag that this stands for.
    pub fn show(&self, hidden: &str) -> Option<String> {
        let name = bytes_of(hidden)?;
        let (hash, padded) = name.split_at_checked(HASH_LEN)?;
        let mut padded = padded.to_vec();
        self.xor(hash, &mut padded);
        while padded.pop_if(|last| *last == 0).is_some() {}
        let tag = String::from_utf8(padded).ok()?;
        // Else it is of another key, or was changed, or is written in another way.
        (self.hide(&tag) == hidden).then_some(tag)
    }

    fn xor(&self, hash: &[u8], bytes: &mut [u8]) {
        let mut stream = vec![0; bytes.len()];
        let mut hasher = blake3::Hasher::new_keyed(&self.streams);
        hasher.update(hash);
        hasher.finalize_xof().fill(&mut stream);
        for (byte, other) in bytes.iter_mut().zip(stream) {
            *byte ^= other;
        }
    }
}

fn digits_of(bytes: &[u8]) -> String {
    let bit = |at: usize| {
        let byte = bytes.get(at / 8).copied().unwrap_or_default();
        byte >> (7 - at % 8) & 1
    };
    let digit = |at: usize| (0..5).fold(0, |sum, one| sum << 1 | bit(5 * at + one));
    let count = (bytes.len() * 8).div_ceil(5);
    let digits = (0..count).map(|at| char::from(DIGITS[usize::from(digit(at))]));
    digits.collect()
}

fn bytes_of(digits: &str) -> Option<Vec<u8>> {
    let mut bytes = vec![0_u8; digits.len() * 5 / 8];
    for (at, digit) in digits.bytes().enumerate() {
        let value = DIGITS.iter().position(|one| *one == digit)?;
        for one in 0..5 {
            if let Some(byte) = bytes.get_mut((5 * at + one) / 8)
                && value >> (4 - one) & 1 == 1
            {
                *byte |= 1 << (7 - (5 * at + one) % 8);
            }
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_hidden_and_found_again_by_their_key_alone() {
        let tags = Tags::of(&DomainKey::of_bytes([1; 32]));
        let others = Tags::of(&DomainKey::of_bytes([2; 32]));
        let long = "x".repeat(128);
        for tag in [
            "a",
            "base",
            "base+3",
            &"y".repeat(32),
            &"y".repeat(33),
            &long,
        ] {
            let hidden = tags.hide(tag);
            assert!(hidden.len() <= 231, "{hidden}");
            assert!(tag.len() < 4 || !hidden.contains(tag), "{hidden}");
            assert_eq!(tags.show(&hidden).as_deref(), Some(tag));
            assert_eq!(others.show(&hidden), None);
            assert_ne!(others.hide(tag), hidden);
            for at in 0..hidden.len() {
                for digit in ["0", "1", "v", "A", "-"] {
                    let mut changed = hidden.clone();
                    changed.replace_range(at..=at, digit);
                    if changed != hidden {
                        assert_eq!(tags.show(&changed), None, "{tag}: {changed}");
                    }
                }
            }
            assert_eq!(tags.show(&hidden[1..]), None);
            assert_eq!(tags.show(&format!("{hidden}0")), None);
        }
        assert_eq!(tags.hide("base").len(), tags.hide("another").len());
        for none in ["", "base", "0", &"0".repeat(77)] {
            assert_eq!(tags.show(none), None, "{none}");
        }
    }

    #[test]
    fn digits_are_those_of_the_standard() {
        assert_eq!(digits_of(b"foobar"), "cpnmuoj1e8");
        assert_eq!(bytes_of("cpnmuoj1e8").as_deref(), Some(&b"foobar"[..]));
    }
}
