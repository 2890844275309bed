//! How many requests commands make: what they ask for is counted, not how long it takes.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use snapstore_store::{Silent, Store};

use super::{Outcome, Scene, commit, image};
use crate::objects::{Objects, Part, Requests};
use crate::protocol::{Listed, RefKey, RefRecord, Session, Unanswered};
use crate::{PushReport, RepackOptions};

/// How often what was asked for of which kind of object.
type Counts = BTreeMap<String, u64>;

/// A bucket that counts.
#[derive(Debug)]
struct Counted {
    bucket: Box<dyn Objects>,
    counts: Arc<Mutex<Counts>>,
}

impl Counted {
    fn count(&self, what: &str, key: &str) {
        let kind = key.split('/').next().unwrap_or_default();
        let mut counts = self.counts.lock().expect("no panic");
        *counts.entry(format!("{what} {kind}")).or_default() += 1;
    }
}

impl Objects for Counted {
    fn create(&self) -> Result<(), Unanswered> {
        self.bucket.create()
    }
    fn is_absent(&self) -> bool {
        self.bucket.is_absent()
    }
    fn put(&self, key: &str, bytes: &[u8]) -> Result<(), Unanswered> {
        self.count("write", key);
        self.bucket.put(key, bytes)
    }
    fn get(&self, key: &str, part: Option<Part>) -> Result<Option<Vec<u8>>, Unanswered> {
        self.count("read", key);
        self.bucket.get(key, part)
    }
    fn exists(&self, key: &str) -> Result<bool, Unanswered> {
        self.count("look for", key);
        self.bucket.exists(key)
    }
    fn list(&self, prefix: &str) -> Result<Vec<Listed>, Unanswered> {
        self.count("list", prefix);
        self.bucket.list(prefix)
    }
    fn delete(&self, key: &str) -> Result<(), Unanswered> {
        self.count("delete", key);
        self.bucket.delete(key)
    }
    fn requests(&self) -> Option<Requests> {
        self.bucket.requests()
    }
}

/// A push, and what it asked for.
fn push(
    scene: &Scene,
    store: &Store,
    name: &str,
) -> Result<(PushReport, Counts), Box<dyn std::error::Error>> {
    let counts = Arc::<Mutex<Counts>>::default();
    let mut remote = scene.remote()?;
    remote.bucket = Box::new(Counted {
        bucket: remote.bucket,
        counts: counts.clone(),
    });
    let report = remote.push(store, name, name, false, &Silent)?;
    let counts = counts.lock().expect("no panic").clone();
    Ok((report, counts))
}

/// As many tags of others as that, which name what `base` does.
fn with_others(scene: &Scene, count: u128) -> Outcome {
    let remote = scene.remote()?;
    let key = scene.keys("refs/base")?.pop().ok_or("a record")?;
    let record = RefKey::parse(&key).ok_or("a record")?;
    let body = RefRecord::decode(&key, &scene.bytes(&key)?).map_err(|error| error.of(&key))?;
    for number in 0..count {
        let other = RefKey {
            tag: format!("other-{number}"),
            session: Session(number),
            ..record.clone()
        };
        let key = other.key();
        remote.bucket.put(&key, &body.encode(&key))?;
    }
    Ok(())
}

#[test]
fn a_push_asks_for_no_more_where_there_are_more_tags() -> Outcome {
    let mut pages = vec![1; 1200];
    let base = image(&pages);
    pages[3] = 2;
    let child = image(&pages);
    let mut seen = Vec::new();
    for others in [40, 400] {
        let scene = Scene::new()?;
        let store = scene.store("store")?;
        commit(&store, "base", &base, None)?;
        commit(&store, "child", &child, Some("base"))?;
        commit(&store, "stranger", &image(&[9; 60]), None)?;
        let remote = scene.remote()?;
        remote.push(&store, "base", "base", false, &Silent)?;
        with_others(&scene, others)?;
        let (report, child) = push(&scene, &store, "child")?;
        assert_eq!((report.pages, report.reused_leaves), (1, 2), "{report:?}");
        // Only that of its ancestor.
        assert_eq!(child.get("read refs"), Some(&1), "{child:?}");
        // What has no ancestor there looks at a few others.
        let (_, stranger) = push(&scene, &store, "stranger")?;
        assert!(stranger["read refs"] <= 40, "{stranger:?}");
        seen.push((child, stranger));
    }
    assert_eq!(seen[0], seen[1], "the number of tags tells");
    Ok(())
}

