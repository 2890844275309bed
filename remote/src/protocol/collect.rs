//! A collection: what no tag and no view needs is condemned, and deleted once nobody can
//! have begun to rely on it. Any number of collections may run at once, and stop
//! anywhere.

use std::collections::{BTreeMap, BTreeSet};

use crate::protocol::heads::Heads;
use crate::protocol::lease::{LeaseRecord, condemnations, is_ended, latest_beats, read_latest};
use crate::protocol::record::{CondemnRecord, fence};
use crate::protocol::void::{Idle, Stays};
use crate::protocol::{
    Bucket, Error, LeaseKind, Listed, Listing, Name, Part, RefKey, Result, Rule, Session, State,
    delete_surely, put_surely,
};

/// The most that one collection condemns. What is left is for the next one.
const MOST_CONDEMNED: usize = 100_000;
/// How often the tags are read until two looks agree.
const LOOKS: u32 = 8;
/// How often a session is asked for.
const WAITS: u32 = 1_000_000;

/// How to collect.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Only say what there is.
    pub dry_run: bool,
}

/// What a collection did.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Collected {
    /// What it deleted, or would.
    pub deleted: Vec<Listed>,
    /// Records of tags that count no more.
    pub records: u64,
    /// Records that never counted, which it removed, or would.
    pub void: Vec<RefKey>,
    /// Records that lead to no snapshot, or are not known to count, and why they stay.
    pub idle: Vec<(RefKey, Stays)>,
    /// The sessions that it gave up; of a dry run, those whose leases are damaged that it would.
    pub fenced: Vec<Session>,
    /// What is needed, in bytes.
    pub kept_bytes: u64,
    /// Why it did not delete all it could.
    pub not_deleted: Option<NotCollected>,
}

impl Collected {
    /// With what another collection did after it.
    pub fn add(&mut self, then: Self) {
        self.deleted.extend(then.deleted);
        self.records += then.records;
        self.void.extend(then.void);
        self.idle = then.idle;
        self.fenced.extend(then.fenced);
        self.kept_bytes = then.kept_bytes;
        self.not_deleted = then.not_deleted;
    }
}

/// Why nothing was deleted.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NotCollected {
    /// Tags were changed faster than they could be read.
    TagsChange,
    /// A push that began before is under way.
    Waits(Session),
}

/// What is needed.
struct Needed {
    parts: BTreeSet<Part>,
    /// The sessions whose leases do not say what they need.
    damaged: Vec<(Session, Listed, Error)>,
}

/// Collects.
///
/// # Errors
/// [`Error::Missing`]: something is missing that no collection deletes; then nothing is
/// deleted. If the bucket did not answer: what was deleted until then was not needed.
pub async fn collect<B: Bucket>(bucket: &B, options: Options) -> Result<Collected> {
    collect_with(bucket, options, &mut Heads::default()).await
}

/// The same where some heads were read already. It reads the others.
pub(crate) async fn collect_with<B: Bucket>(
    bucket: &B,
    options: Options,
    heads: &mut Heads,
) -> Result<Collected> {
    let mut collected = Collected::default();
    let mut there = bucket.list("packs/").await?;
    there.extend(bucket.list("heads/").await?);
    let listing = Listing::of_all(bucket).await?;
    records_are_there(bucket, &listing, &there).await?;
    let needed = Needed::of(bucket, &listing, heads).await?;
    let mut too_young = None;
    for (session, beat, error) in needed.damaged {
        // It may be of a view: such a one has most time.
        if !bucket.is_given_up(session, &beat, true).await {
            too_young = too_young.or(Some(error));
            continue;
        }
        if !options.dry_run {
            let key = session.fence_key();
            put_surely(bucket, &key, &fence(&key)).await?;
        }
        collected.fenced.push(session);
    }
    if let Some(error) = too_young {
        if !options.dry_run {
            end_leases(bucket).await?;
        }
        return Err(error);
    }
    let idle = Idle::of(bucket, &listing, heads).await?;
    if !options.dry_run {
        collected.records = forget_superseded(bucket, &listing).await?;
        idle.forget_void(bucket).await?;
    }
    (collected.void, collected.idle) = (idle.void, idle.stay);
    let mut condemned = BTreeSet::new();
    let mut sizes = BTreeMap::new();
    let at_work = at_work(bucket, &listing, &there).await?;
    for listed in there {
        let Some(part) = Part::parse(&listed.key) else {
            continue;
        };
        if needed.parts.contains(&part) || at_work.contains(&part.session()) {
            collected.kept_bytes += listed.len_bytes;
        } else if condemned.len() < MOST_CONDEMNED {
            condemned.insert(part);
            sizes.insert(part, listed);
        }
    }
    if options.dry_run {
        collected.deleted = sizes.into_values().collect();
        return Ok(collected);
    }
    if !condemned.is_empty() {
        let deleted = delete(bucket, condemned, &mut collected, heads).await?;
        let deleted = deleted.iter().filter_map(|part| sizes.remove(part));
        collected.deleted = deleted.collect();
    } else {
        // Who is silent is in the way of what its tag is.
        let _ = wait_for_pushes(bucket, None, &mut collected).await?;
    }
    end_leases(bucket).await?;
    end_condemnations(bucket).await?;
    Ok(collected)
}

