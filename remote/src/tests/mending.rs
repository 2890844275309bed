//! What is gone or damaged in a bucket: what mends it, and what goes on without it.

use std::fs;
use std::time::{Duration, SystemTime};

use snapstore_store::{PageSize, Silent, Store};

use super::{Outcome, Scene, commit, image, read};
use crate::Error;
use crate::protocol::{self, Options, RefKey, Stays};

fn flipped(bytes: &[u8], at: usize) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[at] ^= 4;
    bytes
}

/// A snapshot and its child: of both heads and of both packs each is deleted, and has a bit
/// flipped in it.
pub fn a_push_that_replaces_mends_what_is_gone_or_damaged(scene: &Scene) -> Outcome {
    let remote = scene.remote()?;
    let store = scene.store("store")?;
    let pages: Vec<u8> = (0..1200).map(|at| (at % 7) as u8).collect();
    let mut changed = pages.clone();
    changed[5] = 99;
    commit(&store, "base", &image(&pages), None)?;
    commit(&store, "child", &image(&changed), Some("base"))?;
    remote.push(&store, "base", "base", false, &Silent)?;
    remote.push(&store, "child", "child", false, &Silent)?;
    for kind in ["heads", "packs"] {
        for number in 0..2 {
            for is_gone in [true, false] {
                let what = format!("{kind}-{number}-{is_gone}");
                let key = scene.keys(kind)?.swap_remove(number);
                let whole = scene.bytes(&key)?;
                remote.bucket.delete(&key)?;
                if !is_gone {
                    remote.bucket.put(&key, &flipped(&whole, whole.len() / 2))?;
                }
                let findings = remote.verify(true)?.findings;
                assert!(!findings.is_empty(), "{what}");
                for (tag, pages) in [("base", &pages), ("child", &changed)] {
                    let named = findings
                        .iter()
                        .any(|one| one.tags.iter().any(|it| it == tag));
                    let report = remote.push(&store, tag, tag, true, &Silent)?;
                    assert_eq!(report.already, !named, "{what}: {tag}: {report:?}");
                    let other = scene.store(&format!("{what}-{tag}"))?;
                    remote.pull(&other, tag, tag, false, &Silent)?;
                    assert_eq!(read(&other, tag)?, image(pages), "{what}: {tag}");
                    assert!(remote.push(&store, tag, tag, true, &Silent)?.already);
                }
                assert_eq!(remote.verify(true)?.findings, [], "{what}");
                remote.collect(Options::default())?;
                assert_eq!(remote.verify(true)?.findings, [], "{what}");
            }
        }
    }
    // What is whole is reused: of three leaves, one is in a pack of the snapshot's own.
    changed[6] = 98;
    commit(&store, "last", &image(&changed), Some("base"))?;
    let before = scene.keys("packs")?;
    remote.push(&store, "last", "last", false, &Silent)?;
    let packs = scene.keys("packs")?;
    let own = packs.iter().find(|key| !before.contains(key));
    let own = own.ok_or("a pack of its own")?;
    let bytes = scene.bytes(own)?;
    scene.replace(own, &flipped(&bytes, bytes.len() / 2))?;
    let report = remote.push(&store, "last", "last", true, &Silent)?;
    assert_eq!(report.reused_leaves, 2, "{report:?}");
    assert_eq!(remote.verify(true)?.findings, []);
    Ok(())
}

