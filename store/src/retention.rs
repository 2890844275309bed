//! Which tags to keep, and why: the policy behind forgetting old snapshots.
//!
//! A plan is made of a [`crate::Listing`] and changes nothing. A tag goes only if no rule
//! keeps it; [`crate::Store::remove_tags_if`] then removes those that are still what the
//! plan was made of.
//!
//! ```
//! use std::time::{Duration, SystemTime};
//! use snapstore_store::{PageSize, Store};
//! use snapstore_store::retention::{Group, Policy};
//!
//! # let dir = tempfile::tempdir()?;
//! # let store = Store::create(&dir.path().join("store"), PageSize::default())?;
//! let policy = Policy {
//!     keep_last: Some(3),
//!     keep_within: Some(Duration::from_secs(7 * 86_400)),
//!     ..Policy::default()
//! };
//! let snapshots = store.snapshots()?;
//! let plan = policy.plan(&snapshots, &store.protected_tags()?, &Group::All, SystemTime::now());
//! let gone: Vec<_> = plan.iter().filter(|it| it.reasons.is_empty()).collect();
//! assert!(gone.is_empty());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, SystemTime};

use glob::Pattern;

use crate::id::SnapshotId;
use crate::snapshots::TaggedSnapshot;

/// The label whose value is the time in UTC, such as 2027-01-31T00:00:00Z, from which on a tag need not
/// be kept.
pub const EXPIRES: &str = "expires";

/// Rules that keep tags. Without any rule nothing goes but what has expired.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    /// The newest tags of each group, so many.
    pub keep_last: Option<usize>,
    /// What was committed less than this ago, counted back from the newest tag of its
    /// group, so that a machine which stopped committing loses nothing.
    pub keep_within: Option<Duration>,
    /// Tags whose name matches one of these patterns (`*`, `?`, `[a-z]`).
    pub keep_tags: Vec<Pattern>,
    /// Tags of snapshots with one of these labels.
    pub keep_labels: Vec<(String, String)>,
    /// Whether nothing goes but what has expired.
    pub only_expired: bool,
}

/// What is counted together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Group {
    /// All tags.
    All,
    /// The tags of each chain: snapshots with the same oldest known ancestor.
    Chain,
    /// Tags with the same value of this label; those without it are a group as well.
    Label(String),
}

/// What is to become of a tag.
#[derive(Clone, Debug)]
pub struct Decision {
    /// The tag.
    pub tag: String,
    /// The snapshot it names.
    pub id: SnapshotId,
    /// The group it was counted in; empty for [`Group::All`].
    pub group: String,
    /// When it was committed, in seconds since 1970.
    pub created_unix_seconds: u64,
    /// Why it is kept. Empty if it goes.
    pub reasons: Vec<Reason>,
    /// Whether it goes because its time has come.
    pub expired: bool,
}

/// Why a tag is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// It is protected.
    Protected,
    /// It is among the newest.
    Last,
    /// It is young enough.
    Within,
    /// This pattern matches its name.
    Tag(String),
    /// It has this label.
    Label(String, String),
    /// It has a time at which it expires, and that has not come.
    NotExpired(String),
    /// Its label `expires` is no time.
    UnknownExpiry(String),
    /// No rule says what is to be kept.
    NoRule,
    /// It has no time at which it expires, and only what has expired is to go.
    NeverExpires,
}

impl std::fmt::Display for Reason {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Protected => write!(out, "protected"),
            Self::Last => write!(out, "among the last"),
            Self::Within => write!(out, "young enough"),
            Self::Tag(pattern) => write!(out, "tag {pattern}"),
            Self::Label(key, value) => write!(out, "label {key}={value}"),
            Self::NotExpired(when) => write!(out, "expires {when}"),
            Self::UnknownExpiry(text) => write!(out, "expires={text} is not a time"),
            Self::NoRule => write!(out, "no rule"),
            Self::NeverExpires => write!(out, "never expires"),
        }
    }
}

impl Policy {
    /// Whether any rule says what is to be kept.
    #[must_use]
    pub fn has_rules(&self) -> bool {
        self.keep_last.is_some()
            || self.keep_within.is_some()
            || !self.keep_tags.is_empty()
            || !self.keep_labels.is_empty()
    }

    /// Decides about each tag, in the order of `snapshots`, which is oldest first.
    ///
    /// A tag that has expired goes whatever `keep_last` and `keep_within` say; a tag that
    /// has not expired stays. What is protected, and what `keep_tags` or `keep_labels`
    /// name, stays in any case.
    #[must_use]
    pub fn plan(
        &self,
        snapshots: &[TaggedSnapshot],
        protected: &BTreeSet<String>,
        group: &Group,
        now: SystemTime,
    ) -> Vec<Decision> {
        let groups = group.of_each(snapshots);
        let mut members: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
        for (at, group) in groups.iter().enumerate() {
            members.entry(group).or_default().push(at);
        }
        let mut decisions: Vec<_> = snapshots
            .iter()
            .zip(&groups)
            .map(|(snapshot, group)| self.by_itself(snapshot, group, protected, now))
            .collect();
        for members in members.values() {
            self.by_age(&mut decisions, members);
        }
        let otherwise = match (self.only_expired, self.has_rules()) {
            (true, _) => Some(Reason::NeverExpires),
            (false, false) => Some(Reason::NoRule),
            (false, true) => None,
        };
        if let Some(reason) = otherwise {
            let rest = decisions.iter_mut().filter(|it| !it.expired);
            for decision in rest.filter(|it| it.reasons.is_empty()) {
                decision.reasons.push(reason.clone());
            }
        }
        decisions
    }

