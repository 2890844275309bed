//! The guest's end of a machine's agent connections: it runs commands for the
//! host, sets the clock, adds entropy, and names the machine and its interfaces.
//!
//! - [`protocol`]: what goes over a connection, for both ends; drawn in
//!   `docs/AGENT.md`.
//! - [`serve`]: answers the requests of one connection, of any kind of stream
//!   socket.
//!
//! Whoever connects is the machine's owner: the agent obeys, with the rights that
//! it was started with. It keeps nothing between connections, so that a machine
//! can be saved and restored at any moment.

mod exec;
mod mac;
mod network;
pub mod protocol;
mod server;
mod system;

pub use mac::{MacAddress, NotAMacAddress};
pub use server::{serve, turn_away};
