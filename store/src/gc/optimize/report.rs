//! What an optimisation is asked for, and what it answers.

use std::time::Duration;

use crate::error::Damage;
use crate::gc::plan::PackPlan;

/// How to optimise.
///
/// ```
/// use snapstore_store::{OptimizeOptions, PageSize, Silent, Store};
///
/// # let dir = tempfile::tempdir()?;
/// # let store = Store::create(&dir.path().join("store"), PageSize::default())?;
/// let report = store.optimize(OptimizeOptions::default(), &Silent)?;
/// println!("{} bytes are left to do", report.left_bytes);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct OptimizeOptions {
    /// Only say what there is to do.
    pub dry_run: bool,
    /// After this time nothing more is written; what was begun is ended.
    pub within: Option<Duration>,
    /// After so many bytes nothing more is written, either.
    pub most_bytes: Option<u64>,
}

/// Why an optimisation has left something to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum OptimizeStop {
    /// Its time was over.
    Time,
    /// It has written as many bytes as it was to.
    Bytes,
    /// Collections have written as much as they may until more is committed, or deleted.
    Allowance,
    /// Commits that began long ago may rely on what is to be changed.
    Writers,
}

/// What an optimisation did, or would do.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct OptimizeReport {
    /// Packs that were rewritten, or are to be.
    pub packs: u64,
    /// The bytes of their files.
    pub pack_bytes: u64,
    /// Bytes written; in a plan, the most there will be.
    pub written_bytes: u64,
    /// Packs that are still to be optimised.
    pub left_packs: u64,
    /// What in them is needed.
    pub left_bytes: u64,
    /// Why there are any.
    pub stopped_by: Option<OptimizeStop>,
    /// The commits that were in the way.
    pub waiting_for: Vec<String>,
    /// Damaged chunks that a snapshot needs. They stay where they are.
    pub not_copied: Vec<Damage>,
    /// Bytes of packs that collections have deleted, less those written.
    pub freed_bytes: i64,
    /// Bytes of packs that commits have written over the store's life, as far as is known.
    pub committed_bytes: u64,
    /// Bytes of packs that collections have written since then.
    pub rewritten_bytes: u64,
}

impl OptimizeReport {
    /// A pack that was to be rewritten is left for another time.
    pub(super) fn put_off(&mut self, pack: &PackPlan) {
        self.packs -= 1;
        self.pack_bytes -= pack.file_bytes;
        self.left_packs += 1;
        self.left_bytes += pack.live_bytes;
    }
}