/// Its ancestor has another name here than there, and is one of few.
#[test]
fn an_ancestor_is_found_under_a_name_that_this_store_does_not_know() -> Outcome {
    let scene = Scene::new()?;
    let store = scene.store("store")?;
    let mut pages = vec![1; 1200];
    commit(&store, "base", &image(&pages), None)?;
    pages[3] = 2;
    commit(&store, "child", &image(&pages), Some("base"))?;
    let remote = scene.remote()?;
    remote.push(&store, "base", "elsewhere", false, &Silent)?;
    let (report, counts) = push(&scene, &store, "child")?;
    assert_eq!((report.pages, report.reused_leaves), (1, 2), "{report:?}");
    assert_eq!(counts.get("read refs"), Some(&1), "{counts:?}");
    Ok(())
}

/// The name of an ancestor means something else there.
#[test]
fn a_name_that_means_something_else_there_is_no_ancestor() -> Outcome {
    let scene = Scene::new()?;
    let (store, other) = (scene.store("store")?, scene.store("other")?);
    let mut pages = vec![1; 1200];
    commit(&store, "base", &image(&pages), None)?;
    pages[3] = 2;
    commit(&store, "child", &image(&pages), Some("base"))?;
    commit(&other, "base", &image(&[7; 30]), None)?;
    let remote = scene.remote()?;
    remote.push(&other, "base", "base", false, &Silent)?;
    remote.push(&store, "base", "mine", false, &Silent)?;
    let (report, counts) = push(&scene, &store, "child")?;
    assert_eq!((report.pages, report.reused_leaves), (1, 2), "{report:?}");
    assert_eq!(counts.get("read refs"), Some(&2), "{counts:?}");
    Ok(())
}

/// What a collection asked for.
fn gc(scene: &Scene, percent: u8) -> Result<Counts, Box<dyn std::error::Error>> {
    let counts = Arc::<Mutex<Counts>>::default();
    let mut remote = scene.remote()?;
    remote.bucket = Box::new(Counted {
        bucket: remote.bucket,
        counts: counts.clone(),
    });
    let options = RepackOptions {
        percent,
        ..RepackOptions::default()
    };
    let done = remote.gc(options, &Silent)?.repacked;
    assert_eq!((done.packs, done.left), (0, 0), "{done:?}");
    let counts = counts.lock().expect("no panic").clone();
    Ok(counts)
}

/// Where all packs are needed whole, that is seen from names: seven listings, and the
/// configuration.
#[test]
fn to_find_nothing_to_repack_takes_no_requests_of_heads_or_packs() -> Outcome {
    let mut seen = Vec::new();
    for tags in [2, 20] {
        let scene = Scene::new()?;
        let store = scene.store("store")?;
        for number in 0..tags {
            let tag = format!("t{number}");
            commit(&store, &tag, &image(&[number + 1; 6]), None)?;
            scene.remote()?.push(&store, &tag, &tag, false, &Silent)?;
        }
        let (without, with) = (gc(&scene, 0)?, gc(&scene, 50)?);
        assert_eq!(with["read heads"], u64::from(tags), "{with:?}");
        assert_eq!(with.get("read packs"), None, "{with:?}");
        let sum = |counts: &Counts| counts.values().sum::<u64>();
        let per_pack = sum(&with) as f64 / f64::from(tags);
        println!("{tags} packs: {per_pack:.1} requests of `remote gc` each, {with:?}");
        seen.push(sum(&with) - sum(&without));
    }
    assert_eq!(seen, [8, 8], "the number of packs tells");
    Ok(())
}

/// Each push that was refused and each removal of nothing leaves a fence for ever.
#[test]
fn a_collection_asks_for_no_fence_by_itself() -> Outcome {
    let scene = Scene::new()?;
    let store = scene.store("store")?;
    commit(&store, "t", &image(&[1; 6]), None)?;
    let remote = scene.remote()?;
    remote.push(&store, "t", "t", false, &Silent)?;
    let before = gc(&scene, 0)?;
    for _ in 0..20 {
        assert!(remote.remove("nothing").is_err());
    }
    assert!(scene.keys("fence")?.len() >= 20);
    assert_eq!(gc(&scene, 0)?, before);
    Ok(())
}