/// That records were not lost altogether. A session without a lease and without a fence
/// ended well, so it wrote a record, and the last record of a tag stays for ever: packs or
/// heads of such a session in a bucket without any record mean that `refs/` was lost, or is
/// not there at the moment.
///
/// # Errors
/// [`Error::Damaged`]; if the bucket did not answer.
pub async fn records_are_there<B: Bucket>(
    bucket: &B,
    listing: &Listing,
    there: &[Listed],
) -> Result<()> {
    if !listing.tags().is_empty() || there.is_empty() {
        return Ok(());
    }
    // A push may have ended between the look at the records and that at the leases.
    let listing = Listing::of_all(bucket).await?;
    let mut parts = there.iter().filter_map(|one| Part::parse(&one.key));
    let ended_well =
        |part: Part| !listing.is_leased(part.session()) && !listing.is_fenced(part.session());
    match listing.tags().is_empty() && parts.any(ended_well) {
        false => Ok(()),
        true => Err(Error::Damaged {
            key: "refs/".to_owned(),
            reason: "all records of tags are missing, though pushes that ended well left packs \
                or heads. Nothing is deleted: put refs/ back, from a copy of the bucket",
        }),
    }
}

/// Condemns, waits, looks, and deletes what nobody needs.
async fn delete<B: Bucket>(
    bucket: &B,
    condemned: BTreeSet<Part>,
    collected: &mut Collected,
    heads: &mut Heads,
) -> Result<Vec<Part>> {
    let own = Name {
        session: bucket.fresh_session(),
        number: 0,
    };
    let early = bucket.is_without(Rule::CondemnedBeforeLeases);
    let mut last = None;
    if early {
        let _ = wait_for_pushes(bucket, Some(own), collected).await?;
    }
    if bucket.is_without(Rule::FenceBeforeLook) {
        last = Some(Listing::of_all(bucket).await?);
    }
    let key = own.condemn_key();
    let record = CondemnRecord { parts: condemned };
    put_surely(bucket, &key, &record.encode(&key)).await?;
    if !early
        && !bucket.is_without(Rule::WaitsForPushes)
        && let Err(waits) = wait_for_pushes(bucket, Some(own), collected).await?
    {
        collected.not_deleted = Some(waits);
        return Ok(Vec::new());
    }
    let listing = match last {
        Some(listing) => listing,
        None => match two_that_agree(bucket).await? {
            Some(listing) => listing,
            None => {
                collected.not_deleted = Some(NotCollected::TagsChange);
                return Ok(Vec::new());
            }
        },
    };
    let needed = Needed::of(bucket, &listing, heads).await?;
    if let Some((_, _, error)) = needed.damaged.into_iter().next() {
        return Err(error);
    }
    let mut parts = record.parts;
    if bucket.is_without(Rule::OwnCondemnedOnly) {
        for listed in bucket.list("packs/").await? {
            parts
                .extend(Part::parse(&listed.key).filter(|part| !listing.is_leased(part.session())));
        }
    }
    let mut deleted = Vec::new();
    for part in parts.difference(&needed.parts) {
        delete_surely(bucket, &part.key()).await?;
        deleted.push(*part);
    }
    Ok(deleted)
}

