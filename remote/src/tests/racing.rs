//! Two hosts that make one bucket a remote at once, on servers that know conditional writes and
//! on others.

use std::fmt;
use std::sync::Mutex;

use snapstore_store::{PageSize, Silent, Store};

use super::{Outcome, Scene, commit, image, read};
use crate::config::CONFIG_KEY;
use crate::objects::{Objects, Part, Requests, wrong};
use crate::protocol::{Listed, Unanswered};
use crate::{DomainKey, Error, Place, Remote};

type Act = Box<dyn FnOnce() -> Outcome + Send>;

/// A bucket where somebody else is faster with its configuration.
struct Slower {
    bucket: Box<dyn Objects>,
    act: Mutex<Option<Act>>,
    has_conditions: bool,
}

impl fmt::Debug for Slower {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.bucket.fmt(f)
    }
}

impl Objects for Slower {
    fn create(&self) -> Result<(), Unanswered> {
        self.bucket.create()
    }
    fn is_absent(&self) -> bool {
        self.bucket.is_absent()
    }
    fn put(&self, key: &str, bytes: &[u8]) -> Result<(), Unanswered> {
        if key == CONFIG_KEY {
            let act = self.act.lock().expect("no panic").take();
            act.map_or(Ok(()), |act| act()).expect("it is the first");
            if self.has_conditions && self.bucket.exists(key)? {
                return Err(wrong("write", key, "another host has written it"));
            }
        }
        self.bucket.put(key, bytes)
    }
    fn get(&self, key: &str, part: Option<Part>) -> Result<Option<Vec<u8>>, Unanswered> {
        self.bucket.get(key, part)
    }
    fn exists(&self, key: &str) -> Result<bool, Unanswered> {
        self.bucket.exists(key)
    }
    fn list(&self, prefix: &str) -> Result<Vec<Listed>, Unanswered> {
        self.bucket.list(prefix)
    }
    fn delete(&self, key: &str) -> Result<(), Unanswered> {
        self.bucket.delete(key)
    }
    fn requests(&self) -> Option<Requests> {
        self.bucket.requests()
    }
}

/// A place where no remote is yet, and one who makes it one once the other has done that.
fn racing(
    place: &Place,
    has_conditions: bool,
    act: impl FnOnce() -> Outcome + Send + 'static,
) -> crate::Result<Remote> {
    let mut remote = Remote::at(place)?;
    remote.bucket = Box::new(Slower {
        bucket: remote.bucket,
        act: Mutex::new(Some(Box::new(act))),
        has_conditions,
    });
    Ok(remote)
}

fn nowhere() -> Result<Scene, Box<dyn std::error::Error>> {
    let dir = tempfile::tempdir()?;
    let place = Place::new(&format!("file://{}", dir.path().join("bucket").display()));
    Ok(Scene { dir, place })
}

#[test]
fn two_hosts_that_make_a_remote_at_once_both_use_it() -> Outcome {
    for has_conditions in [false, true] {
        for is_sealed in [false, true] {
            let mut scene = nowhere()?;
            if is_sealed {
                let key = scene.dir.path().join("key");
                DomainKey::make(&key)?;
                scene.place.key = Some(key);
            }
            let store = scene.store("store")?;
            commit(&store, "t", &image(&[1; 20]), None)?;
            let place = scene.place.clone();
            let first = move || -> Outcome {
                let remote = Remote::at(&place)?;
                remote.init(4096)?;
                remote.push(&store, "t", "t", false, &Silent)?;
                Ok(())
            };
            let second = racing(&scene.place, has_conditions, first)?;
            second.init(4096)?;
            let other = scene.store("other")?;
            second.pull(&other, "t", "t", false, &Silent)?;
            assert!(read(&other, "t")? == image(&[1; 20]), "other bytes");
            assert_eq!(scene.remote()?.page_bytes()?, 4096);
        }
    }
    Ok(())
}

/// One of them is told so, and what the other has pushed is of use.
#[test]
fn of_two_hosts_with_other_pages_one_makes_the_remote() -> Outcome {
    for (has_conditions, pushes) in [(true, false), (true, true), (false, true)] {
        let scene = nowhere()?;
        let store = scene.store("store")?;
        commit(&store, "t", &image(&[1; 20]), None)?;
        let place = scene.place.clone();
        let first = move || -> Outcome {
            let remote = Remote::at(&place)?;
            remote.init(4096)?;
            if pushes {
                remote.push(&store, "t", "t", false, &Silent)?;
            }
            Ok(())
        };
        let other_size = |error: Error| {
            matches!(
                error,
                Error::OtherPageSize {
                    remote_bytes: 4096,
                    ..
                }
            )
        };
        let made = racing(&scene.place, has_conditions, first)?.init(16384);
        assert!(made.is_err_and(other_size), "{has_conditions}, {pushes}");
        assert_eq!(scene.remote()?.page_bytes()?, 4096);
    }
    // Nothing was there yet that tells: the last one counts, and the first one is told.
    let scene = nowhere()?;
    let place = scene.place.clone();
    let first = move || -> Outcome { Ok(Remote::at(&place)?.init(4096)?) };
    racing(&scene.place, false, first)?.init(16384)?;
    let store = Store::create(&scene.dir.path().join("store"), PageSize::default())?;
    commit(&store, "t", &image(&[1; 20]), None)?;
    let pushed = scene.remote()?.push(&store, "t", "t", false, &Silent);
    let told = |error: Error| matches!(error, Error::OtherPageSize { .. });
    assert!(pushed.is_err_and(told));
    Ok(())
}

/// Both find it damaged: one removes the configuration that the other has made.
#[test]
fn two_hosts_that_mend_a_configuration_at_once_leave_one() -> Outcome {
    for has_conditions in [false, true] {
        let scene = Scene::new()?;
        let store = scene.store("store")?;
        commit(&store, "t", &image(&[1; 20]), None)?;
        scene.remote()?.push(&store, "t", "t", false, &Silent)?;
        let mut bytes = scene.bytes(CONFIG_KEY)?;
        bytes[20] ^= 1;
        scene.replace(CONFIG_KEY, &bytes)?;
        let place = scene.place.clone();
        let first = move || -> Outcome { Ok(Remote::at(&place)?.init(4096)?) };
        racing(&scene.place, has_conditions, first)?.init(4096)?;
        assert_eq!(scene.remote()?.verify(true)?.findings, []);
    }
    Ok(())
}
