//! Stores and a directory that they share.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use snapstore_store::{
    CommitRequest, GcOptions, ImageRole, Input, InputData, InputKind, PageSize, ParentChoice,
    Silent, Store,
};

use crate::protocol::{self, Options};
use crate::{Error, Remote};

type Outcome = Result<(), Box<dyn std::error::Error>>;

const PAGE: usize = 4096;

fn image(pages: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (at, seed) in pages.iter().enumerate() {
        if *seed == 0 {
            bytes.extend_from_slice(&[0; PAGE]);
            continue;
        }
        let mut page = vec![0; PAGE];
        let mut hasher = blake3::Hasher::new();
        hasher.update(&[*seed]).update(&at.to_le_bytes());
        hasher.finalize_xof().fill(&mut page);
        bytes.extend_from_slice(&page);
    }
    bytes
}

fn commit(store: &Store, tag: &str, bytes: &[u8], parent: Option<&str>) -> Outcome {
    let request = CommitRequest {
        tag: tag.to_owned(),
        inputs: vec![Input {
            name: "memory".to_owned(),
            role: ImageRole::Memory,
            data: InputData::Bytes(bytes.to_vec().into()),
            kind: InputKind::Full,
        }],
        parent: match parent {
            Some(parent) => ParentChoice::Named(parent.to_owned()),
            None => ParentChoice::Nothing,
        },
        ..CommitRequest::default()
    };
    store.commit(&request, &Silent)?;
    Ok(())
}

fn read(store: &Store, tag: &str) -> Result<Vec<u8>, Box<dyn std::error::Error>> {
    let memory = store.snapshot(tag)?.image("memory").ok_or("no memory")?;
    let mut bytes = vec![0; usize::try_from(memory.size_bytes())?];
    memory.read_at(&mut bytes, 0)?;
    Ok(bytes)
}

struct Scene {
    dir: tempfile::TempDir,
}

impl Scene {
    fn new() -> Result<Self, Box<dyn std::error::Error>> {
        let scene = Self {
            dir: tempfile::tempdir()?,
        };
        scene.remote()?.init(4096)?;
        Ok(scene)
    }

    fn remote(&self) -> crate::Result<Remote> {
        let url = format!("file://{}", self.bucket().display());
        Ok(Remote::at(&url)?.patience(Duration::from_secs(0), false))
    }

    fn bucket(&self) -> PathBuf {
        self.dir.path().join("bucket")
    }

    fn store(&self, name: &str) -> snapstore_store::Result<Store> {
        Store::create(&self.dir.path().join(name), PageSize::default())
    }

    /// The only object of a kind.
    fn object(&self, kind: &str) -> PathBuf {
        let dir = fs::read_dir(self.bucket().join(kind)).expect("there is one");
        dir.map(|entry| entry.expect("it can be read").path())
            .max_by_key(|path| path.metadata().map_or(0, |found| found.len()))
            .expect("there is one")
    }
}

fn list(dir: &Path) -> std::io::Result<Vec<PathBuf>> {
    let entries = fs::read_dir(dir)?;
    entries.map(|entry| Ok(entry?.path())).collect()
}

fn count(dir: &Path) -> usize {
    fs::read_dir(dir).map_or(0, Iterator::count)
}

#[test]
fn only_what_is_missing_moves() -> Outcome {
    let scene = Scene::new()?;
    let remote = scene.remote()?;
    let (one, other) = (scene.store("one")?, scene.store("other")?);
    let mut pages: Vec<u8> = (0..3000).map(|at| (at % 7) as u8).collect();
    let first = image(&pages);
    commit(&one, "base", &first, None)?;
    let report = remote.push(&one, "base", "base", false, &Silent)?;
    assert_eq!(report.reused_pages, 0);
    assert!(report.pages > 2000);
    assert!(remote.push(&one, "base", "base", false, &Silent)?.already);

    pages[1234] = 99;
    let second = image(&pages);
    commit(&one, "next", &second, Some("base"))?;
    let report = remote.push(&one, "next", "next", false, &Silent)?;
    assert_eq!((report.pages, report.reused_leaves), (1, 5), "{report:?}");
    assert!(report.bytes < 100_000, "{report:?}");

    let pulled = remote.pull(&other, "base", "base", false, &Silent)?;
    assert!(pulled.pages > 2000);
    assert_eq!(read(&other, "base")?, first);
    let pulled = remote.pull(&other, "next", "mine", false, &Silent)?;
    assert_eq!(pulled.pages, 1);
    assert_eq!(read(&other, "mine")?, second);
    assert_eq!(other.tag("mine")?, one.tag("next")?);
    // Back as a child of what was pulled.
    pages[7] = 98;
    commit(&other, "back", &image(&pages), Some("mine"))?;
    let report = remote.push(&other, "back", "back", false, &Silent)?;
    assert_eq!(report.pages, 1, "{report:?}");
    remote.pull(&one, "back", "back", false, &Silent)?;
    assert_eq!(read(&one, "back")?, image(&pages));
    assert!(remote.verify(true)?.findings.is_empty());
    assert!(remote.leases()?.is_empty());
    Ok(())
}

