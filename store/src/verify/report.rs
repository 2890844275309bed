//! What a verification finds.

use std::collections::HashMap;

use crate::error::{Damage, Error, Result};
use crate::id::ChunkId;

/// One damage, and the tags of the snapshots that need what is damaged.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Finding {
    /// What is wrong.
    pub damage: Damage,
    /// The ids of the chunks that snapshots need of what is damaged, if the damage is
    /// of more than one.
    pub chunks: Vec<String>,
    /// Tags of the snapshots that need what is damaged. They cannot be read whole,
    /// with two exceptions: `read_all_the_same`; and of a pack whose header, footer or
    /// seal is damaged, the chunks may still be found. What of it cannot be read has
    /// findings of its own.
    pub snapshots: Vec<String>,
    /// Whether these snapshots lose nothing by it: the bytes that are wrong are none
    /// that a reader needs, or there is another copy.
    pub read_all_the_same: bool,
}

/// What could not be looked at, which is no damage: only a newer version can read it,
/// or this process may not.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct NotChecked {
    /// What it is, and why.
    pub reason: String,
    /// Tags of the snapshots that need it.
    pub snapshots: Vec<String>,
}

/// What a verification looked at and found.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct VerifyReport {
    /// Packs looked at.
    pub packs: u64,
    /// Chunks whose stored bytes were read and checked.
    pub chunks_read: u64,
    /// Bytes of stored chunks that were read.
    pub bytes_read: u64,
    /// Tagged snapshots whose references were all followed.
    pub snapshots: u64,
    /// Entries of the index that lead to no chunk. They are harmless; `gc` and
    /// `repair` remove them.
    pub stale_index_entries: u64,
    /// What is damaged.
    pub findings: Vec<Finding>,
    /// What could not be looked at.
    pub not_checked: Vec<NotChecked>,
    /// The position of each damage among the findings.
    #[serde(skip)]
    known: HashMap<Damage, usize>,
}

impl VerifyReport {
    /// Records damage, and what cannot be read and is none; anything else is an error
    /// of the verification itself.
    pub(super) fn add(&mut self, error: Error, tags: &[String]) -> Result<()> {
        self.find(error, tags).map(|_| ())
    }

    /// The same for damage that keeps no snapshot from being read.
    pub(super) fn add_harmless(&mut self, error: Error, tags: &[String]) -> Result<()> {
        if let Some(finding) = self.find(error, &[])? {
            let nobody_loses = finding.snapshots.is_empty();
            finding.read_all_the_same |= nobody_loses;
            add_new(&mut finding.snapshots, tags);
        }
        Ok(())
    }

    /// The same for what keeps a chunk from being read.
    pub(super) fn add_loss(&mut self, error: Error, chunk: ChunkId, tags: &[String]) -> Result<()> {
        let is_of_many = matches!(
            error,
            Error::Damaged(Damage::Footer { .. } | Damage::Pack { .. })
        );
        let chunk = chunk.to_string();
        if let Some(finding) = self.find(error, tags)? {
            finding.read_all_the_same = false;
            if is_of_many && !finding.chunks.contains(&chunk) {
                finding.chunks.push(chunk);
            }
        }
        Ok(())
    }

    fn find(&mut self, error: Error, tags: &[String]) -> Result<Option<&mut Finding>> {
        let damage = match error {
            Error::Damaged(damage) => damage,
            Error::Newer { .. } | Error::Denied { .. } => {
                self.not_checked(error.to_string(), tags);
                return Ok(None);
            }
            Error::Index { path, message } => Damage::Index {
                path,
                reason: message,
            },
            other => return Err(other),
        };
        let position = *self.known.entry(one_word_for(&damage)).or_insert_with(|| {
            self.findings.push(Finding {
                damage,
                chunks: Vec::new(),
                snapshots: Vec::new(),
                read_all_the_same: false,
            });
            self.findings.len() - 1
        });
        let finding = &mut self.findings[position];
        add_new(&mut finding.snapshots, tags);
        Ok(Some(finding))
    }

    fn not_checked(&mut self, reason: String, tags: &[String]) {
        let mut known = self.not_checked.iter_mut();
        match known.find(|known| known.reason == reason) {
            Some(known) => add_new(&mut known.snapshots, tags),
            None => self.not_checked.push(NotChecked {
                reason,
                snapshots: tags.to_vec(),
            }),
        }
    }
}

/// A damaged chunk is one finding, whatever a reader, the reader of a delta against it,
/// and the look at its pack say is wrong with it.
fn one_word_for(damage: &Damage) -> Damage {
    let mut damage = damage.clone();
    if let Damage::Chunk { reason, .. } = &mut damage {
        *reason = "";
    }
    damage
}

fn add_new(known: &mut Vec<String>, tags: &[String]) {
    for tag in tags {
        if !known.contains(tag) {
            known.push(tag.clone());
        }
    }
}
