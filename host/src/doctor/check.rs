//! What a check finds, and the kernel's files that checks look at.

use std::path::Path;

use serde::Serialize;

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
    pub(super) fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self {
            name,
            level: Level::Ok,
            found: found.into(),
            costs: "",
            mend: String::new(),
        }
    }

    pub(super) fn warning(
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

    pub(super) fn error(
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

/// The content of a file of the kernel, without the line's end; none if it has no such
/// file or does not show it.
pub(super) fn read(path: impl AsRef<Path>) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    Some(text.trim().to_owned())
}

/// The same as a number.
pub(super) fn number(path: impl AsRef<Path>) -> Option<u64> {
    read(path)?.parse().ok()
}

/// What is chosen in a file such as `always [madvise] never`.
pub(super) fn chosen(text: &str) -> &str {
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
}
