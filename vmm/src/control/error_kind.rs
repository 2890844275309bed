//! The kinds of errors that a client is told.

use serde::{Deserialize, Serialize};

/// The kind of an error, for programs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The request is not one, or does not fit the moment.
    Invalid,
    /// Another client is at it; try again.
    Busy,
    /// The machine has ended.
    Ended,
    /// It could not be done.
    Failed,
}
