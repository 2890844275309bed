//! How many requests have to wait for others before a mount shows anything.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use snapstore_store::Silent;

use super::moody::{memory, options, page};
use super::{Outcome, PAGE, Scene, commit, image};
use crate::objects::{Objects, Part, Requests, no};
use crate::protocol::{Listed, Unanswered};

/// Far longer than any test takes: who waits for it has found a fault.
const FOR_EVER: Duration = Duration::from_secs(60);

/// Who asks together: nobody is answered before all of a round have asked.
#[derive(Debug, Default)]
struct Rounds {
    now: Mutex<Now>,
    all_are_there: Condvar,
}

#[derive(Debug, Default)]
struct Now {
    /// How many belong to each of the rounds that are to come.
    to_come: VecDeque<usize>,
    asked: Vec<Vec<String>>,
}

impl Rounds {
    fn meet(&self, what: &'static str, key: &str) -> Result<(), Unanswered> {
        let mut now = self.now.lock().expect("no panic");
        let Some(members) = now.to_come.front().copied() else {
            now.asked.push(vec![format!("{what} {key}")]);
            return Ok(());
        };
        let left = now.to_come.len();
        let first = now.asked.last().is_none_or(|round| round.len() == members);
        if first {
            now.asked.push(Vec::new());
        }
        let round = now.asked.last_mut().expect("it was just added");
        round.push(format!("{what} {key}"));
        if round.len() == members {
            now.to_come.pop_front();
            // The next one begins with a list of its own.
            now.asked.push(Vec::new());
            self.all_are_there.notify_all();
            return Ok(());
        }
        let waits = |now: &mut Now| now.to_come.len() == left;
        let met = self.all_are_there.wait_timeout_while(now, FOR_EVER, waits);
        match met.expect("no panic").1.timed_out() {
            true => Err(no(what, key, "the others of its round do not ask".into())),
            false => Ok(()),
        }
    }
}

#[derive(Debug)]
struct Meeting {
    bucket: Box<dyn Objects>,
    rounds: Arc<Rounds>,
}

impl Objects for Meeting {
    fn create(&self) -> Result<(), Unanswered> {
        self.bucket.create()
    }
    fn is_absent(&self) -> bool {
        self.bucket.is_absent()
    }
    fn put(&self, key: &str, bytes: &[u8]) -> Result<(), Unanswered> {
        self.rounds.meet("write", key)?;
        self.bucket.put(key, bytes)
    }
    fn get(&self, key: &str, part: Option<Part>) -> Result<Option<Vec<u8>>, Unanswered> {
        self.rounds.meet("read", key)?;
        self.bucket.get(key, part)
    }
    fn exists(&self, key: &str) -> Result<bool, Unanswered> {
        self.rounds.meet("look for", key)?;
        self.bucket.exists(key)
    }
    fn list(&self, prefix: &str) -> Result<Vec<Listed>, Unanswered> {
        self.rounds.meet("list", prefix)?;
        self.bucket.list(prefix)
    }
    fn delete(&self, key: &str) -> Result<(), Unanswered> {
        self.rounds.meet("delete", key)?;
        self.bucket.delete(key)
    }
    fn requests(&self) -> Option<Requests> {
        None
    }
}

#[test]
fn three_rounds_of_requests_go_before_the_first_page() -> Outcome {
    let scene = Scene::new()?;
    let store = scene.store("store")?;
    let bytes = image(&[1; 6]);
    commit(&store, "t", &bytes, None)?;
    scene.remote()?.push(&store, "t", "t", false, &Silent)?;
    let rounds = Arc::<Rounds>::default();
    rounds.now.lock().expect("no panic").to_come = [2, 4, 2].into();
    let meeting = |bucket| {
        let rounds = rounds.clone();
        Box::new(Meeting { bucket, rounds }) as Box<dyn Objects>
    };
    let mut remote = scene.remote()?;
    remote.bucket = meeting(remote.bucket);
    let demanded = meeting(scene.remote()?.bucket);
    let lazy = remote.lazy_by(&scene.store("empty")?, "t", &options(&scene), demanded)?;
    assert_eq!(page(&memory(&lazy), 0)?, bytes[..PAGE]);
    let asked = std::mem::take(&mut rounds.now.lock().expect("no panic").asked);
    // What is asked for, without the names that are drawn.
    let of = |round: &Vec<String>| -> Vec<String> {
        let of_key = |asked: &String| {
            let (what, key) = asked.split_once(' ').unwrap_or_default();
            let mut parts: Vec<&str> = key.split_inclusive('/').collect();
            if parts.last().is_some_and(|last| last.len() > 8) {
                parts.pop();
            }
            let kind = parts.first().copied().unwrap_or_default();
            format!("{what} {kind}")
        };
        let mut kinds: Vec<String> = round.iter().map(of_key).collect();
        kinds.sort();
        kinds
    };
    let rounds: Vec<_> = asked
        .iter()
        .filter(|round| !round.is_empty())
        .map(of)
        .collect();
    assert_eq!(rounds[0], ["list refs/", "read config"]);
    let second = ["list lease/", "read heads/", "read refs/", "write lease/"];
    assert_eq!(rounds[1], second);
    assert_eq!(rounds[2], ["list fence/", "list refs/"]);
    let packs = ["read packs/"];
    assert!(
        rounds[3..].iter().all(|round| *round == packs),
        "{rounds:?}"
    );
    assert!(rounds.len() <= 5, "{rounds:?}");
    lazy.end();
    Ok(())
}
