//! Why a part of a pack could not be read, for all who wait for it.

use snapstore_store::{Error as StoreError, ErrorClass};

use crate::error::Error;
use crate::protocol::{self, Unanswered};

/// Why not.
#[derive(Clone, Debug)]
pub enum Failure {
    /// The bucket did not answer for as long as it was waited for.
    Unanswered(Unanswered),
    /// An object is not what its writer made.
    Damaged {
        /// The object.
        key: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// An object is missing.
    Missing {
        /// The object.
        key: String,
    },
}

impl Failure {
    /// Nobody asked to the end.
    pub fn ended(key: &str) -> Self {
        Self::unanswered(key, "the reading has ended")
    }

    /// Others asked, and have no answer yet.
    pub fn late(key: &str) -> Self {
        Self::unanswered(key, "there is no answer yet")
    }

    fn unanswered(key: &str, reason: &str) -> Self {
        Self::Unanswered(Unanswered {
            what: "read",
            key: key.to_owned(),
            reason: reason.to_owned(),
            wrong: None,
            refused: false,
        })
    }

    /// What a reader of the snapshot with this head is told.
    pub fn told(self, head: &str) -> StoreError {
        let (class, error) = match self {
            Self::Unanswered(error) => (ErrorClass::Io, protocol::Error::Unanswered(error)),
            Self::Damaged { key, reason } => (
                ErrorClass::Damaged,
                protocol::Error::Damaged { key, reason },
            ),
            Self::Missing { key } => (
                ErrorClass::Damaged,
                protocol::Error::Missing {
                    key,
                    needed_by: head.to_owned(),
                },
            ),
        };
        StoreError::Foreign {
            class,
            source: Box::new(Error::Protocol(error)),
        }
    }
}

impl From<Unanswered> for Failure {
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
