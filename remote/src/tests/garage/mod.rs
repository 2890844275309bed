//! Hosts that share a bucket on three nodes of Garage, of which some are killed, stopped and
//! started all the while.
//!
//! Each host has a store of its own and goes to one node, always the same: while that one is
//! dead or stopped the host waits for it as a client does, and while others are, the node
//! finds two of three for each request, or does not. What hosts were told is written down
//! ([`told`]), and what they see is held against it.
//!
//! `SNAPSTORE_GARAGE_SECONDS` says for how long, `SNAPSTORE_GARAGE_SEED` what is drawn: the
//! bucket of an odd one is encrypted. `SNAPSTORE_GARAGE_FAULT=1` lets nodes answer without
//! the others, which has to be found.

mod host;
mod told;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use snapstore_store::{Silent, SnapshotId};
use snapstore_tests::servers::garage::Cluster;
pub use snapstore_tests::servers::garage::NODES;

use self::told::{End, Told};
use super::{Outcome, Scene, commit, image, place_of, read};
use crate::objects::{Objects, Part, Requests};
use crate::protocol::{self, Listed, Options, Unanswered};
use crate::{DomainKey, Error, Place, Remote, Result};

const DEFAULT_SECONDS: u64 = 20;
/// A day and an hour, after which everybody who is silent is given up.
const LATER_SECONDS: u64 = 25 * 3600;
/// However slow this machine is, so much has to happen.
const FEWEST_PUSHES: usize = 6;
/// How much longer than it should that may take.
const LATEST: Duration = Duration::from_secs(300);
const FEWEST_FAULTS: usize = 4;
/// How often something is tried once all nodes are there again.
const MOST_TRIES: usize = 120;

pub fn number(name: &str, otherwise: u64) -> u64 {
    let said = std::env::var(name).ok();
    said.and_then(|number| number.parse().ok())
        .unwrap_or(otherwise)
}

/// What all hosts know.
pub struct World {
    /// Where each host finds the bucket.
    places: Vec<Place>,
    told: Told,
    /// What is in each snapshot.
    images: Mutex<HashMap<SnapshotId, Vec<u8>>>,
    counts: Mutex<BTreeMap<String, usize>>,
    pushes: AtomicUsize,
    /// How often hosts were disturbed so far.
    pub faults: AtomicUsize,
    is_over: AtomicBool,
    /// The first thing that should not be.
    found: Mutex<Option<String>>,
}

impl World {
    fn new(places: Vec<Place>) -> Self {
        Self {
            places,
            told: Told::default(),
            images: Mutex::default(),
            counts: Mutex::default(),
            pushes: AtomicUsize::new(0),
            faults: AtomicUsize::new(0),
            is_over: AtomicBool::new(false),
            found: Mutex::new(None),
        }
    }

    fn count(&self, what: &str) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.entry(what.to_owned()).or_default() += 1;
    }

    fn found(&self, what: String) {
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        found.get_or_insert(what);
        self.is_over.store(true, Relaxed);
    }

    pub fn is_over(&self) -> bool {
        self.is_over.load(Relaxed)
    }

    /// The bucket as a host finds it.
    fn at(&self, host: usize) -> Place {
        self.places[host].clone()
    }

    fn bytes_of(&self, id: SnapshotId) -> Option<Vec<u8>> {
        let images = self.images.lock().unwrap_or_else(PoisonError::into_inner);
        images.get(&id).map(|pages| image(pages))
    }

    /// Asks until there is an answer: all nodes are there.
    fn until_answered<T>(
        &self,
        what: &str,
        ask: impl Fn() -> Result<T>,
    ) -> std::result::Result<T, String> {
        let mut tries = 0;
        loop {
            match ask() {
                Ok(answer) => return Ok(answer),
                Err(Error::Protocol(
                    protocol::Error::Unanswered(_) | protocol::Error::TagBusy { .. },
                )) if tries < MOST_TRIES => {
                    thread::sleep(Duration::from_millis(500));
                    tries += 1;
                }
                Err(error) => return Err(format!("{what}: {error}")),
            }
        }
    }
}