#[test]
fn what_no_tag_needs_goes_and_the_rest_stays() -> Outcome {
    let scene = Scene::new()?;
    let remote = scene.remote()?;
    let store = scene.store("store")?;
    let mut pages: Vec<u8> = (0..1200).map(|at| (at % 7) as u8).collect();
    commit(&store, "a", &image(&pages), None)?;
    pages[5] = 55;
    let second = image(&pages);
    commit(&store, "b", &second, Some("a"))?;
    commit(&store, "c", &image(&[9; 600]), None)?;
    for tag in ["a", "b", "c"] {
        remote.push(&store, tag, tag, false, &Silent)?;
    }
    let packs = scene.bucket().join("packs");
    assert_eq!(count(&packs), 3);
    remote.remove("c")?;
    remote.remove("a")?;
    assert!(matches!(
        remote.remove("a"),
        Err(Error::Protocol(protocol::Error::NoTag { .. }))
    ));
    assert_eq!(remote.collect(Options { dry_run: true })?.deleted.len(), 3);
    assert_eq!(count(&packs), 3);
    let collected = remote.collect(Options::default())?;
    // A pack and two heads: what `b` shares with `a` stays.
    assert_eq!(collected.deleted.len(), 3, "{collected:?}");
    assert_eq!(count(&packs), 2);
    assert!(remote.verify(true)?.findings.is_empty());
    let other = scene.store("other")?;
    remote.pull(&other, "b", "b", false, &Silent)?;
    assert_eq!(read(&other, "b")?, second);
    remote.remove("b")?;
    remote.collect(Options::default())?;
    assert_eq!(
        (count(&packs), count(&scene.bucket().join("condemn"))),
        (0, 0)
    );
    Ok(())
}

#[test]
fn a_tag_that_exists_is_not_moved_without_being_told() -> Outcome {
    let scene = Scene::new()?;
    let remote = scene.remote()?;
    let store = scene.store("store")?;
    commit(&store, "a", &image(&[1; 10]), None)?;
    commit(&store, "b", &image(&[2; 10]), None)?;
    remote.push(&store, "a", "t", false, &Silent)?;
    let refused = remote.push(&store, "b", "t", false, &Silent);
    let exists = |error| matches!(error, Error::Protocol(protocol::Error::TagExists { .. }));
    assert!(refused.is_err_and(exists));
    remote.push(&store, "b", "t", true, &Silent)?;
    let other = scene.store("other")?;
    remote.pull(&other, "t", "t", false, &Silent)?;
    assert_eq!(read(&other, "t")?, image(&[2; 10]));
    Ok(())
}

/// A snapshot that was removed here: a leaf of it is in a pack that is kept, and the leaf's
/// first page is gone with another one.
#[test]
fn what_was_removed_and_collected_is_pulled_again() -> Outcome {
    let scene = Scene::new()?;
    let remote = scene.remote()?;
    let store = scene.store("store")?;
    let pages = |first: &[u8], others: u8| {
        let mut pages = vec![0; 512];
        pages[..first.len()].copy_from_slice(first);
        pages.extend_from_slice(&[others; 6]);
        image(&pages)
    };
    let removed = pages(&[1, 3], 5);
    commit(&store, "first", &image(&[1, 2]), None)?;
    commit(&store, "removed", &removed, None)?;
    remote.push(&store, "removed", "removed", false, &Silent)?;
    store.remove_tags(&["first".to_owned()])?;
    commit(&store, "last", &pages(&[9], 5), None)?;
    store.remove_tags(&["removed".to_owned()])?;
    store.gc(GcOptions::default(), &Silent)?;
    let pulled = remote.pull(&store, "removed", "removed", false, &Silent)?;
    assert_eq!(
        pulled.pages, 1,
        "one page was collected, and the rest is there"
    );
    assert_eq!(read(&store, "removed")?, removed);
    assert_eq!(store.verify(true, &Silent)?.findings, []);
    Ok(())
}

