//! What the files of working sets may hold. Each set that is recorded is another one, so
//! that it is seen which one is read.

use std::collections::BTreeMap;

use snapstore_store::{Damage, Error, SnapshotId, WorkingSet};

use super::plan::OpNumber;

/// Whose set: an image of a snapshot.
type Whose = (SnapshotId, String);

/// One file.
#[derive(Default)]
struct SetFile {
    /// Every set that was ever written there, or may have been. None of them is flushed, so a
    /// power cut may leave any.
    ever: Vec<WorkingSet>,
    /// What it may hold, if nobody is writing it and if it is there.
    possible: Vec<WorkingSet>,
    /// What those who are writing it may make of it.
    pending: Vec<(OpNumber, WorkingSet)>,
    /// Counts the writings that are over.
    version: u64,
    /// The tag that its snapshot has had ever since it was recorded: nothing may have removed it.
    kept_by: Option<String>,
    /// The power has failed since it was written: half of it may be there.
    torn: bool,
}

/// All files of working sets.
#[derive(Default)]
pub struct Sets {
    files: BTreeMap<Whose, SetFile>,
}

/// A set being written.
pub struct Recording {
    op: OpNumber,
    whose: Whose,
    version: u64,
    set: WorkingSet,
}

impl Sets {
    /// An operation is about to write a set.
    pub fn begin(
        &mut self,
        op: OpNumber,
        id: SnapshotId,
        image: &str,
        set: &WorkingSet,
    ) -> Recording {
        let whose = (id, image.to_owned());
        let file = self.files.entry(whose.clone()).or_default();
        file.pending.push((op, set.clone()));
        file.ever.push(set.clone());
        Recording {
            op,
            whose,
            version: file.version,
            set: set.clone(),
        }
    }

    /// It has written it, or may have. `kept_by` is a tag that keeps it from now on.
    pub fn end(&mut self, recording: Recording, is_written: bool, kept_by: Option<String>) {
        let file = self.files.entry(recording.whose).or_default();
        file.pending.retain(|(op, _)| *op != recording.op);
        let alone = file.version == recording.version;
        file.version += 1;
        if is_written && alone {
            file.possible.clear();
        }
        file.possible.push(recording.set);
        if is_written {
            file.torn = false;
            file.kept_by = kept_by;
        }
    }

    /// A tag is about to be changed: what it keeps may be collected.
    pub fn change_tag(&mut self, tag: &str) {
        for file in self.files.values_mut() {
            file.kept_by.take_if(|kept_by| kept_by == tag);
        }
    }

    /// The power has failed.
    pub fn power_cut(&mut self) {
        for file in self.files.values_mut() {
            file.possible = file.ever.clone();
            file.pending.clear();
            file.kept_by = None;
            file.torn = true;
        }
    }

    /// The images of which a set was ever written.
    pub fn known(&self) -> Vec<Whose> {
        self.files.keys().cloned().collect()
    }

    /// This was read.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn see(
        &mut self,
        id: SnapshotId,
        image: &str,
        found: &Result<Option<WorkingSet>, Error>,
    ) -> Result<(), String> {
        let file = self.files.entry((id, image.to_owned())).or_default();
        match found {
            Ok(None) => match &file.kept_by {
                Some(tag) => Err(format!("{image} of {tag} has none any more")),
                None => {
                    file.possible.clear();
                    Ok(())
                }
            },
            Ok(Some(set)) => {
                let pending = file.pending.iter().map(|(_, set)| set);
                if !file.possible.iter().chain(pending).any(|it| it == set) {
                    return Err(format!(
                        "nobody has recorded {set:?} of {image} of {id} last"
                    ));
                }
                file.torn = false;
                if file.pending.is_empty() {
                    file.possible = vec![set.clone()];
                }
                Ok(())
            }
            // What is torn is as good as none, and is replaced.
            Err(Error::Damaged(Damage::File { .. })) if file.torn => Ok(()),
            Err(error) => Err(error.to_string()),
        }
    }
}
