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
    /// with one exception: of a pack whose header, footer or seal is damaged, the
    /// chunks may still be found. What of it cannot be read has findings of its own.
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
    /// What only a newer version can read, and could not be looked at.
    pub newer: Vec<String>,
    /// The place of each damage among the findings.
    #[serde(skip)]
    known: HashMap<Damage, usize>,
}

impl VerifyReport {
    /// Records damage, and what a newer version wrote; anything else is an error
    /// of the verification itself.
    pub(super) fn add(&mut self, error: Error, tags: &[String]) -> Result<()> {
        self.find(error, tags).map(|_| ())
    }

    /// The same for what keeps a chunk from being read.
    pub(super) fn add_loss(&mut self, error: Error, chunk: ChunkId, tags: &[String]) -> Result<()> {
        let is_of_many = matches!(
            error,
            Error::Damaged(Damage::Footer { .. } | Damage::Pack { .. })
        );
        let chunk = chunk.to_string();
        if let Some(finding) = self.find(error, tags)?
            && is_of_many
            && !finding.chunks.contains(&chunk)
        {
            finding.chunks.push(chunk);
        }
        Ok(())
    }

    fn find(&mut self, error: Error, tags: &[String]) -> Result<Option<&mut Finding>> {
        let damage = match error {
            Error::Damaged(damage) => damage,
            Error::Newer { .. } => {
                let message = error.to_string();
                if !self.newer.contains(&message) {
                    self.newer.push(message);
                }
                return Ok(None);
            }
            Error::Index { path, message } => Damage::Index {
                path,
                reason: message,
            },
            other => return Err(other),
        };
        let position = *self.known.entry(damage.clone()).or_insert_with(|| {
            self.findings.push(Finding {
                damage,
                chunks: Vec::new(),
                snapshots: Vec::new(),
            });
            self.findings.len() - 1
        });
        let finding = &mut self.findings[position];
        for tag in tags {
            if !finding.snapshots.contains(tag) {
                finding.snapshots.push(tag.clone());
            }
        }
        Ok(Some(finding))
    }
}
