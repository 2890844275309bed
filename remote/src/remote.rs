//! A remote: a bucket, and what hosts do with it.

use std::collections::BTreeSet;
use std::future::Future;
use std::path::PathBuf;
use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::thread;
use std::time::Duration;

use serde::Serialize;
use snapstore_store::SnapshotId;

use crate::error::{Error, Result};
use crate::objects::{Objects, Requests};
use crate::place::Place;
use crate::protocol::{
    self, Bucket, Current, LeaseKind, Leased, Listed, Listing, RefRecord, Session, Unanswered, View,
};

/// How long a session may be silent until a collection gives it up.
const PUSH_SILENCE_SECONDS: u64 = 15 * 60;
const VIEW_SILENCE_SECONDS: u64 = 24 * 60 * 60;
/// How often a view says that its holder lives. Each time leaves an object until the end.
const VIEW_BEAT: Duration = Duration::from_secs(2 * 60 * 60);
/// Far longer than a host takes that asks for the clock.
const PROBE_SECONDS: u64 = 24 * 60 * 60;
/// They take about 50 MB, and are those of 512 GiB of pages of 4 KiB.
const KEPT_LEAVES: usize = 1 << 18;
/// How long a collection waits until it looks again.
const WAIT: Duration = Duration::from_secs(2);

/// A bucket with snapshots of many hosts.
pub struct Remote {
    pub(crate) url: String,
    pub(crate) place: Place,
    pub(crate) bucket: Box<dyn Objects>,
    silence_seconds: u64,
    waits: bool,
    /// How often the lease of a view says that its holder lives.
    pub(crate) view_beat: Duration,
    /// Leaves of heads that a repack keeps in memory; heads of more are read when they are needed.
    pub(crate) kept_leaves: usize,
    pub(crate) was_there: bool,
    pub(crate) remembered_in: Option<PathBuf>,
}

/// What a tag of a remote names.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct RemoteTag {
    /// Its name.
    pub tag: String,
    /// The snapshot's id.
    pub id: String,
    /// Why it cannot be told, if so.
    pub problem: Option<String>,
    /// Whether that is damage, rather than a push that is not finished.
    pub damaged: bool,
}

/// Who works on a remote.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct LeaseReport {
    /// The session.
    pub session: String,
    /// What it does; `unknown` of one that is damaged.
    pub kind: &'static str,
    /// Host and process; empty of one that is damaged.
    pub who: String,
    /// Its last sign of life, in seconds since 1970, by the bucket's clock.
    pub last_seen: u64,
    /// Which object is damaged, and what then, if one is.
    pub problem: Option<String>,
}

/// Runs what never waits but inside its requests.
pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(value) = future
            .as_mut()
            .poll(&mut Context::from_waker(Waker::noop()))
        {
            return value;
        }
        thread::yield_now();
    }
}

impl Bucket for Remote {
    async fn put(&self, key: &str, bytes: &[u8]) -> Result<(), Unanswered> {
        self.bucket.put(key, bytes)
    }

    async fn get(&self, key: &str) -> Result<Option<Vec<u8>>, Unanswered> {
        self.bucket.get(key, None)
    }

    async fn exists(&self, key: &str) -> Result<bool, Unanswered> {
        self.bucket.exists(key)
    }

    async fn list(&self, prefix: &str) -> Result<Vec<Listed>, Unanswered> {
        self.bucket.list(prefix)
    }

    async fn delete(&self, key: &str) -> Result<(), Unanswered> {
        self.bucket.delete(key)
    }

    fn fresh_session(&self) -> Session {
        Session(crate::random().expect("the system has random numbers"))
    }

    async fn is_given_up(&self, _: Session, last: &Listed, view: bool) -> bool {
        let allowed = match view {
            true => VIEW_SILENCE_SECONDS.max(self.silence_seconds),
            false => self.silence_seconds,
        };
        let silent = self
            .now()
            .is_ok_and(|now| now.saturating_sub(last.modified) > allowed);
        if !silent && !view && self.waits {
            thread::sleep(WAIT);
        }
        silent
    }

    fn is_impatient(&self) -> bool {
        !self.waits
    }
}

impl Remote {
    /// The remote of a place. Nothing is asked of it yet.
    ///
    /// # Errors
    /// [`Error::BadUrl`], [`Error::Unusable`].
    pub fn at(place: &Place) -> Result<Self> {
        Ok(Self {
            url: place.url.clone(),
            place: place.clone(),
            bucket: crate::open::open(place)?,
            silence_seconds: PUSH_SILENCE_SECONDS,
            waits: true,
            view_beat: VIEW_BEAT,
            kept_leaves: KEPT_LEAVES,
            was_there: false,
            remembered_in: None,
        })
    }

