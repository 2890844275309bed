//! A repack: what tags need of packs that are only partly needed is written once more, in
//! new packs with new heads, so that a collection can delete the old ones.
//!
//! It is a push by a session of its own, which changes no tag: for each record that counts
//! it writes another one of the same change, with the next REV, a head of its own and the
//! same snapshot. A newer change of the tag has a higher SEQ, so it supersedes this one
//! whenever that is written, and a removal stays one. What is old is left to collections.
//!
//! A repack that was given up leaves records which are fenced, beside those that count: they
//! keep what was stored. The next one confirms them instead of doing the same again.

use std::collections::BTreeSet;

use crate::protocol::push::{confirm, is_counting, write_record};
use crate::protocol::{
    Bucket, Error, Lease, LeaseKind, Listing, RefKey, RefKind, Result, Rule, State, Stored,
};

/// The records whose snapshots are needed, by what a repack may do with them.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Roots {
    /// Those that count: each may be written anew, with other packs.
    pub movable: Vec<RefKey>,
    /// Those that may come to count. What they need stays where it is.
    pub fixed: Vec<RefKey>,
    /// Of these, what is left of repacks that were given up.
    pub cut_off: Vec<RefKey>,
}

impl Roots {
    /// Those of a listing.
    #[must_use]
    pub fn of<B: Bucket>(bucket: &B, listing: &Listing) -> Self {
        let mut roots = Self::default();
        for tag in listing.tags() {
            let judged = listing.judge(&tag);
            let winner = judged.winner.filter(|one| one.kind == RefKind::Set);
            for record in judged.pending {
                if record.kind != RefKind::Set {
                    continue;
                }
                if bucket.is_without(Rule::RepackOfWhatCounts) {
                    roots.movable.push(record);
                    continue;
                }
                let is_same = winner.as_ref().is_some_and(|it| it.is_same_change(&record));
                if is_same && listing.state(&record) == State::Fenced {
                    roots.cut_off.push(record.clone());
                }
                roots.fixed.push(record);
            }
            roots.movable.extend(winner);
        }
        roots
    }
}

/// What happens between lease and records.
pub trait Repacking<B> {
    /// Uploads packs, and for each of these records that it moves a head. All that is new in
    /// them was read from what the record's head needs. What stays where it is it asks
    /// [`crate::protocol::may_reuse`] for.
    async fn store(
        &mut self,
        bucket: &B,
        lease: &mut Lease,
        listing: &Listing,
        records: &[RefKey],
    ) -> Result<Vec<(RefKey, Stored)>>;
}

/// Confirms what repacks have left that were given up: the latest one of each tag. How many.
///
/// # Errors
/// If the bucket did not answer, or something is damaged.
pub async fn finish_cut_off<B: Bucket>(bucket: &B, who: &str) -> Result<u64> {
    if bucket.is_without(Rule::CutOffRepackIsFinished) {
        return Ok(0);
    }
    let listing = Listing::of_all(bucket).await?;
    let mut tags = BTreeSet::new();
    let mut finished = 0;
    for record in Roots::of(bucket, &listing).cut_off {
        // The highest comes first, and supersedes the others.
        if !tags.insert(record.tag.clone()) {
            continue;
        }
        match confirm(bucket, &record, who).await {
            Ok(_) => finished += 1,
            // What it needs is gone, so it is void; or the tag was changed.
            Err(Error::Missing { .. } | Error::Gone { .. } | Error::TagBusy { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(finished)
}

/// Writes these records anew, as far as they count. Those that count now.
///
/// # Errors
/// [`Error::LeaseLost`], [`Error::Gone`], [`Error::Unanswered`], and errors of the work: the
/// tags name what they named before, in the old packs or in the new ones.
pub async fn repack<B: Bucket>(
    bucket: &B,
    records: &[RefKey],
    who: &str,
    work: &mut impl Repacking<B>,
) -> Result<Vec<RefKey>> {
    let mut lease = Lease::begin(bucket, LeaseKind::Push, who).await?;
    match steps(bucket, records, work, &mut lease).await {
        Ok(written) => {
            for record in &written {
                bucket.counts(record);
            }
            lease.end(bucket).await?;
            Ok(written)
        }
        Err(error) => {
            lease.give_up(bucket).await;
            Err(error)
        }
    }
}

async fn steps<B: Bucket>(
    bucket: &B,
    records: &[RefKey],
    work: &mut impl Repacking<B>,
    lease: &mut Lease,
) -> Result<Vec<RefKey>> {
    // They were found before the lease was there. What was changed since then needs other packs:
    // nothing would be lost, since what is reused is looked at, but it would be for nothing.
    let listing = Listing::of_all(bucket).await?;
    let counting = |listing: &Listing, record: &RefKey| {
        bucket.is_without(Rule::RepackOfWhatCounts) || is_counting(listing, record)
    };
    let records: Vec<RefKey> = records
        .iter()
        .filter(|record| counting(&listing, record))
        .cloned()
        .collect();
    if records.is_empty() {
        return Ok(Vec::new());
    }
    let stored = work.store(bucket, lease, &listing, &records).await?;
    let listing = Listing::of_all(bucket).await?;
    let mut written = Vec::new();
    let mut relied = BTreeSet::new();
    for (before, stored) in stored {
        // A change of the tag was there first: what was stored for it is nobody's.
        if !counting(&listing, &before) {
            continue;
        }
        let record = match bucket.is_without(Rule::RepackKeepsNumber) {
            false => RefKey {
                rev: listing.next_rev(&before),
                head: stored.head,
                ..before
            },
            true => RefKey {
                seq: listing.next_seq(&before.tag)?,
                session: lease.session(),
                rev: 0,
                head: stored.head,
                ..before
            },
        };
        write_record(bucket, &record, stored.snapshot).await?;
        relied.extend(stored.relied);
        written.push(record);
        if bucket.is_without(Rule::LeaseOutlivesRecords) {
            lease.end(bucket).await?;
        }
    }
    let session = lease.session();
    if bucket.exists(&session.fence_key()).await? && !bucket.is_without(Rule::FenceRefuses) {
        return Err(Error::LeaseLost { session });
    }
    if relied.is_empty() || bucket.is_without(Rule::RootsAreReadAgain) {
        return Ok(written);
    }
    let listing = Listing::of_all(bucket).await?;
    match relied.iter().find(|root| !is_counting(&listing, root)) {
        Some(root) => Err(Error::Gone { name: root.key() }),
        None => Ok(written),
    }
}
