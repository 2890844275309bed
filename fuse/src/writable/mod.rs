//! A snapshot as directories that can be written, and committed.
//!
//! What nobody writes is the store's, and the same page cache for all clones. What is
//! written goes to an overlay (`snapstore_overlay`), page by page, and is known so; `clone`
//! puts images and other files together, `views` has all clones of a mount, `operations` is
//! what can be done to them, `server` adapts that to the kernel, `control` and `client` are the two ends of a commit, `place` is where
//! all of it is found again after the server has ended, `state` says how much of it is, `record` checks what such files say, and `kept` lists what was not gone on with.

mod client;
mod clone;
mod control;
mod file;
mod image;
mod kept;
mod operations;
mod place;
mod record;
mod server;
mod state;
mod trust;
mod views;
mod wire;

use std::path::PathBuf;
use std::sync::Arc;

use snapstore_store::Store;

pub use client::{FrozenForCommit, ViewClient, image_of};
pub(crate) use control::Control;
pub use kept::{Kept, KeptView, is_kept, kept_views};
pub(crate) use operations::Operations;
pub use place::MOST_CLONES;
use place::{Place, Shown};
pub(crate) use server::WritableServer;
pub(crate) use trust::user;
pub(crate) use views::Views;
pub use wire::{CloneStatus, FrozenFileInfo, FrozenImage, FrozenView, Status};

use crate::error::Result;
use crate::layout::Layout;

/// How a writable mount is made.
#[derive(Clone, Debug)]
pub struct WritableOptions {
    /// The snapshot to begin with; without it the view that was at the mount point is found
    /// again.
    pub snapshot: Option<String>,
    /// How many clones, each a directory; without it the mount's root is the only one.
    pub count: Option<u32>,
    /// Who has the files; without it this user. A view that is found again stays as it was.
    pub owner: Option<(u32, u32)>,
    /// The files' mode; without it 644, or as it was.
    pub mode: Option<u32>,
    /// Where what is written is kept.
    pub overlay_dir: PathBuf,
    /// The most of it for each clone; without it none, or as it was.
    pub limit_bytes: Option<u64>,
    /// The files' names. A view that is found again has those that it had.
    pub layout: Layout,
    /// Whether what is in no commit goes once it is unmounted, unless somebody wants it kept.
    pub discard: bool,
}

/// The same with the owner, mode and limit that are asked for; what is not stays.
fn changed(shown: Shown, options: &WritableOptions) -> Shown {
    Shown {
        owner: options.owner.unwrap_or(shown.owner),
        mode: options.mode.unwrap_or(shown.mode),
        limit_bytes: options.limit_bytes.or(shown.limit_bytes),
        ..shown
    }
}

/// Makes the views, or finds them again.
pub(crate) fn open(
    store: Store,
    dir: &std::path::Path,
    options: &WritableOptions,
) -> Result<Arc<Views>> {
    let (place, shown, again) = match &options.snapshot {
        None => {
            let (place, shown) = Place::find(&options.overlay_dir, dir)?;
            (place, changed(shown, options), true)
        }
        Some(name) => {
            let id = store.resolve(name)?;
            let shown = Shown {
                count: options.count,
                layout: options.layout.clone(),
                ..Shown::new(store.path(), dir, id.to_string())
            };
            let shown = changed(shown, options);
            (Place::create(&options.overlay_dir, &shown)?, shown, false)
        }
    };
    let opened = Views::open(store, shown, place, again);
    Ok(Arc::new(opened?))
}
