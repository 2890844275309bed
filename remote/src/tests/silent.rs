//! Views while somebody reads all that they name: signs of life, and what follows where there
//! were none for a day.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::sync::Mutex;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, SystemTime};

use snapstore_store::Silent;

use super::{Outcome, Scene, commit, image, read};
use crate::objects::{Objects, Part, Requests};
use crate::protocol::{self, Listed, Options, Session, Unanswered};
use crate::{Error, Remote};

const TWO_DAYS: Duration = Duration::from_secs(2 * 24 * 60 * 60);

type Act = Box<dyn Fn() -> Outcome + Send + Sync>;

/// A bucket where something happens before a pack is read for the second time.
struct Interrupted {
    bucket: Box<dyn Objects>,
    reads: AtomicUsize,
    act: Act,
    /// Who has given signs of life.
    alive: std::sync::Arc<Mutex<BTreeSet<String>>>,
}

impl fmt::Debug for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.bucket.fmt(f)
    }
}

impl Objects for Interrupted {
    fn create(&self) -> Result<(), Unanswered> {
        self.bucket.create()
    }
    fn is_absent(&self) -> bool {
        self.bucket.is_absent()
    }
    fn put(&self, key: &str, bytes: &[u8]) -> Result<(), Unanswered> {
        if key.starts_with("lease/") {
            self.alive.lock().expect("no panic").insert(key.to_owned());
        }
        self.bucket.put(key, bytes)
    }
    fn get(&self, key: &str, part: Option<Part>) -> Result<Option<Vec<u8>>, Unanswered> {
        if key.starts_with("packs/") && self.reads.fetch_add(1, Relaxed) == 1 {
            (self.act)().expect("nobody is in its way");
        }
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

/// The remote with that, and who gives signs of life there, every so often.
type Made = (Remote, std::sync::Arc<Mutex<BTreeSet<String>>>);

fn interrupted(scene: &Scene, beat: Option<Duration>, act: Act) -> crate::Result<Made> {
    let mut remote = scene.remote()?;
    remote.view_beat = beat.unwrap_or(remote.view_beat);
    let alive = std::sync::Arc::<Mutex<BTreeSet<String>>>::default();
    remote.bucket = Box::new(Interrupted {
        bucket: remote.bucket,
        reads: AtomicUsize::new(0),
        act,
        alive: alive.clone(),
    });
    Ok((remote, alive))
}

/// Whoever looks sees these first signs of life as two days old.
fn age_first_beats(bucket: &std::path::Path) -> Outcome {
    for session in super::list(&bucket.join("lease"))? {
        let beat = session.join("00000000");
        let file = fs::File::options().write(true).open(beat)?;
        file.set_modified(SystemTime::now() - TWO_DAYS)?;
    }
    Ok(())
}

/// While a tag is pulled that was pushed, it is two days later, the tag is set anew or removed,
/// and what nobody needs is collected.
fn two_days_later(scene: &Scene, sets_anew: bool) -> Result<Act, Box<dyn std::error::Error>> {
    let store = scene.store("store")?;
    commit(&store, "t", &image(&[1; 1200]), None)?;
    commit(&store, "next", &image(&[2; 1200]), None)?;
    scene.remote()?.push(&store, "t", "t", false, &Silent)?;
    let (place, bucket) = (scene.place.clone(), scene.bucket());
    Ok(Box::new(move || {
        let remote = Remote::at(&place)?.patience(Duration::ZERO, false);
        age_first_beats(&bucket)?;
        match sets_anew {
            true => drop(remote.push(&store, "next", "t", true, &Silent)?),
            false => remote.remove("t")?,
        }
        // The first one gives up who is silent, the second one deletes what nobody else needs.
        remote.collect(Options::default())?;
        remote.collect(Options::default())?;
        Ok(())
    }))
}

#[test]
fn a_pull_that_takes_days_says_that_it_lives_and_keeps_what_it_reads() -> Outcome {
    for sets_anew in [false, true] {
        let scene = Scene::new()?;
        let act = two_days_later(&scene, sets_anew)?;
        let (remote, alive) = interrupted(&scene, Some(Duration::ZERO), act)?;
        let other = scene.store("other")?;
        remote.pull(&other, "t", "t", false, &Silent)?;
        assert!(read(&other, "t")? == image(&[1; 1200]), "other bytes");
        assert!(alive.lock().expect("no panic").len() > 3);
        assert!(remote.leases()?.is_empty());
        assert_eq!(scene.keys("fence")?, Vec::<String>::new());
    }
    Ok(())
}

/// A host that slept for two days: no sign of life was due by its own clock.
#[test]
fn a_pull_whose_view_was_given_up_begins_anew() -> Outcome {
    let scene = Scene::new()?;
    let act = two_days_later(&scene, true)?;
    let (remote, _) = interrupted(&scene, None, act)?;
    let other = scene.store("other")?;
    remote.pull(&other, "t", "t", false, &Silent)?;
    assert!(read(&other, "t")? == image(&[2; 1200]), "other bytes");
    assert!(remote.leases()?.is_empty());
    // Where nothing is named any more, nothing is damaged.
    let scene = Scene::new()?;
    let act = two_days_later(&scene, false)?;
    let (remote, _) = interrupted(&scene, None, act)?;
    let other = scene.store("other")?;
    let pulled = remote.pull(&other, "t", "t", false, &Silent);
    let no_tag = |error: &Error| matches!(error, Error::Protocol(protocol::Error::NoTag { .. }));
    assert!(pulled.as_ref().is_err_and(no_tag), "{pulled:?}");
    assert!(remote.leases()?.is_empty());
    Ok(())
}

/// Its tag names the same as before, so the view goes on under another lease.
#[test]
fn a_pull_that_was_fenced_goes_on_if_its_snapshot_is_still_named() -> Outcome {
    let scene = Scene::new()?;
    let store = scene.store("store")?;
    commit(&store, "t", &image(&[1; 1200]), None)?;
    scene.remote()?.push(&store, "t", "t", false, &Silent)?;
    let place = scene.place.clone();
    let act = move || -> Outcome {
        let remote = Remote::at(&place)?;
        for (session, ..) in crate::remote::block_on(protocol::leases(&remote))? {
            let key = session.fence_key();
            remote.bucket.put(&key, &protocol::fence(&key))?;
        }
        Ok(())
    };
    let (remote, alive) = interrupted(&scene, Some(Duration::ZERO), Box::new(act))?;
    let other = scene.store("other")?;
    remote.pull(&other, "t", "t", false, &Silent)?;
    assert!(read(&other, "t")? == image(&[1; 1200]), "other bytes");
    let alive = alive.lock().expect("no panic").clone();
    let sessions = alive.iter().filter_map(|key| Session::parse_beat(key));
    let sessions: BTreeSet<Session> = sessions.map(|(session, _)| session).collect();
    assert_eq!(sessions.len(), 2, "{alive:?}");
    assert!(remote.leases()?.is_empty());
    Ok(())
}
