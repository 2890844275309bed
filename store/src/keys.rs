//! What footers and index call chunks by.
//!
//! A key finds a chunk, and never vouches for its bytes. In a store of format 2 it
//! is made with a secret of the store: whoever can choose pages, such as a guest,
//! cannot make two of them get one key. In one of format 1 it is a part of the id.
//! While a store is upgraded it has both, each in packs of its own, and the index
//! has entries of both.

use crate::format::config::Config;
use crate::id::{ChunkId, ChunkKey};
use crate::pack::PackVersion;

/// The keys of a store.
#[derive(Clone)]
pub(crate) struct Keys {
    secret: Option<[u8; 32]>,
    upgrading: bool,
}

impl Keys {
    pub fn of_store(config: &Config) -> Self {
        Self {
            secret: config.two.as_ref().map(|two| two.secret),
            upgrading: config.is_upgrading(),
        }
    }

    /// The key of a chunk that is stored now.
    pub fn of(&self, id: ChunkId) -> ChunkKey {
        match &self.secret {
            Some(secret) => keyed(secret, id),
            None => id.plain_key(),
        }
    }

    /// The key that a chunk has in packs of this version.
    pub fn in_pack(&self, id: ChunkId, version: PackVersion) -> ChunkKey {
        match version {
            PackVersion::One => id.plain_key(),
            PackVersion::Two => self.of(id),
        }
    }

    /// The keys that the index may have of a chunk.
    pub fn in_index(&self, id: ChunkId) -> impl Iterator<Item = ChunkKey> + use<> {
        let old = (self.upgrading && self.secret.is_some()).then(|| id.plain_key());
        std::iter::once(self.of(id)).chain(old)
    }

    /// Whether packs of format 1 are among those of format 2.
    pub fn is_upgrading(&self) -> bool {
        self.upgrading
    }

    /// What a pack says of the secret that its keys were made with, so that a pack of
    /// another store is known for one. It tells nothing of the secret.
    pub fn check_of(&self, identity: [u8; 16]) -> Option<[u8; 8]> {
        let mut name = b"keys of pack ".to_vec();
        name.extend_from_slice(&identity);
        let hash = blake3::keyed_hash(self.secret.as_ref()?, &name);
        hash.as_bytes()[..8].try_into().ok()
    }
}

/// The first 16 bytes of BLAKE3, keyed with the secret, of the kind and the id.
fn keyed(secret: &[u8; 32], id: ChunkId) -> ChunkKey {
    let mut name = [0; 33];
    name[0] = id.kind() as u8;
    name[1..].copy_from_slice(id.as_bytes());
    let hash = blake3::keyed_hash(secret, &name);
    let mut prefix = [0; 16];
    prefix.copy_from_slice(&hash.as_bytes()[..16]);
    ChunkKey {
        kind: id.kind(),
        prefix,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::config::StoreFormat;
    use crate::id::ChunkKind;
    use crate::page::PageSize;

    #[test]
    fn ids_that_begin_alike_have_different_keys_in_format_2() {
        let ids = [1, 2].map(|last| {
            let mut hash = [7; 32];
            hash[31] = last;
            ChunkId::from_hash(ChunkKind::Page, hash)
        });
        let keys = |format| Keys::of_store(&Config::new(PageSize::KIB_4, format).unwrap());
        let [one, two] = [StoreFormat::One, StoreFormat::Two].map(keys);
        assert_eq!(one.of(ids[0]), one.of(ids[1]));
        assert_ne!(two.of(ids[0]), two.of(ids[1]));
        let node = ChunkId::from_hash(ChunkKind::Node, *ids[0].as_bytes());
        assert_ne!(two.of(ids[0]).prefix, two.of(node).prefix);
    }

    #[test]
    fn a_key_is_what_docs_say() {
        let config = Config::new(PageSize::KIB_4, StoreFormat::Two).unwrap();
        let id = ChunkKind::Page.hash(b"page");
        let mut hasher = blake3::Hasher::new_keyed(&config.two.as_ref().unwrap().secret);
        hasher.update(&[0]).update(id.as_bytes());
        let key = Keys::of_store(&config).of(id);
        assert_eq!(key.prefix, hasher.finalize().as_bytes()[..16]);
    }
}
