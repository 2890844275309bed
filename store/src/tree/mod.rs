//! Page trees: an image as a Merkle tree of pages.
//!
//! `shape` is the arithmetic of levels, `read` finds pages and holes, `build` makes
//! a new tree from changed leaves, `diff` compares two trees. A node and its bytes
//! are in `format`. Trees know chunks only by id and hint.

pub(crate) mod build;
pub(crate) mod diff;
pub(crate) mod read;
pub(crate) mod shape;
