//! What hosts that share a bucket do, request by request.
//!
//! Safety rests on three things only: a key is written once and never used again; a
//! finished write is seen by whatever read begins later; and each host does its own
//! acknowledged write before the read that it decides by. Nothing rests on conditional
//! writes, on clocks, or on an error meaning that something was not done.
//!
//! The code is sequential `async` without a runtime: a product's bucket answers when it
//! is polled, the checker's bucket when its scheduler says so.

mod bucket;
mod collect;
mod current;
mod lease;
mod names;
mod push;
mod record;
mod remove;
mod rule;
pub(crate) mod sealed;
mod view;

pub use bucket::{Bucket, Listed, Unanswered, delete_surely, put_surely};
pub use collect::{Collected, NotCollected, Options, collect, records_are_there};
pub use current::{Current, Judged, Listing, State};
pub(crate) use lease::condemnations;
pub use lease::{Lease, LeaseKind, LeaseRecord, leases};
pub use names::{Name, Part, RefKey, RefKind, Session};
pub use push::{Mode, Pushed, Reuse, Stored, Work, confirm, may_reuse, push};
pub use record::{CondemnRecord, HeadSummary, RefRecord};
pub use remove::remove;
pub use rule::Rule;
pub use sealed::{Malformed, seal, unseal};
pub use view::{View, view};

/// Why something was not done, or is not known to be done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The bucket did not answer. What was asked for may have happened.
    #[error(transparent)]
    Unanswered(Unanswered),
    /// Others declared this session ended, since it was silent for too long.
    #[error(
        "the lease of session {session} was lost: it was silent for too long, and a collection gave it up"
    )]
    LeaseLost {
        /// Whose lease.
        session: Session,
    },
    /// Another push of the tag was there first.
    #[error("tag {tag:?} exists in the remote")]
    TagExists {
        /// The tag.
        tag: String,
    },
    /// Another session is about to change the tag.
    #[error("session {session} is about to change tag {tag:?} in the remote")]
    TagBusy {
        /// The tag.
        tag: String,
        /// Whose lease is there.
        session: Session,
    },
    /// Two pushes that were cut off claim the tag.
    #[error("two pushes of tag {tag:?} were cut off, and nothing says which was first")]
    Ambiguous {
        /// The tag.
        tag: String,
    },
    /// There is no such tag.
    #[error("there is no tag {tag:?} in the remote")]
    NoTag {
        /// The tag.
        tag: String,
    },
    /// What a push was to rely on was removed meanwhile.
    #[error("{name} went away while it was to be used again")]
    Gone {
        /// The object.
        name: String,
    },
    /// Something is missing that no collection deletes.
    #[error("object {key} is missing, and {needed_by} needs it")]
    Missing {
        /// The object.
        key: String,
        /// Who needs it.
        needed_by: String,
    },
    /// An object is not what its writer made.
    #[error("object {key} is damaged: {reason}")]
    Damaged {
        /// The object.
        key: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// An object of a later version.
    #[error("object {key} was made by a newer snapstore (version {version})")]
    Newer {
        /// The object.
        key: String,
        /// Its version.
        version: u32,
    },
    /// What the caller does between the steps of a push failed.
    #[error(transparent)]
    Work(Box<dyn std::error::Error + Send + Sync>),
}

impl From<Unanswered> for Error {
    fn from(error: Unanswered) -> Self {
        match error.wrong {
            Some(reason) => Malformed::Wrong(reason).of(&error.key),
            None => Self::Unanswered(error),
        }
    }
}

/// The result of a step.
pub type Result<T, E = Error> = std::result::Result<T, E>;
