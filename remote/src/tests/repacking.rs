//! Packs that are partly needed: what is written anew, and what goes.

mod meanwhile;

use std::collections::BTreeMap;
use std::fs;
use std::sync::atomic::Ordering::Relaxed;

use snapstore_store::{Silent, Store};

use super::first::{is_at_hand, record, scattered, until};
use super::moody::{begin, memory, options, page};
use super::{Outcome, PAGE, Scene, commit, image, read};
use crate::protocol::{self, CondemnRecord, Name, Part, RefKey, Session};
use crate::repack::Gc;
use crate::{Remote, RepackOptions};

type Images = BTreeMap<&'static str, Vec<u8>>;

/// After a repack a bucket takes at most so much of what a fresh push of the same takes: what is
/// left are old records of leaves, and packs that are more than half needed.
const MOST_OF_FRESH: f64 = 1.1;

/// Tags of one lineage: `base`, of which two others need a little each, and `last` above one of
/// them.
fn lineage(store: &Store) -> Result<Images, Box<dyn std::error::Error>> {
    let base = vec![1; 2400];
    let mut one = base.clone();
    one[100..2300].fill(2);
    let mut last = one.clone();
    last[..30].fill(3);
    let mut other = base.clone();
    other[150..].fill(4);
    let images: Images = [
        ("base", base),
        ("one", one),
        ("last", last),
        ("other", other),
    ]
    .into_iter()
    .map(|(tag, pages)| (tag, image(&pages)))
    .collect();
    let parents = [("base", None), ("one", Some("base")), ("last", Some("one"))];
    for (tag, parent) in parents.into_iter().chain([("other", Some("base"))]) {
        commit(store, tag, &images[tag], parent)?;
    }
    Ok(images)
}

/// All of it in the bucket, but only `last` and `other` are kept.
fn with_lineage(scene: &Scene) -> Result<(Store, Images), Box<dyn std::error::Error>> {
    let store = scene.store("store")?;
    let mut images = lineage(&store)?;
    let remote = scene.remote()?;
    for tag in ["base", "one", "last", "other"] {
        remote.push(&store, tag, tag, false, &Silent)?;
    }
    for tag in ["base", "one"] {
        remote.remove(tag)?;
        images.remove(tag);
    }
    Ok((store, images))
}

fn gc(remote: &Remote) -> crate::Result<Gc> {
    let mut done = remote.gc(RepackOptions::default(), &Silent)?;
    match done.failed.take().or(done.untidied.take()) {
        Some(error) => Err(error),
        None => Ok(done),
    }
}

fn bytes_of(scene: &Scene, kinds: &[&str]) -> crate::Result<u64> {
    let mut sum = 0;
    for kind in kinds {
        let found = scene.remote()?.bucket.list(&format!("{kind}/"))?;
        sum += found.iter().map(|one| one.len_bytes).sum::<u64>();
    }
    Ok(sum)
}

fn are_read_as(scene: &Scene, images: &Images) -> Outcome {
    let remote = scene.remote()?;
    let findings = remote.verify(true)?.findings;
    assert_eq!(findings, []);
    let store = scene.store(&format!("reads {:032x}", crate::random()?))?;
    for (tag, bytes) in images {
        remote.pull(&store, tag, tag, false, &Silent)?;
        assert!(read(&store, tag)? == *bytes, "{tag} has other bytes");
    }
    Ok(())
}

