//! A content-addressed store for snapshots of virtual machines.
//!
//! Pages of memory and disk images are stored once each, however many snapshots
//! hold them; a snapshot is a manifest of page-tree roots; a tag names a
//! snapshot. Reading never walks a chain: every snapshot is complete in itself.
//!
//! ```
//! use snapstore_store::{
//!     CommitRequest, GcOptions, ImageRole, Input, InputData, InputKind, PageSize, Silent, Store,
//! };
//!
//! # let dir = tempfile::tempdir()?;
//! # let path = dir.path().join("store");
//! # let ram = dir.path().join("guest.ram");
//! # std::fs::write(&ram, vec![7; 1 << 20])?;
//! let store = Store::create(&path, PageSize::default())?;
//! let request = CommitRequest {
//!     tag: "base".to_owned(),
//!     inputs: vec![Input {
//!         name: "memory".to_owned(),
//!         role: ImageRole::Memory,
//!         data: InputData::File(ram),
//!         kind: InputKind::Full,
//!     }],
//!     ..CommitRequest::default()
//! };
//! let committed = store.commit(&request, &Silent)?;
//! assert_eq!(committed.manifest.added_chunks, 2); // a page and a node
//!
//! // Kept whole while it is read, whatever others remove.
//! let memory = store.snapshot("base")?.image("memory").expect("it has memory");
//! let mut page = vec![0; 4096];
//! memory.read_at(&mut page, 8192)?;
//! assert_eq!(page, vec![7; 4096]);
//! # drop(memory);
//!
//! store.remove_tags(&["base".to_owned()])?;
//! let report = store.gc(GcOptions::default(), &Silent)?;
//! assert_eq!(report.deleted_packs, 1);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Where to begin: [`Store`] has the operations; [`InputData`] and [`ReadAt`] are where
//! images come from, [`Snapshot`] and [`ImageReader`] how they are read, [`Pin`] keeps
//! snapshots for other processes; [`Store::export`] and [`Store::import`] take them to
//! other stores; [`Cancel`] stops what takes too long, and
//! [`Progress`] tells how far it is. Errors are one enum, [`Error`], in few classes
//! ([`ErrorClass`]).
//!
//! The store knows nothing of filesystems or virtual machines. docs/FORMAT.md
//! describes its files, docs/SEMANTICS.md what each operation promises.

#![forbid(unsafe_code)]

mod cancel;
mod chunk_source;
mod chunks;
mod commit;
mod diff;
mod durable;
mod error;
mod foreign;
mod format;
mod gc;
mod id;
mod image;
mod index;
mod keys;
mod layout;
mod lease;
mod lineage;
mod lock;
mod lock_probe;
mod manifest;
mod memory;
mod mount_table;
mod name;
mod opening;
mod pack;
mod page;
mod page_hashes;
mod page_map;
mod patience;
mod pin;
mod placement;
mod progress;
mod protection;
mod recent;
mod regular;
mod repair;
pub mod retention;
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
mod transfer;
mod tree;
mod upgrade;
mod usage;
mod users;
mod verify;
mod working_set;

pub use cancel::Cancel;
pub use chunk_source::{ChunkSource, Fits, Traffic, Waiting};
pub use commit::input::{Extent, Input, InputData, InputKind};
pub use commit::read_at::ReadAt;
pub use commit::unchanging::{FileState, Unchanging};
pub use commit::{CommitRequest, CommitTimings, Committed, ParentChoice, Precopy};
pub use diff::{ChangedRange, ImageDiff};
pub use error::{Damage, Error, ErrorClass, Result};
pub use foreign::ForeignSnapshot;
pub use format::config::StoreFormat;
pub use gc::{
    Decision, GcOptions, GcPlan, GcReport, OptimizeOptions, OptimizeReport, OptimizeStop, PackPlan,
};
pub use id::{ChunkId, ChunkKind, SnapshotId};
pub use image::{ImageReader, Region};
pub use lineage::{ChainStats, Lineages};
pub use manifest::{Image, ImageRole, MAX_IMAGE_BYTES, MAX_IMAGES, MAX_LABELS, Manifest};
pub use mount_table::{MountEntry, mount_id, mount_table};
pub use name::{check_image, check_label, check_new_tag, check_snapshot, check_tag};
pub use page::{PageSize, is_zero};
pub use page_map::{PageKind, PageMap, PageMaps, PageRun};
pub use patience::be_patient;
pub use pin::{NotPinned, Pin};
pub use progress::{Progress, Silent};
pub use regular::{Opened, open as open_regular};
pub use repair::{RepairOptions, RepairReport};
pub use snapshot::Snapshot;
pub use snapshots::{Listing, TaggedSnapshot};
pub use stats::{Reclaimable, SnapshotStats, StoreStats};
pub use store::Store;
pub use threads::check_threads;
pub use transfer::{
    ExportRequest, Exported, ExportedSnapshot, ImportRequest, Imported, ImportedSnapshot,
    NodeParts, Parts, PartsWriter, Receiving, Root, decode_page, page_size_of_manifest,
    snapshot_of_manifest,
};
pub use upgrade::UpgradeReport;
pub use usage::StoreUsage;
pub use verify::{Finding, NotChecked, VerifyReport};
pub use working_set::set::{Pushed, Seen, WorkingSet};

/// Its example is compiled with the others.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
