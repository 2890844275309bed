//! What collections have rewritten.
//!
//! ```text
//!  8  bytes of packs that commits have written, as far as collections have seen them
//!  8  bytes of packs that collections have written
//!  4  number of packs; for each, ascending:
//!       4  pack number
//!      16  the pack's identity
//!       1  0: a commit wrote it; 1: a collection copied it together; 2: it is kept as
//!          `gc --optimize` leaves it
//! ```
//! in a sealed file. Numbers are little-endian. Stores of format 1 have none.

use std::collections::BTreeMap;

use crate::format::sealed_file::Format;
use crate::pack::{PackIdentity, PackNumber};

pub(crate) const FORMAT: Format = Format {
    magic: *b"SNAPREWR",
    version: 1,
};
const LINE_LEN: usize = 21;

/// Who has written a pack, and how.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Tier {
    New,
    Copied,
    Kept,
}

/// A pack that a collection has seen or written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Known {
    pub identity: PackIdentity,
    pub tier: Tier,
}

/// What the file says.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub(crate) struct Rewrites {
    pub committed_bytes: u64,
    pub rewritten_bytes: u64,
    pub packs: BTreeMap<PackNumber, Known>,
}

pub(crate) fn encode(rewrites: &Rewrites) -> Vec<u8> {
    let mut bytes = rewrites.committed_bytes.to_le_bytes().to_vec();
    bytes.extend_from_slice(&rewrites.rewritten_bytes.to_le_bytes());
    let count = u32::try_from(rewrites.packs.len()).expect("packs are counted in 32 bits");
    bytes.extend_from_slice(&count.to_le_bytes());
    for (number, known) in &rewrites.packs {
        bytes.extend_from_slice(&number.0.to_le_bytes());
        bytes.extend_from_slice(&known.identity.0);
        bytes.push(match known.tier {
            Tier::New => 0,
            Tier::Copied => 1,
            Tier::Kept => 2,
        });
    }
    bytes
}

/// `None` if it is malformed.
pub(crate) fn decode(payload: &[u8]) -> Option<Rewrites> {
    let (committed, rest) = payload.split_first_chunk::<8>()?;
    let (rewritten, rest) = rest.split_first_chunk::<8>()?;
    let (count, rest) = rest.split_first_chunk::<4>()?;
    let lines = rest.chunks_exact(LINE_LEN);
    if usize::try_from(u32::from_le_bytes(*count)).ok()? != lines.len()
        || !lines.remainder().is_empty()
    {
        return None;
    }
    let mut packs = BTreeMap::new();
    for line in lines {
        let (number, line) = line.split_first_chunk::<4>()?;
        let (identity, tier) = line.split_first_chunk::<16>()?;
        let tier = match tier {
            [0] => Tier::New,
            [1] => Tier::Copied,
            [2] => Tier::Kept,
            _ => return None,
        };
        let number = PackNumber(u32::from_le_bytes(*number));
        if packs
            .last_key_value()
            .is_some_and(|(last, _)| *last >= number)
        {
            return None;
        }
        let identity = PackIdentity(*identity);
        packs.insert(number, Known { identity, tier });
    }
    Some(Rewrites {
        committed_bytes: u64::from_le_bytes(*committed),
        rewritten_bytes: u64::from_le_bytes(*rewritten),
        packs,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_read_back_and_a_cut_one_is_not() {
        let known = |tier| Known {
            identity: PackIdentity([7; 16]),
            tier,
        };
        let rewrites = Rewrites {
            committed_bytes: 1 << 40,
            rewritten_bytes: 3,
            packs: [(1, Tier::New), (5, Tier::Kept), (6, Tier::Copied)]
                .map(|(number, tier)| (PackNumber(number), known(tier)))
                .into(),
        };
        let bytes = encode(&rewrites);
        assert_eq!(decode(&bytes), Some(rewrites));
        for len in 0..bytes.len() {
            assert_eq!(decode(&bytes[..len]), None, "{len}");
        }
        let mut unknown = bytes.clone();
        *unknown.last_mut().unwrap() = 3;
        assert_eq!(decode(&unknown), None);
        assert_eq!(decode(&[bytes, vec![0]].concat()), None);
    }
}
