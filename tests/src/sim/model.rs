//! What the tags of a store may name, whatever order the operations took.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use snapstore_store::SnapshotId;

use super::content::Content;
use super::plan::OpNumber;

/// What a tag names: nothing, or a snapshot that holds this.
pub type Value = Option<Arc<Content>>;

/// One tag.
#[derive(Default, Debug)]
struct TagState {
    /// What it may be, if nobody is changing it.
    possible: Vec<Value>,
    /// What operations under way may make of it.
    pending: Vec<(OpNumber, Vec<Value>)>,
    /// An operation that failed may have left what the next crash takes back.
    unsure: bool,
    /// Counts the operations that changed it, or may have, and are over.
    version: u64,
}

/// All tags, and the snapshots that are known by their ids.
pub struct Model {
    tags: BTreeMap<String, TagState>,
    contents: HashMap<SnapshotId, Arc<Content>>,
    /// The same ids, as they came to be known.
    ids: Vec<SnapshotId>,
}

/// A change under way, by what it began with.
#[derive(Debug)]
pub struct Change {
    op: OpNumber,
    tag: String,
    version: u64,
    values: Vec<Value>,
}

/// The name of a tag.
#[must_use]
pub fn tag_name(tag: u8) -> String {
    format!("t{tag}")
}

impl Model {
    /// A store without tags.
    #[must_use]
    pub fn new() -> Self {
        Self {
            tags: BTreeMap::new(),
            contents: HashMap::new(),
            ids: Vec::new(),
        }
    }

    fn state(&mut self, tag: &str) -> &mut TagState {
        self.tags.entry(tag.to_owned()).or_insert_with(|| TagState {
            possible: vec![None],
            ..TagState::default()
        })
    }

    /// What a tag may be at this moment.
    #[must_use]
    pub fn values(&self, tag: &str) -> Vec<Value> {
        let Some(state) = self.tags.get(tag) else {
            return vec![None];
        };
        let pending = state.pending.iter().flat_map(|(_, values)| values);
        let mut values: Vec<Value> = Vec::new();
        for value in state.possible.iter().chain(pending) {
            if !values.contains(value) {
                values.push(value.clone());
            }
        }
        values
    }

    /// Whether nobody is changing a tag.
    #[must_use]
    pub fn is_at_rest(&self, tag: &str) -> bool {
        self.tags
            .get(tag)
            .is_none_or(|state| state.pending.is_empty())
    }

    /// An operation begins that may set a tag to one of `values`.
    pub fn begin(&mut self, op: OpNumber, tag: &str, values: Vec<Value>) -> Change {
        let state = self.state(tag);
        state.pending.push((op, values.clone()));
        Change {
            op,
            tag: tag.to_owned(),
            version: state.version,
            values,
        }
    }

    /// The operation has ended. `now` is what it may have set the tag to if it has been
    /// acknowledged.
    pub fn end(&mut self, change: Change, now: Option<Vec<Value>>) {
        let state = self.state(&change.tag);
        state.pending.retain(|(op, _)| *op != change.op);
        // Those that began later count as pending until they end.
        let alone = state.version == change.version;
        state.version += 1;
        match now {
            Some(values) if alone => {
                state.possible = values;
                state.unsure = false;
            }
            Some(values) => add(&mut state.possible, values),
            None => {
                add(&mut state.possible, change.values);
                state.unsure = true;
            }
        }
    }

    /// A tag was seen to be this. Returns whether it may.
    pub fn see(&mut self, tag: &str, value: &Value, after_power_cut: bool) -> bool {
        if !self.values(tag).contains(value) {
            return false;
        }
        let state = self.state(tag);
        if after_power_cut || state.pending.is_empty() && !state.unsure {
            state.possible = vec![value.clone()];
            state.unsure = false;
        }
        true
    }

    /// A snapshot of this id was seen to hold this.
    pub fn know(&mut self, id: SnapshotId, content: Arc<Content>) {
        if self.contents.insert(id, content).is_none() {
            self.ids.push(id);
        }
    }

    /// One of the snapshots that were ever seen.
    #[must_use]
    pub fn any(&self, which: u32) -> Option<SnapshotId> {
        let count = self.ids.len().max(1);
        self.ids.get(which as usize % count).copied()
    }

    /// What the snapshot of this id holds, if it was ever seen.
    #[must_use]
    pub fn content(&self, id: SnapshotId) -> Option<Arc<Content>> {
        self.contents.get(&id).cloned()
    }

    /// The tags that were ever used.
    #[must_use]
    pub fn tags(&self) -> Vec<String> {
        self.tags.keys().cloned().collect()
    }
}

impl Default for Model {
    fn default() -> Self {
        Self::new()
    }
}

fn add(possible: &mut Vec<Value>, values: Vec<Value>) {
    for value in values {
        if !possible.contains(&value) {
            possible.push(value);
        }
    }
}