/// A record, a head or a pack of another tag that is damaged: what needs it is not reused.
pub fn damage_of_others_stops_no_push(scene: &Scene) -> Outcome {
    let remote = scene.remote()?;
    let store = scene.store("store")?;
    let mut pages: Vec<u8> = (0..600).map(|at| (at % 7) as u8).collect();
    commit(&store, "t", &image(&pages), None)?;
    remote.push(&store, "t", "t", false, &Silent)?;
    let damaged = |error: Error| matches!(error, Error::Protocol(protocol::Error::Damaged { .. }));
    // They find the packs whose head is lost.
    let forget_hooks = || -> Outcome {
        let runs = scene.keys("hooks")?;
        let mut runs = runs.iter();
        Ok(runs.try_for_each(|run| remote.bucket.delete(run))?)
    };
    for (number, kind) in ["refs/t", "heads", "packs"].into_iter().enumerate() {
        let key = scene.longest(kind)?;
        let whole = scene.bytes(&key)?;
        // In a pack that is its first leaf's record.
        scene.replace(&key, &flipped(&whole, 40))?;
        pages[3] = 100 + u8::try_from(number)?;
        let tag = format!("u{number}");
        commit(&store, &tag, &image(&pages), Some("t"))?;
        forget_hooks()?;
        let report = remote.push(&store, &tag, &tag, false, &Silent)?;
        assert!(report.pages > 1, "{kind}: {report:?}");
        let other = scene.store(&tag)?;
        remote.pull(&other, &tag, &tag, false, &Silent)?;
        assert_eq!(read(&other, &tag)?, image(&pages), "{kind}");
        remote.remove(&tag)?;
        // The tag itself is not taken for what it was, and can be set anew.
        if kind == "refs/t" {
            let pushed = remote.push(&store, "t", "t", false, &Silent);
            assert!(pushed.is_err_and(damaged));
        }
        forget_hooks()?;
        let report = remote.push(&store, "t", "t", true, &Silent)?;
        assert!(!report.already, "{kind}");
        assert_eq!(remote.verify(true)?.findings, [], "{kind}");
        remote.collect(Options::default())?;
    }
    if scene.is_directory() {
        let path = scene.object("refs/t");
        std::fs::remove_file(&path)?;
        std::os::unix::fs::symlink("/dev/null", &path)?;
        commit(&store, "v", &image(&[9; 20]), None)?;
        remote.push(&store, "v", "v", false, &Silent)?;
    }
    Ok(())
}

pub fn a_configuration_that_is_lost_or_damaged_is_made_anew_for_the_same_pages(
    scene: &Scene,
) -> Outcome {
    let remote = scene.remote()?;
    let store = scene.store("store")?;
    let bytes = image(&[1; 60]);
    commit(&store, "t", &bytes, None)?;
    let config = scene.bytes("config")?;
    // There is nothing yet that has pages.
    for page_bytes in [65536, 4096] {
        scene.replace("config", &flipped(&config, 20))?;
        remote.init(page_bytes)?;
        assert_eq!(remote.page_bytes()?, u64::from(page_bytes));
    }
    // What is something else's stays, where nothing tells of a remote.
    for foreign in [&b"precious=1"[..], b"SNAPCONF\x01\0\0\0", b""] {
        scene.replace("config", foreign)?;
        let is_foreign = |error: Error| matches!(error, Error::ForeignConfig { .. });
        assert!(remote.init(4096).is_err_and(is_foreign));
        assert_eq!(scene.bytes("config")?, foreign);
    }
    scene.replace("config", &config)?;
    remote.push(&store, "t", "t", false, &Silent)?;
    let exists = |error: Error| matches!(error, Error::RemoteExists { .. });
    assert!(remote.init(4096).is_err_and(exists));
    for damaged in [None, Some(flipped(&config, 20)), Some(Vec::new())] {
        remote.bucket.delete("config")?;
        if let Some(damaged) = &damaged {
            remote.bucket.put("config", damaged)?;
        }
        let other_pages = |error: Error| {
            let Error::OtherPageSize {
                remote_bytes,
                store_bytes,
                ..
            } = error
            else {
                return false;
            };
            (remote_bytes, store_bytes) == (4096, 65536)
        };
        assert!(remote.init(65536).is_err_and(other_pages));
        // Nothing was done.
        assert_eq!(remote.bucket.get("config", None)?, damaged);
        remote.init(4096)?;
        let name = format!("other{}", damaged.map_or(1, |bytes| bytes.len()));
        let other = scene.store(&name)?;
        remote.pull(&other, "t", "t", false, &Silent)?;
        assert_eq!(read(&other, "t")?, bytes);
    }
    let path = scene.dir.path().join("large");
    let large = Store::create(&path, PageSize::KIB_64)?;
    let other_pages = |error: Error| matches!(error, Error::OtherPageSize { .. });
    assert!(
        remote
            .pull(&large, "t", "t", false, &Silent)
            .is_err_and(other_pages)
    );
    Ok(())
}

