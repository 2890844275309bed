//! A store whose directory is copied, and both go on: each is committed to, collected and
//! verified by itself; one is copied over the other, file by file, also while somebody
//! commits to what is copied.
//!
//! A copy of a store at rest is a store. Of any other copy only this is promised: what is
//! read is what was committed, `verify` names all that cannot be read, and once it is
//! repaired and what it names is removed, it is as good as any other. Nothing that
//! happens to a copy is seen in the other one. `COPIES_HISTORIES` says how many
//! histories there are.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, bail, ensure};
use fastrand::Rng;
use snapstore_store::{
    CommitRequest, Error, ErrorClass, GcOptions, ImageRole, Input, InputData, InputKind, PageSize,
    ParentChoice, Silent, SnapshotId, Store,
};
use snapstore_tests::harness::noise;

const PAGE: usize = 4096;
/// Histories unless `COPIES_HISTORIES` says otherwise.
const HISTORIES: u64 = 24;
/// Copies that are made in a history.
const COPIES: usize = 5;
/// More than an image has.
const LIMIT_BYTES: u64 = 1 << 20;

/// A store's directory, and what its tags name.
struct Place {
    path: PathBuf,
    tags: BTreeMap<String, SnapshotId>,
}

struct World {
    rng: Rng,
    /// What every snapshot that was ever acknowledged holds.
    contents: HashMap<SnapshotId, Vec<u8>>,
}

/// How files are copied.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Copying {
    /// To a new directory, while nobody uses the store.
    AtRest,
    /// Over another store, whose other files stay.
    Over,
    /// To a new directory, while somebody commits and collects.
    InUse,
    /// Both.
    OverInUse,
}

impl World {
    /// Few distinct pages, many of them alike.
    fn image(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for _ in 0..self.rng.usize(1..=12) {
            let mut page = noise(self.rng.u64(..3), PAGE);
            page[8 * self.rng.usize(..6)] ^= self.rng.u8(..4);
            bytes.extend_from_slice(&page);
        }
        bytes
    }

    fn act(&mut self, place: &mut Place) -> anyhow::Result<()> {
        let store = Store::open(&place.path)?;
        match self.rng.u8(..8) {
            0 => {
                store.gc(GcOptions::default(), &Silent)?;
            }
            1 if !place.tags.is_empty() => {
                let names: Vec<String> = place.tags.keys().cloned().collect();
                let name = names[self.rng.usize(..names.len())].clone();
                store.remove_tags(std::slice::from_ref(&name))?;
                place.tags.remove(&name);
            }
            _ => self.commit(&store, place)?,
        }
        Ok(())
    }

    fn commit(&mut self, store: &Store, place: &mut Place) -> anyhow::Result<()> {
        let bytes = self.image();
        let tag = format!("t{}", self.rng.u8(..5));
        let request = CommitRequest {
            tag: tag.clone(),
            replace: true,
            parent: match self.rng.bool() {
                true => ParentChoice::Automatic,
                false => ParentChoice::Nothing,
            },
            inputs: vec![Input {
                name: "memory".to_owned(),
                role: ImageRole::Memory,
                data: InputData::Bytes(Arc::from(bytes.clone())),
                kind: InputKind::Full,
            }],
            ..CommitRequest::default()
        };
        let id = store.commit(&request, &Silent)?.id;
        self.contents.insert(id, bytes);
        place.tags.insert(tag, id);
        Ok(())
    }

    /// Copies a store's files; the order and what happens between them are drawn.
    fn copy(&mut self, from: &mut Place, to: &Path, how: Copying) -> anyhow::Result<()> {
        let mut files = Vec::new();
        // Empty ones, too.
        for dir in ["tags", "packs", "leases", "locks"] {
            fs::create_dir_all(to.join(dir))?;
        }
        list(&from.path, Path::new(""), &mut files)?;
        if self.rng.bool() {
            self.rng.shuffle(&mut files);
        }
        let stride = files.len() / 3 + 1;
        for (number, file) in files.iter().enumerate() {
            let in_use = matches!(how, Copying::InUse | Copying::OverInUse);
            if in_use && number % stride == stride / 2 {
                self.act(from)?;
            }
            let target = to.join(file);
            fs::create_dir_all(target.parent().context("it is in the store")?)?;
            match fs::copy(from.path.join(file), &target) {
                // It has gone since it was listed.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                other => {
                    other?;
                }
            }
        }
        Ok(())
    }

    /// Everything is whole.
    fn is_whole(&self, place: &Place) -> anyhow::Result<()> {
        let store = Store::open(&place.path)?;
        ensure!(store.tags()? == place.tags, "{:?}", store.tags());
        for (tag, id) in &place.tags {
            ensure!(
                read(&store, *id)? == self.contents[id],
                "{tag}: wrong bytes"
            );
        }
        let report = store.verify(true, &Silent)?;
        ensure!(report.findings.is_empty(), "{:?}", report.findings);
        Ok(())
    }

    /// What can be read is right, and what cannot is named. Returns its tags.
    fn is_told(&self, path: &Path) -> anyhow::Result<BTreeSet<String>> {
        let store = Store::open(path)?;
        let tags = store.tags()?;
        let mut unreadable = BTreeSet::new();
        for (tag, id) in &tags {
            match read(&store, *id) {
                Ok(bytes) => ensure!(bytes == self.contents[id], "{tag}: wrong bytes"),
                Err(error) => {
                    is_damage(error).with_context(|| format!("reading {tag}"))?;
                    unreadable.insert(tag.clone());
                }
            }
        }
        let report = match store.verify(true, &Silent) {
            Ok(report) => report,
            // As a whole: the index is none.
            Err(error) => return is_damage(error).map(|()| unreadable).context("verify"),
        };
        let named: BTreeSet<String> = report
            .findings
            .iter()
            .flat_map(|finding| finding.snapshots.iter().cloned())
            .collect();
        ensure!(
            unreadable.is_subset(&named),
            "{unreadable:?} cannot be read; verify says {:?}",
            report.findings
        );
        Ok(unreadable)
    }

    /// A copy of which nothing is promised, made one of which all is.
    fn mend(&self, path: &Path) -> anyhow::Result<Place> {
        if let Err(error) = self.is_told(path) {
            is_damage_somewhere(error).context("before the repair")?;
        }
        Store::repair(path, &Silent).context("repair")?;
        let lost = self.is_told(path).context("after the repair")?;
        let store = Store::open(path)?;
        let lost: Vec<String> = lost.into_iter().collect();
        store.remove_tags(&lost)?;
        let place = Place {
            path: path.to_owned(),
            tags: store.tags()?,
        };
        self.is_whole(&place).context("without what is lost")?;
        Ok(place)
    }
}

