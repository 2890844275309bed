//! What hosts that share a bucket do, request by request.
//!
//! Safety rests on three things only: a key is written once and never used again; a
//! finished write is seen by whatever read begins later; and each host does its own
//! acknowledged write before the read that it decides by. Nothing rests on conditional
//! writes, on clocks, or on an error meaning that something was not done.
//!
//! The code is sequential `async` without a runtime: a product's bucket answers when it
//! is polled, the checker's bucket when its scheduler says so.

mod at_once;
mod bucket;
mod collect;
mod current;
mod error;
mod heads;
mod lease;
mod names;
mod push;
mod record;
mod remove;
mod repack;
mod rule;
pub(crate) mod sealed;
mod sight;
mod view;
mod void;

pub use at_once::{Answer, Ask, AtOnce};
pub use bucket::{Bucket, Listed, Unanswered, delete_surely, put_surely};
pub(crate) use collect::collect_with;
pub use collect::{Collected, NotCollected, Options, collect, records_are_there};
pub use current::{Current, Judged, Listing, State};
pub use error::{Error, Result};
pub(crate) use heads::Heads;
pub use lease::{Lease, LeaseKind, LeaseRecord, Leased, leases};
pub(crate) use lease::{condemnations, latest_beats, read_beat};
pub use names::{Name, Part, RefKey, RefKind, Session, tag_prefix};
pub use push::{Mode, Pushed, Reuse, Stored, Work, confirm, may_reuse, push};
pub use record::{CondemnRecord, HeadSummary, RefRecord, fence};
pub use remove::remove;
pub use repack::{Repacking, Roots, finish_cut_off, repack};
pub use rule::Rule;
pub use sealed::{Malformed, seal, unseal};
pub use sight::Read;
pub use view::{View, view, view_seen};
pub use void::Stays;
