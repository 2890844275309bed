//! Which pages others have pushed, whatever snapshots they are of: a push whose ancestors are
//! not in the bucket finds packs with pages of its own by a sample of them.
//!
//! Of each page that a push uploads the id is looked at: one in 128 is a *hook*. A run of them
//! says in which pack each is. Whoever looks for pages compares the runs with the hooks of its
//! own pages, reads the lists of the packs that have most of them, and finds in these all
//! pages that both have. Pages that are alike lie together, so a sample finds the packs
//! (Lillibridge et al., Sparse Indexing, FAST 2009).
//!
//! A run is a hint. Nobody relies on it: lists have checks of their own, and a pack that is
//! reused is looked at as the protocol says. Without it, or with a wrong one, pages are
//! uploaded that are there already.

mod find;
mod merge;
mod read;
mod run;

pub use find::{Finding, find};
pub use merge::tidy;
pub use run::{LONGEST_RUN_BYTES, Run};
