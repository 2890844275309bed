//! What a commit is asked for as a whole: what may go together in a snapshot, and
//! what of the parent goes along.

use std::collections::BTreeSet;

use crate::commit::CommitRequest;
use crate::error::{Error, Result};
use crate::format::config::StoreFormat;
use crate::manifest::{Image, ImageRole, MAX_IMAGES, MAX_LABELS, MAX_LEN, Manifest, SHOWN_AS};
use crate::name;

impl CommitRequest {
    /// Refuses what can be seen to be wrong before anything is read. Every commit
    /// begins with that.
    ///
    /// # Errors
    /// [`Error::BadName`] and [`Error::DuplicateName`] for names of tags, images and
    /// labels; [`Error::BadSnapshot`] for too many labels.
    pub fn check(&self) -> Result<()> {
        check(self)
    }
}

fn check(request: &CommitRequest) -> Result<()> {
    name::check_tag(&request.tag)?;
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
    if request.inputs.len() > MAX_IMAGES || request.labels.len() > MAX_LABELS {
        return Err(Error::BadName {
            name: request.tag.clone(),
            what: "a snapshot with so many images or labels",
            rule: "at most 256 images and 1024 labels",
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
