//! A push: a lease, what is stored and what is reused, a record, and a last look.

use std::collections::BTreeSet;

use crate::protocol::record::{HeadSummary, RefRecord};
use crate::protocol::{
    Bucket, Current, Error, Lease, LeaseKind, Listing, Name, Part, RefKey, RefKind, Result, Rule,
    State, put_surely,
};

/// How often a push takes another number after another one took the same.
const RIVALS: u32 = 4;

/// What a push does to its tag.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Mode {
    /// It is new. Pushing what it names already succeeds.
    New,
    /// Whatever it named, it names this now, and what it names is whole.
    Replace,
    /// The same change once more, of a writer that was fenced.
    Confirm(RefKey),
    /// The same change once more, with other packs.
    Repack(RefKey),
}

/// What the work between the steps has stored. All of it was acknowledged.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Stored {
    /// The snapshot.
    pub snapshot: [u8; 32],
    /// Its head.
    pub head: Name,
    /// Records on whose word condemned packs were reused.
    pub relied: BTreeSet<RefKey>,
}

/// A push that counts.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Pushed {
    /// By this record.
    Now(RefKey),
    /// The tag named the snapshot before. Where it was to be replaced, all that it needs was
    /// looked at.
    Already(RefKey),
}

/// What happens between lease and record.
pub trait Work<B> {
    /// Uploads what is missing: packs, then the head. What it reuses it asks
    /// [`may_reuse`] for.
    async fn store(&mut self, bucket: &B, lease: &mut Lease) -> Result<Stored>;

    /// Whether what is seen of the tag is older than what was seen before: then it is looked at
    /// again. An error once that is so for too long.
    fn is_older(&self, _listing: &Listing) -> Result<bool> {
        Ok(false)
    }

    /// A record of the tag has a higher number than this one.
    fn above(&self) -> u64 {
        0
    }

    /// Whether all that this record of the snapshot needs is there and as it was written.
    /// Asked where a tag that is to be replaced names the snapshot already; if not,
    /// [`Work::store`] reuses nothing but what it has looked at.
    async fn is_whole(
        &mut self,
        _bucket: &B,
        _lease: &mut Lease,
        _record: &RefKey,
    ) -> Result<bool> {
        Ok(false)
    }
}

/// Whether a push may rely on a pack that is there already: it exists, and is not
/// condemned, or this root has it. The root is then one of [`Stored::relied`].
///
/// # Errors
/// If the bucket did not answer.
pub async fn may_reuse<B: Bucket>(
    bucket: &B,
    lease: &Lease,
    listing: &Listing,
    pack: Name,
    root: Option<&RefKey>,
) -> Result<Reuse> {
    if !bucket.is_without(Rule::ReusedExists) && !bucket.exists(&pack.pack_key()).await? {
        return Ok(Reuse::No);
    }
    if !lease.is_condemned(Part::Pack(pack)) || bucket.is_without(Rule::CondemnedIsNotUsed) {
        return Ok(Reuse::Yes);
    }
    let settled = |root: &&RefKey| match listing.state(root) {
        State::Settled => true,
        State::Active => bucket.is_without(Rule::RootIsSettled),
        State::Fenced => false,
    };
    Ok(match root.filter(settled) {
        Some(root) => Reuse::OnTheWordOf(root.clone()),
        None => Reuse::No,
    })
}

/// Whether something may be reused.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Reuse {
    /// It may not.
    No,
    /// It may.
    Yes,
    /// It may if this record still counts in the end.
    OnTheWordOf(RefKey),
}

/// Pushes a snapshot under a tag. What it returns is durable, and is what everybody
/// sees who reads the tag from then on, until it is changed.
///
/// # Errors
/// [`Error::TagExists`], [`Error::TagBusy`], [`Error::LeaseLost`], [`Error::Gone`]: the
/// tag does not name the snapshot on this push's word. [`Error::Unanswered`]: nothing is
/// known; pushing again finds out. Errors of the work.
pub async fn push<B: Bucket>(
    bucket: &B,
    tag: &str,
    mode: &Mode,
    snapshot: [u8; 32],
    who: &str,
    work: &mut impl Work<B>,
) -> Result<Pushed> {
    let mut lease = Lease::begin(bucket, LeaseKind::Push, who).await?;
    let pushed = steps(bucket, tag, mode, snapshot, work, &mut lease).await;
    match pushed {
        Ok(pushed) => {
            if let Pushed::Now(record) = &pushed {
                bucket.counts(record);
            }
            // Until the lease is gone nobody else knows that it counts.
            lease.end(bucket).await?;
            Ok(pushed)
        }
        Err(Error::Unanswered(error)) if bucket.is_without(Rule::ErrorIsUnknown) => {
            let _ = lease.end(bucket).await;
            Err(error.into())
        }
        Err(error) => {
            lease.give_up(bucket).await;
            Err(error)
        }
    }
}

