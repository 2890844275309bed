//! A head, and what it names in packs.
//!
//! ```text
//! head, after what `protocol::HeadSummary` has
//!   4 length   canonical manifest
//!   4 count of trees, then each:   2 length   image's name   1 level of the root   32 its id
//!   4 count of inner nodes, children first, then each:   1 level   4 length   canonical part
//!   4 count of leaves, then each:  32 id   4 number of its pack in the head's list   4 offset
//!                                  4 length of its record   2 count   each 4: packs of its pages
//!   of version 2, where a working set was laid apart:
//!   4 number of its pack   4 where it ends there
//!   4 count, then each: 4 number of a pack   4 its length
//!   4 count, then each: 2 length   image's name   4 length   what `working-sets/` has of it
//! record of a leaf
//!      4 length of the canonical part   canonical part
//!      2 count of packs, then each 20 name
//!      for each page in order:  2 number of its pack   4 offset   4 length   1 encoding
//! ```
//! Numbers are little-endian. A record's places are not what its id is the hash of: a
//! page is compared with its own id wherever it was found.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use snapstore_store::{MAX_IMAGE_BYTES, NodeParts};

use crate::protocol::sealed::Fields;
use crate::protocol::{Malformed, Name};

const PAGE_PLACE_LEN: usize = 11;
/// Leaves of an image at most, each as often as it is there: those of the longest image, of the
/// smallest pages.
const MOST_LEAVES: u64 = MAX_IMAGE_BYTES / (512 * 4096);
/// Of the root of such an image.
const MAX_LEVEL: u8 = 3;

/// Where a leaf is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LeafPlace {
    /// The pack with its record.
    pub pack: Name,
    /// Where in the pack.
    pub offset: u32,
    /// How long the record is.
    pub len: u32,
    /// The packs of its pages, sorted.
    pub packs: Box<[Name]>,
}

/// Where a page is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PagePlace {
    /// The pack with it.
    pub pack: Name,
    /// Where in the pack.
    pub offset: u32,
    /// How long it is there.
    pub len: u32,
    /// How it is encoded.
    pub encoding: u8,
}

/// How many of these pages, of which there is one at least, are read at once, and from where to
/// where: those that follow the first in its pack, with gaps of at most `gap_bytes`, and no more
/// than `most_bytes` in all. They are sorted by pack and offset.
pub(crate) fn read_together(
    pages: &[([u8; 32], PagePlace)],
    gap_bytes: u32,
    most_bytes: u32,
) -> (u32, u32, usize) {
    let first = &pages[0].1;
    let (start, mut end) = (first.offset, first.offset.saturating_add(first.len));
    let mut count = 1;
    for (_, place) in &pages[1..] {
        let next = place.offset.saturating_add(place.len);
        if place.pack != first.pack
            || place.offset > end.saturating_add(gap_bytes)
            || next - start > most_bytes
        {
            break;
        }
        end = end.max(next);
        count += 1;
    }
    (start, end, count)
}

impl PagePlace {
    /// There in a pack.
    #[must_use]
    pub fn new(pack: Name, offset: usize, len: usize, encoding: u8) -> Self {
        Self {
            pack,
            offset: u32_of(offset),
            len: u32_of(len),
            encoding,
        }
    }
}

/// How long the record is of a leaf with so many pages in so many packs.
#[must_use]
pub fn record_len(canonical_len: usize, packs: usize, pages: usize) -> usize {
    4 + canonical_len + 2 + packs * Name::LEN + pages * PAGE_PLACE_LEN
}

/// About how long one is at most.
#[must_use]
pub fn most_record_len() -> u64 {
    24 << 10
}

/// The tree of an image.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Tree {
    /// The image's name.
    pub image: String,
    /// The level of the root.
    pub level: u8,
    /// Its id.
    pub id: [u8; 32],
}

/// What a head holds beside its summary.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Head {
    /// The canonical manifest.
    pub manifest: Vec<u8>,
    /// The trees of images that are not all zeros.
    pub trees: Vec<Tree>,
    /// The nodes above leaves, children first.
    pub nodes: Vec<(u8, Vec<u8>)>,
    /// The leaves.
    pub leaves: BTreeMap<[u8; 32], LeafPlace>,
    /// What is to be read first, if that is known.
    pub first: Option<First>,
}