/// The tag is there, and a pack is not.
#[test]
fn a_pull_brings_back_what_the_disk_has_lost() -> Outcome {
    let scene = Scene::new()?;
    let remote = scene.remote()?;
    let store = scene.store("store")?;
    commit(&store, "first", &image(&[1; 6]), None)?;
    let first = list(&scene.dir.path().join("store/packs"))?;
    let bytes = image(&[1, 1, 3, 4]);
    commit(&store, "second", &bytes, None)?;
    remote.push(&store, "second", "second", false, &Silent)?;
    first.iter().try_for_each(fs::remove_file)?;
    let store = Store::open(&scene.dir.path().join("store"))?;
    assert!(!store.verify(true, &Silent)?.findings.is_empty());
    store.remove_tags(&["first".to_owned()])?;
    let pulled = remote.pull(&store, "second", "second", false, &Silent)?;
    assert_eq!(pulled.pages, 2);
    assert_eq!(read(&store, "second")?, bytes);
    assert_eq!(store.verify(true, &Silent)?.findings, []);
    Ok(())
}

/// Whatever is done to an object: the pull names it, and sets no tag.
#[test]
fn hostile_objects_are_refused_and_named() -> Outcome {
    for kind in ["packs", "heads", "refs/t"] {
        let scene = Scene::new()?;
        let remote = scene.remote()?;
        let store = scene.store("store")?;
        commit(&store, "t", &image(&[1; 600]), None)?;
        commit(&store, "u", &image(&[2; 600]), None)?;
        remote.push(&store, "t", "t", false, &Silent)?;
        let path = scene.object(kind);
        let whole = fs::read(&path)?;
        remote.push(&store, "u", "u", false, &Silent)?;
        let others = if kind == "refs/t" { "refs/u" } else { kind };
        let other = list(&scene.bucket().join(others))?;
        let other = other.iter().find(|it| **it != path).ok_or("another")?;
        let swapped_with = fs::read(other)?;
        let name = path
            .file_name()
            .ok_or("a name")?
            .to_string_lossy()
            .into_owned();
        let step = (whole.len() / 40).max(1);
        // The checksum at a pack's end is for who reads all of it.
        let end = if kind == "packs" {
            whole.len() - 32
        } else {
            whole.len()
        };
        let mut hostile: Vec<Vec<u8>> = (0..end)
            .step_by(step)
            .map(|at| whole[..at].to_vec())
            .collect();
        for at in (32..end).step_by(step) {
            let mut flipped = whole.clone();
            flipped[at] ^= 4;
            hostile.push(flipped);
        }
        hostile.push(swapped_with);
        for (number, bytes) in hostile.into_iter().enumerate() {
            fs::write(&path, bytes)?;
            let other = scene.store(&format!("other{number}"))?;
            let pulled = remote.pull(&other, "t", "t", false, &Silent);
            let error = match pulled {
                Ok(pulled) => return Err(format!("{kind} {number}: {pulled:?}").into()),
                Err(error) => error,
            };
            assert!(
                error.to_string().contains(&name),
                "{kind} {number}: {error}"
            );
            assert_eq!(other.tag("t")?, None);
            let verified = remote.verify(true)?;
            assert!(!verified.findings.is_empty(), "{kind} {number}");
        }
        fs::remove_file(&path)?;
        let other = scene.store("last")?;
        assert!(remote.pull(&other, "t", "t", false, &Silent).is_err());
        fs::write(&path, whole)?;
        remote.pull(&other, "t", "t", false, &Silent)?;
    }
    Ok(())
}

