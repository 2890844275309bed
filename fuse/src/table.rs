//! The nodes that a mount shows, by number.
//!
//! The kernel counts how often it was told of a number, and says when it forgets
//! it; then the node goes. It may remember one for as long as it has memory. So
//! that does not decide how long a snapshot is pinned: a directory is **opened**,
//! which means pinned, as long as its tag names it or one of its files is open.
//!
//! The lock on the table is held for a look or a change and never across anything
//! that waits: page faults pass through it.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak};
use std::time::SystemTime;

use snapstore_store::{Image, ImageReader, ImageRole, Result, SnapshotId};

use crate::warm::Session;

pub(crate) const ROOT: u64 = 1;

/// A directory or file.
#[derive(Clone)]
pub(crate) enum Node {
    /// The list of tags.
    Tags,
    Dir(Arc<Dir>),
    File(Arc<File>),
}

/// A snapshot's files, by name.
pub(crate) struct Dir {
    pub id: SnapshotId,
    pub files: Vec<(String, Arc<File>)>,
    pub created: SystemTime,
}

/// A file's content. Its number is its content's: equal images in different
/// snapshots that the kernel knows of at the same time are one file, so that
/// everybody who maps them shares one page cache.
pub(crate) struct File {
    pub ino: u64,
    pub content: Content,
    pub size_bytes: u64,
    /// What it takes where holes take nothing.
    pub data_bytes: u64,
    pub created: SystemTime,
    /// The image that it is, if its working set is of interest.
    pub image: Option<ImageName>,
    /// What is known of its use, from when it is first opened on.
    pub session: OnceLock<Option<Arc<Session>>>,
}

/// An image of a snapshot.
pub(crate) struct ImageName {
    pub snapshot: SnapshotId,
    pub name: String,
    pub page_bytes: u64,
}

pub(crate) enum Content {
    Image(ImageReader),
    Bytes(Vec<u8>),
}

/// A node, and its number.
pub(crate) type Numbered = (u64, Node);

#[derive(Default)]
pub(crate) struct Table {
    inner: RwLock<Inner>,
}

#[derive(Default)]
struct Inner {
    /// What the kernel knows.
    nodes: HashMap<u64, Known>,
    /// Directories of pinned snapshots, by their tags.
    opened: HashMap<Key, Opened>,
    /// Of the files of opened directories, and of those that are open.
    uses: HashMap<u64, Uses>,
    contents: HashMap<[u8; 32], Weak<File>>,
    last_ino: u64,
}

/// A tag and the snapshot that it names, or did once.
type Key = (String, SnapshotId);

struct Known {
    node: Node,
    lookups: u64,
}

struct Opened {
    ino: u64,
    dir: Arc<Dir>,
}

/// Who needs a file.
#[derive(Default)]
struct Uses {
    dirs: u64,
    handles: u64,
}

impl Table {
    /// With the list of tags as its root.
    pub fn of_tags() -> Self {
        let table = Self::default();
        table.write().set_root(Node::Tags);
        table
    }

    /// Makes the directory of one snapshot the root, which is never let go of.
    pub fn set_root(&self, dir: Dir) {
        let mut inner = self.write();
        inner.use_files(&dir);
        inner.set_root(Node::Dir(dir.into()));
    }

    /// The node of a number that the kernel was told of.
    pub fn node(&self, ino: u64) -> Option<Node> {
        self.read().nodes.get(&ino).map(|known| known.node.clone())
    }

    /// The directory of a tag if it is opened, to be told to the kernel.
    pub fn look_up_dir(&self, tag: &str, id: SnapshotId) -> Option<Numbered> {
        self.write().look_up_dir(&(tag.to_owned(), id))
    }

    /// The number of a tag's directory if it is opened.
    pub fn dir_ino(&self, tag: &str, id: SnapshotId) -> Option<u64> {
        let inner = self.read();
        inner
            .opened
            .get(&(tag.to_owned(), id))
            .map(|opened| opened.ino)
    }

    /// Opens the directory of a tag, whose snapshot is pinned, and tells the kernel.
    pub fn add_dir(&self, tag: &str, dir: Dir) -> Numbered {
        let key = (tag.to_owned(), dir.id);
        let mut inner = self.write();
        if let Some(known) = inner.look_up_dir(&key) {
            return known;
        }
        inner.use_files(&dir);
        let (ino, dir) = (inner.next_ino(), Arc::new(dir));
        let opened = Opened {
            ino,
            dir: dir.clone(),
        };
        inner.opened.insert(key, opened);
        inner.look_up(ino, Node::Dir(dir))
    }

    /// A file of a directory, which the kernel is told of.
    pub fn look_up_file(&self, file: &Arc<File>) -> Numbered {
        self.write().look_up(file.ino, Node::File(file.clone()))
    }

    /// The kernel forgets so many of the times that it was told of a number.
    pub fn forget(&self, ino: u64, lookups: u64) {
        let mut inner = self.write();
        let Some(known) = inner.nodes.get_mut(&ino).filter(|_| ino != ROOT) else {
            return;
        };
        known.lookups = known.lookups.saturating_sub(lookups);
        if known.lookups == 0 {
            inner.nodes.remove(&ino);
        }
    }

    /// A handle on a file is opened. False if what it holds is not pinned any more.
    pub fn open_file(&self, ino: u64) -> bool {
        let mut inner = self.write();
        let uses = inner.uses.get_mut(&ino).filter(|uses| uses.dirs > 0);
        uses.map(|uses| uses.handles += 1).is_some()
    }

