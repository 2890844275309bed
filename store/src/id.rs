//! Content identities: what a page, a tree node or a snapshot is called.
//!
//! All three are BLAKE3-256. A page is hashed plainly, so that any tool can
//! check it; nodes and manifests are hashed under contexts of their own
//! (BLAKE3's key derivation mode), so that a guest cannot write a page that
//! passes for a node. Full ids live in tree nodes and manifests, where they
//! carry the trust; the index and the pack footers have keys of 16 bytes, which
//! find a chunk but never vouch for its bytes.

use std::fmt;

const NODE_CONTEXT: &str = "snapstore 2026-11 page tree node v1";
const MANIFEST_CONTEXT: &str = "snapstore 2026-11 snapshot manifest v1";

/// What kind of thing a chunk is; part of its identity.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum ChunkKind {
    /// One page of an image.
    Page = 0,
    /// One node of a page tree.
    Node = 1,
    /// The manifest of a snapshot.
    Manifest = 2,
}

impl ChunkKind {
    pub(crate) fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::Page),
            1 => Some(Self::Node),
            2 => Some(Self::Manifest),
            _ => None,
        }
    }

    /// Hashes `bytes` as a chunk of this kind.
    #[must_use]
    pub fn hash(self, bytes: &[u8]) -> ChunkId {
        let hash = match self {
            Self::Page => blake3::hash(bytes).into(),
            Self::Node => blake3::derive_key(NODE_CONTEXT, bytes),
            Self::Manifest => blake3::derive_key(MANIFEST_CONTEXT, bytes),
        };
        ChunkId { kind: self, hash }
    }
}

impl fmt::Display for ChunkKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Page => "page",
            Self::Node => "tree node",
            Self::Manifest => "manifest",
        })
    }
}

/// The full identity of a chunk: its kind and the BLAKE3-256 of its bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ChunkId {
    kind: ChunkKind,
    hash: [u8; 32],
}

impl ChunkId {
    pub(crate) fn from_hash(kind: ChunkKind, hash: [u8; 32]) -> Self {
        Self { kind, hash }
    }

    /// The chunk's kind.
    #[must_use]
    pub fn kind(&self) -> ChunkKind {
        self.kind
    }

    /// The 32 bytes of the hash.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.hash
    }

    /// What footers and index call it in format 1, and readers in their memory.
    pub(crate) fn plain_key(&self) -> ChunkKey {
        let mut prefix = [0; 16];
        prefix.copy_from_slice(&self.hash[..16]);
        ChunkKey {
            kind: self.kind,
            prefix,
        }
    }
}

impl fmt::Display for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ", self.kind)?;
        write_hex(f, &self.hash)
    }
}

impl fmt::Debug for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What the index and the pack footers know a chunk by: its kind and 128 bits, see
/// [`crate::keys`].
///
/// In format 1 these are the beginning of its hash. Whoever made two chunks with
/// the same key could only break the snapshot that holds both of them: bytes are
/// always checked against the full id before they leave the store.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct ChunkKey {
    pub kind: ChunkKind,
    pub prefix: [u8; 16],
}

impl ChunkKey {
    /// The 17 bytes under which the index files this key.
    pub fn to_index_key(self) -> [u8; 17] {
        let mut key = [0; 17];
        key[0] = self.kind as u8;
        key[1..].copy_from_slice(&self.prefix);
        key
    }
}

impl fmt::Debug for ChunkKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ", self.kind)?;
        write_hex(f, &self.prefix)?;
        f.write_str("…")
    }
}

impl fmt::Display for ChunkKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// The identity of a snapshot: the hash of its manifest's canonical encoding.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SnapshotId([u8; 32]);

impl SnapshotId {
    pub(crate) fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The id of these 64 hexadecimal digits, as [`SnapshotId`] is displayed.
    #[must_use]
    pub fn from_hex(digits: &str) -> Option<Self> {
        let well_formed = digits.len() == 64 && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
        let mut bytes = [0; 32];
        for (at, byte) in bytes.iter_mut().enumerate() {
            let pair = well_formed.then(|| &digits[2 * at..2 * at + 2])?;
            *byte = u8::from_str_radix(pair, 16).ok()?;
        }
        Some(Self(bytes))
    }

    pub(crate) fn chunk(self) -> ChunkId {
        ChunkId::from_hash(ChunkKind::Manifest, self.0)
    }

    /// The 32 bytes of the hash.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The first 12 hexadecimal digits, for people.
    #[must_use]
    pub fn short(&self) -> String {
        self.to_string()[..12].to_owned()
    }
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0)
    }
}

impl fmt::Debug for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl serde::Serialize for SnapshotId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

fn write_hex(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_of_equal_bytes_differ() {
        let [page, node, manifest] = [ChunkKind::Page, ChunkKind::Node, ChunkKind::Manifest]
            .map(|kind| *kind.hash(b"same").as_bytes());
        assert_ne!(page, node);
        assert_ne!(node, manifest);
        assert_ne!(page, manifest);
    }

    #[test]
    fn a_page_id_is_plain_blake3() {
        assert_eq!(
            ChunkKind::Page.hash(b"page").as_bytes(),
            blake3::hash(b"page").as_bytes()
        );
    }

    #[test]
    fn hexadecimal_digits_are_read_back() {
        let id = SnapshotId::from_bytes(std::array::from_fn(|at| at as u8 * 7));
        let digits = id.to_string();
        assert_eq!(SnapshotId::from_hex(&digits), Some(id));
        assert_eq!(SnapshotId::from_hex(&digits[1..]), None);
        assert_eq!(SnapshotId::from_hex(&format!("+{}", &digits[1..])), None);
        assert_eq!(SnapshotId::from_hex(&"\u{e9}".repeat(32)), None);
    }

    #[test]
    fn short_form_is_a_prefix() {
        let id = SnapshotId::from_bytes([0xab; 32]);
        assert!(id.to_string().starts_with(&id.short()));
        assert_eq!(id.short(), "abababababab");
    }
}
