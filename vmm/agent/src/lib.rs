//! The guest's end of a machine's agent connections: it runs commands for the
//! host, sets the clock, adds entropy and names the machine.
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
pub mod protocol;
mod server;
mod system;

pub use server::{serve, turn_away};
