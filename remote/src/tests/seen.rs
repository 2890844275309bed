//! A bucket whose owner deletes the newest record of a tag.

use std::collections::BTreeSet;
use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};

use snapstore_store::{Silent, Store};

use super::{Outcome, Scene, commit, image, read};
use crate::objects::{Objects, Part, Requests};
use crate::protocol::{self, LeaseKind, LeaseRecord, Listed, Options, RefKey, Unanswered};
use crate::{Error, LazyOptions, Remote};

fn is_rolled_back(error: &Error) -> bool {
    matches!(error, Error::Protocol(protocol::Error::RolledBack { .. }))
}

fn is_no_tag(error: &Error) -> bool {
    matches!(error, Error::Protocol(protocol::Error::NoTag { .. }))
}

/// What a store of this name does with the remote, which remembers what it saw.
fn of_store(scene: &Scene, store: &Store) -> crate::Result<Remote> {
    Ok(scene.remote()?.remembered_in(store.path()))
}

/// Two records of `t`, and who wrote them.
fn pushed_twice(scene: &Scene) -> Result<Store, Box<dyn std::error::Error>> {
    let store = scene.store("writer")?;
    let remote = scene.remote()?;
    for (version, replace) in [(1, false), (2, true)] {
        let tag = format!("v{version}");
        commit(&store, &tag, &image(&[version; 6]), None)?;
        remote.push(&store, &tag, "t", replace, &Silent)?;
    }
    Ok(store)
}

/// Deletes the newest record of `t`, as who keeps the bucket can.
fn roll_back(scene: &Scene) -> Outcome {
    let newest = scene.keys("refs")?.into_iter().max().ok_or("a record")?;
    Ok(scene.remote()?.bucket.delete(&newest)?)
}

fn options() -> LazyOptions {
    LazyOptions {
        cache: None,
        cache_limit_bytes: 0,
        timeout: std::time::Duration::from_secs(10),
        prefetches: false,
        fills: false,
    }
}

/// That all who would rely on the older record refuse.
fn all_refuse(scene: &Scene, store: &Store, seen: u64) -> Outcome {
    let remote = || of_store(scene, store);
    let pulled = remote()?.pull(store, "t", "mine", true, &Silent);
    assert!(pulled.is_err_and(|error| is_rolled_back(&error)));
    let mounted = remote()?.lazy(store, "t", &options());
    assert!(mounted.is_err_and(|error| is_rolled_back(&error)));
    let named = remote()?.snapshot_of("t");
    assert!(named.is_err_and(|error| is_rolled_back(&error)));
    for replace in [false, true] {
        let pushed = remote()?.push(store, "own", "t", replace, &Silent);
        assert!(pushed.is_err_and(|error| is_rolled_back(&error)));
    }
    let tags = remote()?.tags()?;
    assert!(
        tags.iter().any(|one| one.tag == "t" && one.damaged),
        "{tags:?}"
    );
    let told = tags.iter().filter_map(|one| one.problem.as_ref());
    let number = format!("seen number {seen}");
    assert!(told.into_iter().any(|told| told.contains(&number)));
    let findings = remote()?.verify(false)?.findings;
    assert_eq!(findings.len(), 1, "{findings:?}");
    assert_eq!(findings[0].object, "refs/t/");
    Ok(())
}

/// In clear and encrypted.
fn each(test: fn(&Scene) -> Outcome) -> Outcome {
    test(&Scene::new()?)?;
    test(&Scene::sealed()?)
}

#[test]
fn what_was_rolled_back_is_refused_by_who_has_seen_it_until_it_is_accepted() -> Outcome {
    each(|scene| {
        let writer = pushed_twice(scene)?;
        let other = scene.store("other")?;
        let (seen, pulled) = (scene.store("seen")?, scene.store("pulled")?);
        for store in [&seen, &pulled] {
            commit(store, "own", &image(&[1; 6]), None)?;
            of_store(scene, store)?.pull(store, "t", "mine", false, &Silent)?;
        }
        let newest = read(&seen, "mine")?;
        roll_back(scene)?;
        all_refuse(scene, &seen, 2)?;
        assert_eq!(read(&seen, "mine")?, newest);
        // Who has seen nothing cannot know.
        of_store(scene, &other)?.pull(&other, "t", "t", false, &Silent)?;

        assert_eq!(of_store(scene, &seen)?.accept_older("t")?, Some((1, 2)));
        assert_eq!(of_store(scene, &seen)?.accept_older("t")?, None);
        assert!(of_store(scene, &seen)?.verify(false)?.findings.is_empty());
        of_store(scene, &seen)?.pull(&seen, "t", "mine", true, &Silent)?;
        assert_ne!(read(&seen, "mine")?, newest);
        // That it was accepted here is nothing to others; what is written here is newer for all.
        all_refuse(scene, &pulled, 2)?;
        commit(&seen, "next", &image(&[3; 6]), None)?;
        of_store(scene, &seen)?.push(&seen, "next", "t", true, &Silent)?;
        of_store(scene, &pulled)?.pull(&pulled, "t", "mine", true, &Silent)?;
        assert_eq!(read(&pulled, "mine")?, image(&[3; 6]));
        drop(writer);
        Ok(())
    })
}

