//! One node of a page tree.
//!
//! ```text
//! canonical part, which the node's id is the hash of
//!      0   1  level: 0 for a leaf, whose children are pages
//!      1   1  version, 0
//!      2   2  number n of children, 1 to 512
//!      4  64  bitmap: bit i is set if child i is there; an absent child is all zeros
//!     68 32n  ids of the children, in order
//! hints, not hashed: for each child where it was stored when the node was written
//!      -   -  difference of pack number and of entry number to the child
//!             before, as LEB128 of the zigzag form (+1 entry is written as 0)
//! ```
//! Hints save the index lookup per page. They may go stale when the collector
//! moves a chunk; a reader checks the key it finds there and then asks the index.

use crate::id::{ChunkId, ChunkKind};
use crate::pack::{EntryNumber, Location, PackNumber};

/// Children of a node.
pub(crate) const FAN_OUT: usize = 512;
const VERSION: u8 = 0;
const BITMAP_LEN: usize = FAN_OUT / 8;
const HEAD_LEN: usize = 4 + BITMAP_LEN;
/// Two LEB128 numbers of at most 33 significant bits each per child.
const MAX_HINT_LEN: usize = 10;
/// The longest payload of a node.
pub(crate) const MAX_PAYLOAD_LEN: usize = HEAD_LEN + FAN_OUT * (32 + MAX_HINT_LEN);

/// A reference to a page or a node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Child {
    pub hash: [u8; 32],
    pub hint: Option<Location>,
}

/// The node reference's id.
pub(crate) fn node_id(child: Child) -> ChunkId {
    ChunkId::from_hash(ChunkKind::Node, child.hash)
}

/// A node with all its children; `None` is an all-zero page or subtree.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Node {
    level: u8,
    children: Vec<Option<Child>>,
}

impl Node {
    pub fn empty(level: u8) -> Self {
        Self {
            level,
            children: vec![None; FAN_OUT],
        }
    }

    pub fn level(&self) -> u8 {
        self.level
    }

    pub fn child(&self, slot: usize) -> Option<Child> {
        self.children[slot]
    }

    pub fn set_child(&mut self, slot: usize, child: Option<Child>) {
        self.children[slot] = child;
    }

    /// The id of a child.
    pub fn child_id(&self, child: Child) -> ChunkId {
        let kind = if self.level == 0 {
            ChunkKind::Page
        } else {
            ChunkKind::Node
        };
        ChunkId::from_hash(kind, child.hash)
    }

    /// The children that are there, with their slots.
    pub fn present(&self) -> impl Iterator<Item = (usize, Child)> + '_ {
        self.children
            .iter()
            .enumerate()
            .filter_map(|(slot, child)| Some((slot, (*child)?)))
    }

    pub fn is_zero(&self) -> bool {
        self.children.iter().all(Option::is_none)
    }

    /// The node's id. A node without children has none: it is the zero constant.
    pub fn id(&self) -> ChunkId {
        ChunkKind::Node.hash(&self.encode_canonical())
    }

    /// The canonical part of the payload.
    pub fn encode_canonical(&self) -> Vec<u8> {
        let count = self.present().count();
        debug_assert!(count > 0, "an all-zero node is never written");
        let mut bytes = Vec::with_capacity(HEAD_LEN + count * (32 + 2));
        let count = u16::try_from(count).expect("at most 512 children");
        bytes.extend_from_slice(&[self.level, VERSION]);
        bytes.extend_from_slice(&count.to_le_bytes());
        bytes.resize(HEAD_LEN, 0);
        for (slot, child) in self.present() {
            bytes[4 + slot / 8] |= 1 << (slot % 8);
            bytes.extend_from_slice(&child.hash);
        }
        bytes
    }

    /// The whole payload, hints included.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = self.encode_canonical();
        let mut previous = Location {
            pack: PackNumber(0),
            entry: EntryNumber(0),
        };
        for (_, child) in self.present() {
            let hint = child.hint.unwrap_or(previous);
            let pack = i64::from(hint.pack.0) - i64::from(previous.pack.0);
            let entry = i64::from(hint.entry.0) - i64::from(previous.entry.0) - 1;
            write_zigzag(&mut bytes, pack);
            write_zigzag(&mut bytes, entry);
            previous = hint;
        }
        bytes
    }

    /// Parses a payload whose canonical part has been checked against its id.
    /// Malformed hints are dropped: they are only hints.
    ///
    /// # Errors
    /// If it is not a well-formed node of this level.
    pub fn decode(payload: &[u8], level: u8) -> Result<Self, Malformed> {
        let len = canonical_len(payload).ok_or(Malformed::Wrong)?;
        let canonical = &payload[..len];
        if canonical[1] != VERSION {
            let version = u32::from(canonical[1]);
            return Err(Malformed::Newer { version });
        }
        if canonical[0] != level {
            return Err(Malformed::Wrong);
        }
        let (head, ids) = canonical.split_at(HEAD_LEN);
        let bitmap = &head[4..];
        let set: usize = bitmap.iter().map(|byte| byte.count_ones() as usize).sum();
        if set * 32 != ids.len() || set == 0 {
            return Err(Malformed::Wrong);
        }
        let mut hints = HintReader::new(&payload[canonical.len()..]);
        let mut node = Self::empty(level);
        let slots = (0..FAN_OUT).filter(|slot| bitmap[slot / 8] >> (slot % 8) & 1 == 1);
        for (slot, id) in slots.zip(ids.chunks_exact(32)) {
            node.children[slot] = Some(Child {
                hash: id.try_into().expect("chunks of 32 bytes"),
                hint: hints.next(),
            });
        }
        Ok(node)
    }
}

