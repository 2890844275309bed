//! Small files: what stands in the place of one, the configuration, the collector's
//! state, tags.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use super::aside::set_aside;
use super::report::RepairReport;
use crate::durable;
use crate::error::{Damage, Error, IoContext as _, Result, UNREADABLE};
use crate::format::config::{Config, StoreFormat};
use crate::format::{pack_v1, pack_v2};
use crate::gc::mark::Reachability;
use crate::gc::rewrites::Ledger;
use crate::gc::state::CollectorState;
use crate::id::{ChunkKind, SnapshotId};
use crate::layout::Layout;
use crate::manifest;
use crate::page::PageSize;
use crate::regular::{self, Opened};
use crate::store::Store;
use crate::tags;

impl Store {
    pub(super) fn repair_tags(
        &self,
        dir_was_missing: bool,
        report: &mut RepairReport,
    ) -> Result<()> {
        let newest = self.newest_by_first_tag()?;
        let mut damaged = BTreeMap::new();
        for (name, id) in tags::each(&self.layout)? {
            match id {
                Ok(_) => {}
                Err(Error::Damaged(damage)) => {
                    let path = self.layout.tags().join(&name);
                    if regular::oddity(&path).is_some() {
                        set_odd_aside(&self.layout, &path, report)?;
                    }
                    damaged.insert(name, Some(damage));
                }
                // What another version, or another user, can read is left to them.
                Err(error) if error.is_lost() => report.left_alone.push(error.to_string()),
                Err(other) => return Err(other),
            }
        }
        if dir_was_missing {
            damaged.extend(newest.keys().cloned().map(|tag| (tag, None)));
        }
        for (tag, damage) in damaged {
            match newest.get(&tag) {
                Some(id) => {
                    self.spare_unreadable(&tag, damage, report)?;
                    tags::set(&self.layout, &tag, *id)?;
                    report.recovered_tags.insert(tag, *id);
                }
                // One that was set aside is gone with what stood in its place.
                None if !tags::exists(&self.layout, &tag) => {}
                None => report.lost_tags.push(tag),
            }
        }
        Ok(())
    }

