//! A reader that is overtaken at each step: its tag is set anew, and what that leaves is
//! collected. And a server that lists what is deleted, as one does that has missed it.

use std::sync::Mutex;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use snapstore_store::{Silent, Store};

use super::dying::Dying;
use super::moody::{memory, options, page};
use super::{Outcome, PAGE, Scene, commit, image, read};
use crate::objects::{Objects, Part, Requests};
use crate::protocol::{self, Listed, Options, RefKey, Session, Unanswered};
use crate::{Error, Place, Remote, Result};

/// How often: a view that begins anew each time gives up after four.
const OFTEN: u8 = 3;

/// A bucket of which each read of a record comes after the tag was set anew and collected.
#[derive(Debug)]
struct Overtaking {
    bucket: Box<dyn Objects>,
    place: Place,
    store: Store,
    left: Mutex<u8>,
}

impl Overtaking {
    fn overtake(&self) {
        let mut left = self.left.lock().expect("no panic");
        if *left == 0 {
            return;
        }
        let name = format!("next{left}");
        *left -= 1;
        let done = || -> Result<()> {
            let remote = Remote::at(&self.place)?.patience(Duration::ZERO, false);
            remote.push(&self.store, &name, "t", true, &Silent)?;
            remote.collect(Options::default())?;
            Ok(())
        };
        done().expect("nobody is in its way");
    }
}

impl Objects for Overtaking {
    fn create(&self) -> std::result::Result<(), Unanswered> {
        self.bucket.create()
    }
    fn is_absent(&self) -> bool {
        self.bucket.is_absent()
    }
    fn put(&self, key: &str, bytes: &[u8]) -> std::result::Result<(), Unanswered> {
        self.bucket.put(key, bytes)
    }
    fn get(
        &self,
        key: &str,
        part: Option<Part>,
    ) -> std::result::Result<Option<Vec<u8>>, Unanswered> {
        if key.starts_with("refs/") {
            self.overtake();
        }
        self.bucket.get(key, part)
    }
    fn exists(&self, key: &str) -> std::result::Result<bool, Unanswered> {
        self.bucket.exists(key)
    }
    fn list(&self, prefix: &str) -> std::result::Result<Vec<Listed>, Unanswered> {
        self.bucket.list(prefix)
    }
    fn delete(&self, key: &str) -> std::result::Result<(), Unanswered> {
        self.bucket.delete(key)
    }
    fn requests(&self) -> Option<Requests> {
        self.bucket.requests()
    }
}

/// A remote, and images.
type Overtaken = std::result::Result<(Remote, Vec<Vec<u8>>), Box<dyn std::error::Error>>;

/// A remote whose tag changes as often as it is read, and what it names each time.
fn overtaking(scene: &Scene) -> Overtaken {
    let store = scene.store("store")?;
    let mut images = Vec::new();
    for (number, name) in ["first", "next3", "next2", "next1"].iter().enumerate() {
        images.push(image(&[number as u8 + 1; 20]));
        commit(&store, name, &images[number], None)?;
    }
    scene.remote()?.push(&store, "first", "t", false, &Silent)?;
    let mut remote = scene.remote()?;
    remote.bucket = Box::new(Overtaking {
        bucket: remote.bucket,
        place: scene.place.clone(),
        store,
        left: Mutex::new(OFTEN),
    });
    Ok((remote, images))
}

#[test]
fn a_record_that_is_gone_once_its_snapshot_is_viewed_is_not_missed() -> Outcome {
    for sealed in [false, true] {
        let new = || match sealed {
            true => Scene::sealed(),
            false => Scene::new(),
        };
        let scene = new()?;
        let (remote, images) = overtaking(&scene)?;
        let other = scene.store("other")?;
        remote.pull(&other, "t", "t", false, &Silent)?;
        let pulled = read(&other, "t")?;
        // Not the first one: that was replaced before the view began.
        assert!(images[1..].contains(&pulled), "other bytes");
        assert!(scene.remote()?.leases()?.is_empty());

        let scene = new()?;
        let (remote, images) = overtaking(&scene)?;
        let other = scene.store("other")?;
        let lazy = remote.lazy(&other, "t", &options(&scene))?;
        let (reader, mut bytes) = (memory(&lazy), Vec::new());
        for number in 0..images[0].len() / PAGE {
            bytes.extend(page(&reader, number)?);
        }
        assert!(images[1..].contains(&bytes), "other bytes");
        lazy.end();

        let scene = new()?;
        let (remote, _) = overtaking(&scene)?;
        let named = remote.snapshot_of("t")?;
        let store = Store::open(&scene.dir.path().join("store"))?;
        let names = ["next3", "next2", "next1"].map(|name| store.tag(name));
        assert!(
            names
                .into_iter()
                .any(|id| id.is_ok_and(|id| id == Some(named)))
        );
        assert_eq!(scene.remote()?.verify(true)?.findings, []);
    }
    Ok(())
}

