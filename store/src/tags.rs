//! Tags: mutable names for snapshots, one sealed file each.
//!
//! The file of a tag is the commit point of everything that publishes: it is
//! replaced in one rename, after all it leads to is durable. Changes are made
//! under the publish lock; reading needs none.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;

use crate::durable;
use crate::error::{Damage, Error, IoContext as _, Result};
use crate::format::sealed_file::Format;
use crate::id::SnapshotId;
use crate::layout::Layout;
use crate::name::check_tag;
use crate::opening;
use crate::recent;
use crate::sim::{self, StepKind};

const FORMAT: Format = Format {
    magic: *b"SNAPTAG1",
    version: 1,
};

/// The snapshot a tag names; `None` if there is no such tag.
pub(crate) fn get(layout: &Layout, tag: &str) -> Result<Option<SnapshotId>> {
    if check_tag(tag).is_err() {
        return Ok(None);
    }
    #[cfg(test)]
    tests::count_a_look();
    let path = layout.tags().join(tag);
    let Some(payload) = FORMAT.read(&path)? else {
        return Ok(None);
    };
    let id = payload.try_into().map_err(|_| Damage::File {
        path,
        reason: "wrong length",
    })?;
    Ok(Some(SnapshotId::from_bytes(id)))
}

/// All tags, sorted by name. A damaged one is an error.
pub(crate) fn all(layout: &Layout) -> Result<BTreeMap<String, SnapshotId>> {
    let mut tags = BTreeMap::new();
    for (name, id) in each(layout)? {
        tags.insert(name, id?);
    }
    Ok(tags)
}

/// All tags in any order, damaged ones with their error.
pub(crate) fn each(layout: &Layout) -> Result<Vec<(String, Result<SnapshotId>)>> {
    let dir = layout.tags();
    sim::before(StepKind::List, &dir).context("list", &dir)?;
    let mut tags = Vec::new();
    let entries = match fs::read_dir(&dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return match opening::is_empty(layout)? {
                true => Ok(tags),
                // Not without tags: a collection would delete all there is.
                false => Err(opening::missing_directory(&dir)),
            };
        }
        other => other.context("list", &dir)?,
    };
    for entry in entries {
        let name = entry.context("list", &dir)?.file_name();
        // Temporary files begin with a dot and are no tags.
        let Some(name) = name.to_str().filter(|name| check_tag(name).is_ok()) else {
            continue;
        };
        match get(layout, name) {
            // Removed since the directory was read.
            Ok(None) => {}
            Ok(Some(id)) => tags.push((name.to_owned(), Ok(id))),
            Err(error) => tags.push((name.to_owned(), Err(error))),
        }
    }
    Ok(tags)
}

/// Whether tags can be set. Looked at before anything is done for one.
pub(crate) fn check_directory(layout: &Layout) -> Result<()> {
    let dir = layout.tags();
    match fs::metadata(&dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => Err(opening::missing_directory(&dir)),
        other => other.map(drop).context("inspect", &dir),
    }
}

/// Whether there is such a tag, damaged or not.
pub(crate) fn exists(layout: &Layout, tag: &str) -> bool {
    check_tag(tag).is_ok() && fs::symlink_metadata(layout.tags().join(tag)).is_ok()
}

/// Points a tag at a snapshot, durably. The caller holds the publish lock.
pub(crate) fn set(layout: &Layout, tag: &str, id: SnapshotId) -> Result<()> {
    check_tag(tag)?;
    recent::note(layout, tag, true, || {
        FORMAT.write(&layout.tags().join(tag), id.as_bytes())
    })
}

/// Removes a tag, durably. The caller holds the publish lock.
pub(crate) fn remove(layout: &Layout, tag: &str) -> Result<()> {
    if !exists(layout, tag) {
        return Err(Error::NotFound {
            name: tag.to_owned(),
        });
    }
    recent::note(layout, tag, false, || {
        durable::remove_file(&layout.tags().join(tag))
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use std::cell::Cell;
    use std::collections::BTreeMap;

    use super::*;
    use crate::commit::input::{Input, InputData, InputKind};
    use crate::commit::{CommitRequest, ParentChoice};
    use crate::manifest::ImageRole;
    use crate::page::PageSize;
    use crate::progress::Silent;
    use crate::store::Store;

    thread_local! {
        static LOOKS: Cell<u64> = const { Cell::new(0) };
    }

    /// A file of a tag is read, or its age looked at.
    pub fn count_a_look() {
        LOOKS.set(LOOKS.get() + 1);
    }

    fn looks(action: impl FnOnce()) -> u64 {
        let before = LOOKS.get();
        action();
        LOOKS.get() - before
    }

    fn commit(store: &Store, tag: &str, fill: u8, parent: ParentChoice) -> SnapshotId {
        let mut bytes = vec![7; 64 * 4096];
        bytes[..4096].fill(fill);
        let request = CommitRequest {
            tag: tag.to_owned(),
            parent,
            inputs: vec![Input {
                name: "memory".to_owned(),
                role: ImageRole::Memory,
                data: InputData::Bytes(bytes.into()),
                kind: InputKind::Full,
            }],
            ..CommitRequest::default()
        };
        store.commit(&request, &Silent).unwrap().id
    }

    /// How many files of tags each operation looks at, in a store with so many tags.
    fn costs(tags: usize) -> BTreeMap<&'static str, u64> {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::create(&dir.path().join("store"), PageSize::KIB_4).unwrap();
        let first = commit(&store, "first", 1, ParentChoice::Nothing);
        for number in 0..tags {
            let path = store.layout.tags().join(format!("t{number}"));
            fs::write(&path, FORMAT.encode(&path, first.as_bytes())).unwrap();
        }
        // The others were not made by a program that notes which were set last.
        for number in 0..recent::MOST {
            set(&store.layout, &format!("late{number}"), first).unwrap();
        }
        let mut costs = BTreeMap::new();
        let mut cost = |what, action: &mut dyn FnMut()| {
            costs.insert(what, looks(action));
        };
        cost("commit", &mut || {
            commit(&store, "automatic", 2, ParentChoice::Automatic);
        });
        cost("commit onto a tag", &mut || {
            commit(
                &store,
                "onto-tag",
                3,
                ParentChoice::Named("first".to_owned()),
            );
        });
        let id = first.to_string();
        cost("commit onto an id", &mut || {
            commit(&store, "onto-id", 4, ParentChoice::Named(id.clone()));
        });
        cost("commit onto a snapshot", &mut || {
            commit(&store, "onto-pin", 5, ParentChoice::Pinned(first));
        });
        cost("resolve an id", &mut || {
            assert_eq!(store.resolve(&id).unwrap(), first);
        });
        cost("pin a tag", &mut || drop(store.pin("t3").unwrap()));
        cost("pin an id", &mut || drop(store.pin(&id).unwrap()));
        cost("tag", &mut || store.set_tag("more", first, false).unwrap());
        cost("rm", &mut || {
            store.remove_tags(&["more".to_owned()]).unwrap()
        });
        costs
    }

    #[test]
    fn operations_on_one_snapshot_look_at_as_many_tags_in_any_store() {
        let few = costs(10);
        assert_eq!(few, costs(1000));
        assert!(few["commit"] > 0, "looks are counted: {few:?}");
        let most = recent::MOST as u64 + 8;
        assert!(few.values().all(|looks| *looks <= most), "{few:?}");
    }
}
