//! Snapshots on their way between stores: out of one as a stream of bytes, and into
//! another.
//!
//! A stream holds each page and tree node once, under no key of any store, so any store
//! with pages of the same size can take it. What it needs of the receiving store is
//! found there and not written again; where it is stored is that store's affair.
//! `crate::format::stream` draws the bytes.
//!
//! ```
//! use snapstore_store::{
//!     CommitRequest, ExportRequest, ImageRole, ImportRequest, Input, InputData, InputKind,
//!     PageSize, Silent, Store,
//! };
//!
//! # let dir = tempfile::tempdir()?;
//! # let store = Store::create(&dir.path().join("store"), PageSize::default())?;
//! # let request = CommitRequest {
//! #     tag: "base".to_owned(),
//! #     inputs: vec![Input {
//! #         name: "memory".to_owned(),
//! #         role: ImageRole::Memory,
//! #         data: InputData::Bytes(vec![7; 1 << 20].into()),
//! #         kind: InputKind::Full,
//! #     }],
//! #     ..CommitRequest::default()
//! # };
//! # let committed = store.commit(&request, &Silent)?;
//! let mut stream = Vec::new();
//! let request = ExportRequest {
//!     snapshots: vec!["base".to_owned()],
//!     ..ExportRequest::default()
//! };
//! store.export(&request, &mut stream, &Silent)?;
//!
//! let other = Store::create(&dir.path().join("other"), PageSize::default())?;
//! let imported = other.import(&ImportRequest::default(), &stream[..], &Silent)?;
//! assert_eq!(imported.snapshots[0].id, committed.id);
//! assert_eq!(other.tag("base")?, Some(committed.id));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#[cfg(test)]
mod condemned;
mod copy;
mod export;
#[cfg(test)]
mod hostile;
mod import;
mod parts;

pub use export::{ExportRequest, Exported, ExportedSnapshot};
pub use import::{ImportRequest, Imported, ImportedSnapshot};
pub use parts::{
    NodeParts, Parts, PartsWriter, Receiving, Root, decode_page, page_size_of_manifest,
    snapshot_of_manifest,
};