    /// The requests that went over the network so far, if any do.
    #[must_use]
    pub fn requests(&self) -> Option<Requests> {
        self.bucket.requests()
    }

    /// How long a push may be silent until a collection gives it up, and whether it is
    /// waited for until then.
    #[must_use]
    pub fn patience(mut self, silence: Duration, waits: bool) -> Self {
        self.silence_seconds = silence.as_secs();
        self.waits = waits;
        self
    }

    /// Whether this store has used a remote there. Then a directory that is empty is no new
    /// bucket: what was mounted there is not.
    #[must_use]
    pub fn was_there(mut self, was_there: bool) -> Self {
        self.was_there = was_there;
        self
    }

    /// Where it is.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Whether all that is there is encrypted.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        self.place.key.is_some()
    }

    /// The bucket's clock. What hosts that were killed left of asking for it goes after a day.
    pub(crate) fn now(&self) -> Result<u64> {
        let key = format!("probe/{:032x}", crate::random().map_err(no_random)?);
        self.bucket.put(&key, b"")?;
        let found = self.bucket.list("probe/")?;
        self.bucket.delete(&key)?;
        let own = found.iter().find(|one| one.key == key);
        let now = own.map(|one| one.modified).ok_or(Error::Unfit {
            url: self.url.clone(),
            what: "it does not list what was just written",
        })?;
        let is_left = |one: &&Listed| now.saturating_sub(one.modified) > PROBE_SECONDS;
        for left in found.iter().filter(is_left) {
            // Whoever asks next does it else.
            let _ = self.bucket.delete(&left.key);
        }
        Ok(now)
    }

    /// Probes what a bucket has to promise. It can find a fault, not prove that there is
    /// none.
    ///
    /// # Errors
    /// [`Error::Unfit`]; [`Error::NoRemote`]; if the bucket did not answer.
    pub fn check(&self) -> Result<()> {
        self.page_bytes()?;
        let unfit = |what| Error::Unfit {
            url: self.url.clone(),
            what,
        };
        for _ in 0..16 {
            let key = format!("probe/{:032x}", crate::random().map_err(no_random)?);
            let listed = || -> Result<bool> {
                let found = self.bucket.list("probe/")?;
                Ok(found.iter().any(|one| one.key == key))
            };
            if self.bucket.get(&key, None)?.is_some() {
                return Err(unfit("it has what nobody wrote"));
            }
            self.bucket.put(&key, key.as_bytes())?;
            if self.bucket.get(&key, None)?.as_deref() != Some(key.as_bytes()) {
                return Err(unfit("it does not return what was just written"));
            }
            if !listed()? {
                return Err(unfit("it does not list what was just written"));
            }
            self.bucket.delete(&key)?;
            if self.bucket.exists(&key)? || listed()? {
                return Err(unfit("it has what was just deleted"));
            }
        }
        Ok(())
    }

    /// Its tags, sorted.
    ///
    /// # Errors
    /// If the bucket did not answer.
    pub fn tags(&self) -> Result<Vec<RemoteTag>> {
        let mut seen = self.seen(&self.config()?.id);
        let (listing, older) = self.listing_with(&seen)?;
        let mut shown = Vec::new();
        let mut tags: Vec<RemoteTag> = Vec::new();
        // Verify tells of names that no tag can have.
        let possible = |tag: &String| snapstore_store::check_tag(tag).is_ok();
        for tag in listing.tags().into_iter().filter(possible) {
            let (record, mut problem) = match listing.current(&tag, &BTreeSet::new()) {
                Current::Absent => continue,
                Current::Settled(record) => (Some(record), None),
                Current::Fenced(record) => (Some(record), Some("its push was cut off".to_owned())),
                Current::Active(record) => (Some(record), Some("its push is under way".to_owned())),
                Current::Ambiguous => (None, Some("two pushes of it were cut off".to_owned())),
            };
            let mut id = String::new();
            let mut damaged = false;
            if let Some(record) = record {
                let key = record.key();
                let counts = problem.is_none();
                match self.object(&key)? {
                    Err(error) => (problem, damaged) = (Some(error.to_string()), true),
                    Ok(None) => continue,
                    Ok(Some(bytes)) => match RefRecord::decode(&key, &bytes) {
                        Ok(body) => {
                            id = hex(&body.snapshot);
                            if counts {
                                shown.push((tag.clone(), record.seq));
                            }
                        }
                        Err(error) => {
                            (problem, damaged) = (Some(error.of(&key).to_string()), true);
                        }
                    },
                }
            }
            tags.push(RemoteTag {
                tag,
                id,
                problem,
                damaged,
            });
        }
        for (tag, problem) in older {
            let at = tags.partition_point(|one| one.tag < tag);
            if tags.get(at).is_none_or(|one| one.tag != tag) {
                let one = RemoteTag {
                    tag,
                    id: String::new(),
                    problem: None,
                    damaged: false,
                };
                tags.insert(at, one);
            }
            (tags[at].problem, tags[at].damaged) = (Some(problem), true);
        }
        // Others may have removed what was seen.
        let removed = seen
            .tags()
            .map(|tag| (tag.to_owned(), listing.removed(tag)));
        shown.extend(removed.filter(|(_, seq)| *seq > 0));
        seen.remember_all(shown, false);
        Ok(tags)
    }

    /// The id of the snapshot that a tag names.
    ///
    /// # Errors
    /// As [`protocol::view`].
    pub fn snapshot_of(&self, tag: &str) -> Result<SnapshotId> {
        let (config, view) = self.view(None, tag, false)?;
        let named = self.named_by(&view);
        if named.is_ok() {
            self.seen(&config.id).remember(&view.record);
        }
        let _ = block_on(view.lease.end(self));
        let id = named?;
        Ok(SnapshotId::from_hex(&hex(&id)).expect("64 digits are an id"))
    }

    /// The snapshot of a view's record. One that is gone since was changed and collected; the
    /// head that it named stays.
    fn named_by(&self, view: &View) -> Result<[u8; 32]> {
        let key = view.record.key();
        let read = view.read.as_ref().and_then(|read| read.record.clone());
        let body = match read {
            Some(body) => Some(body),
            None => self.bucket.get(&key, None)?,
        };
        match body {
            Some(body) => {
                let record = RefRecord::decode(&key, &body).map_err(|error| error.of(&key))?;
                Ok(record.snapshot)
            }
            None => Ok(self.open_head_of(view.record.head, &key)?.snapshot),
        }
    }

    /// Removes a tag.
    ///
    /// # Errors
    /// As [`protocol::remove`].
    pub fn remove(&self, tag: &str) -> Result<()> {
        let mut seen = self.seen(&self.config()?.id);
        let above = seen.highest(tag);
        let record = block_on(protocol::remove(self, tag, above, &who()))?;
        seen.remember(&record);
        Ok(())
    }

    /// Removes tags, each in turn. All of them are looked at first: if one is none, nothing is
    /// removed. Those that were removed, also where a later one failed.
    pub fn remove_all(&self, tags: &[String]) -> (Vec<String>, Result<()>) {
        let mut removed = Vec::new();
        let mut remove = || {
            let mut seen = self.seen(&self.config()?.id);
            for tag in tags.iter().filter(|_| tags.len() > 1) {
                let listing = block_on(Listing::of_tag(self, tag))?;
                if listing.current(tag, &BTreeSet::new()) == Current::Absent {
                    let tag = tag.clone();
                    return Err(protocol::Error::NoTag { tag }.into());
                }
            }
            for tag in tags {
                let above = seen.highest(tag);
                let record = block_on(protocol::remove(self, tag, above, &who()))?;
                seen.remember(&record);
                removed.push(tag.clone());
            }
            Ok(())
        };
        let result = remove();
        (removed, result)
    }

    /// Who works on it. Damage of one lease is told beside the others.
    ///
    /// # Errors
    /// If the bucket did not answer, or a lease is of a newer version.
    pub fn leases(&self) -> Result<Vec<LeaseReport>> {
        self.page_bytes()?;
        let leases = block_on(protocol::leases(self))?;
        Ok(leases.into_iter().map(LeaseReport::of).collect())
    }
}

impl LeaseReport {
    fn of((session, last, lease): Leased) -> Self {
        let (kind, who, problem) = match lease {
            Ok(lease) => {
                let kind = match lease.kind {
                    LeaseKind::Push => "push",
                    LeaseKind::View(_) => "view",
                    LeaseKind::Removal => "removal",
                };
                (kind, lease.who, None)
            }
            Err(error) => ("unknown", String::new(), Some(error.to_string())),
        };
        Self {
            session: session.to_string(),
            kind,
            who,
            last_seen: last.modified,
            problem,
        }
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// This host and process, for people.
pub(crate) fn who() -> String {
    let host = rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned();
    format!("{host} process {}", std::process::id())
}

pub(crate) fn no_random(error: std::io::Error) -> Error {
    Unanswered {
        what: "draw a random name for",
        key: String::new(),
        reason: error.to_string(),
        wrong: None,
        refused: true,
    }
    .into()
}
