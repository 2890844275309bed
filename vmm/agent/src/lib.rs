//! The guest's end of a machine's agent connections: it runs commands for the
//! host, sets the clock, adds entropy, and names the machine and its interfaces.
//!
//! [`serve`] answers the requests of one connection, of any kind of stream socket. What
//! goes over it is `snapstore-agent-protocol`.
//!
//! Whoever connects is the machine's owner: the agent obeys, with the rights that
//! it was started with. It keeps nothing between connections, so that a machine
//! can be saved and restored at any moment.

mod exec;
mod network;
mod reply;
mod server;
mod system;

pub use server::{serve, turn_away};