/// A working set that was laid apart.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct First {
    /// Its pack.
    pub pack: Name,
    /// Where it ends there.
    pub end: u32,
    /// How long packs are without their lists of pages, as far as their writer knew.
    pub lengths: BTreeMap<Name, u32>,
    /// What was recorded, by the images' names: as the store keeps it.
    pub sets: Vec<(String, Vec<u8>)>,
}

impl Head {
    /// All packs that the leaves need.
    #[must_use]
    pub fn packs(&self) -> Vec<Name> {
        let mut packs = BTreeSet::new();
        for leaf in self.leaves.values() {
            packs.insert(leaf.pack);
            packs.extend(&*leaf.packs);
        }
        packs.into_iter().collect()
    }

    /// Its bytes, with the packs of [`Head::packs`].
    #[must_use]
    pub fn encode(&self, packs: &[Name]) -> Vec<u8> {
        let number = |pack: &Name| {
            let at = packs.binary_search(pack);
            u32_of(at.expect("the head lists all packs of its leaves")).to_le_bytes()
        };
        let mut out = Vec::new();
        append(&mut out, &self.manifest);
        out.extend_from_slice(&u32_of(self.trees.len()).to_le_bytes());
        for tree in &self.trees {
            append_name(&mut out, &tree.image);
            out.push(tree.level);
            out.extend_from_slice(&tree.id);
        }
        out.extend_from_slice(&u32_of(self.nodes.len()).to_le_bytes());
        for (level, canonical) in &self.nodes {
            out.push(*level);
            append(&mut out, canonical);
        }
        out.extend_from_slice(&u32_of(self.leaves.len()).to_le_bytes());
        for (id, leaf) in &self.leaves {
            out.extend_from_slice(id);
            out.extend_from_slice(&number(&leaf.pack));
            out.extend_from_slice(&leaf.offset.to_le_bytes());
            out.extend_from_slice(&leaf.len.to_le_bytes());
            let count = u16::try_from(leaf.packs.len()).expect("at most 512 pages");
            out.extend_from_slice(&count.to_le_bytes());
            leaf.packs
                .iter()
                .for_each(|pack| out.extend_from_slice(&number(pack)));
        }
        if let Some(first) = &self.first {
            out.extend_from_slice(&number(&first.pack));
            out.extend_from_slice(&first.end.to_le_bytes());
            let known = first.lengths.iter();
            let known: Vec<_> = known
                .filter(|(pack, _)| packs.binary_search(pack).is_ok())
                .collect();
            out.extend_from_slice(&u32_of(known.len()).to_le_bytes());
            for (pack, len) in known {
                out.extend_from_slice(&number(pack));
                out.extend_from_slice(&len.to_le_bytes());
            }
            out.extend_from_slice(&u32_of(first.sets.len()).to_le_bytes());
            for (image, set) in &first.sets {
                append_name(&mut out, image);
                append(&mut out, set);
            }
        }
        out
    }

    /// The version of a head that holds this.
    #[must_use]
    pub fn version(&self) -> u32 {
        1 + u32::from(self.first.is_some())
    }

    /// # Errors
    /// If no head of this version was written so.
    pub fn decode(version: u32, bytes: &[u8], packs: &[Name]) -> Result<Self, Malformed> {
        let mut fields = Fields(bytes);
        let wrong = Malformed::Wrong("it names a pack that it does not list");
        let pack = |number: u32| packs.get(number as usize).copied().ok_or(wrong);
        let len = fields.count(1)?;
        let mut head = Self {
            manifest: fields.take(len)?.to_vec(),
            ..Self::default()
        };
        for _ in 0..fields.count(35)? {
            head.trees.push(Tree {
                image: name_of(&mut fields)?,
                level: fields.array::<1>()?[0],
                id: fields.array()?,
            });
        }
        for _ in 0..fields.count(5)? {
            let level = fields.array::<1>()?[0];
            let len = fields.count(1)?;
            head.nodes.push((level, fields.take(len)?.to_vec()));
        }
        for _ in 0..fields.count(46)? {
            let id = fields.array()?;
            let own = pack(fields.u32()?)?;
            let (offset, len) = (fields.u32()?, fields.u32()?);
            let count = u16::from_le_bytes(fields.array()?);
            let of_pages = (0..count).map(|_| pack(fields.u32()?));
            let of_pages = of_pages.collect::<Result<_, _>>()?;
            head.leaves.insert(
                id,
                LeafPlace {
                    pack: own,
                    offset,
                    len,
                    packs: of_pages,
                },
            );
        }
        if version > 1 {
            let mut first = First {
                pack: pack(fields.u32()?)?,
                end: fields.u32()?,
                lengths: BTreeMap::new(),
                sets: Vec::new(),
            };
            for _ in 0..fields.count(8)? {
                first.lengths.insert(pack(fields.u32()?)?, fields.u32()?);
            }
            for _ in 0..fields.count(6)? {
                let image = name_of(&mut fields)?;
                let len = fields.count(1)?;
                first.sets.push((image, fields.take(len)?.to_vec()));
            }
            head.first = Some(first);
        }
        fields.end()?;
        head.check()?;
        Ok(head)
    }