/// It slept, a collection gave it up and deleted its packs, and then it wrote its head and its
/// record, saw the fence, and failed.
#[test]
fn what_a_push_leaves_that_was_given_up_is_no_damage() -> Outcome {
    let scene = Scene::new()?;
    let remote = scene.remote()?;
    let store = scene.store("store")?;
    commit(&store, "t", &image(&[1; 6]), None)?;
    remote.push(&store, "t", "t", false, &Silent)?;
    let key = scene.keys("refs")?.swap_remove(0);
    let record = RefKey::parse(&key).ok_or("a record")?;
    let fence = record.writer().fence_key();
    remote.bucket.put(&fence, &protocol::fence(&fence))?;
    let report = remote.verify(true)?;
    assert_eq!((report.findings, report.notes), (vec![], vec![]));
    for pack in scene.keys("packs")? {
        remote.bucket.delete(&pack)?;
    }
    for read_data in [false, true] {
        let report = remote.verify(read_data)?;
        assert_eq!(report.findings, []);
        assert_eq!(report.notes.len(), 1);
        assert_eq!(report.notes[0].object, key);
    }
    let other = scene.store("other")?;
    let none = |error: Error| matches!(error, Error::Protocol(protocol::Error::NoTag { .. }));
    let pulled = remote.pull(&other, "t", "t", false, &Silent);
    assert!(pulled.is_err_and(none));
    // The next one takes its place, and of that it is damage.
    remote.push(&store, "t", "t", false, &Silent)?;
    remote.collect(Options::default())?;
    remote.pull(&other, "t", "t", false, &Silent)?;
    let report = remote.verify(true)?;
    assert_eq!((report.findings, report.notes), (vec![], vec![]));
    for pack in scene.keys("packs")? {
        remote.bucket.delete(&pack)?;
    }
    let report = remote.verify(false)?;
    assert_eq!((report.findings.len(), report.notes), (1, vec![]));
    Ok(())
}

/// Of a push that was given up: one whose head is gone, one that lacks a pack, and one that is
/// whole, which somebody may have been told of. All come back by a late write.
#[test]
fn what_a_push_leaves_that_was_given_up_goes_once_it_is_void() -> Outcome {
    let scene = Scene::new()?;
    let remote = scene.remote()?;
    let store = scene.store("store")?;
    let tags = ["below", "headless", "holey", "whole", "gone"];
    for (number, tag) in (1..).zip(tags) {
        commit(&store, tag, &image(&[number; 6]), None)?;
        remote.push(&store, tag, tag, false, &Silent)?;
    }
    // One that was given up over one that counts.
    commit(&store, "next", &image(&[9; 6]), None)?;
    let below = scene.keys("refs/below")?;
    remote.push(&store, "next", "below", true, &Silent)?;
    remote.remove("gone")?;
    let mut cut_off = Vec::new();
    for tag in ["below", "headless", "holey", "whole"] {
        let keys = scene.keys(&format!("refs/{tag}"))?;
        let key = keys.into_iter().find(|key| !below.contains(key));
        let key = key.ok_or("a record")?;
        let record = RefKey::parse(&key).ok_or("a record")?;
        let fence = record.writer().fence_key();
        remote.bucket.put(&fence, &protocol::fence(&fence))?;
        let session = record.writer();
        let packs = scene.keys("packs")?;
        let pack = packs
            .into_iter()
            .find(|key| key.contains(&session.to_string()));
        match tag {
            "below" | "headless" => remote.bucket.delete(&record.head.head_key())?,
            "holey" => remote.bucket.delete(&pack.ok_or("a pack")?)?,
            _ => {}
        }
        cut_off.push((key.clone(), scene.bytes(&key)?));
    }
    let keys = |some: &[(String, Vec<u8>)]| -> Vec<String> {
        some.iter().map(|(key, _)| key.clone()).collect()
    };
    let whole = cut_off.pop().ok_or("there are four")?.0;
    for comes_late in [false, true] {
        for dry_run in [true, false] {
            let collected = remote.collect(Options { dry_run })?;
            let void: Vec<String> = collected.void.iter().map(RefKey::key).collect();
            assert_eq!(void, keys(&cut_off), "{comes_late}, {dry_run}");
            let idle = |why: Stays| -> Vec<&RefKey> {
                let idle = collected.idle.iter().filter(|(_, stays)| *stays == why);
                idle.map(|(record, _)| record).collect()
            };
            let stays = idle(Stays::CutOffPush);
            assert!(stays.len() == 1 && stays[0].key() == whole, "{stays:?}");
            let stays = idle(Stays::Removed);
            assert!(stays.len() == 1 && stays[0].tag == "gone", "{stays:?}");
        }
        for tag in ["headless", "holey"] {
            assert_eq!(scene.keys(&format!("refs/{tag}"))?, [""; 0]);
        }
        assert_eq!(scene.keys("refs/below")?, below);
        for (key, bytes) in &cut_off {
            remote.bucket.put(key, bytes)?;
        }
    }
    let other = scene.store("other")?;
    for (tag, number) in [("below", 1), ("whole", 4)] {
        remote.pull(&other, tag, tag, false, &Silent)?;
        assert_eq!(read(&other, tag)?, image(&[number; 6]), "{tag}");
    }
    remote.collect(Options::default())?;
    let report = remote.verify(true)?;
    assert_eq!((report.findings, report.notes), (vec![], vec![]));
    Ok(())
}

