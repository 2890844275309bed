//! What a commit has met that cannot be read.

use std::collections::BTreeSet;

use crate::error::Error;
use crate::pack::PackNumber;

/// How many things that cannot be read are told.
pub(super) const MAX_NOTES: usize = 16;

/// What a commit has met that cannot be read.
#[derive(Default)]
pub(super) struct Notes {
    pub packs: BTreeSet<PackNumber>,
    pub errors: Vec<Error>,
}
