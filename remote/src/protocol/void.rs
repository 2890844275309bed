//! Records that lead to no snapshot: which of them a collection forgets, and why the others
//! stay.
//!
//! A record is **void** if its writer was fenced and what it needs is gone. Nobody was ever
//! told that it counts, or it was superseded meanwhile. For what it needs was there before it,
//! and goes only by a collection whose last look, after the fences, found nothing that needs it
//! (R5 to R7): so the record was written after the fence, which its writer looks for once it is
//! there, and before anybody is told. It supersedes nothing, so without it nothing older comes
//! to count. A late write brings it back: the fence is still there, so it is as void as before,
//! and the next collection forgets it again.
//!
//! Where what it needs was lost otherwise, so is what a push had done whose writer was told
//! nothing; readers take it for void, too.
//!
//! What is not void may be what somebody was told of, or what keeps a late write from counting.

use std::collections::BTreeSet;

use crate::protocol::heads::Heads;
use crate::protocol::record::fence;
use crate::protocol::{
    Bucket, Listing, RefKey, RefKind, Result, Rule, State, delete_surely, put_surely,
};

/// Why a record stays though no snapshot is known to be meant by it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stays {
    /// It says that the tag was removed.
    Removed,
    /// A removal that was cut off.
    CutOffRemoval,
    /// A push that was cut off, all of which is there.
    CutOffPush,
    /// It takes back another one.
    TakenBack,
}

impl Stays {
    /// The same for people.
    #[must_use]
    pub fn why(self) -> &'static str {
        match self {
            Self::Removed => "late writes of what the tag was before count for nothing beside it",
            Self::CutOffRemoval => {
                "who removed the tag may have been told so; the tag's next push takes its place"
            }
            Self::CutOffPush => {
                "all that it needs is there, so its writer may have been told that it counts; \
                 the next read of the tag confirms it, and `push --replace` or `remote rm` takes \
                 its place"
            }
            Self::TakenBack => {
                "a late write of the record that it takes back counts for nothing beside it; the \
                 tag's next change takes its place"
            }
        }
    }
}

/// What there is of both.
#[derive(Debug, Default)]
pub(crate) struct Idle {
    pub void: Vec<RefKey>,
    pub stay: Vec<(RefKey, Stays)>,
}

impl Idle {
    /// Looks at all records that a listing has and that are not superseded.
    pub async fn of<B: Bucket>(bucket: &B, listing: &Listing, heads: &mut Heads) -> Result<Self> {
        let mut idle = Self::default();
        for tag in listing.tags() {
            let judged = listing.judge(&tag);
            let removed = judged.winner.filter(|it| it.kind == RefKind::Removed);
            idle.stay.extend(removed.map(|it| (it, Stays::Removed)));
            let superseded: BTreeSet<&RefKey> = judged.superseded.iter().collect();
            let taken_back = listing
                .records(&tag)
                .filter(|it| it.kind == RefKind::Retracted && !superseded.contains(it));
            let taken_back = taken_back.map(|it| (it.clone(), Stays::TakenBack));
            idle.stay.extend(taken_back);
            for record in judged.pending {
                if listing.state(&record) != State::Fenced {
                    continue;
                }
                if record.kind == RefKind::Removed {
                    idle.stay.push((record, Stays::CutOffRemoval));
                } else if is_void(bucket, &record, heads).await? {
                    idle.void.push(record);
                } else {
                    idle.stay.push((record, Stays::CutOffPush));
                }
            }
        }
        Ok(idle)
    }

    /// Removes the void ones.
    pub async fn forget_void<B: Bucket>(&self, bucket: &B) -> Result<()> {
        for record in &self.void {
            // The fence that was seen may be one that somebody is writing. Without it a late
            // write of the record would come to count.
            let key = record.writer().fence_key();
            put_surely(bucket, &key, &fence(&key)).await?;
            delete_surely(bucket, &record.key()).await?;
        }
        Ok(())
    }
}

/// Whether something is gone that the record of a fenced writer needs.
async fn is_void<B: Bucket>(bucket: &B, record: &RefKey, heads: &mut Heads) -> Result<bool> {
    if bucket.is_without(Rule::ForgottenIsVoid) {
        return Ok(true);
    }
    let Some(packs) = heads.packs(bucket, record.head).await? else {
        return Ok(true);
    };
    for pack in packs {
        if !bucket.exists(&pack.pack_key()).await? {
            return Ok(true);
        }
    }
    Ok(false)
}
