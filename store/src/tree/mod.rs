//! Page trees: an image as a Merkle tree of pages.
//!
//! `node` is one node and its bytes, `shape` the arithmetic of levels, `read`
//! finds pages and holes, `build` makes a new tree from changed leaves, `diff`
//! compares two trees. Trees know chunks only by id and hint.

pub(crate) mod build;
pub(crate) mod diff;
pub(crate) mod node;
pub(crate) mod read;
pub(crate) mod shape;
