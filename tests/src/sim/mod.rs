//! A simulator of the store: histories of several processes that commit, remove
//! tags, collect, verify, repair, read and mount, interleaved at every step, with
//! crashes, power cuts, failing disks and full ones. After every operation all
//! that was acknowledged is read back. docs/TESTING.md tells more.

mod actor;
mod campaign;
mod check;
mod content;
mod corpus;
mod damage;
mod disk;
mod draw;
mod epilogue;
mod history;
mod model;
mod mounts;
pub mod plan;
mod sets;
mod shapes;
mod shrink;
mod world;

pub use campaign::{Campaign, Found, Report, explain, hunt, run};
pub use draw::Shape;
pub use history::{Crew, Outcome};
pub use world::Failure;