/// Kills a node, stops one, or one of each at once, again and again. In the end all are
/// there.
fn disturb(
    world: &World,
    cluster: &Cluster,
    rng: &mut fastrand::Rng,
) -> std::result::Result<(), String> {
    while !world.is_over() {
        thread::sleep(Duration::from_millis(rng.u64(500..2500)));
        let (node, kind) = (rng.usize(..NODES), rng.usize(..3));
        let other = (node + rng.usize(1..NODES)) % NODES;
        if kind != 1 {
            cluster.kill(node)?;
        }
        if kind != 0 {
            cluster.stop(other)?;
        }
        thread::sleep(Duration::from_millis(rng.u64(500..3000)));
        if kind != 0 {
            cluster.go_on(other)?;
        }
        if kind != 1 {
            cluster.restart(node)?;
        }
        world.count(
            [
                "a node was killed",
                "a node was stopped",
                "one was killed and one stopped",
            ][kind],
        );
        world.faults.fetch_add(1, Relaxed);
    }
    Ok(())
}

/// A bucket whose clock says that it is later than when others wrote to it.
#[derive(Debug)]
struct Later(Box<dyn Objects>, Mutex<BTreeSet<String>>);

impl Objects for Later {
    fn create(&self) -> std::result::Result<(), Unanswered> {
        self.0.create()
    }
    fn is_absent(&self) -> bool {
        self.0.is_absent()
    }
    fn put(&self, key: &str, bytes: &[u8]) -> std::result::Result<(), Unanswered> {
        self.1.lock().expect("no panic").insert(key.to_owned());
        self.0.put(key, bytes)
    }
    fn get(
        &self,
        key: &str,
        part: Option<Part>,
    ) -> std::result::Result<Option<Vec<u8>>, Unanswered> {
        self.0.get(key, part)
    }
    fn exists(&self, key: &str) -> std::result::Result<bool, Unanswered> {
        self.0.exists(key)
    }
    fn list(&self, prefix: &str) -> std::result::Result<Vec<Listed>, Unanswered> {
        let mut found = self.0.list(prefix)?;
        let own = self.1.lock().expect("no panic");
        for one in found.iter_mut().filter(|one| own.contains(&one.key)) {
            one.modified += LATER_SECONDS;
        }
        Ok(found)
    }
    fn delete(&self, key: &str) -> std::result::Result<(), Unanswered> {
        self.0.delete(key)
    }
    fn requests(&self) -> Option<Requests> {
        self.0.requests()
    }
}

/// A collection after a day.
fn collect_later(world: &World) -> std::result::Result<usize, String> {
    world.until_answered("the last collection", || {
        let mut remote = Remote::at(&world.at(0))?;
        remote.bucket = Box::new(Later(remote.bucket, Mutex::default()));
        remote.now()?;
        Ok(remote.collect(Options::default())?.deleted.len())
    })
}

#[test]
fn nodes_that_are_killed_and_stopped_lose_nothing_that_was_acknowledged() -> Outcome {
    let name = "nodes_that_are_killed_and_stopped_lose_nothing_that_was_acknowledged";
    let cluster = match Cluster::start() {
        Ok(cluster) => cluster,
        Err(why) => {
            println!("SKIPPED {name}: {why}");
            return Ok(());
        }
    };
    let seed = number("SNAPSTORE_GARAGE_SEED", 1);
    let seconds = number("SNAPSTORE_GARAGE_SECONDS", DEFAULT_SECONDS);
    let mut place = place_of(cluster.place(0));
    // Longer than any node is away.
    place.retry_seconds = Some(30);
    let by_way_of = |node| Place {
        endpoint: Some(cluster.endpoint(node)),
        ..place.clone()
    };
    let places = (0..NODES).map(by_way_of).collect();
    let pushes = hosts_at_work(places, seed, (seconds, FEWEST_FAULTS), |world| {
        disturb(world, &cluster, &mut fastrand::Rng::with_seed(seed))
    })?;
    println!("{pushes} pushes were acknowledged while nodes were killed or stopped");
    Ok(())
}

