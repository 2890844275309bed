//! The tree of directories and files that a mount shows, without FUSE.
//!
//! A snapshot is pinned while a tag names it that was looked up, or a file of it is
//! open. Pinning one waits for locks of the store, so it is done apart
//! ([`View::open_tag`]): all that was opened before goes on meanwhile.

use std::sync::{Mutex, MutexGuard, PoisonError};

use snapstore_store::{
    Error, ForeignSnapshot, Image, ImageReader, Manifest, NotPinned, Pin, Result, SnapshotId, Store,
};

use crate::layout::Layout;
use crate::table::{Content, Dir, Node, Numbered, ROOT, Table};

/// What a mount shows.
#[derive(Clone, Debug)]
pub enum MountTarget {
    /// One snapshot's files, of this tag or id.
    Snapshot(String),
    /// A directory per tag; new tags appear as they are committed.
    AllTags,
    /// The files of a snapshot that is elsewhere, and is kept there by who mounts it.
    Foreign(ForeignSnapshot),
}

/// An entry of a directory.
#[derive(Clone)]
pub(crate) struct Entry {
    pub ino: u64,
    pub name: String,
    pub is_dir: bool,
}

/// Of a directory that the kernel does not know yet (libfuse calls it
/// `FUSE_UNKNOWN_INO`).
const UNKNOWN_INO: u64 = 0xffff_ffff;

/// What a name means.
pub(crate) enum Found {
    Node(Numbered),
    Nothing,
    /// A tag that has to be opened first.
    Unopened,
}

pub(crate) struct View {
    store: Store,
    table: Table,
    pin: Mutex<Pin>,
}

impl View {
    /// A layout is for one snapshot; all tags have the usual one.
    pub fn new(store: Store, what: &MountTarget, layout: &Layout) -> Result<Self> {
        let mut pin = store.empty_pin()?;
        let table = Table::of_tags();
        match what {
            MountTarget::AllTags => {
                // A store that cannot list its tags fails now, not at the first `ls`.
                store.tag_names()?;
            }
            MountTarget::Snapshot(name) => {
                let id = pin.add(&store, name)?;
                let dir = snapshot_dir(&store, &table, id, layout)?;
                table.set_root(dir);
            }
            MountTarget::Foreign(snapshot) => {
                let reader = |image: &Image| snapshot.image_reader(image);
                let shown = (snapshot.id(), snapshot.manifest());
                let dir = dir_of(&table, shown, layout, &reader);
                table.set_root(dir);
            }
        }
        let pin = Mutex::new(pin);
        Ok(Self { store, table, pin })
    }

    /// Why nothing that is shown is kept from collection, if that is so.
    pub fn not_pinned(&self) -> Option<NotPinned> {
        self.lock_pin().not_pinned()
    }

    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The node of a number that was handed out.
    pub fn node(&self, ino: u64) -> Option<Node> {
        self.table.node(ino)
    }

    /// The node of `name` in a directory, which the kernel is told of. It waits for
    /// no lock of the store.
    pub fn lookup(&self, dir: u64, name: &str) -> Result<Found> {
        match self.node(dir) {
            Some(Node::Tags) => Ok(match self.store.tag(name)? {
                None => Found::Nothing,
                Some(id) => match self.table.look_up_dir(name, id) {
                    Some(found) => Found::Node(found),
                    None => Found::Unopened,
                },
            }),
            Some(Node::Dir(dir)) => {
                let file = dir.files.iter().find(|(file, _)| file == name);
                Ok(file.map_or(Found::Nothing, |(_, file)| {
                    Found::Node(self.table.look_up_file(file))
                }))
            }
            Some(Node::File(_)) | None => Ok(Found::Nothing),
        }
    }

    /// The directory of the snapshot that a tag names now, pinned, which the kernel
    /// is told of. This may wait for others who use the store.
    pub fn open_tag(&self, tag: &str) -> Result<Option<Numbered>> {
        let mut pin = self.lock_pin();
        let id = match pin.add(&self.store, tag) {
            Err(Error::NotFound { .. }) => return Ok(None),
            other => other?,
        };
        match snapshot_dir(&self.store, &self.table, id, &Layout::default()) {
            Ok(dir) => Ok(Some(self.table.add_dir(tag, dir))),
            Err(error) => {
                if !self.table.shows(id) {
                    pin.remove(id)?;
                }
                Err(error)
            }
        }
    }

    /// The kernel forgets so many of the times that it was told of a number.
    pub fn forget(&self, ino: u64, lookups: u64) {
        self.table.forget(ino, lookups);
    }

