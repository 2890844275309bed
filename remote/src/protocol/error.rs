//! What can go wrong in the protocol, one variant a kind of cause.

use super::bucket::Unanswered;
use super::names::Session;

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
    /// A tag has no record any more that was seen before.
    #[error(
        "the bucket shows an older record of tag {tag:?} than was seen before ({}, seen number {seen}): \
         the newer one was deleted, or a listing lags",
        shown_number(*shown)
    )]
    RolledBack {
        /// The tag.
        tag: String,
        /// The number of the record that is there, 0 for none.
        shown: u64,
        /// The highest one that was seen.
        seen: u64,
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

fn shown_number(shown: u64) -> String {
    match shown {
        0 => "none".to_owned(),
        shown => format!("number {shown}"),
    }
}

impl From<Unanswered> for Error {
    fn from(error: Unanswered) -> Self {
        match error.wrong {
            Some(reason) => Self::Damaged {
                key: error.key,
                reason,
            },
            None => Self::Unanswered(error),
        }
    }
}

/// The result of a step.
pub type Result<T, E = Error> = std::result::Result<T, E>;