/// A bucket that lists what is not there.
#[derive(Debug)]
struct Ghosts {
    bucket: Box<dyn Objects>,
    keys: Vec<String>,
    /// Listings of leases so far, if each has another lease of somebody.
    restless: Option<AtomicUsize>,
}

impl Objects for Ghosts {
    fn create(&self) -> std::result::Result<(), Unanswered> {
        self.bucket.create()
    }
    fn is_absent(&self) -> bool {
        self.bucket.is_absent()
    }
    fn put(&self, key: &str, bytes: &[u8]) -> std::result::Result<(), Unanswered> {
        self.bucket.put(key, bytes)
    }
    fn get(
        &self,
        key: &str,
        part: Option<Part>,
    ) -> std::result::Result<Option<Vec<u8>>, Unanswered> {
        self.bucket.get(key, part)
    }
    fn exists(&self, key: &str) -> std::result::Result<bool, Unanswered> {
        self.bucket.exists(key)
    }
    fn list(&self, prefix: &str) -> std::result::Result<Vec<Listed>, Unanswered> {
        let mut found = self.bucket.list(prefix)?;
        let mut keys = self.keys.clone();
        if let Some(listings) = &self.restless {
            keys.push(Session(7 + listings.fetch_add(1, Relaxed) as u128).beat_key(0));
        }
        let ghosts = keys.into_iter().filter(|key| key.starts_with(prefix));
        found.extend(ghosts.map(|key| Listed {
            key,
            len_bytes: 100,
            modified: 1,
        }));
        found.sort_by(|one, other| one.key.cmp(&other.key));
        Ok(found)
    }
    fn delete(&self, key: &str) -> std::result::Result<(), Unanswered> {
        self.bucket.delete(key)
    }
    fn requests(&self) -> Option<Requests> {
        self.bucket.requests()
    }
}

/// It waits for nobody, and gives up nobody.
#[test]
fn a_push_that_ended_and_is_listed_holds_up_no_collection() -> Outcome {
    let scene = Scene::new()?;
    let store = scene.store("store")?;
    for tag in ["a", "b"] {
        commit(&store, tag, &image(&[tag.as_bytes()[0]; 20]), None)?;
        scene.remote()?.push(&store, tag, tag, false, &Silent)?;
    }
    scene.remote()?.remove("a")?;
    let mut remote = Remote::at(&scene.place)?;
    remote.bucket = Box::new(Ghosts {
        bucket: remote.bucket,
        keys: [0, 1]
            .map(|beat| format!("lease/{:032x}/{beat:08}", 7))
            .to_vec(),
        restless: None,
    });
    let collected = remote.collect(Options::default())?;
    assert_eq!(collected.deleted.len(), 2, "{collected:?}");
    assert!(collected.fenced.is_empty(), "{collected:?}");
    let other = scene.store("other")?;
    remote.pull(&other, "b", "b", false, &Silent)?;
    Ok(())
}

/// It has no record, so nobody else asks whether its lease is there.
#[test]
fn what_a_push_left_that_was_cut_off_and_is_listed_is_deleted() -> Outcome {
    let scene = Scene::new()?;
    let store = scene.store("store")?;
    commit(&store, "kept", &image(&[1; 20]), None)?;
    scene
        .remote()?
        .push(&store, "kept", "kept", false, &Silent)?;
    let kept = scene.keys("packs")?;
    commit(&store, "t", &image(&[2; 20]), None)?;
    for requests in 1.. {
        let mut remote = scene.remote()?;
        remote.bucket = Box::new(Dying {
            bucket: remote.bucket,
            left: AtomicUsize::new(requests),
            is_done: true,
        });
        let _ = remote.push(&store, "t", "t", false, &Silent);
        if scene.keys("packs")? != kept {
            break;
        }
    }
    let listed = scene.keys("lease")?;
    let mut remote = scene.remote()?;
    // While the lease is there its pack stays.
    let collected = remote.collect(Options::default())?;
    assert_eq!(collected.deleted, [], "{collected:?}");
    for key in &listed {
        remote.bucket.delete(key)?;
    }
    remote.bucket = Box::new(Ghosts {
        bucket: remote.bucket,
        keys: listed,
        restless: None,
    });
    let collected = remote.collect(Options::default())?;
    assert_eq!(collected.deleted.len(), 1, "{collected:?}");
    assert_eq!(scene.keys("packs")?, kept);
    Ok(())
}

