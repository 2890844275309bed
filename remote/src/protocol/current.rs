//! What the records of a tag say: which one counts, which are needed all the same, and
//! which are superseded.
//!
//! A record supersedes older ones once the session that wrote it has ended well. Whether
//! it has is looked at after the record was seen: first whether its lease is gone, then
//! whether there is a fence. In this order nobody's end is taken for another one's
//! beginning: a lease is there before the record, and goes only after its writer knew
//! that it counts, or after there is a fence. That a lease is there is not believed of a
//! listing alone: what was deleted may still be listed, and then the newest record would not
//! count.

use std::collections::BTreeSet;

use crate::protocol::lease::is_ended;
use crate::protocol::names::tag_prefix;
use crate::protocol::{
    Bucket, Error, Listed, RefKey, RefKind, Result, Rule, Session, latest_beats,
};

/// What is known of the session that wrote a record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// It ended, and no fence is there: the record counts.
    Settled,
    /// It has a lease: the record may come to count, or be taken back.
    Active,
    /// It was fenced: whether it knew that its record counts is not known.
    Fenced,
}

/// Records, and what is known of their writers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Listing {
    /// The records, those that count most first in each tag.
    refs: Vec<RefKey>,
    /// The beats of all leases.
    pub beats: Vec<Listed>,
    leased: BTreeSet<Session>,
    fenced: BTreeSet<Session>,
    fenced_is_settled: bool,
    active_is_settled: bool,
    fenced_is_no_root: bool,
}

/// What a tag is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Current {
    /// Nothing, or it was removed.
    Absent,
    /// This counts.
    Settled(RefKey),
    /// This would count, but for the fence of its writer.
    Fenced(RefKey),
    /// Nothing counts yet: its writer works on it.
    Active(RefKey),
    /// Two that are fenced are of one number.
    Ambiguous,
}

/// The records of a tag, judged.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Judged {
    /// The one that counts.
    pub winner: Option<RefKey>,
    /// Those that may come to count.
    pub pending: Vec<RefKey>,
    /// Those that count no more.
    pub superseded: Vec<RefKey>,
}

impl Listing {
    /// Reads the records of a tag.
    ///
    /// # Errors
    /// If the bucket did not answer.
    pub async fn of_tag<B: Bucket>(bucket: &B, tag: &str) -> Result<Self> {
        Self::of(bucket, &tag_prefix(tag)).await
    }

    /// Reads all records.
    ///
    /// # Errors
    /// If the bucket did not answer.
    pub async fn of_all<B: Bucket>(bucket: &B) -> Result<Self> {
        Self::of(bucket, "refs/").await
    }

    async fn of<B: Bucket>(bucket: &B, prefix: &str) -> Result<Self> {
        let (records, beats, fences);
        let mut ended = BTreeSet::new();
        if bucket.is_without(Rule::LooksInOrder) {
            fences = bucket.list("fence/").await?;
            beats = bucket.list("lease/").await?;
            records = bucket.list(prefix).await?;
        } else {
            records = bucket.list(prefix).await?;
            beats = bucket.list("lease/").await?;
            let writers = records.iter().filter_map(|one| RefKey::parse(&one.key));
            let writers: BTreeSet<Session> = writers.map(|record| record.writer()).collect();
            for session in latest_beats(&beats).into_keys() {
                if writers.contains(&session) && is_ended(bucket, session, &beats).await? {
                    ended.insert(session);
                }
            }
            fences = bucket.list("fence/").await?;
        }
        let mut listing = Self::from_keys(&records, beats, &fences).judged_without(bucket);
        listing.leased.retain(|session| !ended.contains(session));
        Ok(listing)
    }

    /// As the checker judges it that has taken a rule away.
    pub(crate) fn judged_without<B: Bucket>(mut self, bucket: &B) -> Self {
        self.fenced_is_settled = bucket.is_without(Rule::FencedSupersedesNothing);
        self.active_is_settled = bucket.is_without(Rule::ActiveSupersedesNothing);
        self.fenced_is_no_root = bucket.is_without(Rule::FencedIsRoot);
        self
    }

    /// The record of a tag that counts most, if it comes to count.
    pub(crate) fn highest<'a>(&'a self, tag: &'a str) -> Option<&'a RefKey> {
        self.standing(tag).next()
    }

