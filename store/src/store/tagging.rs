//! The tags of a store: looking at them, setting, moving, removing and protecting them.

use std::collections::{BTreeMap, BTreeSet};

use super::Store;
use crate::error::{Error, Result};
use crate::gc::mark::Reachability;
use crate::id::SnapshotId;
use crate::name::{check_new_tag, check_tag};
use crate::{protection, tags};

impl Store {
    /// All tags.
    ///
    /// # Errors
    /// The first damaged tag file.
    pub fn tags(&self) -> Result<BTreeMap<String, SnapshotId>> {
        tags::all(&self.layout)
    }

    /// The names of all tags, damaged ones too.
    ///
    /// # Errors
    /// I/O errors only.
    pub fn tag_names(&self) -> Result<Vec<String>> {
        let mut names: Vec<_> = tags::each(&self.layout)?
            .into_iter()
            .map(|(name, _)| name)
            .collect();
        names.sort();
        Ok(names)
    }

    /// The snapshot that a tag names; `None` if there is no such tag.
    ///
    /// # Errors
    /// [`Error::Damaged`] if the tag's file is damaged.
    pub fn tag(&self, name: &str) -> Result<Option<SnapshotId>> {
        tags::get(&self.layout, name)
    }

    /// Points `tag` at a snapshot. With `replace` an existing tag is moved.
    ///
    /// # Errors
    /// [`Error::TagExists`] without `replace`; [`Error::Damaged`] if parts of a
    /// snapshot that had no tag any more have been collected.
    pub fn set_tag(&self, tag: &str, id: SnapshotId, replace: bool) -> Result<()> {
        let _publish = self.publish_lock()?;
        self.check_tag_free(tag, replace)?;
        if !self.is_tagged(id, tag)? {
            // Under the lock, so that no collection deletes what was just seen.
            Reachability::new(&self.chunks)?.add_snapshot(id)?;
        }
        tags::set(&self.layout, tag, id)
    }

    /// Removes tags, damaged ones too. What only they led to is freed by the
    /// next collection. One that is named twice is removed once.
    ///
    /// # Errors
    /// [`Error::NotFound`] if any of them does not exist, or [`Error::BadName`] if it
    /// can be no tag; then none is removed.
    /// [`Error::Protected`] if one is protected.
    pub fn remove_tags(&self, names: &[String]) -> Result<()> {
        let names: BTreeSet<&String> = names.iter().collect();
        names.iter().try_for_each(|name| check_tag(name))?;
        let _publish = self.publish_lock()?;
        for name in &names {
            if !tags::exists(&self.layout, name) {
                return Err(Error::NotFound {
                    name: (*name).clone(),
                });
            }
            protection::check(&self.layout, name)?;
        }
        names
            .into_iter()
            .try_for_each(|name| tags::remove(&self.layout, name))
    }

    /// Removes those of these tags that still name the snapshots they are given with and
    /// are not protected. Returns the tags that were removed: what was moved or
    /// protected since the caller looked stays.
    ///
    /// # Errors
    /// I/O errors; tags before the one that failed are removed.
    pub fn remove_tags_if(&self, tags: &[(String, SnapshotId)]) -> Result<Vec<String>> {
        let _publish = self.publish_lock()?;
        let mut removed = Vec::new();
        for (tag, id) in tags {
            if tags::get(&self.layout, tag)? == Some(*id)
                && !protection::is_protected(&self.layout, tag)?
            {
                tags::remove(&self.layout, tag)?;
                removed.push(tag.clone());
            }
        }
        Ok(removed)
    }

    /// Protects a tag from being removed or moved, or ends that.
    ///
    /// # Errors
    /// [`Error::NotFound`] if there is no such tag.
    pub fn protect_tag(&self, tag: &str, protected: bool) -> Result<()> {
        check_tag(tag)?;
        let _publish = self.publish_lock()?;
        if !tags::exists(&self.layout, tag) {
            return Err(Error::NotFound {
                name: tag.to_owned(),
            });
        }
        protection::set(&self.layout, tag, protected)
    }

    /// The tags that are protected.
    ///
    /// # Errors
    /// I/O errors only.
    pub fn protected_tags(&self) -> Result<BTreeSet<String>> {
        protection::all(&self.layout)
    }

    /// Whether a commit or a tag of this name would be refused at once. It is
    /// looked at again when the tag is set.
    ///
    /// # Errors
    /// [`Error::TagExists`] unless `replace`; I/O errors.
    pub fn check_tag_free(&self, tag: &str, replace: bool) -> Result<()> {
        check_new_tag(tag)?;
        tags::check_directory(&self.layout)?;
        if replace {
            protection::check(&self.layout, tag)?;
        }
        let found = match tags::get(&self.layout, tag) {
            Err(Error::Damaged(_)) if replace => return Ok(()),
            other => other?,
        };
        match found {
            Some(id) if !replace => Err(Error::TagExists {
                tag: tag.to_owned(),
                id,
            }),
            _ => Ok(()),
        }
    }
}
