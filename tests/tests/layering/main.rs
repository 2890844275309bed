//! Who may know whom: crates by their manifests, modules by what they name.
//!
//! A circle of files can only be understood as a whole. So there is none, in no crate.

mod crates;
mod modules;
