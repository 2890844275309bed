//! Firecracker, at its API socket.
//!
//! Firecracker writes its state together with memory, into two files: here they are files in
//! memory of this process, which it opens by `/proc`. Of a machine that was restored from a
//! mount that memory is thrown away: what its process changed of the mapped image is exact,
//! and can only be a change to that. So nothing has to be remembered of earlier snapshots,
//! nor does it matter what Firecracker's own log of dirty pages was reset by.

mod commit;
mod description;
mod restore;
mod version;

pub use commit::Firecracker;
pub use restore::FirecrackerRestorer;
