//! Hosts that are killed at one request to a bucket after the other.

use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;

use snapstore_store::Silent;

use super::{Outcome, Scene, commit, image, read};
use crate::objects::{Objects, Part, Requests, no};
use crate::protocol::{self, Listed, Unanswered};
use crate::{Error, Remote};

/// A bucket whose host is killed at a request: that one may have been done, and none
/// follows.
#[derive(Debug)]
pub struct Dying {
    pub bucket: Box<dyn Objects>,
    /// Requests until then.
    pub left: AtomicUsize,
    /// Whether the last one is done.
    pub is_done: bool,
}

impl Dying {
    fn ask<T>(&self, ask: impl Fn() -> Result<T, Unanswered>) -> Result<T, Unanswered> {
        match self
            .left
            .fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1))
        {
            // The last one.
            Ok(1) => {
                if self.is_done {
                    let _ = ask();
                }
            }
            Ok(_) => return ask(),
            Err(_) => {}
        }
        Err(no("reach", "it", "this host was killed".to_owned()))
    }
}

impl Objects for Dying {
    fn create(&self) -> Result<(), Unanswered> {
        self.bucket.create()
    }
    fn is_absent(&self) -> bool {
        self.bucket.is_absent()
    }
    fn put(&self, key: &str, bytes: &[u8]) -> Result<(), Unanswered> {
        self.ask(|| self.bucket.put(key, bytes))
    }
    fn get(&self, key: &str, part: Option<Part>) -> Result<Option<Vec<u8>>, Unanswered> {
        self.ask(|| self.bucket.get(key, part))
    }
    fn exists(&self, key: &str) -> Result<bool, Unanswered> {
        self.ask(|| self.bucket.exists(key))
    }
    fn list(&self, prefix: &str) -> Result<Vec<Listed>, Unanswered> {
        self.ask(|| self.bucket.list(prefix))
    }
    fn delete(&self, key: &str) -> Result<(), Unanswered> {
        self.ask(|| self.bucket.delete(key))
    }
    fn requests(&self) -> Option<Requests> {
        self.bucket.requests()
    }
}

/// A push is killed at its first request, then at its second, and so on, each in a bucket
/// of its own; then it is run again, by another process.
pub fn a_push_that_is_killed_at_any_request_is_run_again(scene: &Scene) -> Outcome {
    let store = scene.store("store")?;
    let bytes = image(&[1; 600]);
    commit(&store, "t", &bytes, None)?;
    for at in 0..100 {
        let mut place = scene.place.clone();
        place.url += &format!("/{at}");
        let remote = || Remote::at(&place);
        remote()?.init(4096)?;
        let mut dying = remote()?;
        dying.bucket = Box::new(Dying {
            bucket: remote()?.bucket,
            left: AtomicUsize::new(at),
            is_done: at % 2 == 1,
        });
        let pushed = dying.push(&store, "t", "t", false, &Silent);
        let again = remote()?;
        again.push(&store, "t", "t", false, &Silent)?;
        assert!(again.verify(true)?.findings.is_empty(), "request {at}");
        match pushed {
            Err(error) => assert!(
                matches!(&error, Error::Protocol(protocol::Error::Unanswered(_))),
                "request {at}: {error:?}"
            ),
            Ok(_) => {
                assert!(at > 10, "a push makes more requests than {at}");
                let other = scene.store("other")?;
                again.pull(&other, "t", "t", false, &Silent)?;
                assert_eq!(read(&other, "t")?, bytes);
                return Ok(());
            }
        }
    }
    Err("a push makes less than a hundred requests".into())
}

/// One that is none, and then a host that is killed at each request.
pub fn of_several_tags_all_are_looked_at_before_one_is_removed(scene: &Scene) -> Outcome {
    let remote = scene.remote()?;
    let store = scene.store("store")?;
    commit(&store, "t", &image(&[1; 6]), None)?;
    let names = |tags: &[&str]| -> Vec<String> { tags.iter().map(|&tag| tag.into()).collect() };
    let left = || -> crate::Result<Vec<String>> {
        Ok(remote.tags()?.into_iter().map(|one| one.tag).collect())
    };
    remote.push(&store, "t", "t", false, &Silent)?;
    let (removed, result) = remote.remove_all(&names(&["t", "nope"]));
    let none = |error| matches!(error, Error::Protocol(protocol::Error::NoTag { .. }));
    assert!(result.is_err_and(none));
    assert_eq!((removed, left()?), (names(&[]), names(&["t"])));
    let mut told = Vec::new();
    for at in 0..100 {
        let tags = [format!("a{at}"), format!("b{at}")];
        for tag in &tags {
            remote.push(&store, "t", tag, false, &Silent)?;
        }
        let mut dying = scene.remote()?;
        dying.bucket = Box::new(Dying {
            bucket: scene.remote()?.bucket,
            left: AtomicUsize::new(at),
            is_done: false,
        });
        let (removed, result) = dying.remove_all(&tags);
        let left = left()?;
        assert!(removed.iter().all(|tag| !left.contains(tag)), "{removed:?}");
        told.push(removed.len());
        match result {
            Ok(()) => break,
            Err(error) => assert!(
                matches!(&error, Error::Protocol(protocol::Error::Unanswered(_))),
                "request {at}: {error:?}"
            ),
        }
    }
    told.dedup();
    assert_eq!(told, [0, 1, 2]);
    Ok(())
}