/// Of two damaged leases one has been there for long; a third one is whole.
#[test]
fn a_damaged_lease_is_told_beside_the_others_and_goes_in_its_time() -> Outcome {
    let scene = Scene::new()?;
    let remote = scene.remote()?;
    let store = scene.store("store")?;
    commit(&store, "t", &image(&[1; 6]), None)?;
    remote.push(&store, "t", "t", false, &Silent)?;
    let (_, view) = remote.view(None, "t", false)?;
    let key = |number: u32| format!("lease/{number:032x}/00000000");
    for number in [1, 2] {
        remote.bucket.put(&key(number), b"nothing")?;
    }
    let file = fs::File::options()
        .write(true)
        .open(scene.bucket().join(key(2)))?;
    file.set_modified(SystemTime::now() - Duration::from_secs(2 * 24 * 60 * 60))?;
    let problems = || -> Result<Vec<String>, Error> {
        let leases = remote.leases()?;
        let whole = leases.iter().filter(|one| one.problem.is_none());
        assert_eq!(whole.map(|one| one.kind).collect::<Vec<_>>(), ["view"]);
        Ok(leases.into_iter().filter_map(|one| one.problem).collect())
    };
    let found = problems()?;
    assert!(found.len() == 2 && found[0].contains(&key(1)) && found[1].contains(&key(2)));
    // The other one is in the way of all else.
    let damaged = |error: Error| error.to_string().contains(&key(1));
    assert!(remote.collect(Options::default()).is_err_and(damaged));
    let found = problems()?;
    assert!(found.len() == 1 && found[0].contains(&key(1)), "{found:?}");
    assert!(!scene.keys("lease")?.contains(&key(2)));
    crate::remote::block_on(view.lease.end(&remote))?;
    Ok(())
}

/// It may be of a mount, which has a day for a sign of life. Until then nothing is deleted.
#[test]
fn a_damaged_lease_is_named_and_ends_after_a_day() -> Outcome {
    let scene = Scene::new()?;
    let remote = scene.remote()?;
    let store = scene.store("store")?;
    commit(&store, "t", &image(&[1; 6]), None)?;
    remote.push(&store, "t", "t", false, &Silent)?;
    remote.remove_all(&["t".to_owned()]).1?;
    let key = "lease/00000000000000000000000000000001/00000000";
    let path = scene.bucket().join(key);
    fs::create_dir_all(path.parent().ok_or("a directory")?)?;
    fs::write(&path, b"nothing")?;
    let day = Duration::from_secs(24 * 60 * 60);
    for (age, ends) in [(Duration::ZERO, false), (day / 2, false), (day * 2, true)] {
        let file = fs::File::options().write(true).open(&path)?;
        file.set_modified(SystemTime::now() - age)?;
        let findings = remote.verify(false)?.findings;
        assert_eq!(findings.len(), 1, "{findings:?}");
        assert_eq!(findings[0].object, key);
        for dry_run in [true, false] {
            let collected = remote.collect(Options { dry_run });
            match collected {
                Ok(collected) => {
                    assert!(ends, "{age:?}");
                    assert!(!collected.deleted.is_empty());
                }
                Err(error) => {
                    assert!(!ends, "{error}");
                    assert!(error.to_string().contains("for a day"), "{error}");
                }
            }
        }
        assert_eq!(scene.keys("packs")?.is_empty(), ends);
    }
    assert_eq!(scene.keys("lease")?, [""; 0]);
    assert_eq!(remote.verify(true)?.findings, []);
    Ok(())
}
