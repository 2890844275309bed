//! What a host, a store and a user's machines are like, for a person who asks why
//! something does not work or is slow.
//!
//! Each check looks at one thing, changes nothing and says what it found, what a bad
//! finding costs and what mends it. [`mend_leftovers`] is the only one that changes
//! anything.

mod devices;
mod kernel;
mod leftovers;
mod limits;
mod storage;

use std::path::Path;

use serde::Serialize;

pub use leftovers::mend as mend_leftovers;

/// How a check came out.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// As it should be.
    Ok,
    /// It works, and something is slower, weaker or left over.
    Warning,
    /// Something does not work.
    Error,
}

/// What a check found.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Check {
    /// What was looked at: a short name that stays the same.
    pub name: &'static str,
    /// How it came out.
    pub level: Level,
    /// What was found.
    pub found: String,
    /// What that costs; empty for [`Level::Ok`].
    pub costs: &'static str,
    /// A command, or a setting, that mends it; empty if none does.
    pub mend: String,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self {
            name,
            level: Level::Ok,
            found: found.into(),
            costs: "",
            mend: String::new(),
        }
    }

    fn warning(
        name: &'static str,
        found: impl Into<String>,
        costs: &'static str,
        mend: impl Into<String>,
    ) -> Self {
        Self {
            level: Level::Warning,
            costs,
            mend: mend.into(),
            ..Self::ok(name, found)
        }
    }

    fn error(
        name: &'static str,
        found: impl Into<String>,
        costs: &'static str,
        mend: impl Into<String>,
    ) -> Self {
        Self {
            level: Level::Error,
            ..Self::warning(name, found, costs, mend)
        }
    }
}

/// Looks at everything. The store is looked at if it is there.
#[must_use]
pub fn examine(store: &Path) -> Vec<Check> {
    let mut checks = devices::checks();
    checks.extend(kernel::checks());
    checks.extend(limits::checks());
    checks.extend(storage::checks(store));
    checks.extend(leftovers::checks());
    checks
}

/// The content of a file of the kernel, without the line's end; none if it has no such
/// file or does not show it.
fn read(path: impl AsRef<Path>) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    Some(text.trim().to_owned())
}

/// The same as a number.
fn number(path: impl AsRef<Path>) -> Option<u64> {
    read(path)?.parse().ok()
}

/// What is chosen in a file such as `always [madvise] never`.
fn chosen(text: &str) -> &str {
    let inner = text
        .split_once('[')
        .and_then(|(_, rest)| rest.split_once(']'));
    inner.map_or(text, |(chosen, _)| chosen)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chosen_word_is_in_brackets() {
        assert_eq!(chosen("always [madvise] never"), "madvise");
        assert_eq!(chosen("tsc"), "tsc");
    }

    #[test]
    fn whatever_is_wrong_says_what_it_costs() {
        let dir = tempfile::tempdir().unwrap();
        let checks = examine(&dir.path().join("none"));
        for name in ["kvm", "fuse", "kernel", "store"] {
            assert!(checks.iter().any(|check| check.name == name), "{name}");
        }
        for check in checks {
            assert!(!check.found.is_empty(), "{check:?}");
            assert_eq!(
                check.level == Level::Ok,
                check.costs.is_empty(),
                "{check:?}"
            );
        }
    }
}
