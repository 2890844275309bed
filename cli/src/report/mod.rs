//! A report of a store as one page for a browser: who descends from whom, who has which
//! page, what grew and what is shared.
//!
//! [`gather`] asks the store and makes the data, [`page()`] makes a page around it. All drawing
//! is done by the page's own scripts (`page/*.js`), which get what people named only as text.
//! The store records no times of pauses or restores, so there are none here.

mod data;
mod page;

pub use data::gather;
pub use page::page;
