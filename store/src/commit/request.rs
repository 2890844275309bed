//! What a commit is asked for as a whole: what may go together in a snapshot, and
//! what of the parent goes along.

use std::collections::{BTreeMap, BTreeSet};

use crate::commit::input::Input;
use crate::commit::unchanging::Unchanging;
use crate::error::{Error, Result};
use crate::format::config::StoreFormat;
use crate::id::SnapshotId;
use crate::manifest::{
    Image, ImageRole, MAX_IMAGES, MAX_LABELS, MAX_LEN, Manifest, SHOWN_AS, TOO_MANY_IMAGES,
};
use crate::name;

/// Which snapshot a new one is made from.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum ParentChoice {
    /// The tag's present snapshot if there is one, else the recent snapshot
    /// that the memory is most like, if it is like any.
    #[default]
    Automatic,
    /// This tag, or the id of a tagged snapshot.
    Named(String),
    /// This snapshot, which the caller (or anybody else) keeps whole with a
    /// [`Pin`](crate::Pin) until the commit has begun to read its inputs, or which is tagged.
    Pinned(SnapshotId),
    /// None: the snapshot begins a chain.
    Nothing,
}

/// What to commit.
#[derive(Clone, Debug, Default)]
pub struct CommitRequest {
    /// The tag that will name the snapshot.
    pub tag: String,
    /// Whether an existing tag may be moved.
    pub replace: bool,
    /// What it is made from.
    pub parent: ParentChoice,
    /// Its images.
    pub inputs: Vec<Input>,
    /// Whether the parent's memory and disks that are not among the inputs are
    /// carried over. They always are if one of the inputs is a diff. Attached files
    /// never are: they describe the parent.
    pub inherit: bool,
    /// Files that must not change until the snapshot is set, such as one that a
    /// machine's disk lies over. Files that are inputs are watched anyway.
    pub unchanging: Vec<Unchanging>,
    /// Labels for people and programs.
    pub labels: BTreeMap<String, String>,
    /// Whether the new snapshot is pinned before its tag can be seen, so that
    /// nobody can remove the tag and collect the snapshot before the caller has
    /// pinned it.
    pub keep: bool,
}

impl CommitRequest {
    /// Refuses what can be seen to be wrong before anything is read. Every commit
    /// begins with that.
    ///
    /// # Errors
    /// [`Error::BadName`] and [`Error::DuplicateName`] for names of tags, images and
    /// labels; [`Error::BadSnapshot`] for too many images or too long labels.
    pub fn check(&self) -> Result<()> {
        check(self)
    }
}

fn check(request: &CommitRequest) -> Result<()> {
    name::check_new_tag(&request.tag)?;
    let mut seen = BTreeSet::new();
    let mut shown = BTreeSet::new();
    for input in &request.inputs {
        name::check_image(&input.name)?;
        let file = match input.role {
            ImageRole::Memory => "memory.bin".to_owned(),
            ImageRole::Disk => format!("{}.img", input.name),
            ImageRole::File => input.name.clone(),
        };
        if file == SHOWN_AS {
            return Err(Error::BadName {
                name: file,
                what: "an attached file",
                rule: "a mount shows what the snapshot holds under this name",
            });
        }
        if !seen.insert(&input.name) {
            return Err(Error::DuplicateName {
                name: input.name.clone(),
            });
        }
        // The memory, and a file that has its name.
        if !shown.insert(file.clone()) {
            return Err(Error::DuplicateName { name: file });
        }
    }
    for (key, value) in &request.labels {
        name::check_label(key, value)?;
    }
    if request.inputs.len() > MAX_IMAGES {
        return Err(Error::BadSnapshot {
            tag: request.tag.clone(),
            problem: TOO_MANY_IMAGES,
        });
    }
    if request.labels.len() > MAX_LABELS {
        return Err(Error::BadName {
            name: request.tag.clone(),
            what: "a snapshot with so many labels",
            rule: "at most 1024 labels",
        });
    }
    let label_bytes: usize = request
        .labels
        .iter()
        .map(|(key, value)| key.len() + value.len())
        .sum();
    if label_bytes > MAX_LEN / 2 {
        return Err(Error::BadSnapshot {
            tag: request.tag.clone(),
            problem: "its labels are longer than 512 KiB in all",
        });
    }
    Ok(())
}

/// Adds the parent's memory and disks that are not given, if that is wanted: a
/// diff is of all that the parent has. Returns their names.
pub(super) fn inherit(
    images: &mut Vec<Image>,
    parent: Option<&Manifest>,
    request: &CommitRequest,
) -> Result<Vec<String>> {
    let diffs = request.inputs.iter().any(|input| input.kind.is_diff());
    if !request.inherit && !diffs {
        return Ok(Vec::new());
    }
    let parent = parent.ok_or(Error::NothingToInherit)?;
    let mut inherited = Vec::new();
    for old in &parent.images {
        let missing = images.iter().all(|image| image.name != old.name);
        if !missing || old.role == ImageRole::File {
            continue;
        }
        if images
            .iter()
            .any(|image| image.file_name() == old.file_name())
        {
            return Err(Error::NameTaken {
                name: old.file_name(),
            });
        }
        inherited.push(old.name.clone());
        images.push(Image {
            changed_pages: 0,
            ..old.clone()
        });
    }
    Ok(inherited)
}

/// The images of the parent that the snapshot does not have.
pub(super) fn left_out(images: &[Image], parent: Option<&Manifest>) -> Vec<Image> {
    let old = parent.map_or(&[][..], |parent| &parent.images);
    old.iter()
        .filter(|old| images.iter().all(|image| image.name != old.name))
        .cloned()
        .collect()
}

/// The bytes of a manifest that can be read again.
pub(super) fn encode(manifest: &Manifest, format: StoreFormat) -> Result<Vec<u8>> {
    let encoded = manifest.encode(format);
    let problem = match manifest.problem() {
        None if encoded.len() > MAX_LEN => Some("its manifest is longer than 1 MiB"),
        problem => problem,
    };
    match problem {
        None => Ok(encoded),
        Some(problem) => Err(Error::BadSnapshot {
            tag: manifest.first_tag.clone(),
            problem,
        }),
    }
}
