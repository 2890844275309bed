//! What a mount has to show of an image, where others show the rest.

use std::ops::Range;

/// A part of an image.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Part {
    /// The image's name.
    pub image: String,
    /// Its bytes, ascending.
    pub ranges: Vec<Range<u64>>,
}
