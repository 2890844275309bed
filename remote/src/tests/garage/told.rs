//! What hosts were told of the tags of a bucket, and what a tag may name after that.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Mutex, MutexGuard, PoisonError};

use snapstore_store::SnapshotId;

/// What a tag names; nothing if there is none.
pub type Value = Option<SnapshotId>;

/// Changes of tags, each with when it began and ended by one clock of all hosts.
#[derive(Default)]
pub struct Told {
    clock: AtomicU64,
    tags: Mutex<BTreeMap<String, Vec<Change>>>,
}

struct Change {
    value: Value,
    began: u64,
    /// None while its host is at work.
    ended: Option<u64>,
    end: End,
}

/// How a change ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// Its host was told that it is done.
    Acknowledged,
    /// It may have happened, or it may not. Its host is not at work on it any more.
    Unknown,
    /// Its host was told that it has not happened.
    Refused,
}

/// A change that is under way.
pub struct Begun<'a> {
    told: &'a Told,
    tag: &'a str,
    number: usize,
}

impl Begun<'_> {
    pub fn end(self, end: End) {
        let now = self.told.now();
        let mut tags = self.told.tags();
        let change = &mut tags.get_mut(self.tag).expect("it was begun")[self.number];
        (change.ended, change.end) = (Some(now), end);
    }
}

impl Told {
    /// The time.
    pub fn now(&self) -> u64 {
        self.clock.fetch_add(1, SeqCst)
    }

    fn tags(&self) -> MutexGuard<'_, BTreeMap<String, Vec<Change>>> {
        self.tags.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All tags that somebody began to change.
    pub fn names(&self) -> Vec<String> {
        self.tags().keys().cloned().collect()
    }

    /// A host begins to set a tag, or to remove it.
    pub fn begin<'a>(&'a self, tag: &'a str, value: Value) -> Begun<'a> {
        let mut tags = self.tags();
        let changes = tags.entry(tag.to_owned()).or_default();
        changes.push(Change {
            value,
            began: self.now(),
            ended: None,
            end: End::Unknown,
        });
        Begun {
            told: self,
            tag,
            number: changes.len() - 1,
        }
    }

    /// Whether a tag may name this for who began to look at one time and ended at another.
    /// It may unless it was never set to it by then, or a change was acknowledged that began
    /// after it was set and ended before the look began.
    pub fn check(&self, tag: &str, value: Value, (from, to): (u64, u64)) -> Result<(), String> {
        let tags = self.tags();
        let changes = tags.get(tag).map_or(&[][..], Vec::as_slice);
        let is_past = |set: u64| {
            changes.iter().any(|after| {
                after.end == End::Acknowledged
                    && after.began > set
                    && after.ended.is_some_and(|ended| ended < from)
            })
        };
        let mut set = changes.iter().filter(|change| change.end != End::Refused);
        let may = set.any(|change| {
            let is_it = change.value == value && change.began < to;
            is_it && change.ended.is_none_or(|ended| !is_past(ended))
        });
        // There was none in the beginning.
        if may || (value.is_none() && !is_past(0)) {
            return Ok(());
        }
        drop(tags);
        let why = format!("{tag} was {} from {from} to {to}", shown(value));
        Err(why + &self.changes(tag))
    }

    /// What hosts were told of a tag, a line for each change.
    pub fn changes(&self, tag: &str) -> String {
        let mut told = String::new();
        for change in self.tags().get(tag).into_iter().flatten() {
            let ended = change.ended.map_or("...".to_owned(), |at| at.to_string());
            let (value, began, end) = (shown(change.value), change.began, change.end);
            let _ = write!(told, "\n    {value} from {began} to {ended}: {end:?}");
        }
        told
    }
}

fn shown(value: Value) -> String {
    value.map_or("none".to_owned(), |id| id.to_string()[..8].to_owned())
}

#[test]
fn what_was_acknowledged_is_past_only_after_a_later_change() {
    let told = Told::default();
    let id = |byte: u8| SnapshotId::from_hex(&format!("{byte:02x}").repeat(32));
    let look = |value: Value| {
        let now = told.now();
        told.check("t", value, (now, told.now()))
    };
    let [one, two] = [id(1), id(2)];
    assert!(one.is_some() && look(None).is_ok() && look(one).is_err());
    told.begin("t", one).end(End::Acknowledged);
    assert!(look(None).is_err() && look(one).is_ok());
    let under_way = told.begin("t", two);
    assert!(look(one).is_ok() && look(two).is_ok());
    under_way.end(End::Unknown);
    assert!(look(one).is_ok() && look(two).is_ok());
    let before = told.now();
    told.begin("t", None).end(End::Acknowledged);
    assert!(look(None).is_ok() && look(one).is_err() && look(two).is_err());
    assert!(
        told.check("t", two, (before, told.now())).is_ok(),
        "it began before"
    );
    told.begin("t", two).end(End::Refused);
    assert!(look(two).is_err());
}
