//! How much to repack.

/// What to repack.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RepackOptions {
    /// Only say what there is.
    pub dry_run: bool,
    /// Packs of which less than this share is needed, of a hundred; 0 for none.
    pub percent: u8,
    /// About how many bytes are written at most.
    pub most_bytes: u64,
}

impl RepackOptions {
    /// Half of what goes is written at most, so a bucket has at most about twice what is
    /// needed, and each byte that is freed costs at most one that is written.
    pub const PERCENT: u8 = 50;
}

impl Default for RepackOptions {
    fn default() -> Self {
        Self {
            dry_run: false,
            percent: Self::PERCENT,
            most_bytes: u64::MAX,
        }
    }
}
