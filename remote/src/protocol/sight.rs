//! A view that begins in few rounds of requests, where nothing is in its way: nearly always.
//!
//! ```text
//! 1  list the tag's records
//! 2  write the lease ‖ list leases ‖ read the record ‖ read its head
//! 3  list the tag's records again ‖ list fences
//! ```
//! This keeps the order of the ordinary way. Leases are looked at after the records were seen,
//! fences after the leases. The lease was written before the records are listed
//! again. If these are the same as before, what was judged of them still holds, as long as
//! none is above the one that is viewed: nothing that may have come to count in the meantime could
//! supersede it. In all other cases the view begins anew, in the ordinary way.
//!
//! What is read in the second round may be gone, or go: objects do not change, and the third round
//! tells whether they stay.

use std::collections::BTreeSet;

use crate::protocol::{
    Answer, Ask, AtOnce, Lease, Listed, Listing, RefKey, RefKind, Result, Rule, Unanswered,
    put_surely, tag_prefix,
};

/// What was read with a view.
#[derive(Clone, Debug)]
pub struct Read {
    /// The record.
    pub record: Option<Vec<u8>>,
    /// The head that it names, if it was wanted.
    pub head: Option<Vec<u8>>,
}

/// Begins to view what these records of a tag say, if nothing is in the way. The head is read
/// with them if it is wanted.
pub async fn at_first_sight<B: AtOnce>(
    bucket: &B,
    tag: &str,
    who: &str,
    seen: &[Listed],
    wants_head: bool,
) -> Result<Option<(Lease, RefKey, Read)>> {
    let highest = Listing::from_keys(seen, Vec::new(), &[])
        .highest(tag)
        .cloned();
    let Some(record) = highest.filter(|record| record.kind == RefKind::Set) else {
        return Ok(None);
    };
    let (lease, key, bytes) = Lease::of_view(bucket, record.head, who);
    let (ref_key, head_key) = (record.key(), record.head.head_key());
    let mut asks = vec![
        Ask::Put(&key, &bytes),
        Ask::List("lease/"),
        Ask::Get(&ref_key),
    ];
    if wants_head {
        asks.push(Ask::Get(&head_key));
    }
    let mut answers = bucket.at_once(&asks).await.into_iter();
    let is_written = answers.next().is_some_and(|put| put.is_ok());
    if !is_written && let Err(error) = put_surely(bucket, &key, &bytes).await {
        lease.give_up(bucket).await;
        return Err(error.into());
    }
    match look(bucket, &record, seen, answers).await {
        Ok(Some(read)) => Ok(Some((lease, record, read))),
        Ok(None) => {
            lease.end(bucket).await?;
            Ok(None)
        }
        Err(error) => {
            // One that stays is given up by a collection.
            let _ = lease.end(bucket).await;
            Err(error)
        }
    }
}

/// The third round, after these answers of the second one.
async fn look<B: AtOnce>(
    bucket: &B,
    record: &RefKey,
    seen: &[Listed],
    mut answers: impl Iterator<Item = Result<Answer, Unanswered>>,
) -> Result<Option<Read>> {
    let beats = answers.next().expect("each is answered")?.objects();
    let prefix = tag_prefix(&record.tag);
    let asks = [Ask::List(&prefix), Ask::List("fence/")];
    let mut looked = bucket.at_once(&asks).await.into_iter();
    let mut next = || looked.next().expect("each is answered");
    let (again, fences) = (next()?.objects(), next()?.objects());
    let listing = Listing::from_keys(seen, beats, &fences).judged_without(bucket);
    let stays = keys(seen) == keys(&again) || bucket.is_without(Rule::ViewLooksAgain);
    let is_winner = listing.judge(&record.tag).winner.as_ref() == Some(record);
    if !stays || !is_winner {
        return Ok(None);
    }
    Ok(Some(Read {
        record: answers.next().expect("each is answered")?.bytes(),
        head: match answers.next() {
            Some(head) => head?.bytes(),
            None => None,
        },
    }))
}

fn keys(listed: &[Listed]) -> BTreeSet<&str> {
    listed.iter().map(|one| one.key.as_str()).collect()
}