async fn steps<B: Bucket>(
    bucket: &B,
    tag: &str,
    mode: &Mode,
    snapshot: [u8; 32],
    work: &mut impl Work<B>,
    lease: &mut Lease,
) -> Result<Pushed> {
    let mut listing = Listing::of_tag(bucket, tag).await?;
    while work.is_older(&listing)? {
        listing = Listing::of_tag(bucket, tag).await?;
    }
    if let Some(record) = check_free(bucket, &listing, tag, mode, snapshot).await?
        && (*mode != Mode::Replace || work.is_whole(bucket, lease, &record).await?)
    {
        return Ok(Pushed::Already(record));
    }
    let stored = work.store(bucket, lease).await?;
    for _ in 0..RIVALS {
        let listing = Listing::of_tag(bucket, tag).await?;
        // What is replaced may be damaged, which what was stored is not.
        if let Some(record) = check_free(bucket, &listing, tag, mode, snapshot).await?
            && *mode != Mode::Replace
        {
            return Ok(Pushed::Already(record));
        }
        let record = match mode {
            Mode::New | Mode::Replace => RefKey {
                tag: tag.to_owned(),
                seq: listing.next_seq(tag)?.max(work.above().saturating_add(1)),
                session: lease.session(),
                rev: 0,
                kind: RefKind::Set,
                head: stored.head,
            },
            Mode::Confirm(before) | Mode::Repack(before) => RefKey {
                rev: listing.next_rev(before),
                head: stored.head,
                ..before.clone()
            },
        };
        write_record(bucket, &record, stored.snapshot).await?;
        let rival = last_look(bucket, lease, &record, &stored, mode).await?;
        let Some(rival) = rival else {
            return Ok(Pushed::Now(record));
        };
        let retracted = RefKey {
            rev: record.rev.saturating_add(1),
            kind: RefKind::Retracted,
            head: lease.next_name(),
            ..record
        };
        write_record(bucket, &retracted, [0; 32]).await?;
        let tag = tag.to_owned();
        match mode {
            Mode::New if lease.session() < rival.session => return Err(Error::TagExists { tag }),
            Mode::Confirm(_) => {
                let session = rival.session;
                return Err(Error::TagBusy { tag, session });
            }
            _ => {}
        }
    }
    Err(Error::TagBusy {
        tag: tag.to_owned(),
        session: lease.session(),
    })
}

pub(super) async fn write_record<B: Bucket>(
    bucket: &B,
    record: &RefKey,
    snapshot: [u8; 32],
) -> Result<()> {
    let key = record.key();
    Ok(put_surely(bucket, &key, &RefRecord { snapshot }.encode(&key)).await?)
}

/// Whether the record counts, now that it is there. A rival, if there is one.
async fn last_look<B: Bucket>(
    bucket: &B,
    lease: &Lease,
    record: &RefKey,
    stored: &Stored,
    mode: &Mode,
) -> Result<Option<RefKey>> {
    if !matches!(mode, Mode::Repack(_)) && !bucket.is_without(Rule::LooksForOthers) {
        let listing = Listing::of_tag(bucket, &record.tag).await?;
        if let Some(rival) = listing.rival(record) {
            return Ok(Some(rival.clone()));
        }
    }
    let session = lease.session();
    if bucket.exists(&session.fence_key()).await? && !bucket.is_without(Rule::FenceRefuses) {
        return Err(Error::LeaseLost { session });
    }
    if bucket.is_without(Rule::RootsAreReadAgain) {
        return Ok(None);
    }
    for root in &stored.relied {
        let listing = Listing::of_tag(bucket, &root.tag).await?;
        let unfenced = bucket.is_without(Rule::RootIsSettled)
            && listing.state(root) == State::Active
            && listing.judge(&root.tag).pending.contains(root);
        if listing.judge(&root.tag).winner.as_ref() != Some(root) && !unfenced {
            return Err(Error::Gone { name: root.key() });
        }
    }
    Ok(None)
}