/// Else the record before it would count again, which may be gone.
#[test]
fn a_push_that_ended_and_is_listed_counts() -> Outcome {
    for sealed in [false, true] {
        let scene = match sealed {
            true => Scene::sealed()?,
            false => Scene::new()?,
        };
        let store = scene.store("store")?;
        for (number, name) in ["first", "second"].iter().enumerate() {
            commit(&store, name, &image(&[number as u8 + 1; 20]), None)?;
            scene.remote()?.push(&store, name, "t", true, &Silent)?;
        }
        let records = scene.keys("refs")?;
        let last = records.iter().filter_map(|key| RefKey::parse(key)).max();
        let session = last.ok_or("a record")?.writer();
        let remote = || -> Result<Remote> {
            let mut remote = scene.remote()?;
            remote.bucket = Box::new(Ghosts {
                bucket: remote.bucket,
                keys: [0, 1].map(|beat| session.beat_key(beat)).to_vec(),
                restless: None,
            });
            Ok(remote)
        };
        let second = store.tag("second")?.ok_or("it was committed")?;
        assert_eq!(remote()?.snapshot_of("t")?, second);
        let tags = remote()?.tags()?;
        assert_eq!(
            (&tags[0].id, &tags[0].problem),
            (&second.to_string(), &None)
        );
        let other = scene.store("other")?;
        remote()?.pull(&other, "t", "t", false, &Silent)?;
        assert_eq!(other.tag("t")?, Some(second));
        // Nobody is waited for, nobody is told to wait.
        remote()?.remove("t")?;
        assert_eq!(remote()?.tags()?, []);
    }
    Ok(())
}

/// Views come and go all the while.
#[test]
fn who_comes_and_goes_holds_up_no_collection() -> Outcome {
    let scene = Scene::new()?;
    let (store, mut remote) = (scene.store("store")?, scene.remote()?);
    commit(&store, "t", &image(&[1; 20]), None)?;
    remote.push(&store, "t", "t", false, &Silent)?;
    remote.remove("t")?;
    remote.bucket = Box::new(Ghosts {
        bucket: remote.bucket,
        keys: Vec::new(),
        restless: Some(AtomicUsize::new(0)),
    });
    let collected = remote.collect(Options::default())?;
    assert_eq!(collected.not_deleted, None);
    assert_eq!(collected.deleted.len(), 2, "{collected:?}");
    Ok(())
}

/// The last sign of life of a view is on its way: it is listed, and cannot be read yet.
#[test]
fn a_view_whose_last_beat_cannot_be_read_yet_keeps_its_packs() -> Outcome {
    let scene = Scene::new()?;
    let store = scene.store("store")?;
    for tag in ["a", "viewed"] {
        commit(&store, tag, &image(&[tag.as_bytes()[0]; 20]), None)?;
        scene.remote()?.push(&store, tag, tag, false, &Silent)?;
    }
    let reads = scene.remote()?;
    let lazy = reads.lazy(&scene.store("other")?, "viewed", &options(&scene))?;
    let lease = scene.keys("lease")?.pop().ok_or("a lease")?;
    let session = Session::parse_beat(&lease).ok_or("a beat")?.0;
    scene.remote()?.remove("viewed")?;
    let mut remote = scene.remote()?;
    remote.bucket = Box::new(Ghosts {
        bucket: remote.bucket,
        keys: vec![session.beat_key(99)],
        restless: None,
    });
    let collected = remote.collect(Options::default())?;
    assert_eq!(collected.deleted, []);
    let reader = memory(&lazy);
    for number in 0..20 {
        page(&reader, number)?;
    }
    lazy.end();
    Ok(())
}

/// No host comes to the last number. Whoever wrote it is not told to be in the way.
#[test]
fn a_record_with_the_last_number_is_told_as_what_it_is() -> Outcome {
    let scene = Scene::new()?;
    let (store, remote) = (scene.store("store")?, scene.remote()?);
    commit(&store, "t", &image(&[1; 20]), None)?;
    remote.push(&store, "t", "t", false, &Silent)?;
    let key = scene.keys("refs")?.pop().ok_or("a record")?;
    let record = RefKey::parse(&key).ok_or("a record")?;
    let last = RefKey {
        seq: u64::MAX,
        ..record
    };
    let body = protocol::RefRecord { snapshot: [1; 32] }.encode(&last.key());
    remote.bucket.put(&last.key(), &body)?;
    let pushed = remote.push(&store, "t", "t", true, &Silent).map(|_| ());
    for done in [pushed, remote.remove("t")] {
        let Err(Error::Protocol(protocol::Error::Damaged { key, .. })) = done else {
            return Err(format!("it is not told: {done:?}").into());
        };
        assert!(key.starts_with("refs/t"), "{key}");
    }
    Ok(())
}