/// Waits until each push that may not have seen the record has ended or is fenced. If
/// there is no record, only those who are silent are given up.
async fn wait_for_pushes<B: Bucket>(
    bucket: &B,
    own: Option<Name>,
    collected: &mut Collected,
) -> Result<Result<(), NotCollected>> {
    let mut done = BTreeSet::new();
    for _ in 0..WAITS {
        let mut waits_for = None;
        let listed = bucket.list("lease/").await?;
        let fences = bucket.list("fence/").await?;
        let fences: BTreeSet<Session> = fences
            .iter()
            .filter_map(|one| Session::parse_fence(&one.key))
            .collect();
        for session in latest_beats(&listed).into_keys() {
            if done.contains(&session) {
                continue;
            }
            let Some((beat, record)) = read_latest(bucket, session, &listed).await? else {
                done.insert(session);
                continue;
            };
            let record = match record {
                Ok(record) => Some(record),
                // What it was for does not matter any more.
                Err(_) if fences.contains(&session) => None,
                Err(error) => return Err(error),
            };
            let seen = |record: &LeaseRecord| own.is_some_and(|own| record.seen.contains(&own));
            let is_view = match &record {
                Some(record) if record.kind == LeaseKind::Push && seen(record) => continue,
                // A removal relies on nothing.
                Some(record) => matches!(record.kind, LeaseKind::View(_)),
                None => false,
            };
            if fences.contains(&session) && bucket.is_without(Rule::FenceIsWrittenAgain) {
                done.insert(session);
                continue;
            }
            let fenced = fences.contains(&session);
            if !fenced && !bucket.is_given_up(session, &beat, is_view).await {
                if !is_view {
                    waits_for = Some(session);
                }
                continue;
            }
            if bucket.is_without(Rule::SilenceNeedsFence) {
                done.insert(session);
                continue;
            }
            // Also one that somebody else is writing: it may not be there yet.
            let key = session.fence_key();
            put_surely(bucket, &key, &fence(&key)).await?;
            done.insert(session);
            if !fenced {
                collected.fenced.push(session);
            }
        }
        let Some(session) = waits_for.filter(|_| own.is_some()) else {
            return Ok(Ok(()));
        };
        if bucket.is_impatient() {
            return Ok(Err(NotCollected::Waits(session)));
        }
    }
    Ok(Err(NotCollected::TagsChange))
}

/// The tags, at one instant: two looks after each other that find the same. Names are
/// never used again, so what both have was there between them, and what neither has was
/// not, or counted no more.
async fn two_that_agree<B: Bucket>(bucket: &B) -> Result<Option<Listing>> {
    let mut before = Listing::of_all(bucket).await?;
    if bucket.is_without(Rule::TwoLooksAgree) {
        return Ok(Some(before));
    }
    for _ in 0..LOOKS {
        let now = Listing::of_all(bucket).await?;
        if now.agrees_with(&before) {
            return Ok(Some(now));
        }
        before = now;
    }
    Ok(None)
}

/// The sessions that wrote any of this and have not ended: of a lease that is only listed a read
/// tells.
async fn at_work<B: Bucket>(
    bucket: &B,
    listing: &Listing,
    there: &[Listed],
) -> Result<BTreeSet<Session>> {
    let parts = there.iter().filter_map(|one| Part::parse(&one.key));
    let sessions = parts.map(Part::session);
    let leased: BTreeSet<Session> = sessions.filter(|it| listing.is_leased(*it)).collect();
    let mut at_work = BTreeSet::new();
    for session in &leased {
        if !is_ended(bucket, *session, &listing.beats).await? {
            at_work.insert(*session);
        }
    }
    if at_work != leased {
        // Some that ended since the records were listed may have written one before.
        let known = listing.writers();
        for listed in bucket.list("refs/").await? {
            let writer = RefKey::parse(&listed.key).map(|record| record.writer());
            at_work.extend(writer.filter(|it| leased.contains(it) && !known.contains(it)));
        }
    }
    Ok(at_work)
}

