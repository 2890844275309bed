//! A reader that is overtaken at each step: its tag is set anew, and what that leaves is
//! collected.

use std::sync::Mutex;
use std::time::Duration;

use snapstore_store::{Silent, Store};

use super::lazy::{memory, options, page};
use super::{Outcome, PAGE, Scene, commit, image, read};
use crate::objects::{Objects, Part, Requests};
use crate::protocol::{Listed, Options, Unanswered};
use crate::{Place, Remote, Result};

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

/// A remote whose tag changes as often as it is read, and what it names each time.
fn overtaking(
    scene: &Scene,
) -> std::result::Result<(Remote, Vec<Vec<u8>>), Box<dyn std::error::Error>> {
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