    /// That it does not claim what no host writes, and what would take very much memory.
    fn check(&self) -> Result<(), Malformed> {
        let wrong = |reason| Err(Malformed::Wrong(reason));
        let is_of_leaf = |pack| self.leaves.values().any(|leaf| leaf.pack == pack);
        if self.first.as_ref().is_some_and(|it| !is_of_leaf(it.pack)) {
            return wrong("its working set is in a pack that has none of its leaves");
        }
        let nodes = self.nodes_by_id();
        let mut known = HashMap::new();
        let is_too_large = |tree: &Tree| {
            tree.level > MAX_LEVEL
                || count_leaves(&nodes, (tree.id, tree.level), &mut known) > MOST_LEAVES
        };
        match self.trees.iter().any(is_too_large) {
            true => wrong("an image is larger than any can be"),
            false => Ok(()),
        }
    }

    fn nodes_by_id(&self) -> BTreeMap<[u8; 32], NodeParts> {
        let nodes = self.nodes.iter();
        nodes
            .filter_map(|(level, canonical)| NodeParts::parse(canonical, *level))
            .map(|node| (node.id(), node))
            .collect()
    }

    /// The ids of an image's leaves, by their numbers in it.
    #[must_use]
    pub fn leaves_of(&self, image: &str) -> BTreeMap<u64, [u8; 32]> {
        let nodes = self.nodes_by_id();
        let mut found = BTreeMap::new();
        for tree in self.trees.iter().filter(|tree| tree.image == image) {
            let mut open = vec![(tree.id, tree.level, 0_u64)];
            while let Some((id, level, first)) = open.pop() {
                if level == 0 {
                    found.insert(first, id);
                    continue;
                }
                let leaves = 512_u64.saturating_pow(u32::from(level) - 1);
                for (slot, child) in nodes.get(&id).map_or(&[][..], |node| &node.children) {
                    let first = first.saturating_add((*slot as u64).saturating_mul(leaves));
                    open.push((*child, level - 1, first));
                }
            }
        }
        found
    }
}

/// How many leaves are below a node, each as often as it is there.
fn count_leaves(
    nodes: &BTreeMap<[u8; 32], NodeParts>,
    (id, level): ([u8; 32], u8),
    known: &mut HashMap<([u8; 32], u8), u64>,
) -> u64 {
    if level == 0 {
        return 1;
    }
    if let Some(count) = known.get(&(id, level)) {
        return *count;
    }
    let children = nodes.get(&id).map_or(&[][..], |node| &node.children);
    let children = children.iter();
    let counts = children.map(|(_, child)| count_leaves(nodes, (*child, level - 1), known));
    let count = counts.fold(0, u64::saturating_add);
    known.insert((id, level), count);
    count
}