/// Hosts work for so long, and until they were disturbed so often, each with its own way to one
/// bucket, which is a new one. In the end, when nobody disturbs them any more, all is looked
/// at. Returns how many pushes were acknowledged.
pub fn hosts_at_work(
    mut places: Vec<Place>,
    seed: u64,
    (seconds, fewest_faults): (u64, usize),
    disturb: impl FnOnce(&World) -> std::result::Result<(), String> + Send,
) -> std::result::Result<usize, Box<dyn std::error::Error>> {
    let dir = tempfile::tempdir()?;
    if seed % 2 == 1 {
        let key = dir.path().join("key");
        DomainKey::make(&key)?;
        for place in &mut places {
            place.key = Some(key.clone());
        }
    }
    let world = World::new(places);
    world.until_answered("init", || Remote::at(&world.at(0))?.init(4096))?;
    let end = Instant::now() + Duration::from_secs(seconds);
    thread::scope(|scope| {
        for number in 0..NODES {
            let (world, dir) = (&world, dir.path());
            scope.spawn(move || {
                let host = host::Host::new(world, dir, number, seed);
                if let Err(error) = host.and_then(host::Host::work) {
                    world.found(format!("host {number}: {error}"));
                }
            });
        }
        let disturbed = &world;
        scope.spawn(move || {
            if let Err(error) = disturb(disturbed) {
                disturbed.found(error);
            }
        });
        let is_enough = || {
            let (pushes, faults) = (world.pushes.load(Relaxed), world.faults.load(Relaxed));
            Instant::now() > end && pushes >= FEWEST_PUSHES && faults >= fewest_faults
        };
        while !is_enough() && !world.is_over() {
            thread::sleep(Duration::from_millis(100));
            if Instant::now() > end + LATEST {
                world.found("so little is acknowledged, or fails, that it has no end".to_owned());
            }
        }
        world.is_over.store(true, Relaxed);
    });
    let counts = world.counts.lock();
    for (what, count) in &*counts.unwrap_or_else(PoisonError::into_inner) {
        println!("{count:6} {what}");
    }
    let found = world.found.lock();
    let found = found.unwrap_or_else(PoisonError::into_inner).take();
    if let Some(found) = found {
        return Err(format!("seed {seed}: {found}").into());
    }
    let last = Scene {
        dir,
        place: world.at(0),
    };
    look_at_all(&world, &last).map_err(|error| format!("seed {seed}: {error}"))?;
    Ok(world.pushes.load(Relaxed))
}