#[test]
fn who_wrote_listed_or_mounted_a_record_remembers_it() -> Outcome {
    each(|scene| {
        let writer = pushed_twice(scene)?;
        for way in ["tags", "mount", "name", "already"] {
            let store = scene.store(way)?;
            let remote = of_store(scene, &store)?;
            match way {
                "tags" => drop(remote.tags()?),
                "mount" => remote.lazy(&store, "t", &options())?.end(),
                "name" => drop(remote.snapshot_of("t")?),
                _ => {
                    let remote = of_store(scene, &writer)?;
                    assert!(remote.push(&writer, "v2", "t", false, &Silent)?.already);
                }
            }
        }
        roll_back(scene)?;
        for way in ["tags", "mount", "name", "writer"] {
            let store = Store::open(&scene.dir.path().join(way))?;
            commit(&store, "own", &image(&[1; 6]), None)?;
            all_refuse(scene, &store, 2)?;
        }
        Ok(())
    })
}

#[test]
fn a_tag_that_was_removed_is_gone_and_one_without_records_is_rolled_back() -> Outcome {
    each(|scene| {
        pushed_twice(scene)?;
        let store = scene.store("seen")?;
        commit(&store, "own", &image(&[1; 6]), None)?;
        of_store(scene, &store)?.pull(&store, "t", "mine", false, &Silent)?;
        let pull = || of_store(scene, &store)?.pull(&store, "t", "mine", true, &Silent);
        scene.remote()?.remove("t")?;
        for _ in 0..2 {
            assert!(pull().is_err_and(|error| is_no_tag(&error)));
            assert!(of_store(scene, &store)?.tags()?.is_empty());
            // The removal stays.
            scene.remote()?.collect(Options::default())?;
        }
        let records = scene.keys("refs")?;
        assert_eq!(records.len(), 1, "{records:?}");
        roll_back(scene)?;
        // That it was removed was seen, too.
        all_refuse(scene, &store, 3)?;
        assert_eq!(of_store(scene, &store)?.accept_older("t")?, Some((0, 3)));
        assert!(pull().is_err_and(|error| is_no_tag(&error)));
        of_store(scene, &store)?.push(&store, "own", "t", false, &Silent)?;
        assert!(scene.keys("refs")?[0].contains("/0000000000000004-"));
        Ok(())
    })
}

#[test]
fn what_was_seen_is_of_one_bucket_and_may_be_lost() -> Outcome {
    each(|scene| {
        pushed_twice(scene)?;
        let store = scene.store("seen")?;
        of_store(scene, &store)?.pull(&store, "t", "mine", false, &Silent)?;
        let dir = store.path().join("remotes-seen");
        let files: Vec<_> = fs::read_dir(&dir)?.collect::<Result<_, _>>()?;
        assert_eq!(files.len(), 1, "{files:?}");
        roll_back(scene)?;
        let pull = || of_store(scene, &store)?.pull(&store, "t", "mine", true, &Silent);
        assert!(pull().is_err_and(|error| is_rolled_back(&error)));
        // Damaged, it is as if it was lost.
        let mut bytes = fs::read(files[0].path())?;
        bytes[20] ^= 1;
        fs::write(files[0].path(), bytes)?;
        pull()?;
        // Another bucket where this one was.
        fs::remove_dir_all(scene.bucket())?;
        scene.remote()?.init(4096)?;
        assert!(pull().is_err_and(|error| is_no_tag(&error)));
        assert!(of_store(scene, &store)?.tags()?.is_empty());
        Ok(())
    })
}