    /// The rules that look at nothing but the snapshot.
    fn by_itself(
        &self,
        snapshot: &TaggedSnapshot,
        group: &str,
        protected: &BTreeSet<String>,
        now: SystemTime,
    ) -> Decision {
        let labels = &snapshot.manifest.labels;
        let mut reasons = Vec::new();
        if protected.contains(&snapshot.tag) {
            reasons.push(Reason::Protected);
        }
        let matching = self.keep_tags.iter().filter(|it| it.matches(&snapshot.tag));
        reasons.extend(matching.map(|it| Reason::Tag(it.as_str().to_owned())));
        for (key, value) in &self.keep_labels {
            if labels.get(key) == Some(value) {
                reasons.push(Reason::Label(key.clone(), value.clone()));
            }
        }
        let mut expired = false;
        if let Some(text) = labels.get(EXPIRES) {
            match humantime::parse_rfc3339(text) {
                Ok(when) if when <= now => expired = reasons.is_empty(),
                Ok(_) => reasons.push(Reason::NotExpired(text.clone())),
                Err(_) => reasons.push(Reason::UnknownExpiry(text.clone())),
            }
        }
        Decision {
            tag: snapshot.tag.clone(),
            id: snapshot.id,
            group: group.to_owned(),
            created_unix_seconds: snapshot.manifest.created_unix_seconds,
            reasons,
            expired,
        }
    }

    /// The rules that compare the members of a group, oldest first.
    fn by_age(&self, decisions: &mut [Decision], members: &[usize]) {
        let living: Vec<usize> = members
            .iter()
            .copied()
            .filter(|at| !decisions[*at].expired)
            .collect();
        let Some(newest) = living.last() else {
            return;
        };
        let newest = decisions[*newest].created_unix_seconds;
        let last = self.keep_last.unwrap_or(0);
        for (rank, at) in living.iter().rev().enumerate() {
            let decision = &mut decisions[*at];
            if rank < last {
                decision.reasons.push(Reason::Last);
            }
            let age = newest.saturating_sub(decision.created_unix_seconds);
            // The newest is within any time, also none.
            if self
                .keep_within
                .is_some_and(|within| age == 0 || age < within.as_secs())
            {
                decision.reasons.push(Reason::Within);
            }
        }
    }
}

impl Group {
    /// The group of each snapshot, by a name that people know.
    pub(crate) fn of_each(&self, snapshots: &[TaggedSnapshot]) -> Vec<String> {
        match self {
            Self::All => vec![String::new(); snapshots.len()],
            Self::Label(key) => snapshots
                .iter()
                .map(|snapshot| match snapshot.manifest.labels.get(key) {
                    Some(value) => format!("{key}={value}"),
                    None => format!("no {key}"),
                })
                .collect(),
            Self::Chain => chains(snapshots),
        }
    }
}