/// All nodes are there: each tag is what it may be, by way of each node, and reads whole; and
/// once all are removed nothing is left.
fn look_at_all(world: &World, last: &Scene) -> Outcome {
    // Those who were cut off are given up.
    collect_later(world)?;
    let reader = last.store("reader")?;
    let mut kept = 0;
    for tag in world.told.names() {
        let values = (0..NODES).map(|node| {
            let from = world.told.now();
            let value = value_of(world, node, &tag);
            let value = value.map_err(|error| format!("{error}\n{}", records_of(world, &tag)))?;
            if let Some(value) = value {
                world.told.check(&tag, value, (from, world.told.now()))?;
            }
            Ok(value)
        });
        let values = values.collect::<std::result::Result<Vec<_>, String>>()?;
        let is_one = values.windows(2).all(|two| two[0] == two[1]);
        assert!(
            is_one,
            "{tag} is another by way of another node: {values:?}"
        );
        if let Some(Some(id)) = values[0] {
            kept += 1;
            world.until_answered("a pull", || {
                last.remote()?.pull(&reader, &tag, &tag, true, &Silent)
            })?;
            let bytes = world.bytes_of(id).ok_or("somebody committed it")?;
            assert!(read(&reader, &tag)? == bytes, "{tag} has other bytes");
        }
    }
    let verified = world.until_answered("verify", || last.remote()?.verify(true))?;
    assert_eq!(verified.findings, []);
    println!("{kept} tags were read back, and {} packs", verified.packs);
    // What was cut off may still count, so each tag is set once more before it is removed.
    let store = last.store("last")?;
    commit(&store, "last", &image(&[200; 4]), None)?;
    for tag in world.told.names() {
        world.until_answered("the last push", || {
            last.remote()?.push(&store, "last", &tag, true, &Silent)
        })?;
        world.until_answered("the last removal", || match last.remote()?.remove(&tag) {
            // It was done, and nobody answered.
            Err(Error::Protocol(protocol::Error::NoTag { .. })) => Ok(()),
            done => done,
        })?;
    }
    // One deletes what was kept for the other one's condemnation.
    for _ in 0..3 {
        collect_later(world)?;
    }
    for kind in ["packs", "heads", "hooks", "lease", "condemn", "probe"] {
        let left = there(world, last, kind)?;
        let seen: Vec<String> = left.iter().map(|key| seen_by_nodes(world, key)).collect();
        assert!(left.is_empty(), "{}", seen.join("\n"));
    }
    let records = there(world, last, "refs")?;
    assert_eq!(records.len(), world.told.names().len(), "{records:?}");
    Ok(())
}

/// What each node says of an object.
fn seen_by_nodes(world: &World, key: &str) -> String {
    let mut told = key.to_owned();
    let dir = &key[..=key.rfind('/').unwrap_or(0)];
    for node in 0..NODES {
        let Ok(remote) = Remote::at(&world.at(node)) else {
            continue;
        };
        let listed = remote.bucket.list(dir);
        let listed = listed.map(|found| found.iter().any(|one| one.key == key));
        let read = remote.bucket.exists(key);
        let _ = write!(told, "\n    node {node} lists: {listed:?}, read: {read:?}");
    }
    told
}

/// The objects that can be read: a node that missed a deletion lists more.
fn there(world: &World, last: &Scene, kind: &str) -> std::result::Result<Vec<String>, String> {
    let listed = world.until_answered("a listing", || last.keys(kind))?;
    let (mut kept, mut deleted) = (Vec::new(), 0);
    for key in listed {
        let look = || Ok(last.remote()?.bucket.exists(&key)?);
        match world.until_answered("a look", look)? {
            true => kept.push(key),
            false => deleted += 1,
        }
    }
    if deleted > 0 {
        println!("{deleted:6} of {kind} are listed that were deleted");
    }
    Ok(kept)
}

/// What a tag names; none if nobody can tell which of two pushes that were cut off was first.
fn value_of(
    world: &World,
    node: usize,
    tag: &str,
) -> std::result::Result<Option<told::Value>, String> {
    world.until_answered("what a tag names", || {
        match Remote::at(&world.at(node))?.snapshot_of(tag) {
            Ok(id) => Ok(Some(Some(id))),
            Err(Error::Protocol(protocol::Error::NoTag { .. })) => Ok(Some(None)),
            Err(Error::Protocol(protocol::Error::Ambiguous { .. })) => Ok(None),
            Err(error) => Err(error),
        }
    })
}

/// What each node lists that says what a tag is, whether it can be read, and what hosts were told.
fn records_of(world: &World, tag: &str) -> String {
    let mut told = world.told.changes(tag);
    for node in 0..NODES {
        let Ok(remote) = Remote::at(&world.at(node)) else {
            continue;
        };
        for prefix in [&*protocol::tag_prefix(tag), "lease/", "fence/"] {
            for one in remote.bucket.list(prefix).unwrap_or_default() {
                let read = remote.bucket.get(&one.key, None);
                let is_there = read.map(|found| found.is_some());
                let _ = write!(
                    told,
                    "\n    node {node} lists {}, read: {is_there:?}",
                    one.key
                );
            }
        }
    }
    told
}