    /// A handle on a file is opened. False if its snapshot is not pinned any more.
    pub fn open_file(&self, ino: u64) -> bool {
        self.table.open_file(ino)
    }

    /// A handle on a file is closed.
    pub fn close_file(&self, ino: u64) {
        self.table.close_file(ino);
    }

    /// Closes the directories of tags that name something else by now, or that the
    /// kernel has forgotten, if none of their files is open. Returns the snapshots
    /// that are to be let go of ([`View::let_go`]).
    pub fn close_unused(&self) -> Vec<SnapshotId> {
        let mut unused = self.table.opened();
        unused.retain(|key| {
            let (tag, id) = key;
            // What cannot be read says nothing.
            let has_moved = || self.store.tag(tag).is_ok_and(|now| now != Some(*id));
            !self.table.is_known(key) || has_moved()
        });
        unused.retain(|key| self.table.close_dir(key));
        unused.into_iter().map(|(_, id)| id).collect()
    }

    /// Ends the pin of a snapshot of which no directory is opened. This may wait for
    /// others who use the store.
    pub fn let_go(&self, id: SnapshotId) -> Result<()> {
        let mut pin = self.lock_pin();
        // It may have been opened again, which takes the same lock.
        if self.table.shows(id) {
            return Ok(());
        }
        pin.remove(id)
    }

    /// What a directory holds.
    pub fn entries(&self, dir: u64) -> Result<Option<Vec<Entry>>> {
        match self.node(dir) {
            Some(Node::Tags) => {
                let mut entries = Vec::new();
                for tag in self.store.tag_names()? {
                    // A tag may go, or turn out damaged, at any moment; the others
                    // are still worth listing.
                    match self.store.tag(&tag) {
                        Ok(Some(id)) => entries.push(Entry {
                            ino: self.table.dir_ino(&tag, id).unwrap_or(UNKNOWN_INO),
                            name: tag,
                            is_dir: true,
                        }),
                        Ok(None) => {}
                        Err(error) => tracing::error!(%tag, %error, "left out of the listing"),
                    }
                }
                Ok(Some(entries))
            }
            Some(Node::Dir(dir)) => Ok(Some(
                dir.files
                    .iter()
                    .map(|(name, file)| Entry {
                        ino: file.ino,
                        name: name.clone(),
                        is_dir: false,
                    })
                    .collect(),
            )),
            Some(Node::File(_)) | None => Ok(None),
        }
    }

    /// The images of the one snapshot that is shown.
    pub fn images(&self) -> Vec<ImageReader> {
        let Some(Node::Dir(dir)) = self.node(ROOT) else {
            return Vec::new();
        };
        let files = dir.files.iter().filter(|(_, file)| file.image.is_some());
        let images = files.filter_map(|(_, file)| match &file.content {
            Content::Image(reader) => Some(reader.clone()),
            Content::Bytes(_) => None,
        });
        images.collect()
    }

