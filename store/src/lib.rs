//! A content-addressed store for snapshots of virtual machines.
//!
//! Pages of memory and disk images are stored once each, however many snapshots
//! hold them; a snapshot is a manifest of page-tree roots; a tag names a
//! snapshot. Reading never walks a chain: every snapshot is complete in itself.
//!
//! ```no_run
//! use snapstore_store::{CommitRequest, ImageRole, Input, InputData, InputKind, Silent, Store};
//!
//! let store = Store::open("/var/lib/snapstore".as_ref())?;
//! let request = CommitRequest {
//!     tag: "base".to_owned(),
//!     inputs: vec![Input {
//!         name: "memory".to_owned(),
//!         role: ImageRole::Memory,
//!         data: InputData::File("guest.ram".into()),
//!         kind: InputKind::Full,
//!     }],
//!     ..CommitRequest::default()
//! };
//! let committed = store.commit(&request, &Silent)?;
//! let reader = store.image_reader(&committed.manifest.images[0]);
//! let mut page = vec![0; 4096];
//! reader.read_at(&mut page, 0)?;
//! # Ok::<(), snapstore_store::Error>(())
//! ```
//!
//! The store knows nothing of filesystems or virtual machines. docs/FORMAT.md
//! describes its files, docs/SEMANTICS.md what each operation promises.

#![forbid(unsafe_code)]

mod cancel;
mod chunks;
mod commit;
mod diff;
mod durable;
mod error;
mod format;
mod gc;
mod id;
mod image;
mod index;
mod keys;
mod layout;
mod lease;
mod lock;
mod lock_probe;
mod manifest;
mod mount_table;
mod name;
mod opening;
mod pack;
mod page;
mod pin;
mod placement;
mod progress;
mod recent;
mod regular;
mod repair;
mod rewrite;
mod salvage;
mod scratch;
#[cfg(feature = "sim")]
pub mod sim;
#[cfg(not(feature = "sim"))]
mod sim;
mod snapshot;
mod snapshots;
mod stats;
mod store;
mod tags;
mod threads;
mod tree;
mod upgrade;
mod users;
mod verify;

pub use cancel::Cancel;
pub use commit::input::{Extent, Input, InputData, InputKind};
pub use commit::read_at::ReadAt;
pub use commit::unchanging::{FileState, Unchanging};
pub use commit::{CommitRequest, CommitTimings, Committed, ParentChoice, Precopy};
pub use diff::{ChangedRange, ImageDiff};
pub use error::{Damage, Error, ErrorClass, Result};
pub use format::config::StoreFormat;
pub use gc::{Decision, GcOptions, GcPlan, GcReport, PackPlan};
pub use id::{ChunkId, ChunkKind, SnapshotId};
pub use image::{ImageReader, Region};
pub use manifest::{Image, ImageRole, Manifest};
pub use mount_table::{MountEntry, mount_id, mount_table};
pub use name::{check_image, check_label, check_snapshot, check_tag};
pub use page::{PageSize, is_zero};
pub use pin::{NotPinned, Pin};
pub use progress::{Progress, Silent};
pub use repair::RepairReport;
pub use snapshot::Snapshot;
pub use snapshots::{Listing, TaggedSnapshot};
pub use stats::{SnapshotStats, StoreStats};
pub use store::Store;
pub use upgrade::UpgradeReport;
pub use verify::{Finding, VerifyReport};
