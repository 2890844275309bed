//! The bytes of everything that is stored: what is written, and one decoder for
//! each version that there ever was. docs/FORMAT.md draws them.
//!
//! A new version of a structure is a new decoder here, and new stores in
//! `tests/fixtures`. What a version writes is never written differently by a later
//! one. A version that is not known is [`crate::Error::Newer`], not damage.

pub(crate) mod collector;
pub(crate) mod config;
pub(crate) mod entry;
pub(crate) mod index_run;
pub(crate) mod lease;
pub(crate) mod manifest;
pub(crate) mod node;
pub(crate) mod pack_v1;
pub(crate) mod pack_v2;
pub(crate) mod rewrites;
pub(crate) mod sealed_file;
pub(crate) mod stream;
pub(crate) mod working_set;
