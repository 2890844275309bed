//! Landlock: no path leads to a file, no TCP, and no signal or abstract socket of
//! processes outside. What is open already stays usable.

use std::os::fd::BorrowedFd;

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, PathBeneath, RestrictionStatus, Ruleset,
    RulesetAttr as _, RulesetCreatedAttr as _, RulesetError, RulesetStatus, Scope,
};

use super::refused;
use crate::error::Result;

/// The newest rules that are asked for; an older kernel enforces those that it knows.
const NEWEST: ABI = ABI::V7;

/// Forbids this thread, and those it starts, every file but those under `proc`,
/// which may be read. Tells how much of it this kernel enforces, if any.
pub(super) fn restrict(proc: BorrowedFd<'_>) -> Result<Option<String>> {
    let status = rules(proc)
        .map_err(|error| refused("forbid files with Landlock")(std::io::Error::other(error)))?;
    Ok(match status.ruleset {
        RulesetStatus::FullyEnforced => Some("full".to_owned()),
        RulesetStatus::PartiallyEnforced => Some("partial".to_owned()),
        RulesetStatus::NotEnforced => None,
    })
}

fn rules(proc: BorrowedFd<'_>) -> Result<RestrictionStatus, RulesetError> {
    Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?
        .add_rule(PathBeneath::new(proc, AccessFs::ReadFile))?
        .restrict_self()
}
