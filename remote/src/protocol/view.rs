//! A view: a snapshot that stays whole while somebody reads it, whatever becomes of its
//! tag.

use std::collections::BTreeSet;

use crate::protocol::push::confirm;
use crate::protocol::{
    Bucket, Current, Error, Lease, LeaseKind, Listing, RefKey, Result, Rule, State,
};

/// How often a view begins anew because its tag was changed.
const CHANGES: u32 = 4;

/// What keeps a snapshot whole.
pub struct View {
    /// Ends with [`Lease::end`].
    pub lease: Lease,
    /// The record whose head is read.
    pub record: RefKey,
}

/// Begins to view what a tag names.
///
/// # Errors
/// [`Error::NoTag`]; [`Error::TagBusy`] if all that there is is a push under way;
/// [`Error::Ambiguous`]; if the bucket did not answer.
pub async fn view<B: Bucket>(bucket: &B, tag: &str, who: &str) -> Result<View> {
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
            Ok(true) => return Ok(View { lease, record }),
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
