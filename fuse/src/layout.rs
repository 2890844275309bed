//! Other names for a snapshot's files, for programs that look for them under their own.
//!
//! Only a mount shows them: below it, and in a commit of it, every file has its usual name.

use serde::{Deserialize, Serialize};

/// Under which names a mount shows a snapshot's files, and what it shows beside them.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Layout {
    /// What it is called; empty for that of every mount.
    pub name: String,
    /// What a file is called otherwise, and here. No name occurs twice on a side.
    pub renamed: Vec<(String, String)>,
    /// Files that the snapshot does not have, and what is in them.
    pub made: Vec<(String, String)>,
}

impl Layout {
    /// Whether it is that of every mount.
    #[must_use]
    pub fn is_usual(&self) -> bool {
        self.name.is_empty()
    }

    /// What a file is called here.
    #[must_use]
    pub fn shown<'a>(&'a self, usual: &'a str) -> &'a str {
        let mut renamed = self.renamed.iter();
        let found = renamed.find(|(from, _)| from == usual);
        found.map_or(usual, |(_, to)| to)
    }

    /// What it is called otherwise; `None` for the usual name of a file that has another one
    /// here.
    #[must_use]
    pub fn usual<'a>(&'a self, shown: &'a str) -> Option<&'a str> {
        let found = self.renamed.iter().find(|(_, to)| to == shown);
        match found {
            Some((from, _)) => Some(from),
            None if self.renamed.iter().any(|(from, _)| from == shown) => None,
            None => Some(shown),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_there_and_back() {
        let pair = |from: &str, to: &str| (from.to_owned(), to.to_owned());
        let layout = Layout {
            name: "other".to_owned(),
            renamed: vec![pair("memory.bin", "ram"), pair("disk0.img", "disk1.img")],
            made: Vec::new(),
        };
        for (usual, shown) in [
            ("memory.bin", "ram"),
            ("x", "x"),
            ("disk0.img", "disk1.img"),
        ] {
            assert_eq!(layout.shown(usual), shown);
            assert_eq!(layout.usual(shown), Some(usual));
        }
        assert_eq!(layout.usual("memory.bin"), None);
        assert_eq!(layout.usual("disk0.img"), None);
    }
}