    /// Before a tag is set anew: what the disk could not read may be read later, and may
    /// say something else.
    fn spare_unreadable(
        &self,
        tag: &str,
        damage: Option<Damage>,
        report: &mut RepairReport,
    ) -> Result<()> {
        match damage {
            Some(damage @ Damage::File { reason, .. }) if reason == UNREADABLE => {
                set_aside(&self.layout, &self.layout.tags().join(tag))?;
                report.add(damage);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// The newest whole snapshot that was first committed under each name.
    fn newest_by_first_tag(&self) -> Result<BTreeMap<String, SnapshotId>> {
        let mut newest: BTreeMap<String, (u64, SnapshotId)> = BTreeMap::new();
        let index = self.chunks.index()?;
        let mut reach = Reachability::new(&self.chunks)?;
        for entry in index.manifests() {
            let (key, at) = entry?;
            debug_assert_eq!(key.kind, ChunkKind::Manifest);
            let Some(id) = self.chunks.manifest_id_at(key, at)? else {
                continue;
            };
            let manifest = match manifest::read(&self.chunks, id) {
                Err(Error::Damaged(_) | Error::Newer { .. }) => continue,
                other => other?,
            };
            match reach.add_snapshot(id) {
                Err(Error::Damaged(_) | Error::Newer { .. }) => continue,
                other => other?,
            }
            let found = (manifest.created_unix_seconds, id);
            let best = newest.entry(manifest.first_tag).or_insert(found);
            *best = (*best).max(found);
        }
        Ok(newest.into_iter().map(|(tag, (_, id))| (tag, id)).collect())
    }
}

/// What stands in the place of a file of the store and is none, but for tags and packs.
pub(super) fn odd_files(layout: &Layout) -> Vec<PathBuf> {
    let locks = [
        "collect",
        "publish",
        "publish-turn",
        "allocate",
        "next-pack",
    ];
    let mut files: Vec<PathBuf> = locks.map(|name| layout.locks().join(name)).into();
    files.extend([layout.config(), layout.config_copy()]);
    files.extend([layout.collector(), layout.rewrites(), layout.recent_tags()]);
    for dir in [layout.root().to_owned(), layout.tags()] {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        let temporary = entries.filter(|entry| durable::is_temporary(&entry.file_name()));
        files.extend(temporary.map(|entry| entry.path()));
    }
    files.retain(|path| regular::oddity(path).is_some());
    files
}

/// Sets aside what stands in the place of a file.
pub(super) fn set_odd_aside(layout: &Layout, path: &Path, report: &mut RepairReport) -> Result<()> {
    let reason = regular::oddity(path).unwrap_or("it is not a file");
    set_aside(layout, path)?;
    report.remaining.push(Damage::File {
        path: path.to_owned(),
        reason,
    });
    Ok(())
}

/// Makes the configuration anew: from its copy, or, in format 1, from what the packs
/// say.
pub(super) fn repair_config(layout: &Layout, report: &mut RepairReport) -> Result<()> {
    let readable = |path: &Path| match Config::read(path) {
        Err(Error::Damaged(_)) => Ok(None),
        other => other,
    };
    let (path, copy_path) = (layout.config(), layout.config_copy());
    let (config, copy) = (readable(&path)?, readable(&copy_path)?);
    if let Some(config) = &config
        && (config.two.is_none() || copy.as_ref() == Some(config))
    {
        return Ok(());
    }
    let rebuilt = if config.is_some() {
        "config-copy"
    } else {
        "config"
    };
    let known = match config.or(copy) {
        Some(known) => known,
        None => Config::new(page_size_of_packs(layout)?, StoreFormat::One)?,
    };
    known.write(&path, &copy_path)?;
    report.rebuilt_files.push(rebuilt.to_owned());
    Ok(())
}

/// With nothing condemned nothing is deleted until the next collection has
/// marked everything; and there are no writers now whose epoch could matter.
pub(super) fn repair_collector(
    layout: &Layout,
    format: StoreFormat,
    report: &mut RepairReport,
) -> Result<()> {
    match CollectorState::read(layout) {
        Err(Error::Damaged(_)) => {
            CollectorState::new().write(layout, format)?;
            report.rebuilt_files.push("collector".to_owned());
        }
        other => drop(other?),
    }
    match Ledger::read(layout) {
        // How much was rewritten is not known any more: all counts as committed.
        Err(Error::Damaged(_)) => {
            durable::unlink(&layout.rewrites())?;
            durable::sync_dir(layout.root())?;
            report.rebuilt_files.push("rewrites".to_owned());
        }
        other => drop(other?),
    }
    Ok(())
}

/// The page size that the first readable pack header of version 1 names.
///
/// # Errors
/// [`Error::NoStore`] if there is none; [`Error::SecretLost`] if there are packs of
/// version 2.
fn page_size_of_packs(layout: &Layout) -> Result<PageSize> {
    let dir = layout.packs();
    let mut found = None;
    for entry in fs::read_dir(&dir).context("list", &dir)? {
        let path = entry.context("list", &dir)?.path();
        let mut header = [0; pack_v2::HEADER_LEN];
        let Ok(Opened::File(mut file)) = regular::open(&path) else {
            continue;
        };
        if file.read_exact(&mut header).is_err() {
            continue;
        }
        if pack_v2::read_header(&header) != pack_v2::Header::Other {
            return Err(Error::SecretLost {
                path: layout.root().to_owned(),
            });
        }
        let head = header.first_chunk().expect("it is longer");
        found = found.or(pack_v1::page_size_in_header(head));
    }
    found.ok_or_else(|| Error::NoStore {
        path: layout.root().to_owned(),
    })
}