    fn lock_pin(&self) -> MutexGuard<'_, Pin> {
        self.pin.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn snapshot_dir(store: &Store, table: &Table, id: SnapshotId, layout: &Layout) -> Result<Dir> {
    let manifest = store.manifest(id)?;
    let reader = |image: &Image| store.image_reader(image);
    Ok(dir_of(table, (id, &manifest), layout, &reader))
}

/// A snapshot's files, wherever its pages are read from.
fn dir_of(
    table: &Table,
    (id, manifest): (SnapshotId, &Manifest),
    layout: &Layout,
    reader: &dyn Fn(&Image) -> ImageReader,
) -> Dir {
    let created = manifest.created();
    let page_bytes = manifest.page_size.bytes();
    let mut files: Vec<_> = manifest
        .images
        .iter()
        .map(|image| {
            let file = table.image_file(id, image, page_bytes, created, reader(image));
            (layout.shown(&image.file_name()).to_owned(), file)
        })
        .collect();
    for (name, text) in &layout.made {
        let file = table.bytes_file(text.clone().into_bytes(), created);
        files.push((name.clone(), file));
    }
    let shown = table.bytes_file(manifest_bytes(id, manifest, layout), created);
    files.push(("manifest.json".to_owned(), shown));
    Dir { id, files, created }
}

fn manifest_bytes(id: SnapshotId, manifest: &Manifest, layout: &Layout) -> Vec<u8> {
    let mut shown = serde_json::json!(manifest);
    shown["id"] = serde_json::json!(id);
    if !layout.is_usual() {
        // Who looks for files by their usual names takes another mount.
        shown["layout"] = serde_json::json!(layout.name);
    }
    let mut bytes = shown.to_string().into_bytes();
    bytes.push(b'\n');
    bytes
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

    /// As the server does it.
    fn find(view: &View, dir: u64, name: &str) -> Result<Option<u64>> {
        let found = match view.lookup(dir, name)? {
            Found::Node(found) => Some(found),
            Found::Nothing => None,
            Found::Unopened => view.open_tag(name)?,
        };
        Ok(found.map(|(ino, _)| ino))
    }

    #[test]
    fn equal_content_is_one_inode_and_new_tags_appear() -> Result<()> {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("store");
        let store = Store::create(&path, PageSize::KIB_4)?;
        commit(&store, dir.path(), "one", 1);
        let view = View::new(
            Store::open(&path)?,
            &MountTarget::AllTags,
            &Layout::default(),
        )?;
        let file = |tag: &str, name: &str| -> Result<Option<u64>> {
            let Some(dir) = find(&view, ROOT, tag)? else {
                return Ok(None);
            };
            find(&view, dir, name)
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

    /// Bytes of all leases: what is pinned has its id in one.
    fn lease_bytes(store: &Store) -> u64 {
        let files = std::fs::read_dir(store.path().join("leases")).expect("leases");
        let sizes = files.map(|file| file.and_then(|it| it.metadata()).expect("a lease").len());
        sizes.sum()
    }

    #[test]
    fn what_has_no_tag_and_no_reader_is_let_go_of() -> Result<()> {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("store");
        let store = Store::create(&path, PageSize::KIB_4)?;
        let view = View::new(
            Store::open(&path)?,
            &MountTarget::AllTags,
            &Layout::default(),
        )?;
        let (nodes, empty) = (view.table.len(), lease_bytes(&store));
        for round in 0..20_u8 {
            let tag = format!("tag{round}");
            commit(&store, dir.path(), &tag, round);
            let found = find(&view, ROOT, &tag)?.expect("the tag");
            assert_eq!(find(&view, ROOT, &tag)?, Some(found));
            let file = find(&view, found, "memory.bin")?.expect("the memory");
            assert!(lease_bytes(&store) > empty, "nothing is pinned");
            assert_eq!(view.close_unused(), [], "the tag is there");
            assert!(view.open_file(file));
            let id = store.resolve(&tag)?;
            store.remove_tags(std::slice::from_ref(&tag))?;
            assert_eq!(view.close_unused(), [], "a file is open");
            view.close_file(file);
            assert_eq!(view.close_unused(), [id]);
            view.let_go(id)?;
            assert_eq!(lease_bytes(&store), empty);
            assert!(!view.open_file(file), "what is not pinned cannot be opened");
            view.forget(found, 1);
            assert!(view.node(found).is_some(), "the kernel knows it still");
            view.forget(found, 1);
            view.forget(file, 1);
            assert_eq!(view.table.len(), nodes);
        }
        Ok(())
    }

    #[test]
    fn what_the_kernel_has_forgotten_is_let_go_of_and_opened_again() -> Result<()> {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("store");
        let store = Store::create(&path, PageSize::KIB_4)?;
        for tag in ["one", "two"] {
            commit(&store, dir.path(), tag, 1);
        }
        let view = View::new(
            Store::open(&path)?,
            &MountTarget::AllTags,
            &Layout::default(),
        )?;
        let empty = lease_bytes(&store);
        let one = find(&view, ROOT, "one")?.expect("a tag");
        let file = find(&view, one, "memory.bin")?.expect("the memory");
        view.forget(one, 1);
        let id = store.resolve("one")?;
        assert_eq!(view.close_unused(), [id]);
        // Before it was let go of.
        find(&view, ROOT, "one")?.expect("a tag");
        view.let_go(id)?;
        assert!(lease_bytes(&store) > empty);
        assert!(view.open_file(file), "the same content is the same file");
        Ok(())
    }

    #[test]
    fn a_listing_pins_nothing() -> Result<()> {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("store");
        let store = Store::create(&path, PageSize::KIB_4)?;
        for tag in ["one", "two"] {
            commit(&store, dir.path(), tag, 1);
        }
        let view = View::new(
            Store::open(&path)?,
            &MountTarget::AllTags,
            &Layout::default(),
        )?;
        let listed = view.entries(ROOT)?.expect("a directory");
        assert_eq!(listed.len(), 2);
        assert_eq!(view.table.len(), 1);
        Ok(())
    }
}