pub fn what_is_partly_needed_is_repacked(scene: &Scene) -> Outcome {
    let (store, images) = with_lineage(scene)?;
    let remote = scene.remote()?;
    let dry_run = RepackOptions {
        dry_run: true,
        ..RepackOptions::default()
    };
    let before = bytes_of(scene, &["packs", "heads"])?;
    let would = remote.gc(dry_run, &Silent)?.repacked;
    assert_eq!((would.packs, would.snapshots), (1, 2), "{would:?}");
    assert_eq!(bytes_of(scene, &["packs", "heads"])?, before);
    let done = gc(&remote)?;
    let told = done.repacked.clone();
    // What only `last` or `other` needs of `base`, and what both do.
    assert_eq!(
        (told.packs, told.snapshots, told.pages),
        (1, 2, 250),
        "{told:?}"
    );
    assert_eq!(told.needed_bytes, would.needed_bytes);
    assert_eq!(told.damaged, []);
    // A page is read once, and no other byte of the pack but records of leaves.
    assert!(told.read_bytes < 290 * PAGE as u64, "{told:?}");
    assert!(told.written_bytes < 300 * PAGE as u64, "{told:?}");
    let freed: u64 = done.collected.deleted.iter().map(|one| one.len_bytes).sum();
    assert!(freed > told.packs_bytes, "{done:?}");
    are_read_as(scene, &images)?;
    assert!(remote.leases()?.is_empty());
    // Nothing is left to do: few records of leaves are read to know that.
    let again = gc(&remote)?;
    assert_eq!(again.repacked.packs, 0, "{again:?}");
    assert!(again.repacked.read_bytes < 200_000, "{again:?}");
    assert!(again.collected.deleted.is_empty(), "{again:?}");
    // The same in a fresh bucket.
    let there = bytes_of(scene, &["packs", "heads", "hooks"])?;
    let fresh = Scene::new()?;
    let fresh_remote = fresh.remote()?;
    for tag in images.keys() {
        fresh_remote.push(&store, tag, tag, false, &Silent)?;
    }
    let least = bytes_of(&fresh, &["packs", "heads", "hooks"])?;
    let ratio = there as f64 / least as f64;
    println!("{there} bytes after rm and gc, {least} of a fresh push: {ratio:.3}");
    assert!(ratio <= MOST_OF_FRESH, "{there} of {least}");
    // What was repacked is an ancestor as any other, and found by hooks, too.
    let mut pages = vec![1; 2400];
    pages[150..].fill(4);
    pages[3] = 9;
    commit(&store, "next", &image(&pages), Some("other"))?;
    let report = remote.push(&store, "next", "next", false, &Silent)?;
    assert_eq!((report.pages, report.reused_leaves), (1, 4), "{report:?}");
    // Of what a repack wrote parts are needed no more, in time: here two thirds are.
    for tag in ["other", "next"] {
        remote.remove(tag)?;
    }
    assert_eq!(gc(&remote)?.repacked.packs, 0);
    let most = RepackOptions {
        percent: 80,
        ..RepackOptions::default()
    };
    let done = remote.gc(most, &Silent)?.repacked;
    assert_eq!((done.packs, done.snapshots), (1, 1), "{done:?}");
    let images = images.into_iter().filter(|(tag, _)| *tag == "last");
    are_read_as(scene, &images.collect())
}

/// Of two packs the one that is needed least comes first, and no more is written than that.
#[test]
fn a_limit_and_a_share_say_what_is_repacked() -> Outcome {
    let scene = Scene::new()?;
    with_lineage(&scene)?;
    let remote = scene.remote()?;
    for options in [
        // 250 of 2400 pages are needed.
        RepackOptions {
            percent: 5,
            ..RepackOptions::default()
        },
        RepackOptions {
            percent: 0,
            ..RepackOptions::default()
        },
        RepackOptions {
            most_bytes: 1 << 20,
            ..RepackOptions::default()
        },
    ] {
        let done = remote.gc(options, &Silent)?.repacked;
        assert_eq!((done.packs, done.written_bytes), (0, 0), "{done:?}");
        let left = u64::from(options.most_bytes != u64::MAX);
        assert_eq!(done.left, left, "{done:?}");
    }
    let most_bytes = 2 << 20;
    let options = RepackOptions {
        most_bytes,
        ..RepackOptions::default()
    };
    let done = remote.gc(options, &Silent)?.repacked;
    assert_eq!(done.packs, 1);
    assert!(done.written_bytes < most_bytes, "{done:?}");
    Ok(())
}

/// A head that is larger than what goes is not written for it.
#[test]
fn what_costs_more_than_it_frees_is_left() -> Outcome {
    let scene = Scene::new()?;
    let (store, remote) = (scene.store("store")?, scene.remote()?);
    // Each page in a leaf of its own, so that the head is long.
    let mut pages = vec![0; 512 * 80];
    let mut commit = |tag: &str, leaves: usize, seed: u8, parent: Option<&str>| {
        for leaf in pages.chunks_mut(512).take(leaves) {
            leaf[0] = seed;
        }
        commit(&store, tag, &image(&pages), parent)?;
        remote.push(&store, tag, tag, false, &Silent)?;
        Outcome::Ok(())
    };
    commit("base", 80, 1, None)?;
    commit("one", 3, 2, Some("base"))?;
    commit("two", 2, 3, Some("one"))?;
    remote.remove("one")?;
    // A third of a pack of three pages is needed.
    let done = gc(&remote)?.repacked;
    let told = (done.packs, done.written_bytes, done.left);
    assert_eq!(told, (0, 0, 1), "{done:?}");
    let more = RepackOptions {
        percent: 70,
        ..RepackOptions::default()
    };
    let done = remote.gc(more, &Silent)?.repacked;
    assert_eq!((done.packs, done.left), (1, 0), "{done:?}");
    Ok(())
}