fn read(store: &Store, id: SnapshotId) -> Result<Vec<u8>, Error> {
    let manifest = store.manifest(id)?;
    store.read_file_image(&manifest.images[0], LIMIT_BYTES)
}

fn is_damage(error: Error) -> anyhow::Result<()> {
    match error.class() {
        ErrorClass::Damaged => Ok(()),
        _ => Err(error.into()),
    }
}

fn is_damage_somewhere(error: anyhow::Error) -> anyhow::Result<()> {
    match error.downcast::<Error>() {
        Ok(error) => is_damage(error),
        Err(other) => Err(other),
    }
}

fn list(root: &Path, below: &Path, files: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    let mut names: Vec<_> = fs::read_dir(root.join(below))?.collect::<Result<_, _>>()?;
    names.sort_by_key(fs::DirEntry::file_name);
    for entry in names {
        let path = below.join(entry.file_name());
        match entry.file_type()?.is_dir() {
            true => list(root, &path, files)?,
            false => files.push(path),
        }
    }
    Ok(())
}

/// Flips a bit in a chunk of each pack.
fn flip(store: &Path) -> anyhow::Result<()> {
    for entry in fs::read_dir(store.join("packs"))? {
        let path = entry?.path();
        let mut bytes = fs::read(&path)?;
        let middle = bytes.len() / 3;
        bytes[middle] ^= 1;
        fs::write(&path, bytes)?;
    }
    Ok(())
}

fn history(seed: u64, has_fault: bool) -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let mut world = World {
        rng: Rng::with_seed(seed),
        contents: HashMap::new(),
    };
    let path = dir.path().join("0");
    Store::create(&path, PageSize::KIB_4)?;
    let mut places = vec![Place {
        path,
        tags: BTreeMap::new(),
    }];
    for number in 1..=COPIES {
        for _ in 0..world.rng.usize(2..=8) {
            let which = world.rng.usize(..places.len());
            world.act(&mut places[which])?;
        }
        for place in &places {
            world.is_whole(place).context("between copies")?;
        }
        let how = match world.rng.u8(..6) {
            0 => Copying::Over,
            1 => Copying::InUse,
            2 => Copying::OverInUse,
            _ => Copying::AtRest,
        };
        world.rng.shuffle(&mut places);
        let is_over = matches!(how, Copying::Over | Copying::OverInUse);
        let target = match is_over && places.len() > 1 {
            true => places.pop().context("there are two")?.path,
            false => dir.path().join(number.to_string()),
        };
        let copied = world.copy(&mut places[0], &target, how);
        copied.with_context(|| format!("copying, {how:?}"))?;
        if how == Copying::AtRest && has_fault {
            flip(&target)?;
        }
        let copy = match how {
            Copying::AtRest => Place {
                path: target,
                tags: places[0].tags.clone(),
            },
            _ => world
                .mend(&target)
                .with_context(|| format!("copied {how:?}"))?,
        };
        places.push(copy);
    }
    for place in &places {
        let store = Store::open(&place.path)?;
        for _ in 0..2 {
            store.gc(GcOptions::default(), &Silent)?;
        }
        world.is_whole(place).context("in the end")?;
    }
    Ok(())
}

#[test]
fn copies_of_a_store_go_on_by_themselves_or_say_what_they_lack() -> anyhow::Result<()> {
    let given = std::env::var("COPIES_HISTORIES").ok();
    let histories = given.map_or(Ok(HISTORIES), |text| text.parse())?;
    let first = std::env::var("COPIES_SEED").map_or(Ok(0), |text| text.parse::<u64>())?;
    // For `scripts/soak.sh`: that this is found.
    let has_fault = std::env::var("COPIES_FAULT").is_ok_and(|text| !text.is_empty());
    for seed in first..first + histories {
        if let Err(error) = history(seed, has_fault) {
            bail!("seed {seed} (COPIES_SEED={seed} COPIES_HISTORIES=1): {error:#}");
        }
    }
    println!("{histories} histories of copies");
    Ok(())
}