/// The oldest known ancestor of each snapshot, by the first of its tags.
fn chains(snapshots: &[TaggedSnapshot]) -> Vec<String> {
    let mut names: HashMap<SnapshotId, (&str, Option<SnapshotId>)> = HashMap::new();
    for snapshot in snapshots {
        names
            .entry(snapshot.id)
            .or_insert((&snapshot.tag, snapshot.manifest.parent));
    }
    let mut roots: HashMap<SnapshotId, SnapshotId> = HashMap::new();
    for snapshot in snapshots {
        // Each snapshot is walked over once, however long the chain.
        let mut walked = Vec::new();
        let mut at = snapshot.id;
        let root = loop {
            if let Some(root) = roots.get(&at) {
                break *root;
            }
            walked.push(at);
            match names.get(&at).and_then(|(_, parent)| *parent) {
                Some(parent) if names.contains_key(&parent) => at = parent,
                _ => break at,
            }
        };
        roots.extend(walked.into_iter().map(|id| (id, root)));
    }
    snapshots
        .iter()
        .map(|snapshot| names[&roots[&snapshot.id]].0.to_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;
    use crate::manifest::Manifest;
    use crate::page::PageSize;

    const DAY: u64 = 86_400;

    fn snapshot(tag: &str, number: u8, parent: Option<u8>, day: u64) -> TaggedSnapshot {
        TaggedSnapshot {
            tag: tag.to_owned(),
            id: SnapshotId::from_bytes([number; 32]),
            manifest: Manifest {
                parent: parent.map(|number| SnapshotId::from_bytes([number; 32])),
                created_unix_seconds: day * DAY,
                page_size: PageSize::default(),
                first_tag: tag.to_owned(),
                images: Vec::new(),
                labels: BTreeMap::new(),
                added_chunks: 0,
                added_bytes: 0,
                ..Manifest::blank(PageSize::default())
            },
        }
    }

    fn labelled(mut snapshot: TaggedSnapshot, key: &str, value: &str) -> TaggedSnapshot {
        let labels = &mut snapshot.manifest.labels;
        labels.insert(key.to_owned(), value.to_owned());
        snapshot
    }

    fn gone(policy: &Policy, snapshots: &[TaggedSnapshot], group: &Group) -> Vec<String> {
        let protected = BTreeSet::from(["held".to_owned()]);
        let now = UNIX_EPOCH + Duration::from_secs(100 * DAY);
        policy
            .plan(snapshots, &protected, group, now)
            .into_iter()
            .filter(|it| it.reasons.is_empty())
            .map(|it| it.tag)
            .collect()
    }

    fn days(tags: &[(&str, u64)]) -> Vec<TaggedSnapshot> {
        (1..)
            .zip(tags)
            .map(|(number, (tag, day))| snapshot(tag, number, None, *day))
            .collect()
    }

    #[test]
    fn the_last_and_the_young_stay() {
        let snapshots = days(&[("a", 1), ("held", 2), ("b", 3), ("c", 4), ("d", 9)]);
        let last = |count| Policy {
            keep_last: Some(count),
            ..Policy::default()
        };
        assert_eq!(gone(&last(2), &snapshots, &Group::All), ["a", "b"]);
        assert_eq!(
            gone(&last(0), &snapshots, &Group::All),
            ["a", "b", "c", "d"]
        );
        let within = |days| Policy {
            keep_within: Some(Duration::from_secs(days * DAY)),
            ..Policy::default()
        };
        // Counted back from d, and not from now.
        assert_eq!(gone(&within(6), &snapshots, &Group::All), ["a", "b"]);
        assert_eq!(gone(&within(0), &snapshots, &Group::All), ["a", "b", "c"]);
        // Nothing that was not asked for.
        assert!(gone(&Policy::default(), &snapshots, &Group::All).is_empty());
    }

    #[test]
    fn names_and_labels_keep() {
        let snapshots = vec![
            snapshot("v1", 1, None, 1),
            labelled(snapshot("x", 2, None, 2), "env", "prod"),
            labelled(snapshot("y", 3, None, 3), "env", "test"),
        ];
        let policy = Policy {
            keep_tags: vec![Pattern::new("v*").expect("a pattern")],
            keep_labels: vec![("env".to_owned(), "prod".to_owned())],
            ..Policy::default()
        };
        assert_eq!(gone(&policy, &snapshots, &Group::All), ["y"]);
    }

    #[test]
    fn each_group_is_counted_by_itself() {
        let snapshots = vec![
            snapshot("a", 1, None, 1),
            snapshot("b", 2, None, 2),
            snapshot("a1", 3, Some(1), 3),
            snapshot("b1", 4, Some(2), 4),
            snapshot("a2", 5, Some(3), 5),
        ];
        let policy = Policy {
            keep_last: Some(1),
            ..Policy::default()
        };
        assert_eq!(gone(&policy, &snapshots, &Group::Chain), ["a", "b", "a1"]);
        assert_eq!(
            gone(&policy, &snapshots, &Group::All),
            ["a", "b", "a1", "b1"]
        );
        // A parent that is gone begins the chain with its child.
        assert_eq!(gone(&policy, &snapshots[2..], &Group::Chain), ["a1"]);
        let snapshots = vec![
            labelled(snapshot("p1", 1, None, 1), "env", "prod"),
            labelled(snapshot("p2", 2, None, 2), "env", "prod"),
            snapshot("n", 3, None, 3),
        ];
        let by_label = Group::Label("env".to_owned());
        assert_eq!(gone(&policy, &snapshots, &by_label), ["p1"]);
    }

    #[test]
    fn what_has_expired_goes_and_nothing_before() {
        // Day 100 is 1970-04-11.
        let expired = "1970-04-10T00:00:00Z";
        let snapshots = vec![
            labelled(snapshot("old", 1, None, 1), EXPIRES, expired),
            labelled(snapshot("held", 2, None, 2), EXPIRES, expired),
            labelled(
                snapshot("young", 3, None, 3),
                EXPIRES,
                "1970-04-12T00:00:00Z",
            ),
            labelled(snapshot("odd", 4, None, 4), EXPIRES, "soon"),
            snapshot("plain", 5, None, 5),
            labelled(snapshot("new", 6, None, 6), EXPIRES, expired),
        ];
        assert_eq!(
            gone(&Policy::default(), &snapshots, &Group::All),
            ["old", "new"]
        );
        let policy = Policy {
            keep_last: Some(1),
            ..Policy::default()
        };
        // What has expired does not count as one of the last.
        assert_eq!(gone(&policy, &snapshots, &Group::All), ["old", "new"]);
        let policy = Policy {
            keep_last: Some(0),
            ..Policy::default()
        };
        assert_eq!(
            gone(&policy, &snapshots, &Group::All),
            ["old", "plain", "new"]
        );
    }
}
