//! What a host does: it commits to its own store, pushes, removes, pulls, reads where it is
//! and collects, in an order that is drawn, and is killed now and then.

use std::path::Path;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use snapstore_store::{ErrorClass, GcOptions, PageSize, Silent, SnapshotId, Store};

use super::{End, NODES, World};
use crate::protocol::{self, Options};
use crate::tests::dying::Dying;
use crate::tests::moody::{memory, page};
use crate::tests::{PAGE, commit, image, read};
use crate::{Error, LazyOptions, Remote, Result};

type Step<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Tags of each host, beside one that all set.
const TAGS: usize = 4;
const SHARED: &str = "shared";
/// Snapshots that a host keeps in its store.
const KEPT: usize = 3;
/// How long a push may be silent: less than it may be held up by a node that is away.
const SILENCE: Duration = Duration::from_secs(4);
/// A read where it is may take so long: longer than any node is away.
const READ: Duration = Duration::from_secs(60);
/// More than what is written at once.
const LONG: usize = 5000;

pub struct Host<'a> {
    world: &'a World,
    number: usize,
    store: Store,
    rng: fastrand::Rng,
    pages: Vec<u8>,
    /// Its snapshots, by their tags here.
    committed: Vec<String>,
    commits: usize,
}

impl<'a> Host<'a> {
    pub fn new(world: &'a World, dir: &Path, number: usize, seed: u64) -> Step<Self> {
        let mut rng = fastrand::Rng::with_seed(seed.wrapping_mul(1000) + number as u64);
        Ok(Self {
            world,
            number,
            store: Store::create(&dir.join(format!("host{number}")), PageSize::default())?,
            pages: (0..400).map(|_| rng.u8(..3)).collect(),
            rng,
            committed: Vec::new(),
            commits: 0,
        })
    }

    /// Until the world is over.
    pub fn work(mut self) -> Step {
        while !self.world.is_over() {
            match self.rng.u8(..20) {
                0..=7 => self.push()?,
                8..=10 => self.remove()?,
                11..=14 => self.pull()?,
                15..=16 => self.read_there()?,
                17 => self.list()?,
                _ => self.collect()?,
            }
        }
        Ok(())
    }

    fn remote(&self) -> Result<Remote> {
        Remote::at(&self.world.at(self.number))
    }

    /// One that is killed at one of its requests, once in a while.
    fn remote_that_may_die(&mut self) -> Result<Remote> {
        let mut remote = self.remote()?;
        if self.rng.u8(..8) == 0 {
            remote.bucket = Box::new(Dying {
                bucket: remote.bucket,
                left: AtomicUsize::new(self.rng.usize(..30)),
                is_done: self.rng.bool(),
            });
        }
        Ok(remote)
    }

    fn own_tag(&mut self) -> String {
        match self.rng.u8(..4) {
            0 => SHARED.to_owned(),
            _ => format!("h{}-{}", self.number, self.rng.usize(..TAGS)),
        }
    }

    fn any_tag(&mut self) -> String {
        match self.rng.u8(..4) {
            0 => SHARED.to_owned(),
            _ => format!("h{}-{}", self.rng.usize(..NODES), self.rng.usize(..TAGS)),
        }
    }

    /// Another snapshot: mostly a child of the last one, which differs in a few pages.
    fn commit(&mut self) -> Step<(String, SnapshotId)> {
        let rng = &mut self.rng;
        match rng.u8(..16) {
            0 => self.pages = (0..LONG).map(|_| 1 + rng.u8(..3)).collect(),
            1..=3 => self.pages = (0..rng.usize(1..1200)).map(|_| rng.u8(..)).collect(),
            _ => {
                for _ in 0..rng.usize(1..30) {
                    let at = rng.usize(..self.pages.len());
                    self.pages[at] = rng.u8(..);
                }
            }
        }
        let tag = format!("c{}", self.commits);
        self.commits += 1;
        let parent = self.committed.last().map(String::as_str);
        commit(&self.store, &tag, &image(&self.pages), parent)?;
        let id = self.store.tag(&tag)?.ok_or("it was committed")?;
        let mut images = self.world.images.lock().expect("no panic");
        images.insert(id, self.pages.clone());
        drop(images);
        self.committed.push(tag.clone());
        if self.committed.len() > KEPT {
            self.store.remove_tags(&[self.committed.remove(0)])?;
        }
        if self.commits.is_multiple_of(20) {
            self.store.gc(GcOptions::default(), &Silent)?;
        }
        Ok((tag, id))
    }

    fn push(&mut self) -> Step {
        let (local, id) = self.commit()?;
        let (tag, replaces) = (self.own_tag(), self.rng.u8(..4) > 0);
        let remote = self.remote_that_may_die()?;
        let begun = self.world.told.begin(&tag, Some(id));
        let pushed = remote.push(&self.store, &local, &tag, replaces, &Silent);
        match pushed {
            Ok(_) => {
                begun.end(End::Acknowledged);
                self.world.pushes.fetch_add(1, Relaxed);
                self.world.count("pushes: acknowledged");
            }
            Err(Error::Protocol(protocol::Error::TagExists { .. })) if !replaces => {
                begun.end(End::Refused);
                self.world.count("pushes: the tag exists");
            }
            Err(error) => {
                begun.end(End::Unknown);
                self.excuse("pushes", error)?;
            }
        }
        Ok(())
    }

