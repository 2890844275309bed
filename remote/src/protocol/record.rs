//! The bodies of records, condemnations and fences, and what the protocol needs of a head.
//!
//! ```text
//! record of a tag   SNAPREF1:   32 snapshot's id, or zeros
//! condemnation      SNAPCOND:   4 count, then each:  1 kind (0 pack, 1 head)  20 name
//! fence             SNAPFENC:   nothing, so that all who write one write the same
//! head              SNAPHEAD:   32 snapshot's id   4 count of packs   each 20 name
//!                               4 count   each 20 name of a pack that was copied, 20 its copy
//!                               then what `crate::head` draws
//! ```

use std::collections::BTreeSet;

use crate::protocol::sealed::{Fields, seal_as, unseal_up_to};
use crate::protocol::{Malformed, Name, Part, seal, unseal};

const REF: [u8; 8] = *b"SNAPREF1";
const CONDEMN: [u8; 8] = *b"SNAPCOND";
const FENCE: [u8; 8] = *b"SNAPFENC";
const HEAD: [u8; 8] = *b"SNAPHEAD";
/// The newest version of a head.
const HEAD_VERSION: u32 = 2;

/// What a tag's record holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RefRecord {
    /// The id of the snapshot, or zeros.
    pub snapshot: [u8; 32],
}

impl RefRecord {
    /// Its bytes.
    #[must_use]
    pub fn encode(self, key: &str) -> Vec<u8> {
        seal(REF, key, &self.snapshot)
    }

    /// # Errors
    /// If it is damaged or newer.
    pub fn decode(key: &str, bytes: &[u8]) -> Result<Self, Malformed> {
        let mut fields = Fields(unseal(REF, key, bytes)?);
        let snapshot = fields.array()?;
        fields.end()?;
        Ok(Self { snapshot })
    }
}

/// What a collection is about to delete.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct CondemnRecord {
    /// Packs and heads.
    pub parts: BTreeSet<Part>,
}

impl CondemnRecord {
    /// Its bytes.
    #[must_use]
    pub fn encode(&self, key: &str) -> Vec<u8> {
        let count = u32::try_from(self.parts.len()).expect("a record has a bounded number");
        let mut payload = count.to_le_bytes().to_vec();
        for part in &self.parts {
            let (kind, name) = match part {
                Part::Pack(name) => (0, name),
                Part::Head(name) => (1, name),
            };
            payload.push(kind);
            payload.extend_from_slice(&name.to_bytes());
        }
        seal(CONDEMN, key, &payload)
    }

    /// # Errors
    /// If it is damaged or newer.
    pub fn decode(key: &str, bytes: &[u8]) -> Result<Self, Malformed> {
        let mut fields = Fields(unseal(CONDEMN, key, bytes)?);
        let count = fields.count(1 + Name::LEN)?;
        let mut parts = BTreeSet::new();
        for _ in 0..count {
            let kind = fields.array()?;
            let name = Name::from_bytes(&fields.array()?);
            parts.insert(match kind {
                [0_u8] => Part::Pack(name),
                [1] => Part::Head(name),
                _ => {
                    return Err(Malformed::Wrong(
                        "it condemns what is neither pack nor head",
                    ));
                }
            });
        }
        fields.end()?;
        Ok(Self { parts })
    }
}

/// A fence's bytes.
#[must_use]
pub fn fence(key: &str) -> Vec<u8> {
    seal(FENCE, key, &[])
}

/// What the protocol needs of a head.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HeadSummary {
    /// The version of the head, of which its rest depends.
    pub version: u32,
    /// The snapshot.
    pub snapshot: [u8; 32],
    /// All packs that it needs, own ones and those of others.
    pub packs: Vec<Name>,
    /// Packs that leaves refer to and that are not used any more, and their copies.
    pub moved: Vec<(Name, Name)>,
}

impl HeadSummary {
    /// The bytes of a head with this beginning.
    #[must_use]
    pub fn encode(&self, key: &str, rest: &[u8]) -> Vec<u8> {
        let count = u32::try_from(self.packs.len()).expect("a head has a bounded number of packs");
        let mut payload = self.snapshot.to_vec();
        payload.extend_from_slice(&count.to_le_bytes());
        for pack in &self.packs {
            payload.extend_from_slice(&pack.to_bytes());
        }
        let count = u32::try_from(self.moved.len()).expect("not more than packs");
        payload.extend_from_slice(&count.to_le_bytes());
        for (from, to) in &self.moved {
            payload.extend_from_slice(&from.to_bytes());
            payload.extend_from_slice(&to.to_bytes());
        }
        payload.extend_from_slice(rest);
        seal_as(self.version, HEAD, key, &payload)
    }

    /// The beginning, and the bytes that follow it.
    ///
    /// # Errors
    /// If the head is damaged or newer.
    pub fn decode<'a>(key: &str, bytes: &'a [u8]) -> Result<(Self, &'a [u8]), Malformed> {
        let (version, payload) = unseal_up_to(HEAD_VERSION, HEAD, key, bytes)?;
        let mut fields = Fields(payload);
        let snapshot = fields.array()?;
        let count = fields.count(Name::LEN)?;
        let packs = (0..count).map(|_| Ok(Name::from_bytes(&fields.array()?)));
        let packs = packs.collect::<Result<_, Malformed>>()?;
        let count = fields.count(2 * Name::LEN)?;
        let mut name = || Ok(Name::from_bytes(&fields.array()?));
        let moved = (0..count).map(|_| Ok((name()?, name()?)));
        let moved = moved.collect::<Result<_, Malformed>>()?;
        let summary = Self {
            version,
            snapshot,
            packs,
            moved,
        };
        Ok((summary, fields.0))
    }
}