/// Copies a bucket that is a directory, so that each history begins alike.
fn copied(scene: &Scene) -> Result<Scene, Box<dyn std::error::Error>> {
    fn copy(from: &std::path::Path, to: &std::path::Path) -> std::io::Result<()> {
        fs::create_dir_all(to)?;
        for entry in fs::read_dir(from)? {
            let entry = entry?;
            let to = to.join(entry.file_name());
            match entry.file_type()?.is_dir() {
                true => copy(&entry.path(), &to)?,
                false => fs::copy(entry.path(), &to).map(drop)?,
            }
        }
        Ok(())
    }
    let other = Scene::new()?;
    fs::remove_dir_all(other.bucket())?;
    copy(&scene.bucket(), &other.bucket())?;
    Ok(other)
}

/// Each page of the pack that is to be repacked, in turn.
#[test]
fn a_damaged_page_is_named_and_its_pack_left_alone() -> Outcome {
    let scene = Scene::new()?;
    let (_, images) = with_lineage(&scene)?;
    scene.remote()?.collect(protocol::Options::default())?;
    let before: Vec<String> = scene.keys("packs")?;
    let told = gc(&copied(&scene)?.remote()?)?.repacked;
    assert_eq!(told.packs, 1);
    for at in [0.02, 0.5, 0.97] {
        let copy = copied(&scene)?;
        let after = copied(&scene)?;
        gc(&after.remote()?)?;
        // The one that goes.
        let kept = after.keys("packs")?;
        let old = before.iter().find(|key| !kept.contains(key));
        let old = old.ok_or("one went")?;
        let mut bytes = copy.bytes(old)?;
        let at = (bytes.len() as f64 * at) as usize;
        bytes[at] ^= 1;
        copy.replace(old, &bytes)?;
        let done = gc(&copy.remote()?)?;
        let is_needed = !(bytes.len() / 10..bytes.len() * 9 / 10).contains(&at);
        let found = &done.repacked.damaged;
        assert_eq!(found.len(), usize::from(is_needed), "at {at}: {found:?}");
        if is_needed {
            assert_eq!(found[0].object, *old);
            assert!(!found[0].tags.is_empty(), "{found:?}");
            assert_eq!(done.repacked.packs, 0);
            // Nothing is left of what was written until then.
            assert_eq!(copy.keys("packs")?.len(), before.len());
            assert_eq!(copy.bytes(old)?, bytes);
            assert_eq!(copy.keys("heads")?.len(), 2);
        } else {
            // What nobody needs is not read.
            are_read_as(&copy, &images)?;
        }
    }
    Ok(())
}

/// A snapshot with a working set, whose other pages are in a pack that goes: after that, too,
/// what is touched first is there before it is asked for, with no request for anything else.
pub fn a_working_set_stays_one(scene: &Scene) -> Outcome {
    let store = scene.store("store")?;
    let mut pages = vec![1; 2048];
    commit(&store, "base", &image(&pages), None)?;
    for at in (0..2048).filter(|at| at % 8 != 0) {
        pages[at] = 2;
    }
    let bytes = image(&pages);
    commit(&store, "next", &bytes, Some("base"))?;
    let touched = scattered(2048, 200);
    record(&store, "next", &touched)?;
    let remote = scene.remote()?;
    for tag in ["base", "next"] {
        remote.push(&store, tag, tag, false, &Silent)?;
    }
    remote.remove("base")?;
    let packs = scene.keys("packs")?.len();
    let done = gc(&remote)?;
    assert_eq!(
        (done.repacked.packs, done.repacked.snapshots),
        (1, 1),
        "{done:?}"
    );
    // That of `base`, and the working set in its old place.
    assert_eq!(scene.keys("packs")?.len(), packs, "{done:?}");
    are_read_as(scene, &[("next", bytes.clone())].into())?;
    let empty = scene.store("empty")?;
    let (lazy, mood) = begin(scene, &empty, "next", &options(scene))?;
    let reader = memory(&lazy);
    until("the set is there", || {
        touched.iter().all(|page| is_at_hand(&reader, *page))
    });
    let before = mood.reads.load(Relaxed);
    for number in touched.iter().map(|number| *number as usize) {
        assert_eq!(page(&reader, number)?, bytes[number * PAGE..][..PAGE]);
    }
    assert_eq!(mood.reads.load(Relaxed), before);
    lazy.end();
    let again = gc(&remote)?;
    assert_eq!(
        (again.repacked.packs, again.repacked.read_bytes),
        (0, 0),
        "{again:?}"
    );
    Ok(())
}