    fn remove(&mut self) -> Step {
        let tag = self.own_tag();
        let remote = self.remote_that_may_die()?;
        let from = self.world.told.now();
        let begun = self.world.told.begin(&tag, None);
        match remote.remove(&tag) {
            Ok(()) => {
                begun.end(End::Acknowledged);
                self.world.count("removals: acknowledged");
            }
            Err(Error::Protocol(protocol::Error::NoTag { .. })) => {
                begun.end(End::Refused);
                self.sees(&tag, None, from)?;
                self.world.count("removals: there was none");
            }
            Err(error) => {
                begun.end(End::Unknown);
                self.excuse("removals", error)?;
            }
        }
        Ok(())
    }

    /// What was seen since then may be so.
    fn sees(&self, tag: &str, value: Option<SnapshotId>, from: u64) -> Step {
        let to = self.world.told.now();
        Ok(self.world.told.check(tag, value, (from, to))?)
    }

    fn pull(&mut self) -> Step {
        let tag = self.any_tag();
        let remote = self.remote()?;
        let from = self.world.told.now();
        match remote.pull(&self.store, &tag, "pulled", true, &Silent) {
            Ok(_) => {
                let id = self.store.tag("pulled")?.ok_or("it was pulled")?;
                self.sees(&tag, Some(id), from)?;
                let bytes = self.world.bytes_of(id).ok_or("nobody committed it")?;
                if read(&self.store, "pulled")? != bytes {
                    return Err(format!("{tag} was pulled with other bytes").into());
                }
                self.world.count("pulls: whole");
            }
            Err(Error::Protocol(protocol::Error::NoTag { .. })) => {
                self.sees(&tag, None, from)?;
                self.world.count("pulls: there was none");
            }
            Err(error) => self.excuse("pulls", error)?,
        }
        Ok(())
    }

    fn read_there(&mut self) -> Step {
        let tag = self.any_tag();
        let options = LazyOptions {
            cache: None,
            cache_limit_bytes: 0,
            timeout: READ,
            prefetches: true,
            fills: false,
        };
        let remote = self.remote()?;
        let from = self.world.told.now();
        match remote.lazy(&self.store, &tag, &options) {
            Ok(lazy) => {
                let id = lazy.snapshot().id();
                self.sees(&tag, Some(id), from)?;
                let bytes = self.world.bytes_of(id).ok_or("nobody committed it")?;
                let reader = memory(&lazy);
                for _ in 0..10 {
                    let number = self.rng.usize(..bytes.len() / PAGE);
                    // It waits for longer than any node is away.
                    let read = page(&reader, number).map_err(|error| match error.class() {
                        ErrorClass::Io => format!("page {number} of {tag} never came: {error}"),
                        _ => format!("page {number} of {tag}: {error}"),
                    })?;
                    if read != bytes[number * PAGE..][..PAGE] {
                        return Err(format!("page {number} of {tag} is another").into());
                    }
                }
                lazy.end();
                self.world.count("reads where it is: whole");
            }
            Err(Error::Protocol(protocol::Error::NoTag { .. })) => {
                self.sees(&tag, None, from)?;
                self.world.count("reads where it is: there was none");
            }
            Err(error) => self.excuse("reads where it is", error)?,
        }
        Ok(())
    }

    /// All tags, and whether anything is wrong with them.
    fn list(&mut self) -> Step {
        let remote = self.remote()?;
        let from = self.world.told.now();
        match remote.tags() {
            Ok(tags) => {
                for one in tags {
                    if one.damaged {
                        return Err(format!("{} is told to be damaged: {one:?}", one.tag).into());
                    }
                    if one.problem.is_none() {
                        self.sees(&one.tag, SnapshotId::from_hex(&one.id), from)?;
                    }
                }
                self.world.count("listings");
            }
            Err(error) => self.excuse("listings", error)?,
        }
        match remote.verify(false) {
            Ok(report) if report.findings.is_empty() => self.world.count("verifications"),
            Ok(report) => return Err(format!("verify has found {:?}", report.findings).into()),
            Err(error) => self.excuse("verifications", error)?,
        }
        Ok(())
    }

    fn collect(&mut self) -> Step {
        let waits = self.rng.bool();
        let remote = self.remote_that_may_die()?.patience(SILENCE, waits);
        match remote.collect(Options::default()) {
            Ok(collected) => {
                let what = match collected.deleted.is_empty() {
                    true => "collections: nothing was deleted",
                    false => "collections: something was deleted",
                };
                self.world.count(what);
            }
            Err(error) => self.excuse("collections", error)?,
        }
        Ok(())
    }

    /// What may fail while nodes are dead and others work on the same tags. Damage and what is
    /// missing never may.
    fn excuse(&self, what: &str, error: Error) -> Step {
        use protocol::Error as Of;
        let why = match &error {
            Error::Protocol(Of::Unanswered(why)) if why.reason.contains("was killed") => {
                "the host was killed"
            }
            Error::Protocol(Of::Unanswered(why)) => {
                println!("host {}: {what}: {why}", self.number);
                "nobody answered"
            }
            Error::Protocol(Of::LeaseLost { .. }) => "the lease was lost",
            Error::Protocol(Of::TagBusy { .. }) => "another was about to change the tag",
            Error::Protocol(Of::Ambiguous { .. }) => "two were cut off",
            Error::Protocol(Of::Gone { .. }) => "what was relied on went away",
            _ => return Err(format!("{what}: {error}").into()),
        };
        self.world.count(&format!("{what}: {why}"));
        Ok(())
    }
}