/// A file without an end, and one that waits for a writer: told as what it is, and verify
/// goes on with the others.
#[test]
fn what_is_no_object_is_neither_waited_for_nor_read() -> Outcome {
    type Replace = fn(&Path) -> std::io::Result<()>;
    let replace: [(&str, Replace); 3] = [
        ("a named pipe", |path| {
            let (kind, mode) = (rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR);
            Ok(rustix::fs::mknodat(rustix::fs::CWD, path, kind, mode, 0)?)
        }),
        ("a symbolic link", |path| {
            std::os::unix::fs::symlink("/dev/zero", path)
        }),
        ("longer than any", |path| {
            fs::File::create(path)?.set_len(1 << 40)
        }),
    ];
    for kind in ["packs", "heads", "config"] {
        for (says, replace) in replace {
            let scene = Scene::new()?;
            let remote = scene.remote()?;
            let store = scene.store("store")?;
            commit(&store, "t", &image(&[1; 6]), None)?;
            remote.push(&store, "t", "t", false, &Silent)?;
            let path = match kind {
                "config" => scene.bucket().join(kind),
                kind => scene.object(kind),
            };
            fs::remove_file(&path)?;
            replace(&path)?;
            let other = scene.store("other")?;
            let error = match remote.pull(&other, "t", "t", false, &Silent) {
                Ok(pulled) => return Err(format!("{kind}, {says}: {pulled:?}").into()),
                Err(error) => error,
            };
            assert!(error.to_string().contains(says), "{kind}: {error}");
            let is_damage = matches!(&error, Error::Protocol(protocol::Error::Damaged { .. }));
            assert!(is_damage, "{kind}: {error:?}");
            if kind != "config" {
                let findings = remote.verify(true)?.findings;
                assert_eq!(findings.len(), 1, "{findings:?}");
                assert!(findings[0].problem.contains(says), "{findings:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_bucket_that_is_not_there_is_not_found() -> Outcome {
    let scene = Scene::new()?;
    let remote = scene.remote()?;
    let store = scene.store("store")?;
    commit(&store, "t", &image(&[1; 6]), None)?;
    fs::remove_dir_all(scene.bucket())?;
    let gone = |error: Error| matches!(error, Error::NoRemote { .. });
    assert!(
        remote
            .push(&store, "t", "t", false, &Silent)
            .is_err_and(gone)
    );
    assert!(remote.collect(Options::default()).is_err_and(gone));
    assert!(remote.tags().is_err_and(gone));
    Ok(())
}

/// Another bucket's directory behind a link is neither read nor written nor emptied.
#[test]
fn a_link_does_not_lead_out_of_the_bucket() -> Outcome {
    for kind in [
        "packs",
        "heads",
        "refs",
        "lease",
        "condemn",
        "unfinished",
        "probe",
    ] {
        let scene = Scene::new()?;
        let remote = scene.remote()?;
        let store = scene.store("store")?;
        commit(&store, "t", &image(&[1; 6]), None)?;
        remote.push(&store, "t", "t", false, &Silent)?;
        let other = scene.dir.path().join("other");
        fs::create_dir(&other)?;
        for name in ["0", "1"] {
            let name = format!("00000000000000000000000000000abc-0000000{name}");
            fs::write(other.join(name), b"another's")?;
        }
        let before = list(&other)?;
        let linked = scene.bucket().join(kind);
        if linked.exists() {
            fs::remove_dir_all(&linked)?;
        }
        std::os::unix::fs::symlink(&other, &linked)?;
        let told = |error: Error| {
            let error = error.to_string();
            error.contains(kind) && error.contains("symbolic link")
        };
        commit(&store, "u", &image(&[2; 6]), None)?;
        let collected = remote.collect(Options::default());
        let pushed = remote.push(&store, "u", "u", false, &Silent);
        // Only probes go there.
        if kind != "probe" {
            assert!(pushed.is_err_and(told), "{kind}");
            // A collection that finds nothing writes nothing.
            assert!(kind == "unfinished" || collected.is_err_and(told), "{kind}");
        }
        assert!(remote.check().is_err() || !["probe", "unfinished"].contains(&kind));
        assert_eq!(list(&other)?, before, "{kind}");
    }
    Ok(())
}

/// It may be what protects packs, so nothing is collected.
#[test]
fn what_stands_in_place_of_a_record_is_told() -> Outcome {
    let replace: [fn(&Path) -> std::io::Result<()>; 2] = [
        |path| std::os::unix::fs::symlink("/dev/null", path),
        |path| fs::create_dir(path),
    ];
    for replace in replace {
        let scene = Scene::new()?;
        let remote = scene.remote()?;
        let store = scene.store("store")?;
        commit(&store, "t", &image(&[1; 6]), None)?;
        remote.push(&store, "t", "t", false, &Silent)?;
        let path = scene.object("refs/t");
        fs::remove_file(&path)?;
        replace(&path)?;
        let damaged =
            |error: Error| matches!(error, Error::Protocol(protocol::Error::Damaged { .. }));
        assert!(remote.collect(Options::default()).is_err_and(damaged));
        assert_eq!(count(&scene.bucket().join("packs")), 1);
        assert_eq!(remote.verify(false)?.findings.len(), 1);
    }
    Ok(())
}

/// The last record of a tag stays for ever: without any, packs are not garbage.
#[test]
fn a_bucket_that_lost_all_records_is_not_emptied() -> Outcome {
    let scene = Scene::new()?;
    let remote = scene.remote()?;
    let store = scene.store("store")?;
    commit(&store, "t", &image(&[1; 6]), None)?;
    remote.push(&store, "t", "t", false, &Silent)?;
    let (refs, aside) = (scene.bucket().join("refs"), scene.dir.path().join("aside"));
    fs::rename(&refs, &aside)?;
    let damaged = |error: Error| matches!(error, Error::Protocol(protocol::Error::Damaged { .. }));
    for dry_run in [true, false] {
        assert!(remote.collect(Options { dry_run }).is_err_and(damaged));
    }
    let findings = remote.verify(false)?.findings;
    assert!(
        findings.iter().any(|one| one.object == "refs/"),
        "{findings:?}"
    );
    fs::rename(&aside, &refs)?;
    assert!(remote.verify(true)?.findings.is_empty());
    // A removal is a record, too.
    remote.remove("t")?;
    assert_eq!(remote.collect(Options::default())?.deleted.len(), 2);
    Ok(())
}

/// It is a finding, by name, and what pushes and collections say is the way out.
#[test]
fn a_condemnation_that_is_damaged_is_named_with_the_way_out() -> Outcome {
    let scene = Scene::new()?;
    let remote = scene.remote()?;
    let store = scene.store("store")?;
    commit(&store, "t", &image(&[1; 6]), None)?;
    remote.push(&store, "t", "t", false, &Silent)?;
    let name = "condemn/00000000000000000000000000000abc-00000001";
    let path = scene.bucket().join(name);
    fs::create_dir_all(scene.bucket().join("condemn"))?;
    fs::write(&path, b"")?;
    let told = |error: Error| {
        let error = error.to_string();
        error.contains(name) && error.contains("delete this object")
    };
    commit(&store, "u", &image(&[2; 6]), None)?;
    assert!(
        remote
            .push(&store, "u", "u", false, &Silent)
            .is_err_and(told)
    );
    assert!(remote.collect(Options::default()).is_err_and(told));
    let findings = remote.verify(false)?.findings;
    assert!(
        findings.iter().any(|one| one.object == name),
        "{findings:?}"
    );
    fs::remove_file(&path)?;
    remote.push(&store, "u", "u", false, &Silent)?;
    remote.collect(Options::default())?;
    assert!(remote.verify(true)?.findings.is_empty());
    Ok(())
}

#[test]
fn a_name_that_no_tag_can_have_is_a_finding_and_no_tag() -> Outcome {
    let scene = Scene::new()?;
    let remote = scene.remote()?;
    let store = scene.store("store")?;
    commit(&store, "t", &image(&[1; 6]), None)?;
    remote.push(&store, "t", "t", false, &Silent)?;
    let record = scene.object("refs/t");
    let odd = scene.bucket().join("refs/\u{1b}[31mred");
    fs::create_dir(&odd)?;
    fs::copy(&record, odd.join(record.file_name().ok_or("a name")?))?;
    let tags = remote.tags()?;
    assert_eq!(tags.len(), 1, "{tags:?}");
    let findings = remote.verify(false)?.findings;
    assert_eq!(findings.len(), 1, "{findings:?}");
    assert_eq!(findings[0].object, "refs/\\u{1b}[31mred/");
    Ok(())
}
