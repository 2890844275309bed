//! What else happens while a bucket is repacked: another host, an end at any request, a mount.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use snapstore_store::{Silent, Store};

use super::{Images, are_read_as, bytes_of, copied, gc, with_lineage};
use crate::objects::{Objects, Part, Requests};
use crate::protocol::{self, Listed, Name, RefKey, Session, Unanswered};
use crate::tests::dying::Dying;
use crate::tests::moody::{begin, memory, options, page};
use crate::tests::{Outcome, PAGE, Scene, commit, image};
use crate::{Error, Remote};

/// A bucket in which another host does something before a request.
struct Meeting {
    bucket: Box<dyn Objects>,
    left: AtomicUsize,
    other: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl std::fmt::Debug for Meeting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a bucket of two hosts")
    }
}

impl Meeting {
    fn meet(&self) {
        let left = self
            .left
            .fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1));
        if left == Ok(1)
            && let Some(other) = self.other.lock().expect("no panic").take()
        {
            other();
        }
    }
}

impl Objects for Meeting {
    fn create(&self) -> Result<(), Unanswered> {
        self.bucket.create()
    }
    fn is_absent(&self) -> bool {
        self.bucket.is_absent()
    }
    fn put(&self, key: &str, bytes: &[u8]) -> Result<(), Unanswered> {
        self.meet();
        self.bucket.put(key, bytes)
    }
    fn get(&self, key: &str, part: Option<Part>) -> Result<Option<Vec<u8>>, Unanswered> {
        self.meet();
        self.bucket.get(key, part)
    }
    fn exists(&self, key: &str) -> Result<bool, Unanswered> {
        self.meet();
        self.bucket.exists(key)
    }
    fn list(&self, prefix: &str) -> Result<Vec<Listed>, Unanswered> {
        self.meet();
        self.bucket.list(prefix)
    }
    fn delete(&self, key: &str) -> Result<(), Unanswered> {
        self.meet();
        self.bucket.delete(key)
    }
    fn requests(&self) -> Option<Requests> {
        self.bucket.requests()
    }
}

/// Smaller than the other, since it is done over and over again.
fn small(scene: &Scene) -> Result<(Store, Images), Box<dyn std::error::Error>> {
    let (store, remote) = (scene.store("store")?, scene.remote()?);
    let mut pages = vec![1; 300];
    commit(&store, "base", &image(&pages), None)?;
    remote.push(&store, "base", "base", false, &Silent)?;
    let mut images = Images::new();
    for (tag, seed) in [("one", 2), ("two", 3)] {
        pages[20..].fill(seed);
        commit(&store, tag, &image(&pages), Some("base"))?;
        remote.push(&store, tag, tag, false, &Silent)?;
        images.insert(tag, image(&pages));
    }
    pages[..].fill(7);
    commit(&store, "new", &image(&pages), None)?;
    images.insert("new", image(&pages));
    remote.remove("base")?;
    Ok((store, images))
}

/// Before its first request, then its second, and so on, another host removes a tag, pushes
/// another snapshot there, or repacks, too.
#[test]
fn another_host_comes_in_between_at_each_request() -> Outcome {
    let scene = Scene::new()?;
    let (_, images) = small(&scene)?;
    // With heads that are kept, and with none.
    let all = usize::MAX;
    for (what, kept_leaves) in [
        ("rm", all),
        ("push", all),
        ("gc", all),
        ("push", 0),
        ("gc", 0),
    ] {
        for at in 0.. {
            let copy = copied(&scene)?;
            let place = copy.place.clone();
            let store = scene.dir.path().join("store");
            let came = Arc::new(AtomicBool::new(false));
            let comes = came.clone();
            let act = move || {
                comes.store(true, Relaxed);
                let act = || -> Outcome {
                    let patience = Duration::from_secs(3600);
                    let remote = Remote::at(&place)?.patience(patience, false);
                    match what {
                        "rm" => remote.remove("one")?,
                        "push" => {
                            let store = Store::open(&store)?;
                            remote.push(&store, "new", "one", true, &Silent)?;
                        }
                        _ => drop(gc(&remote)?),
                    }
                    Ok(())
                };
                act().expect("the other one is done");
            };
            let mut remote = copy.remote()?.patience(Duration::from_secs(3600), false);
            remote.kept_leaves = kept_leaves;
            let meeting = Meeting {
                bucket: remote.bucket,
                left: AtomicUsize::new(at + 1),
                other: Mutex::new(Some(Box::new(act))),
            };
            remote.bucket = Box::new(meeting);
            let done = gc(&remote);
            let done = done.map_err(|error| format!("{what} before request {at}: {error}"))?;
            assert_eq!(done.repacked.damaged, [], "{what} before request {at}");
            let is_over = !came.load(Relaxed);
            // With a little patience all is as it should be.
            let then = gc(&copy.remote()?)?;
            assert_eq!(then.repacked.damaged, [], "{what} before request {at}");
            let mut left: Images = images.clone();
            let new = left.remove("new").ok_or("it is new")?;
            match what {
                _ if is_over => {}
                "rm" => drop(left.remove("one")),
                "push" => drop(left.insert("one", new)),
                _ => {}
            }
            are_read_as(&copy, &left).map_err(|error| format!("{what} before {at}: {error}"))?;
            let tags: Vec<String> = copy
                .remote()?
                .tags()?
                .into_iter()
                .map(|it| it.tag)
                .collect();
            assert_eq!(
                tags.len(),
                left.len(),
                "{what} before request {at}: {tags:?}"
            );
            if is_over {
                assert!(at > 40, "a collection makes more requests than {at}");
                break;
            }
            let then = gc(&copy.remote()?)?;
            assert_eq!(
                then.repacked.packs, 0,
                "{what} before request {at}: {then:?}"
            );
        }
    }
    Ok(())
}