/// Why bytes are no node that this program reads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Malformed {
    /// A newer version of this program wrote them.
    Newer { version: u32 },
    /// No version did.
    Wrong,
}

/// How many bytes at the beginning of a node's payload its id covers, in every
/// version.
pub(crate) fn canonical_len(payload: &[u8]) -> Option<usize> {
    let count = usize::from(u16::from_le_bytes([*payload.get(2)?, *payload.get(3)?]));
    (1..=FAN_OUT)
        .contains(&count)
        .then_some(HEAD_LEN + count * 32)
        .filter(|len| *len <= payload.len())
}

/// How long the payload of a node is that these bytes begin with, if they may begin
/// with one.
pub(crate) fn len_of(bytes: &[u8]) -> Option<usize> {
    let canonical = canonical_len(bytes)?;
    let set: usize = bytes[4..HEAD_LEN]
        .iter()
        .map(|byte| byte.count_ones() as usize)
        .sum();
    if bytes[1] != VERSION || HEAD_LEN + set * 32 != canonical {
        return None;
    }
    let mut rest = &bytes[canonical..];
    for _ in 0..2 * set {
        read_zigzag(&mut rest)?;
    }
    Some(bytes.len() - rest.len())
}

struct HintReader<'a> {
    rest: &'a [u8],
    previous: Option<Location>,
}

impl<'a> HintReader<'a> {
    fn new(rest: &'a [u8]) -> Self {
        Self {
            rest,
            previous: Some(Location {
                pack: PackNumber(0),
                entry: EntryNumber(0),
            }),
        }
    }

    fn next(&mut self) -> Option<Location> {
        let previous = self.previous.take()?;
        let pack = i64::from(previous.pack.0).checked_add(read_zigzag(&mut self.rest)?)?;
        let entry = i64::from(previous.entry.0)
            .checked_add(read_zigzag(&mut self.rest)?)?
            .checked_add(1)?;
        self.previous = Some(Location {
            pack: PackNumber(u32::try_from(pack).ok()?),
            entry: EntryNumber(u32::try_from(entry).ok()?),
        });
        self.previous
    }
}

fn write_zigzag(out: &mut Vec<u8>, value: i64) {
    let mut rest = (value << 1 ^ value >> 63).cast_unsigned();
    while rest >= 0x80 {
        out.push((rest & 0x7f) as u8 | 0x80);
        rest >>= 7;
    }
    out.push(rest as u8);
}

fn read_zigzag(bytes: &mut &[u8]) -> Option<i64> {
    let mut value = 0_u64;
    for shift in (0..35).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some((value >> 1).cast_signed() ^ -(value & 1).cast_signed());
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn location() -> impl Strategy<Value = Location> {
        (any::<u32>(), any::<u32>()).prop_map(|(pack, entry)| Location {
            pack: PackNumber(pack),
            entry: EntryNumber(entry),
        })
    }

    proptest! {
        #[test]
        fn any_node_survives_the_round_trip(
            level in 0_u8..4,
            children in prop::collection::btree_map(
                0_usize..FAN_OUT, (any::<[u8; 32]>(), location()), 1..FAN_OUT),
        ) {
            let mut node = Node::empty(level);
            for (slot, (hash, hint)) in children {
                node.set_child(slot, Some(Child { hash, hint: Some(hint) }));
            }
            let payload = node.encode();
            prop_assert!(payload.len() <= MAX_PAYLOAD_LEN);
            prop_assert_eq!(Node::decode(&payload, level), Ok(node.clone()));
            prop_assert_eq!(Node::decode(&payload, level + 1), Err(Malformed::Wrong));
            let canonical = &payload[..canonical_len(&payload).unwrap()];
            prop_assert_eq!(ChunkKind::Node.hash(canonical), node.id());
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            let _ = Node::decode(&bytes, 0);
        }
    }

    #[test]
    fn a_node_of_another_version_is_newer() {
        let mut node = Node::empty(0);
        let hash = [1; 32];
        node.set_child(1, Some(Child { hash, hint: None }));
        let mut payload = node.encode();
        payload[1] = 3;
        let newer = Malformed::Newer { version: 3 };
        assert_eq!(Node::decode(&payload, 0), Err(newer));
    }

    #[test]
    fn lost_hints_do_not_lose_the_node() {
        let mut node = Node::empty(0);
        let hint = Location {
            pack: PackNumber(3),
            entry: EntryNumber(9),
        };
        node.set_child(
            1,
            Some(Child {
                hash: [1; 32],
                hint: Some(hint),
            }),
        );
        node.set_child(
            400,
            Some(Child {
                hash: [2; 32],
                hint: Some(hint),
            }),
        );
        let payload = node.encode();
        let cut = &payload[..canonical_len(&payload).unwrap()];
        let back = Node::decode(cut, 0).unwrap();
        assert_eq!(
            back.child(400),
            Some(Child {
                hash: [2; 32],
                hint: None
            })
        );
    }
}
