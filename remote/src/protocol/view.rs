//! A view: a snapshot that stays whole while somebody reads it, whatever becomes of its
//! tag.

use std::collections::BTreeSet;

use crate::protocol::push::confirm;
use crate::protocol::sight::{Read, at_first_sight};
use crate::protocol::{
    AtOnce, Bucket, Current, Error, Lease, LeaseKind, Listed, Listing, RefKey, Result, Rule, State,
    tag_prefix,
};

/// How often a view begins anew because its tag was changed.
const CHANGES: u32 = 4;

/// What keeps a snapshot whole.
pub struct View {
    /// Ends with [`Lease::end`].
    pub lease: Lease,
    /// The record whose head is read.
    pub record: RefKey,
    /// What was read of both meanwhile.
    pub read: Option<Read>,
}

/// Begins to view what a tag names.
///
/// # Errors
/// [`Error::NoTag`]; [`Error::TagBusy`] if all that there is is a push under way;
/// [`Error::Ambiguous`]; if the bucket did not answer.
pub async fn view<B: AtOnce>(bucket: &B, tag: &str, who: &str) -> Result<View> {
    let seen = bucket.list(&tag_prefix(tag)).await?;
    view_seen(bucket, tag, who, &seen, false).await
}

/// The same where the tag's records were just listed. The head is read meanwhile if it is
/// wanted.
///
/// # Errors
/// As [`view`].
pub async fn view_seen<B: AtOnce>(
    bucket: &B,
    tag: &str,
    who: &str,
    seen: &[Listed],
    wants_head: bool,
) -> Result<View> {
    match at_first_sight(bucket, tag, who, seen, wants_head).await? {
        Some((lease, record, read)) => Ok(View {
            lease,
            record,
            read: Some(read),
        }),
        None => view_slowly(bucket, tag, who).await,
    }
}

/// Step by step, whatever the tag's records are.
async fn view_slowly<B: Bucket>(bucket: &B, tag: &str, who: &str) -> Result<View> {
    let mut void = BTreeSet::new();
    for _ in 0..CHANGES {
        let listing = Listing::of_tag(bucket, tag).await?;
        let record = match listing.current(tag, &void) {
            Current::Settled(record) => record,
            Current::Fenced(record) if bucket.is_without(Rule::FencedIsConfirmed) => record,
            Current::Fenced(record) => match confirm(bucket, &record, who).await {
                Ok(confirmed) => confirmed,
                Err(Error::Missing { .. }) => {
                    void.insert(record);
                    continue;
                }
                Err(error) => return Err(error),
            },
            Current::Active(record) => {
                return Err(Error::TagBusy {
                    tag: tag.to_owned(),
                    session: record.writer(),
                });
            }
            Current::Absent => {
                return Err(Error::NoTag {
                    tag: tag.to_owned(),
                });
            }
            Current::Ambiguous => {
                return Err(Error::Ambiguous {
                    tag: tag.to_owned(),
                });
            }
        };
        let lease = Lease::begin(bucket, LeaseKind::View(record.head), who).await?;
        match is_root_still(bucket, &record).await {
            Ok(true) => {
                return Ok(View {
                    lease,
                    record,
                    read: None,
                });
            }
            Ok(false) => lease.end(bucket).await?,
            Err(error) => {
                let _ = lease.end(bucket).await;
                return Err(error);
            }
        }
    }
    Err(Error::Gone {
        name: format!("what tag {tag:?} names"),
    })
}

/// Whether the record counts, now that the lease is there: a collection that has not
/// seen the lease has seen the record.
async fn is_root_still<B: Bucket>(bucket: &B, record: &RefKey) -> Result<bool> {
    if bucket.is_without(Rule::ViewLooksAgain) {
        return Ok(true);
    }
    let listing = Listing::of_tag(bucket, &record.tag).await?;
    let confirmed = bucket.is_without(Rule::FencedIsConfirmed)
        && listing.state(record) == State::Fenced
        && listing.judge(&record.tag).pending.contains(record);
    Ok(confirmed || listing.judge(&record.tag).winner.as_ref() == Some(record))
}
