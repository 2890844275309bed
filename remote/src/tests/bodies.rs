//! What holds of each kind of bucket.

use std::fs;

use snapstore_store::{GcOptions, Silent, Store};

pub use super::dying::{
    a_push_that_is_killed_at_any_request_is_run_again,
    of_several_tags_all_are_looked_at_before_one_is_removed,
};
pub use super::first::{
    a_working_set_goes_with_its_snapshot,
    a_working_set_that_is_recorded_later_is_pushed_by_the_next_push,
};
pub use super::hooks::pages_of_others_are_found_by_hooks;
pub use super::lazy::what_stays_there_reads_as_what_is_pulled;
pub use super::mending::{
    a_configuration_that_is_lost_or_damaged_is_made_anew_for_the_same_pages,
    a_push_that_replaces_mends_what_is_gone_or_damaged, damage_of_others_stops_no_push,
};
pub use super::repacking::{a_working_set_stays_one, what_is_partly_needed_is_repacked};
use super::{Outcome, Scene, commit, image, list, read};
use crate::Error;
use crate::protocol::{self, Name, Options, RefKey, RefKind, RefRecord, Session};

pub fn only_what_is_missing_moves(scene: &Scene) -> Outcome {
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

pub fn what_no_tag_needs_goes_and_the_rest_stays(scene: &Scene) -> Outcome {
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
    let packs = || scene.keys("packs").map(|keys| keys.len());
    assert_eq!(packs()?, 3);
    remote.remove("c")?;
    remote.remove("a")?;
    assert!(matches!(
        remote.remove("a"),
        Err(Error::Protocol(protocol::Error::NoTag { .. }))
    ));
    assert_eq!(remote.collect(Options { dry_run: true })?.deleted.len(), 3);
    assert_eq!(packs()?, 3);
    let collected = remote.collect(Options::default())?;
    // A pack and two heads: what `b` shares with `a` stays.
    assert_eq!(collected.deleted.len(), 3, "{collected:?}");
    assert_eq!(packs()?, 2);
    assert!(remote.verify(true)?.findings.is_empty());
    let other = scene.store("other")?;
    remote.pull(&other, "b", "b", false, &Silent)?;
    assert_eq!(read(&other, "b")?, second);
    remote.remove("b")?;
    remote.collect(Options::default())?;
    assert_eq!((packs()?, scene.keys("condemn")?.len()), (0, 0));
    Ok(())
}

pub fn a_tag_that_exists_is_not_moved_without_being_told(scene: &Scene) -> Outcome {
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
pub fn what_was_removed_and_collected_is_pulled_again(scene: &Scene) -> Outcome {
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
pub fn a_pull_brings_back_what_the_disk_has_lost(scene: &Scene) -> Outcome {
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

/// The last record of a tag stays for ever: without any, packs are not garbage.
pub fn a_bucket_that_lost_all_records_is_not_emptied(scene: &Scene) -> Outcome {
    let remote = scene.remote()?;
    let store = scene.store("store")?;
    commit(&store, "t", &image(&[1; 6]), None)?;
    remote.push(&store, "t", "t", false, &Silent)?;
    let record = scene.longest("refs")?;
    let aside = scene.bytes(&record)?;
    remote.bucket.delete(&record)?;
    let damaged = |error: Error| matches!(error, Error::Protocol(protocol::Error::Damaged { .. }));
    for dry_run in [true, false] {
        assert!(remote.collect(Options { dry_run }).is_err_and(damaged));
    }
    let findings = remote.verify(false)?.findings;
    assert!(
        findings.iter().any(|one| one.object == "refs/"),
        "{findings:?}"
    );
    remote.bucket.put(&record, &aside)?;
    assert!(remote.verify(true)?.findings.is_empty());
    // A removal is a record, too.
    remote.remove("t")?;
    assert_eq!(remote.collect(Options::default())?.deleted.len(), 2);
    Ok(())
}

/// All say that there is no such tag, so a push that makes it must not say that it is there.
pub fn a_tag_whose_removal_was_cut_off_is_made_anew(scene: &Scene) -> Outcome {
    let remote = scene.remote()?;
    let store = scene.store("store")?;
    commit(&store, "a", &image(&[1; 6]), None)?;
    commit(&store, "b", &image(&[2; 6]), None)?;
    for again in ["a", "b"] {
        remote.push(&store, "a", "t", true, &Silent)?;
        let before = scene.keys("refs")?;
        let before = before.iter().filter_map(|key| RefKey::parse(key)).max();
        let before = before.ok_or("it has a record")?;
        let session = Session(crate::random()?);
        let removal = RefKey {
            seq: before.seq + 1,
            session,
            kind: RefKind::Removed,
            head: Name { session, number: 0 },
            ..before
        };
        let key = removal.key();
        let body = RefRecord { snapshot: [0; 32] }.encode(&key);
        remote.bucket.put(&key, &body)?;
        let fence = session.fence_key();
        remote.bucket.put(&fence, &protocol::fence(&fence))?;
        assert_eq!(remote.tags()?, []);
        let report = remote.push(&store, again, "t", false, &Silent)?;
        assert!(!report.already, "{report:?}");
        let other = scene.store(again)?;
        remote.pull(&other, "t", "t", false, &Silent)?;
        assert_eq!(other.tag("t")?, store.tag(again)?);
    }
    Ok(())
}

/// It is a finding, by name, and what pushes and collections say is the way out.
pub fn a_condemnation_that_is_damaged_is_named_with_the_way_out(scene: &Scene) -> Outcome {
    let remote = scene.remote()?;
    let store = scene.store("store")?;
    commit(&store, "t", &image(&[1; 6]), None)?;
    remote.push(&store, "t", "t", false, &Silent)?;
    let name = "condemn/00000000000000000000000000000abc-00000001";
    remote.bucket.put(name, b"")?;
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
    remote.bucket.delete(name)?;
    remote.push(&store, "u", "u", false, &Silent)?;
    remote.collect(Options::default())?;
    assert!(remote.verify(true)?.findings.is_empty());
    Ok(())
}

/// Whatever is done to an object: the pull names it, and sets no tag.
pub fn hostile_objects_are_refused_and_named(scene: &Scene) -> Outcome {
    let remote = scene.remote()?;
    let store = scene.store("store")?;
    commit(&store, "t", &image(&[1; 600]), None)?;
    commit(&store, "u", &image(&[2; 600]), None)?;
    remote.push(&store, "t", "t", false, &Silent)?;
    let kinds = ["packs", "heads", "refs/t"].map(|kind| (kind, scene.longest(kind)));
    remote.push(&store, "u", "u", false, &Silent)?;
    for (kind, key) in kinds {
        let key = key?;
        let whole = scene.bytes(&key)?;
        let others = if kind == "refs/t" { "refs/u" } else { kind };
        let other = scene.keys(others)?.into_iter().find(|it| *it != key);
        let swapped_with = scene.bytes(&other.ok_or("another")?)?;
        let name = key.rsplit('/').next().ok_or("a name")?;
        // What is read is the same for every kind of bucket.
        let variants = if scene.is_directory() { 40 } else { 4 };
        let step = (whole.len() / variants).max(1);
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
            scene.replace(&key, &bytes)?;
            let other = scene.store(&format!("{}{number}", kind.replace('/', "-")))?;
            let pulled = remote.pull(&other, "t", "t", false, &Silent);
            let error = match pulled {
                Ok(pulled) => return Err(format!("{kind} {number}: {pulled:?}").into()),
                Err(error) => error,
            };
            assert!(error.to_string().contains(name), "{kind} {number}: {error}");
            let is_known = matches!(&error, Error::Protocol(protocol::Error::Damaged { .. }));
            assert!(is_known, "{kind} {number}: {error:?}");
            assert_eq!(other.tag("t")?, None);
            let verified = remote.verify(true)?;
            assert!(!verified.findings.is_empty(), "{kind} {number}");
        }
        remote.bucket.delete(&key)?;
        let other = scene.store(&format!("{}-last", kind.replace('/', "-")))?;
        assert!(remote.pull(&other, "t", "t", false, &Silent).is_err());
        remote.bucket.put(&key, &whole)?;
        remote.pull(&other, "t", "t", false, &Silent)?;
    }
    Ok(())
}

pub fn a_bucket_keeps_what_it_has_to(scene: &Scene) -> Outcome {
    let remote = scene.remote()?;
    remote.check()?;
    let bucket = &remote.bucket;
    assert_eq!(bucket.get("packs/absent", None)?, None);
    assert_eq!(bucket.get("packs/absent", Some((7, 7)))?, None);
    assert!(!bucket.exists("packs/absent")?);
    assert!(bucket.list("packs/")?.is_empty());
    bucket.delete("packs/absent")?;
    bucket.put("packs/a", b"")?;
    bucket.put("packs/b+c=d@e", b"bytes")?;
    let found = bucket.list("packs/")?;
    let found: Vec<_> = found.iter().map(|one| (&*one.key, one.len_bytes)).collect();
    assert_eq!(found, [("packs/a", 0), ("packs/b+c=d@e", 5)]);
    assert!(bucket.list("pack/")?.is_empty());
    bucket.delete("packs/a")?;
    assert!(!bucket.exists("packs/a")?);
    Ok(())
}

pub fn a_write_whose_answer_is_lost_is_written_again(scene: &Scene) -> Outcome {
    let remote = scene.remote()?;
    for _ in 0..3 {
        remote.bucket.put("heads/a", b"the same bytes")?;
    }
    assert_eq!(scene.bytes("heads/a")?, b"the same bytes");
    Ok(())
}

pub fn a_part_behind_the_end_is_no_part(scene: &Scene) -> Outcome {
    let bucket = &scene.remote()?.bucket;
    bucket.put("packs/a", &[7; 100])?;
    for (part, len) in [
        ((0, 100), 100),
        ((10, 20), 20),
        ((50, 100), 50),
        ((100, 10), 0),
        ((5000, 10), 0),
        ((10, 0), 0),
        ((u64::from(u32::MAX), 1 << 20), 0),
    ] {
        let found = bucket.get("packs/a", Some(part))?.ok_or("it is there")?;
        assert_eq!(found, vec![7; len], "{part:?}");
    }
    Ok(())
}

pub fn long_objects_are_written_in_parts(scene: &Scene) -> Outcome {
    let bucket = &scene.remote()?.bucket;
    let long = image(&vec![3; 20 * 256 + 1]);
    bucket.put("packs/a", &long)?;
    assert_eq!(scene.bytes("packs/a")?, long);
    let part = bucket.get("packs/a", Some(((8 << 20) - 5, 10)))?;
    assert_eq!(part.as_deref(), Some(&long[(8 << 20) - 5..(8 << 20) + 5]));
    // A record is never so long, whoever put it there.
    bucket.put("refs/a/b", &long[..(64 << 10) + 1])?;
    let refused = bucket.get("refs/a/b", None);
    assert!(refused.is_err_and(|error| error.wrong.is_some()));
    Ok(())
}