    /// What three listings say.
    pub(crate) fn from_keys(records: &[Listed], beats: Vec<Listed>, fences: &[Listed]) -> Self {
        let mut refs: Vec<RefKey> = records
            .iter()
            .filter_map(|one| RefKey::parse(&one.key))
            .collect();
        refs.sort_by(|one, other| other.cmp(one));
        let lease = |one: &Listed| Some(Session::parse_beat(&one.key)?.0);
        Self {
            refs,
            leased: beats.iter().filter_map(lease).collect(),
            beats,
            fenced: fences
                .iter()
                .filter_map(|one| Session::parse_fence(&one.key))
                .collect(),
            fenced_is_settled: false,
            active_is_settled: false,
            fenced_is_no_root: false,
        }
    }

    /// Whether both looks found the same records, and the same leases and fences of those who
    /// wrote them. Who else came or went, and how often somebody gave a sign of life, is nothing
    /// that a record depends on.
    #[must_use]
    pub fn agrees_with(&self, other: &Self) -> bool {
        let writers = self.writers();
        let mut both = writers.iter();
        self.refs == other.refs
            && both.all(|writer| {
                (self.is_leased(*writer), self.is_fenced(*writer))
                    == (other.is_leased(*writer), other.is_fenced(*writer))
            })
    }

    /// The sessions that wrote its records.
    #[must_use]
    pub fn writers(&self) -> BTreeSet<Session> {
        self.refs.iter().map(RefKey::writer).collect()
    }

    /// The tags that have records.
    #[must_use]
    pub fn tags(&self) -> BTreeSet<String> {
        self.refs.iter().map(|record| record.tag.clone()).collect()
    }

    /// Whether a session has a lease.
    #[must_use]
    pub fn is_leased(&self, session: Session) -> bool {
        self.leased.contains(&session)
    }

    /// Whether a session has a fence.
    #[must_use]
    pub fn is_fenced(&self, session: Session) -> bool {
        self.fenced.contains(&session)
    }

    /// What is known of the session that wrote a record.
    #[must_use]
    pub fn state(&self, record: &RefKey) -> State {
        match (
            self.is_fenced(record.writer()),
            self.is_leased(record.writer()),
        ) {
            (true, _) if self.fenced_is_settled => State::Settled,
            (true, _) => State::Fenced,
            (false, true) if self.active_is_settled => State::Settled,
            (false, true) => State::Active,
            (false, false) => State::Settled,
        }
    }

    /// All records of a tag, those that count most first.
    pub fn records<'a>(&'a self, tag: &'a str) -> impl Iterator<Item = &'a RefKey> {
        self.refs.iter().filter(move |record| record.tag == tag)
    }

    /// Those that were not taken back, which count most first.
    fn standing<'a>(&'a self, tag: &'a str) -> impl Iterator<Item = &'a RefKey> {
        self.records(tag)
            .filter(|record| record.kind != RefKind::Retracted && !self.is_retracted(record))
    }

    fn is_retracted(&self, record: &RefKey) -> bool {
        self.records(&record.tag).any(|other| {
            other.kind == RefKind::Retracted
                && other.is_same_change(record)
                && other.writer() == record.writer()
                && other > record
        })
    }

    /// The number that the next change of a tag takes.
    ///
    /// # Errors
    /// [`Error::Damaged`]: a record has the last one.
    pub fn next_seq(&self, tag: &str) -> Result<u64> {
        let Some(latest) = self.records(tag).next() else {
            return Ok(1);
        };
        latest.seq.checked_add(1).ok_or_else(|| Error::Damaged {
            key: latest.key(),
            reason: "it has the last number that there is, which no host has written. Remove it \
                from the bucket",
        })
    }

    /// The number of the next record of the same change.
    #[must_use]
    pub fn next_rev(&self, record: &RefKey) -> u32 {
        let same = self
            .records(&record.tag)
            .filter(|one| one.is_same_change(record));
        let latest = same.map(|one| one.rev).max();
        latest.map_or(1, |rev| rev.saturating_add(1))
    }

    /// Another change that took the same number, and was not taken back.
    #[must_use]
    pub fn rival(&self, record: &RefKey) -> Option<&RefKey> {
        let standing = self.refs.iter().filter(|other| {
            other.tag == record.tag && other.kind != RefKind::Retracted && !self.is_retracted(other)
        });
        standing
            .into_iter()
            .find(|other| other.seq == record.seq && other.session != record.session)
    }