/// Most of a pack of a tag that was removed is needed by another one: that is seen from its
/// head, and nothing of the pack is read.
#[test]
fn what_heads_tell_takes_no_reading_of_packs() -> Outcome {
    let scene = Scene::new()?;
    let (store, remote) = (scene.store("store")?, scene.remote()?);
    let mut pages = vec![1; 512 * 6];
    commit(&store, "base", &image(&pages), None)?;
    pages[7] = 2;
    commit(&store, "next", &image(&pages), Some("base"))?;
    for tag in ["base", "next"] {
        remote.push(&store, tag, tag, false, &Silent)?;
    }
    remote.remove("base")?;
    let done = gc(&remote)?.repacked;
    let told = (done.packs, done.left, done.read_bytes);
    assert_eq!(told, (0, 0, 0), "{done:?}");
    Ok(())
}

/// A pack that was copied when its tag was confirmed: records name the old one.
#[test]
fn a_copy_of_a_pack_is_repacked() -> Outcome {
    let scene = Scene::new()?;
    let store = scene.store("store")?;
    let images = lineage(&store)?;
    let remote = scene.remote()?;
    remote.push(&store, "base", "base", false, &Silent)?;
    let pack = Part::parse(&scene.keys("packs")?[0]).ok_or("a pack")?;
    remote.push(&store, "other", "other", false, &Silent)?;
    // A collection was about to delete the pack, and gave up the push that used it.
    let session = Session(crate::random()?);
    let condemned = Name { session, number: 0 }.condemn_key();
    let record = CondemnRecord {
        parts: [pack].into(),
    };
    remote.bucket.put(&condemned, &record.encode(&condemned))?;
    let records = scene.keys("refs/other")?;
    let writer = RefKey::parse(&records[0]).ok_or("a record")?.writer();
    let fence = writer.fence_key();
    remote.bucket.put(&fence, &protocol::fence(&fence))?;
    let images: Images = [("other", images["other"].clone())].into();
    let packs = scene.keys("packs")?.len();
    are_read_as(&scene, &images)?;
    assert_eq!(scene.keys("packs")?.len(), packs + 1, "it was copied");
    remote.remove("base")?;
    let done = gc(&remote)?;
    assert_eq!(
        (done.repacked.packs, done.repacked.pages),
        (1, 150),
        "{done:?}"
    );
    // That of `other`, and a new one.
    assert_eq!(scene.keys("packs")?.len(), 2, "{done:?}");
    are_read_as(&scene, &images)?;
    // It is the ancestor of others, as any.
    let mut pages = vec![1; 2400];
    pages[150..].fill(4);
    pages[2399] = 9;
    commit(&store, "next", &image(&pages), Some("other"))?;
    let report = remote.push(&store, "next", "next", false, &Silent)?;
    assert_eq!(report.pages, 1, "{report:?}");
    Ok(())
}

/// As where heads are so many or so large that they are not kept: each is read when it is
/// needed, and what comes of it is the same.
#[test]
fn heads_that_are_not_kept_are_read_when_they_are_needed() -> Outcome {
    let mut told = Vec::new();
    for kept_leaves in [usize::MAX, 0] {
        let scene = Scene::new()?;
        let (_, images) = with_lineage(&scene)?;
        let mut remote = scene.remote()?;
        remote.kept_leaves = kept_leaves;
        let done = gc(&remote)?.repacked;
        assert_eq!(
            (done.packs, done.snapshots, done.pages),
            (1, 2, 250),
            "{done:?}"
        );
        are_read_as(&scene, &images)?;
        told.push(done);
    }
    assert_eq!(told[0], told[1]);
    Ok(())
}