/// A sign of life may come when its push has ended: it was on its way for long. Then the record
/// seems not to count, until a collection gives the session up.
#[test]
fn a_lease_that_comes_after_its_push_is_no_roll_back() -> Outcome {
    each(|scene| {
        pushed_twice(scene)?;
        let store = scene.store("seen")?;
        of_store(scene, &store)?.pull(&store, "t", "mine", false, &Silent)?;
        let newest = scene.keys("refs")?.into_iter().max().ok_or("a record")?;
        let session = RefKey::parse(&newest).ok_or("a record's name")?.session;
        let key = session.beat_key(1);
        let late = LeaseRecord {
            kind: LeaseKind::Push,
            seen: BTreeSet::new(),
            who: "late".to_owned(),
        };
        let bucket = scene.remote()?.bucket;
        bucket.put(&key, &late.encode(&key))?;
        let pulled = of_store(scene, &store)?.pull(&store, "t", "mine", true, &Silent);
        let busy = |error: &Error| matches!(error, Error::Protocol(protocol::Error::TagBusy { session: found, .. }) if *found == session);
        assert!(pulled.as_ref().is_err_and(busy), "{pulled:?}");
        assert!(of_store(scene, &store)?.verify(false)?.findings.is_empty());
        bucket.delete(&key)?;
        of_store(scene, &store)?.pull(&store, "t", "mine", true, &Silent)?;
        Ok(())
    })
}

/// What is removed after it was rolled back is removed for all who saw more.
#[test]
fn a_removal_is_above_all_that_was_seen() -> Outcome {
    each(|scene| {
        pushed_twice(scene)?;
        let store = scene.store("seen")?;
        of_store(scene, &store)?.tags()?;
        roll_back(scene)?;
        of_store(scene, &store)?.remove("t")?;
        assert!(of_store(scene, &store)?.tags()?.is_empty());
        assert!(of_store(scene, &store)?.verify(false)?.findings.is_empty());
        Ok(())
    })
}

/// A bucket whose listings lag: so often the newest record is not there yet.
#[derive(Debug)]
struct Lagging {
    bucket: Box<dyn Objects>,
    left: AtomicUsize,
}

impl Objects for Lagging {
    fn create(&self) -> Result<(), Unanswered> {
        self.bucket.create()
    }

    fn is_absent(&self) -> bool {
        self.bucket.is_absent()
    }

    fn put(&self, key: &str, bytes: &[u8]) -> Result<(), Unanswered> {
        self.bucket.put(key, bytes)
    }

    fn get(&self, key: &str, part: Option<Part>) -> Result<Option<Vec<u8>>, Unanswered> {
        self.bucket.get(key, part)
    }

    fn exists(&self, key: &str) -> Result<bool, Unanswered> {
        self.bucket.exists(key)
    }

    fn list(&self, prefix: &str) -> Result<Vec<Listed>, Unanswered> {
        let mut found = self.bucket.list(prefix)?;
        let lags = |left: usize| left.checked_sub(1);
        let (set, fetch) = (Ordering::SeqCst, Ordering::SeqCst);
        if prefix.starts_with("refs/") && self.left.fetch_update(set, fetch, lags).is_ok() {
            found.sort_by(|one, other| one.key.cmp(&other.key));
            found.pop();
        }
        Ok(found)
    }

    fn delete(&self, key: &str) -> Result<(), Unanswered> {
        self.bucket.delete(key)
    }

    fn requests(&self) -> Option<Requests> {
        self.bucket.requests()
    }
}

#[test]
fn a_listing_that_lags_is_looked_at_again() -> Outcome {
    each(|scene| {
        let writer = pushed_twice(scene)?;
        of_store(scene, &writer)?.tags()?;
        let lagging = |listings| {
            let mut remote = of_store(scene, &writer)?;
            remote.bucket = Box::new(Lagging {
                bucket: remote.bucket,
                left: AtomicUsize::new(listings),
            });
            Ok::<_, Error>(remote)
        };
        // A view lists them twice before it says what it saw.
        let pulled = lagging(2)?.pull(&writer, "t", "again", false, &Silent)?;
        assert_eq!(pulled.id, writer.resolve("v2")?.to_string());
        assert!(
            lagging(1)?
                .push(&writer, "v2", "t", false, &Silent)?
                .already
        );
        let tags = lagging(1)?.tags()?;
        assert!(tags.iter().all(|one| !one.damaged), "{tags:?}");
        assert!(lagging(1)?.verify(false)?.findings.is_empty());
        Ok(())
    })
}
