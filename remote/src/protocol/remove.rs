//! Removing a tag: a record that says so, in a session of its own.

use std::collections::BTreeSet;

use crate::protocol::record::RefRecord;
use crate::protocol::{
    Bucket, Current, Error, Lease, LeaseKind, Listing, RefKey, RefKind, Result, Rule, put_surely,
};

/// How often a removal takes another number after another change took the same.
const RIVALS: u32 = 4;

/// Removes a tag, by a record with a number above `above`. What only it needed goes with the next
/// collections.
///
/// # Errors
/// [`Error::NoTag`]; as [`crate::protocol::push`].
pub async fn remove<B: Bucket>(bucket: &B, tag: &str, above: u64, who: &str) -> Result<RefKey> {
    let mut lease = Lease::begin(bucket, LeaseKind::Removal, who).await?;
    match steps(bucket, tag, above, &mut lease).await {
        Ok(record) => {
            bucket.counts(&record);
            lease.end(bucket).await?;
            Ok(record)
        }
        Err(error) => {
            lease.give_up(bucket).await;
            Err(error)
        }
    }
}

async fn steps<B: Bucket>(bucket: &B, tag: &str, above: u64, lease: &mut Lease) -> Result<RefKey> {
    for _ in 0..RIVALS {
        let listing = Listing::of_tag(bucket, tag).await?;
        if listing.current(tag, &BTreeSet::new()) == Current::Absent {
            return Err(Error::NoTag {
                tag: tag.to_owned(),
            });
        }
        let record = RefKey {
            tag: tag.to_owned(),
            seq: listing.next_seq(tag)?.max(above.saturating_add(1)),
            session: lease.session(),
            rev: 0,
            kind: RefKind::Removed,
            head: lease.next_name(),
        };
        let key = record.key();
        let body = RefRecord { snapshot: [0; 32] }.encode(&key);
        put_surely(bucket, &key, &body).await?;
        let session = lease.session();
        let rival = match bucket.is_without(Rule::LooksForOthers) {
            true => None,
            false => Listing::of_tag(bucket, tag).await?.rival(&record).cloned(),
        };
        if bucket.exists(&session.fence_key()).await? && !bucket.is_without(Rule::FenceRefuses) {
            return Err(Error::LeaseLost { session });
        }
        if rival.is_none() {
            return Ok(record);
        }
        let retracted = RefKey {
            rev: 1,
            kind: RefKind::Retracted,
            head: lease.next_name(),
            ..record
        };
        let key = retracted.key();
        let body = RefRecord { snapshot: [0; 32] }.encode(&key);
        put_surely(bucket, &key, &body).await?;
    }
    Err(Error::TagBusy {
        tag: tag.to_owned(),
        session: lease.session(),
    })
}
