//! Cloud Hypervisor, at its API socket.
//!
//! Its snapshot is a directory of three files with fixed names. Of a machine whose process
//! has mapped the memory of a mount, the one with the memory is there already when it
//! begins: Cloud Hypervisor then writes the two others and ends with an error, which costs
//! neither time nor room. What the process changed of the mapped image is read instead.

mod commit;
mod description;
mod restore;

pub use commit::CloudHypervisor;
pub use restore::CloudHypervisorRestorer;