impl Needed {
    async fn of<B: Bucket>(bucket: &B, listing: &Listing, heads: &mut Heads) -> Result<Self> {
        let mut parts = BTreeSet::new();
        let mut damaged = Vec::new();
        for record in listing.roots() {
            let settled = listing.state(&record) == State::Settled;
            let packs = heads.packs(bucket, record.head).await?;
            let Some(packs) = packs else {
                if settled && still_counts(bucket, &record).await? {
                    return Err(Error::Missing {
                        key: record.head.head_key(),
                        needed_by: record.key(),
                    });
                }
                continue;
            };
            parts.insert(Part::Head(record.head));
            parts.extend(packs.iter().copied().map(Part::Pack));
        }
        for session in latest_beats(&listing.beats).into_keys() {
            if listing.is_fenced(session) {
                continue;
            }
            let lease = match read_latest(bucket, session, &listing.beats).await? {
                Some((_, Ok(lease))) => lease,
                Some((beat, Err(error))) => {
                    damaged.push((session, beat, error));
                    continue;
                }
                None => continue,
            };
            if let LeaseKind::View(head) = lease.kind
                && let Some(packs) = heads.packs(bucket, head).await?
            {
                parts.insert(Part::Head(head));
                parts.extend(packs.iter().copied().map(Part::Pack));
            }
        }
        Ok(Self { parts, damaged })
    }
}

/// Whether a record counts whose head was not there: it may have been superseded and
/// collected since it was listed.
async fn still_counts<B: Bucket>(bucket: &B, record: &RefKey) -> Result<bool> {
    let listing = Listing::of_tag(bucket, &record.tag).await?;
    Ok(listing.judge(&record.tag).winner.as_ref() == Some(record))
}

/// Deletes records that count no more, oldest first. Those of a tag's last change stay
/// for ever: they are what a late write of an older one is superseded by.
async fn forget_superseded<B: Bucket>(bucket: &B, listing: &Listing) -> Result<u64> {
    let mut forgotten = 0;
    for tag in listing.tags() {
        for record in listing.judge(&tag).superseded.iter().rev() {
            delete_surely(bucket, &record.key()).await?;
            forgotten += 1;
        }
    }
    Ok(forgotten)
}

/// Takes away leases that fences have ended.
async fn end_leases<B: Bucket>(bucket: &B) -> Result<()> {
    let fences = bucket.list("fence/").await?;
    let fences: BTreeSet<Session> = fences
        .iter()
        .filter_map(|one| Session::parse_fence(&one.key))
        .collect();
    let mut ended: BTreeMap<Session, Vec<Listed>> = BTreeMap::new();
    for beat in bucket.list("lease/").await? {
        let session = Session::parse_beat(&beat.key).map(|(session, _)| session);
        if let Some(session) = session.filter(|it| fences.contains(it)) {
            ended.entry(session).or_default().push(beat);
        }
    }
    for (session, beats) in ended {
        // Before the lease goes, though it was listed: somebody else may be writing it, and with
        // neither, what the session wrote would be taken for that of one that ended well.
        let key = session.fence_key();
        put_surely(bucket, &key, &fence(&key)).await?;
        for beat in beats {
            delete_surely(bucket, &beat.key).await?;
        }
        if bucket.is_without(Rule::FenceStays) {
            delete_surely(bucket, &key).await?;
        }
    }
    Ok(())
}

/// Takes away condemnations of what is gone.
async fn end_condemnations<B: Bucket>(bucket: &B) -> Result<()> {
    for (name, record) in condemnations(bucket).await? {
        let mut gone = true;
        for part in &record.parts {
            gone = gone && !bucket.exists(&part.key()).await?;
        }
        if gone || bucket.is_without(Rule::CondemnedForLife) {
            delete_surely(bucket, &name.condemn_key()).await?;
        }
    }
    Ok(())
}