    /// Judges the records of a tag.
    #[must_use]
    pub fn judge(&self, tag: &str) -> Judged {
        let mut judged = Judged::default();
        let standing: Vec<&RefKey> = self.standing(tag).collect();
        let mut seqs: Vec<u64> = standing.iter().map(|record| record.seq).collect();
        seqs.dedup();
        for seq in seqs {
            let group = || standing.iter().copied().filter(move |one| one.seq == seq);
            let settled = group().find(|one| self.state(one) == State::Settled);
            for record in group() {
                let may_count = match (self.state(record), settled) {
                    (State::Settled, _) => false,
                    (State::Fenced, _) if self.fenced_is_no_root => false,
                    (_, None) => true,
                    (State::Active, Some(settled)) => record > settled,
                    (State::Fenced, Some(settled)) => {
                        record > settled && record.is_same_change(settled)
                    }
                };
                if may_count {
                    judged.pending.push(record.clone());
                }
            }
            if let Some(settled) = settled {
                judged.superseded = self
                    .records(tag)
                    .filter(|one| {
                        one.seq < seq
                            || one.is_same_change(settled)
                                && one.kind == RefKind::Set
                                && *one < settled
                    })
                    .cloned()
                    .collect();
                judged.winner = Some(settled.clone());
                break;
            }
        }
        judged
    }

    /// The highest number of a tag's records that count or may come to count; 0 if there is none.
    pub(crate) fn shown(&self, tag: &str) -> u64 {
        let judged = self.judge(tag);
        let counting = judged.winner.iter().chain(&judged.pending);
        counting.map(|record| record.seq).max().unwrap_or(0)
    }

    /// The number of the removal of a tag, or of what counts; 0 if there is none.
    pub(crate) fn removed(&self, tag: &str) -> u64 {
        let counting = self.judge(tag).winner.map_or(0, |record| record.seq);
        counting.max(self.cut_off_removal(tag).unwrap_or(0))
    }

    /// The records whose snapshots are needed.
    #[must_use]
    pub fn roots(&self) -> Vec<RefKey> {
        let mut roots = Vec::new();
        for tag in self.tags() {
            let judged = self.judge(&tag);
            roots.extend(judged.winner);
            roots.extend(judged.pending);
        }
        roots.retain(|record| record.kind == RefKind::Set);
        roots
    }

    /// The number of the change by which a tag was removed, if nobody knows whether who
    /// removed it was told so. All take the tag for removed then, and what is below it for
    /// nothing.
    #[must_use]
    pub fn cut_off_removal(&self, tag: &str) -> Option<u64> {
        let standing: Vec<&RefKey> = self.standing(tag).collect();
        let mut seqs: Vec<u64> = standing.iter().map(|record| record.seq).collect();
        seqs.dedup();
        for seq in seqs {
            let mut is_fenced = false;
            let mut is_removal = true;
            for record in standing.iter().filter(|record| record.seq == seq) {
                match self.state(record) {
                    State::Settled => return None,
                    State::Active => {}
                    State::Fenced => {
                        is_fenced = true;
                        is_removal &= record.kind == RefKind::Removed;
                    }
                }
            }
            if is_fenced {
                return is_removal.then_some(seq);
            }
        }
        None
    }

    /// What a tag is, where these records are known to have lost what they need.
    #[must_use]
    pub fn current(&self, tag: &str, void: &BTreeSet<RefKey>) -> Current {
        let standing: Vec<&RefKey> = self
            .standing(tag)
            .filter(|record| !void.contains(record))
            .collect();
        let mut seqs: Vec<u64> = standing.iter().map(|record| record.seq).collect();
        seqs.dedup();
        let mut active = None;
        let removed = self.cut_off_removal(tag);
        for seq in seqs {
            let group = || standing.iter().copied().filter(move |one| one.seq == seq);
            if let Some(settled) = group().find(|one| self.state(one) == State::Settled) {
                return match settled.kind {
                    RefKind::Set => Current::Settled(settled.clone()),
                    _ => Current::Absent,
                };
            }
            if removed == Some(seq) {
                // It may have been told to have been removed.
                return Current::Absent;
            }
            let mut fenced = group().filter(|one| self.state(one) == State::Fenced);
            if let Some(first) = fenced.next() {
                return match fenced.all(|other| other.is_same_change(first)) {
                    true => Current::Fenced(first.clone()),
                    false => Current::Ambiguous,
                };
            }
            active = active.or_else(|| group().next().cloned());
        }
        match active {
            Some(record) if record.kind == RefKind::Set => Current::Active(record),
            _ => Current::Absent,
        }
    }
}
