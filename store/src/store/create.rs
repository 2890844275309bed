//! Creating a store.

use std::fs;
use std::path::{Path, PathBuf};

use super::{Store, absolute};
use crate::durable;
use crate::error::{Error, IoContext as _, Result};
use crate::format::config::{Config, StoreFormat};
use crate::index::IndexWriter;
use crate::layout::Layout;
use crate::lock::{self, LockKind};
use crate::opening;
use crate::page::PageSize;

impl Store {
    /// Creates an empty store at `path`, which must not exist or be empty. Of several that
    /// create one there at the same time one does, and the others fail. What was left by
    /// one that was interrupted is used, whatever settings that was to have.
    ///
    /// # Errors
    /// [`Error::StoreExists`]; [`Error::NotEmpty`] if there is anything else in the
    /// directory; [`Error::Damaged`] if it is a store that has lost its configuration.
    pub fn create(path: &Path, page_size: PageSize) -> Result<Self> {
        Self::create_in_format(path, page_size, StoreFormat::Two)
    }

    /// The same in an older format, for programs that know only that.
    ///
    /// # Errors
    /// As [`Store::create`].
    pub fn create_in_format(path: &Path, page_size: PageSize, format: StoreFormat) -> Result<Self> {
        let layout = Layout::new(absolute(path)?);
        let had_parent = layout.root().ancestors().skip(1).find(|it| it.is_dir());
        let had_parent = had_parent.map(Path::to_owned);
        fs::create_dir_all(path).context("create", path)?;
        refuse_store(&layout)?;
        if let Err(error) = refuse_foreign_files(&layout) {
            // They may be those of a store that somebody else has created meanwhile.
            refuse_store(&layout)?;
            return Err(error);
        }
        for dir in layout.directories() {
            fs::create_dir_all(&dir).context("create", &dir)?;
        }
        let _publish = lock::acquire(&layout, LockKind::Publish, lock::DEFAULT_TIMEOUT)?;
        refuse_store(&layout)?;
        // Whatever an interrupted creation has left of it.
        durable::remove_dir(&layout.index())?;
        drop(IndexWriter::open_or_create(&layout.index())?);
        durable::sync_dir(layout.root())?;
        // Up to the first directory that was there before.
        for dir in layout.root().ancestors().skip(1) {
            durable::sync_dir(dir)?;
            if Some(dir) == had_parent.as_deref() {
                break;
            }
        }
        // Last: a directory with a configuration is a complete store.
        let config = Config::new(page_size, format)?;
        config.write(&layout.config(), &layout.config_copy())?;
        Self::open(path)
    }
}

/// Fails if there is a store.
fn refuse_store(layout: &Layout) -> Result<()> {
    match Config::read(&layout.config())? {
        None => Ok(()),
        Some(config) => Err(Error::StoreExists {
            path: layout.root().to_owned(),
            page_bytes: config.page_size.bytes(),
        }),
    }
}

/// What is left of a creation that was interrupted, or of an empty store, may be
/// used.
fn refuse_foreign_files(layout: &Layout) -> Result<()> {
    let root = layout.root();
    if !layout.config().exists() && opening::has_packs(layout)? {
        return Err(opening::without_config(layout));
    }
    let mut ours: Vec<PathBuf> = layout.directories().into();
    // The last one is the filesystem's, at whose root a store may be.
    ours.extend([layout.index(), layout.config(), root.join("lost+found")]);
    if opening::is_empty(layout)? {
        ours.extend([layout.collector(), layout.recent_tags(), layout.damaged()]);
        ours.extend([layout.working_sets(), layout.rewrites()]);
        ours.extend(["mounts.log", "mounts.log.1"].map(|log| root.join(log)));
    }
    for entry in fs::read_dir(root).context("list", root)? {
        let path = entry.context("list", root)?.path();
        let of_creation = [".config.new", ".config-copy.new", "config-copy"];
        let of_creation = of_creation.iter().any(|name| path.ends_with(name));
        if !of_creation && !ours.contains(&path) {
            return Err(Error::NotEmpty {
                path: root.to_owned(),
            });
        }
    }
    Ok(())
}
