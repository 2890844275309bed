//! The tree of directories and files that a mount shows, without FUSE.
//!
//! Inode numbers stay what they are while the mount lives. A file's number
//! belongs to its content: images of equal bytes in different snapshots are one
//! inode, so that everybody who maps them shares one page cache.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use snapstore_store::{Error, Image, ImageReader, Manifest, Pin, Result, SnapshotId, Store};

pub(crate) const ROOT: u64 = 1;

/// What a mount shows.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum What {
    /// One snapshot's files, of this tag or id.
    Snapshot(String),
    /// A directory per tag; new tags appear as they are committed.
    AllTags,
}

/// A directory or file.
pub(crate) enum Node {
    /// The list of tags.
    Tags,
    /// A snapshot's files, by name.
    Snapshot {
        files: Vec<(String, u64)>,
        created: SystemTime,
    },
    File(File),
}

/// A file's content.
pub(crate) struct File {
    pub content: Content,
    pub size_bytes: u64,
    /// What it takes where holes take nothing.
    pub data_bytes: u64,
    pub created: SystemTime,
}

pub(crate) enum Content {
    Image(ImageReader),
    Bytes(Vec<u8>),
}

/// An entry of a directory.
pub(crate) struct Entry {
    pub ino: u64,
    pub name: String,
    pub is_dir: bool,
}

#[derive(PartialEq, Eq, Hash)]
enum Key {
    Dir { tag: String, id: SnapshotId },
    ManifestOf(SnapshotId),
    Content([u8; 32]),
}

struct Table {
    by_ino: HashMap<u64, Arc<Node>>,
    by_key: HashMap<Key, u64>,
    next_ino: u64,
    pin: Pin,
}

pub(crate) struct View {
    store: Store,
    table: Mutex<Table>,
}

impl View {
    pub fn new(store: Store, what: &What) -> Result<Self> {
        let mut table = Table {
            by_ino: HashMap::new(),
            by_key: HashMap::new(),
            next_ino: ROOT + 1,
            pin: store.empty_pin()?,
        };
        let root = match what {
            What::AllTags => {
                // A store that cannot list its tags fails now, not at the first `ls`.
                store.tag_names()?;
                Node::Tags
            }
            What::Snapshot(name) => {
                let id = table.pin.add(&store, name)?;
                table.snapshot_node(&store, id)?
            }
        };
        table.by_ino.insert(ROOT, Arc::new(root));
        Ok(Self {
            store,
            table: Mutex::new(table),
        })
    }

    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The node of a number that was handed out.
    pub fn node(&self, ino: u64) -> Option<Arc<Node>> {
        self.lock().by_ino.get(&ino).cloned()
    }

    /// The number of `name` in a directory.
    pub fn lookup(&self, dir: u64, name: &str) -> Result<Option<u64>> {
        match self.node(dir).as_deref() {
            Some(Node::Tags) => match self.tag_dir(name) {
                Err(Error::NotFound { .. }) => Ok(None),
                found => found.map(Some),
            },
            Some(Node::Snapshot { files, .. }) => Ok(files
                .iter()
                .find(|(file, _)| file == name)
                .map(|(_, ino)| *ino)),
            Some(Node::File(_)) | None => Ok(None),
        }
    }

    /// What a directory holds.
    pub fn entries(&self, dir: u64) -> Result<Option<Vec<Entry>>> {
        match self.node(dir).as_deref() {
            Some(Node::Tags) => {
                let mut entries = Vec::new();
                for tag in self.store.tag_names()? {
                    // A tag may go, or turn out damaged, at any moment; the others
                    // are still worth listing.
                    match self.tag_dir(&tag) {
                        Ok(ino) => entries.push(Entry {
                            ino,
                            name: tag,
                            is_dir: true,
                        }),
                        Err(error) => tracing::error!(%tag, %error, "left out of the listing"),
                    }
                }
                Ok(Some(entries))
            }
            Some(Node::Snapshot { files, .. }) => Ok(Some(
                files
                    .iter()
                    .map(|(name, ino)| Entry {
                        ino: *ino,
                        name: name.clone(),
                        is_dir: false,
                    })
                    .collect(),
            )),
            Some(Node::File(_)) | None => Ok(None),
        }
    }

