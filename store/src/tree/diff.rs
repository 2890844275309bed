//! Comparing two page trees, skipping equal subtrees.

use std::ops::ControlFlow;

use crate::chunks::Chunks;
use crate::error::Result;
use crate::format::node::{Child, FAN_OUT};
use crate::tree::read::Tree;
use crate::tree::shape::pages_per_child;

/// Calls `differs` with the number of each page that is not the same in both
/// trees, in order. Pages beyond the end of the shorter image count as zero.
pub(crate) fn changed_pages(
    chunks: &Chunks,
    old: &Tree,
    new: &Tree,
    differs: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> Result<ControlFlow<()>> {
    let level = old.shape().root_level().max(new.shape().root_level());
    let lift = |tree: &Tree| Side {
        child: tree.root(),
        level: tree.shape().root_level(),
    };
    compare(chunks, lift(old), lift(new), level, 0, differs)
}

/// A subtree that may be lower than the level it is compared at; then it is
/// the first child of the levels between.
#[derive(Clone, Copy)]
struct Side {
    child: Option<Child>,
    level: u8,
}

impl Side {
    /// The children at `level`, which is at least this side's own.
    fn children(self, chunks: &Chunks, level: u8) -> Result<Vec<Side>> {
        let mut below = vec![
            Side {
                child: None,
                level: level.saturating_sub(1),
            };
            FAN_OUT
        ];
        if self.level < level {
            below[0] = self;
        } else if let Some(child) = self.child {
            let node = chunks.node(child, level)?;
            for (slot, child) in node.present() {
                below[slot].child = Some(child);
            }
        }
        Ok(below)
    }

    fn same_as(self, other: Self) -> bool {
        let hash = |side: Self| side.child.map(|child| child.hash);
        hash(self) == hash(other) && (self.level == other.level || self.child.is_none())
    }
}

fn compare(
    chunks: &Chunks,
    old: Side,
    new: Side,
    level: u8,
    first_page: u64,
    differs: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> Result<ControlFlow<()>> {
    if old.same_as(new) {
        return Ok(ControlFlow::Continue(()));
    }
    let pairs = old
        .children(chunks, level)?
        .into_iter()
        .zip(new.children(chunks, level)?);
    for (slot, (old, new)) in pairs.enumerate() {
        let page = first_page + slot as u64 * pages_per_child(level);
        let goes_on = if level > 0 {
            compare(chunks, old, new, level - 1, page, differs)?
        } else if old.same_as(new) {
            ControlFlow::Continue(())
        } else {
            differs(page)
        };
        if goes_on.is_break() {
            return Ok(goes_on);
        }
    }
    Ok(ControlFlow::Continue(()))
}