/// A collection is killed at its first request, then at its second, and so on; the next one
/// goes on, and has no more to do than one that was not killed.
#[test]
fn a_repack_that_is_killed_at_any_request_is_finished_by_the_next_collection() -> Outcome {
    let scene = Scene::new()?;
    let (_, mut images) = small(&scene)?;
    images.remove("new");
    let whole = copied(&scene)?;
    gc(&whole.remote()?)?;
    let least = bytes_of(&whole, &["packs"])?;
    let mut finished = 0;
    for at in 0.. {
        let copy = copied(&scene)?;
        let mut dying = copy.remote()?;
        dying.bucket = Box::new(Dying {
            bucket: dying.bucket,
            left: AtomicUsize::new(at),
            is_done: at % 2 == 1,
        });
        let killed = gc(&dying);
        // The tags name what they named.
        are_read_as(&copy, &images).map_err(|error| format!("request {at}: {error}"))?;
        // Who was killed is given up.
        for lease in copy.remote()?.leases()? {
            let session = Session::parse(&lease.session).ok_or("a session")?;
            let fence = session.fence_key();
            copy.remote()?
                .bucket
                .put(&fence, &protocol::fence(&fence))?;
        }
        let then = gc(&copy.remote()?)?;
        finished += then.repacked.finished;
        gc(&copy.remote()?)?;
        are_read_as(&copy, &images).map_err(|error| format!("after request {at}: {error}"))?;
        // Killed between the records of two tags, it leaves what both need in two packs.
        let twice = 20 * (PAGE as u64 + 41) + (40 << 10);
        let bytes = bytes_of(&copy, &["packs"])?;
        assert!(bytes <= least + twice, "request {at}: {bytes}");
        assert_eq!(copy.keys("heads")?.len(), 2, "request {at}");
        assert_eq!(copy.keys("condemn")?.len(), 0, "request {at}");
        match killed {
            Err(Error::Protocol(protocol::Error::Unanswered(_))) => {}
            Err(error) => return Err(format!("request {at}: {error:?}").into()),
            Ok(_) => {
                assert!(at > 40, "a collection makes more requests than {at}");
                // Killed between its records and the end of its lease.
                assert!(finished > 0, "no repack was cut off");
                return Ok(());
            }
        }
    }
    Ok(())
}

/// It goes on reading from the old pack, which goes when it ends.
#[test]
fn a_mount_that_is_open_meanwhile_reads_on() -> Outcome {
    let scene = Scene::new()?;
    let (_, images) = with_lineage(&scene)?;
    let empty = scene.store("empty")?;
    let (lazy, mood) = begin(&scene, &empty, "last", &options(&scene))?;
    let reader = memory(&lazy);
    assert_eq!(page(&reader, 0)?, images["last"][..PAGE]);
    let remote = scene.remote()?;
    let done = gc(&remote)?;
    assert_eq!(done.repacked.packs, 1, "{done:?}");
    let old = done.repacked.packs_bytes;
    let with_old = bytes_of(&scene, &["packs"])?;
    let reads = mood.reads.load(Relaxed);
    let mut bytes = vec![0; images["last"].len()];
    reader.read_at(&mut bytes, 0)?;
    assert!(bytes == images["last"], "other bytes");
    assert!(mood.reads.load(Relaxed) > reads, "all was in the cache");
    // Another one begins with what is new.
    let other = begin(&scene, &scene.store("another")?, "last", &options(&scene))?;
    other.0.end();
    lazy.end();
    let done = gc(&remote)?;
    assert_eq!(done.repacked.packs, 0, "{done:?}");
    assert_eq!(bytes_of(&scene, &["packs"])?, with_old - old);
    are_read_as(&scene, &images)
}

