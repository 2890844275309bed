//! Firecracker, at its API socket.
//!
//! Firecracker writes its state together with memory, into two files (`written`). Of a machine
//! that was restored from a mount that memory is thrown away: what its process changed of the
//! mapped image is exact, and can only be a change to that. So nothing has to be remembered of
//! earlier snapshots, nor does it matter what Firecracker's own log of dirty pages was reset by.

mod commit;
mod description;
mod restore;
mod version;
mod written;

pub use commit::Firecracker;
pub use restore::FirecrackerRestorer;