/// A leaf and where its pages are, in order.
///
/// # Errors
/// If no version wrote the record so, or it is not the leaf with this id.
pub fn decode_leaf(id: &[u8; 32], record: &[u8]) -> Result<(NodeParts, Vec<PagePlace>), Malformed> {
    let mut fields = Fields(record);
    let len = fields.count(1)?;
    let node = NodeParts::parse(fields.take(len)?, 0);
    let node = node.filter(|node| node.id() == *id);
    let node = node.ok_or(Malformed::Wrong(
        "it has no leaf with the id that its head names",
    ))?;
    let count = u16::from_le_bytes(fields.array()?);
    let names = (0..count).map(|_| Ok(Name::from_bytes(&fields.array()?)));
    let names = names.collect::<Result<Vec<_>, Malformed>>()?;
    let mut places = Vec::with_capacity(node.children.len());
    for _ in &node.children {
        let number = usize::from(u16::from_le_bytes(fields.array()?));
        let pack = names.get(number).copied();
        places.push(PagePlace {
            pack: pack.ok_or(Malformed::Wrong(
                "a leaf names a pack that it does not list",
            ))?,
            offset: fields.u32()?,
            len: fields.u32()?,
            encoding: fields.array::<1>()?[0],
        });
    }
    fields.end()?;
    Ok((node, places))
}

fn append_name(out: &mut Vec<u8>, name: &str) {
    let len = u16::try_from(name.len()).expect("names are short");
    out.extend_from_slice(&len.to_le_bytes());
    out.extend_from_slice(name.as_bytes());
}

fn name_of(fields: &mut Fields<'_>) -> Result<String, Malformed> {
    let len = usize::from(u16::from_le_bytes(fields.array()?));
    let name = String::from_utf8(fields.take(len)?.to_vec());
    name.map_err(|_| Malformed::Wrong("an image has no name"))
}

pub(crate) fn append(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(&u32_of(bytes.len()).to_le_bytes());
    out.extend_from_slice(bytes);
}

pub(crate) fn u32_of(number: usize) -> u32 {
    u32::try_from(number).expect("packs and heads are far below 4 GiB")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::Session;

    /// An inner node with this child so often.
    fn node(level: u8, child: [u8; 32], count: u16) -> (u8, Vec<u8>) {
        let mut bytes = vec![level, 0];
        bytes.extend_from_slice(&count.to_le_bytes());
        bytes.resize(bytes.len() + 64, 0);
        for slot in 0..usize::from(count) {
            bytes[4 + slot / 8] |= 1 << (slot % 8);
            bytes.extend_from_slice(&child);
        }
        (level, bytes)
    }

    /// The root has so many children, and the others all that there can be.
    fn head_of(levels: u8, of_root: u16) -> Head {
        let mut head = Head::default();
        let mut id = [1; 32];
        for level in 1..=levels {
            let count = if level == levels { of_root } else { 512 };
            let node = node(level, id, count);
            id = NodeParts::parse(&node.1, level).expect("a node").id();
            head.nodes.push(node);
        }
        head.trees.push(Tree {
            image: "memory".to_owned(),
            level: levels,
            id,
        });
        head
    }

    fn told(head: &Head, packs: &[Name]) -> Result<(), Malformed> {
        Head::decode(head.version(), &head.encode(packs), packs).map(|_| ())
    }

    /// A few kilobytes that stand for more leaves than fit into memory.
    #[test]
    fn a_head_of_few_nodes_is_of_no_more_leaves_than_can_be() {
        assert_eq!(head_of(1, 512).leaves_of("memory").len(), 512);
        // 16 TiB: 32 times 512 GiB.
        for (levels, of_root, is_right) in [
            (2, 512, true),
            (3, 32, true),
            (3, 33, false),
            (4, 1, false),
            (200, 512, false),
        ] {
            let told = told(&head_of(levels, of_root), &[]);
            assert_eq!(told.is_ok(), is_right, "{levels} levels: {told:?}");
        }
    }

    #[test]
    fn a_working_set_is_in_a_pack_of_a_leaf() {
        let name = |number| Name {
            session: Session(7),
            number,
        };
        let mut head = head_of(1, 512);
        let place = LeafPlace {
            pack: name(1),
            offset: 0,
            len: 1,
            packs: Box::default(),
        };
        head.leaves.insert([1; 32], place);
        for (pack, is_right) in [(name(1), true), (name(2), false)] {
            head.first = Some(First {
                pack,
                end: 1,
                lengths: BTreeMap::new(),
                sets: Vec::new(),
            });
            assert_eq!(told(&head, &[name(1), name(2)]).is_ok(), is_right);
        }
    }
}