/// Two snapshots have a leaf in common, whose pages are in other packs for each: its record is
/// written once, with places of the first one. A collection is about to delete one of these
/// packs, which only the first one's record speaks for.
#[test]
fn a_record_speaks_for_no_pack_that_its_head_does_not_need() -> Outcome {
    let scene = Scene::new()?;
    let remote = scene.remote()?;
    let push = |host: &str, tag: &str, pages: &[u8], parent: Option<&str>| -> Outcome {
        let store = Store::open(&scene.dir.path().join(host)).or_else(|_| scene.store(host))?;
        commit(&store, tag, &image(pages), parent)?;
        remote.push(&store, tag, tag, false, &Silent)?;
        Ok(())
    };
    let leaf = |halves: [u8; 2]| [[halves[0]; 256], [halves[1]; 256]].concat();
    let with_more = |halves, seed| [leaf(halves), vec![seed; 2048]].concat();
    push("first", "half", &leaf([1, 0]), None)?;
    let half = scene.keys("packs")?;
    push("second", "gone", &with_more([0, 2], 8), None)?;
    // By hooks: the halves are where they are.
    push("third", "a", &leaf([1, 2]), None)?;
    for key in scene.keys("hooks")? {
        remote.bucket.delete(&key)?;
    }
    push("fourth", "gone-too", &with_more([1, 2], 9), None)?;
    push("fourth", "b", &leaf([1, 2]), Some("gone-too"))?;
    for tag in ["gone", "gone-too"] {
        remote.remove(tag)?;
    }
    let packs_of = |tag: &str| -> Result<Vec<String>, Box<dyn std::error::Error>> {
        let records = scene.keys(&format!("refs/{tag}"))?;
        let last = records.iter().filter_map(|key| RefKey::parse(key)).max();
        let last = last.ok_or("a record")?;
        let opened = remote.open_head_of(last.head, &last.key())?;
        Ok(opened.packs.iter().map(|pack| pack.pack_key()).collect())
    };
    assert!(packs_of("a")?.contains(&half[0]), "hooks found none");
    assert!(!packs_of("b")?.contains(&half[0]), "hooks found some");
    let session = Session(crate::random()?);
    let condemned = Name { session, number: 0 }.condemn_key();
    let parts = half.iter().filter_map(|key| protocol::Part::parse(key));
    let record = protocol::CondemnRecord {
        parts: parts.collect(),
    };
    remote.bucket.put(&condemned, &record.encode(&condemned))?;
    let done = gc(&remote)?.repacked;
    assert!(done.snapshots > 0, "{done:?}");
    assert!(!packs_of("b")?.contains(&half[0]), "{done:?}");
    // So that pack may go with who needs it, and nothing is lost.
    for tag in ["a", "half"] {
        remote.remove(tag)?;
    }
    gc(&remote)?;
    let images: Images = [("b", image(&leaf([1, 2])))].into();
    are_read_as(&scene, &images)
}

/// Before its first request, then its second, and so on, another host removes a tag and collects,
/// or repacks: what is gone then is no damage.
#[test]
fn a_verify_that_others_collect_beside_finds_nothing() -> Outcome {
    let scene = Scene::new()?;
    small(&scene)?;
    for removes in [true, false] {
        for at in 0.. {
            let copy = copied(&scene)?;
            let place = copy.place.clone();
            let came = Arc::new(AtomicBool::new(false));
            let comes = came.clone();
            let act = move || {
                comes.store(true, Relaxed);
                let act = || -> Outcome {
                    let remote = Remote::at(&place)?.patience(Duration::ZERO, false);
                    if removes {
                        remote.remove("one")?;
                    }
                    gc(&remote)?;
                    Ok(())
                };
                act().expect("the other one is done");
            };
            let mut remote = copy.remote()?;
            remote.bucket = Box::new(Meeting {
                bucket: remote.bucket,
                left: AtomicUsize::new(at + 1),
                other: Mutex::new(Some(Box::new(act))),
            });
            let findings = remote.verify(at % 2 == 0)?.findings;
            assert_eq!(
                findings,
                [],
                "before request {at}, one is removed: {removes}"
            );
            if !came.load(Relaxed) {
                assert!(at > 8, "a verification makes more requests than {at}");
                break;
            }
        }
    }
    Ok(())
}