    /// A handle on a file is closed.
    pub fn close_file(&self, ino: u64) {
        let mut inner = self.write();
        if let Some(uses) = inner.uses.get_mut(&ino) {
            uses.handles = uses.handles.saturating_sub(1);
        }
        inner.drop_unused(ino);
    }

    /// Whether a directory of the snapshot is opened.
    pub fn shows(&self, id: SnapshotId) -> bool {
        self.read().shows(id)
    }

    /// All opened directories.
    pub fn opened(&self) -> Vec<Key> {
        self.read().opened.keys().cloned().collect()
    }

    /// Whether the kernel knows an opened directory.
    pub fn is_known(&self, key: &Key) -> bool {
        let inner = self.read();
        let opened = inner.opened.get(key);
        opened.is_some_and(|opened| inner.nodes.contains_key(&opened.ino))
    }

    /// Closes a directory unless one of its files is open. True if no other one
    /// shows the same snapshot.
    pub fn close_dir(&self, key: &Key) -> bool {
        let mut inner = self.write();
        let Some(opened) = inner.opened.get(key) else {
            return false;
        };
        let dir = opened.dir.clone();
        let is_open = |ino| inner.uses.get(ino).is_some_and(|uses| uses.handles > 0);
        if dir.files.iter().any(|(_, file)| is_open(&file.ino)) {
            return false;
        }
        inner.opened.remove(key);
        for (_, file) in &dir.files {
            if let Some(uses) = inner.uses.get_mut(&file.ino) {
                uses.dirs = uses.dirs.saturating_sub(1);
            }
            inner.drop_unused(file.ino);
        }
        !inner.shows(dir.id)
    }

    /// How many nodes the kernel knows.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.read().nodes.len()
    }

    /// The file of an image: that of another snapshot with the same content, if one
    /// is known.
    pub fn image_file(
        &self,
        snapshot: SnapshotId,
        image: &Image,
        page_bytes: u64,
        created: SystemTime,
        reader: ImageReader,
    ) -> Arc<File> {
        let mut inner = self.write();
        let key = image.content_key();
        if let Some(file) = inner.contents.get(&key).and_then(Weak::upgrade) {
            return file;
        }
        let data_bytes = image.nonzero_pages * page_bytes;
        let file = Arc::new(File {
            ino: inner.next_ino(),
            content: Content::Image(reader),
            size_bytes: image.size_bytes,
            data_bytes: data_bytes.min(image.size_bytes.next_multiple_of(512)),
            created,
            image: (image.role != ImageRole::File).then(|| ImageName {
                snapshot,
                name: image.name.clone(),
                page_bytes,
            }),
            session: OnceLock::new(),
        });
        inner.contents.retain(|_, file| file.strong_count() > 0);
        inner.contents.insert(key, Arc::downgrade(&file));
        file
    }

    /// A file of these bytes.
    pub fn bytes_file(&self, bytes: Vec<u8>, created: SystemTime) -> Arc<File> {
        Arc::new(File {
            ino: self.write().next_ino(),
            size_bytes: bytes.len() as u64,
            data_bytes: bytes.len() as u64,
            created,
            image: None,
            session: OnceLock::new(),
            content: Content::Bytes(bytes),
        })
    }

    fn read(&self) -> RwLockReadGuard<'_, Inner> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Inner> {
        self.inner.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn set_root(&mut self, node: Node) {
        self.last_ino = self.last_ino.max(ROOT);
        self.nodes.insert(ROOT, Known { node, lookups: 1 });
    }

    /// Numbers are never used again.
    fn next_ino(&mut self) -> u64 {
        self.last_ino = self.last_ino.max(ROOT) + 1;
        self.last_ino
    }

    fn look_up(&mut self, ino: u64, node: Node) -> Numbered {
        let known = self.nodes.entry(ino).or_insert(Known { node, lookups: 0 });
        known.lookups += 1;
        (ino, known.node.clone())
    }

    fn look_up_dir(&mut self, key: &Key) -> Option<Numbered> {
        let opened = self.opened.get(key)?;
        let (ino, node) = (opened.ino, Node::Dir(opened.dir.clone()));
        Some(self.look_up(ino, node))
    }

    /// Counts one directory more for each of its files.
    fn use_files(&mut self, dir: &Dir) {
        for (_, file) in &dir.files {
            self.uses.entry(file.ino).or_default().dirs += 1;
        }
    }

    fn drop_unused(&mut self, ino: u64) {
        let uses = self.uses.get(&ino);
        if uses.is_some_and(|uses| uses.dirs == 0 && uses.handles == 0) {
            self.uses.remove(&ino);
        }
    }

    fn shows(&self, id: SnapshotId) -> bool {
        self.opened.keys().any(|(_, shown)| *shown == id)
    }
}

impl File {
    /// The same if it need not wait for whoever has the pages.
    pub fn read_at_hand(&self, out: &mut [u8], offset: u64) -> Result<Option<usize>> {
        match &self.content {
            Content::Image(image) => image.read_at_hand(out, offset),
            Content::Bytes(_) => self.read_at(out, offset).map(Some),
        }
    }

    /// Whether reading it may wait for whoever has the pages.
    pub fn may_wait(&self) -> bool {
        matches!(&self.content, Content::Image(image) if image.may_wait())
    }

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