    /// The directory of the snapshot that a tag names now.
    fn tag_dir(&self, tag: &str) -> Result<u64> {
        let id = self.store.tag(tag)?.ok_or_else(|| Error::NotFound {
            name: tag.to_owned(),
        })?;
        let mut table = self.lock();
        let key = |id| Key::Dir {
            tag: tag.to_owned(),
            id,
        };
        if let Some(ino) = table.by_key.get(&key(id)) {
            return Ok(*ino);
        }
        let id = table.pin.add(&self.store, tag)?;
        let node = table.snapshot_node(&self.store, id)?;
        Ok(table.insert(key(id), node))
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn insert(&mut self, key: Key, node: Node) -> u64 {
        let ino = self.next_ino;
        self.next_ino += 1;
        self.by_ino.insert(ino, Arc::new(node));
        self.by_key.insert(key, ino);
        ino
    }

    fn snapshot_node(&mut self, store: &Store, id: SnapshotId) -> Result<Node> {
        let manifest = store.manifest(id)?;
        let created = manifest.created();
        let mut files = Vec::new();
        for image in &manifest.images {
            files.push((image.file_name(), self.image_ino(store, image, created)));
        }
        let key = Key::ManifestOf(id);
        let ino = match self.by_key.get(&key) {
            Some(ino) => *ino,
            None => self.insert(key, manifest_file(id, &manifest)),
        };
        files.push(("manifest.json".to_owned(), ino));
        Ok(Node::Snapshot { files, created })
    }

    fn image_ino(&mut self, store: &Store, image: &Image, created: SystemTime) -> u64 {
        let key = Key::Content(image.content_key());
        if let Some(ino) = self.by_key.get(&key) {
            return *ino;
        }
        let data_bytes = image.nonzero_pages * store.page_size().bytes();
        let file = File {
            content: Content::Image(store.image_reader(image)),
            size_bytes: image.size_bytes,
            data_bytes: data_bytes.min(image.size_bytes.next_multiple_of(512)),
            created,
        };
        self.insert(key, Node::File(file))
    }
}

fn manifest_file(id: SnapshotId, manifest: &Manifest) -> Node {
    let mut shown = serde_json::json!(manifest);
    shown["id"] = serde_json::json!(id);
    let mut bytes = shown.to_string().into_bytes();
    bytes.push(b'\n');
    Node::File(File {
        size_bytes: bytes.len() as u64,
        data_bytes: bytes.len() as u64,
        created: manifest.created(),
        content: Content::Bytes(bytes),
    })
}

impl File {
    /// Reads from `offset` on into `out`; returns how many bytes there were.
    pub fn read_at(&self, out: &mut [u8], offset: u64) -> Result<usize> {
        match &self.content {
            Content::Image(image) => image.read_at(out, offset),
            Content::Bytes(bytes) => {
                let rest = usize::try_from(offset)
                    .ok()
                    .and_then(|offset| bytes.get(offset..))
                    .unwrap_or_default();
                let len = rest.len().min(out.len());
                out[..len].copy_from_slice(&rest[..len]);
                Ok(len)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use snapstore_store::{
        CommitRequest, ImageRole, Input, InputData, InputKind, PageSize, Silent,
    };

    fn commit(store: &Store, dir: &std::path::Path, tag: &str, first_byte: u8) {
        let path = dir.join("image");
        let mut bytes = vec![0; 8192];
        bytes[0] = first_byte;
        std::fs::write(&path, bytes).expect("a temporary file");
        let input = |name: &str, role| Input {
            name: name.to_owned(),
            role,
            data: InputData::File(path.clone()),
            kind: InputKind::Full,
        };
        let request = CommitRequest {
            tag: tag.to_owned(),
            inputs: vec![
                input("memory", ImageRole::Memory),
                input("disk0", ImageRole::Disk),
            ],
            ..CommitRequest::default()
        };
        store.commit(&request, &Silent).expect("a commit");
    }

    #[test]
    fn equal_content_is_one_inode_and_new_tags_appear() -> Result<()> {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("store");
        let store = Store::create(&path, PageSize::KIB_4)?;
        commit(&store, dir.path(), "one", 1);
        let view = View::new(Store::open(&path)?, &What::AllTags)?;
        let file = |tag: &str, name: &str| -> Result<Option<u64>> {
            let Some(dir) = view.lookup(ROOT, tag)? else {
                return Ok(None);
            };
            view.lookup(dir, name)
        };
        let one = file("one", "memory.bin")?;
        assert!(one.is_some());
        assert_eq!(one, file("one", "disk0.img")?, "the same bytes");
        assert_eq!(file("two", "memory.bin")?, None);
        commit(&store, dir.path(), "two", 1);
        commit(&store, dir.path(), "three", 3);
        assert_eq!(one, file("two", "memory.bin")?);
        assert_ne!(one, file("three", "memory.bin")?);
        let names: Vec<_> = view
            .entries(ROOT)?
            .into_iter()
            .flatten()
            .map(|entry| entry.name)
            .collect();
        assert_eq!(names, ["one", "three", "two"]);
        Ok(())
    }
}
