//! Landlock: no path leads to a file, or to a socket that is not in the machine's
//! directory; no TCP, and no signal or abstract socket of processes outside. What is
//! open already stays usable.

use std::os::fd::BorrowedFd;

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, PathBeneath, RestrictionStatus, Ruleset,
    RulesetAttr as _, RulesetCreatedAttr as _, RulesetError, RulesetStatus, Scope,
};

use super::refused::refused;
use crate::error::Result;

/// The newest rules that are asked for; an older kernel enforces those that it knows.
const NEWEST: ABI = ABI::V9;

/// Forbids this thread, and those it starts, every file but those under `proc`,
/// which may be read, and sockets but those in `dir`. Tells how much of it this kernel
/// enforces, if any.
pub(super) fn restrict(proc: BorrowedFd<'_>, dir: BorrowedFd<'_>) -> Result<Option<String>> {
    let status = rules(proc, dir)
        .map_err(|error| refused("forbid files with Landlock")(std::io::Error::other(error)))?;
    Ok(match status.ruleset {
        RulesetStatus::FullyEnforced => Some("full".to_owned()),
        RulesetStatus::PartiallyEnforced => Some("partial".to_owned()),
        RulesetStatus::NotEnforced => None,
    })
}

fn rules(proc: BorrowedFd<'_>, dir: BorrowedFd<'_>) -> Result<RestrictionStatus, RulesetError> {
    Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?
        .add_rule(PathBeneath::new(proc, AccessFs::ReadFile))?
        .add_rule(PathBeneath::new(dir, AccessFs::ResolveUnix))?
        .restrict_self()
}