/// Whether the tag can be changed so. The record that names the snapshot already.
async fn check_free<B: Bucket>(
    bucket: &B,
    listing: &Listing,
    tag: &str,
    mode: &Mode,
    snapshot: [u8; 32],
) -> Result<Option<RefKey>> {
    let current = listing.current(tag, &BTreeSet::new());
    let wrong = |tag: &str| Error::TagExists {
        tag: tag.to_owned(),
    };
    if *mode == Mode::New {
        // What may come to count is in the way, but for what is left of a push of the
        // same that was cut off.
        let judged = listing.judge(tag);
        // What is below a removal is nothing to anybody, though collections keep it.
        let removed = listing.cut_off_removal(tag);
        let stands = |one: &RefKey| one.kind == RefKind::Set && removed < Some(one.seq);
        let before = judged.winner.filter(stands);
        if let Some(before) = before {
            return match snapshot_of(bucket, &before).await? == Some(snapshot) {
                true => Ok(Some(before)),
                false => Err(wrong(tag)),
            };
        }
        let pending = judged.pending;
        for record in pending.iter().filter(|one| stands(one)) {
            let fenced = listing.state(record) == State::Fenced;
            if fenced && !bucket.exists(&record.head.head_key()).await? {
                // It is void.
                continue;
            }
            if snapshot_of(bucket, record).await? != Some(snapshot) {
                return Err(match listing.state(record) {
                    State::Active => Error::TagBusy {
                        tag: tag.to_owned(),
                        session: record.writer(),
                    },
                    _ => wrong(tag),
                });
            }
        }
    }
    match (mode, current) {
        (Mode::New, Current::Settled(record)) => match snapshot_of(bucket, &record).await? {
            Some(named) if named == snapshot => Ok(Some(record)),
            _ => Err(wrong(tag)),
        },
        (Mode::Replace, Current::Settled(record)) => match snapshot_of(bucket, &record).await {
            // Whatever it said, this is said from now on.
            Err(Error::Damaged { .. }) => Ok(None),
            named => Ok((named? == Some(snapshot)).then_some(record)),
        },
        (Mode::New, Current::Ambiguous) => Err(wrong(tag)),
        (Mode::New | Mode::Replace, _) => Ok(None),
        // Those above it may be void.
        (Mode::Confirm(record), _) if listing.judge(tag).pending.contains(record) => Ok(None),
        (Mode::Repack(record), Current::Settled(current)) if *record == current => Ok(None),
        (Mode::Confirm(record) | Mode::Repack(record), _) => {
            Err(Error::Gone { name: record.key() })
        }
    }
}

/// Whether a record is the one that counts of its tag.
pub(super) fn is_counting(listing: &Listing, record: &RefKey) -> bool {
    listing.judge(&record.tag).winner.as_ref() == Some(record)
}

async fn snapshot_of<B: Bucket>(bucket: &B, record: &RefKey) -> Result<Option<[u8; 32]>> {
    let key = record.key();
    let Some(bytes) = bucket.get(&key).await? else {
        return Ok(None);
    };
    let decoded = RefRecord::decode(&key, &bytes).map_err(|error| error.of(&key))?;
    Ok(Some(decoded.snapshot))
}

/// Writes the record of a writer that was fenced once more, in a session of its own, so
/// that it counts.
///
/// # Errors
/// As [`push`]. [`Error::Missing`]: what it needs was collected, so its writer never
/// knew that it counts, and it is void.
pub async fn confirm<B: Bucket>(bucket: &B, record: &RefKey, who: &str) -> Result<RefKey> {
    let head_key = record.head.head_key();
    let missing = |key: String| Error::Missing {
        key,
        needed_by: record.key(),
    };
    let bytes = bucket.get(&head_key).await?;
    let bytes = bytes.ok_or_else(|| missing(head_key.clone()))?;
    let mut again = Again {
        record,
        head_key: &head_key,
        bytes: &bytes,
    };
    let (summary, _) =
        HeadSummary::decode(&head_key, &bytes).map_err(|error| error.of(&head_key))?;
    let mode = Mode::Confirm(record.clone());
    let pushed = push(
        bucket,
        &record.tag,
        &mode,
        summary.snapshot,
        who,
        &mut again,
    )
    .await?;
    match pushed {
        Pushed::Now(record) | Pushed::Already(record) => Ok(record),
    }
}

struct Again<'a> {
    record: &'a RefKey,
    head_key: &'a str,
    bytes: &'a [u8],
}

impl<B: Bucket> Work<B> for Again<'_> {
    async fn store(&mut self, bucket: &B, lease: &mut Lease) -> Result<Stored> {
        let decoded = HeadSummary::decode(self.head_key, self.bytes);
        let (mut summary, rest) = decoded.map_err(|error| error.of(self.head_key))?;
        let listing = Listing::of_tag(bucket, &self.record.tag).await?;
        for pack in &mut summary.packs {
            if may_reuse(bucket, lease, &listing, *pack, None).await? == Reuse::Yes {
                continue;
            }
            // Condemned, and there all the same: what is condemned stays so, its copy
            // is not.
            let key = pack.pack_key();
            let Some(bytes) = bucket.get(&key).await? else {
                let needed_by = self.record.key();
                return Err(Error::Missing { key, needed_by });
            };
            // A copy takes as long as the pack is large.
            lease.beat(bucket).await?;
            let copy = lease.next_name();
            put_surely(bucket, &copy.pack_key(), &bytes).await?;
            for (_, to) in &mut summary.moved {
                if to == pack {
                    *to = copy;
                }
            }
            summary.moved.push((*pack, copy));
            *pack = copy;
        }
        let head = lease.next_name();
        let key = head.head_key();
        put_surely(bucket, &key, &summary.encode(&key, rest)).await?;
        Ok(Stored {
            snapshot: summary.snapshot,
            head,
            relied: BTreeSet::new(),
        })
    }
}
