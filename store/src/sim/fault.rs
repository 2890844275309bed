//! Faults that can be put back, to see the simulator find them.

/// One fault. Each is switched on in one place of the code, which says
/// `sim::on(Fault::...)`.
#[cfg_attr(not(feature = "sim"), allow(dead_code))]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Fault {
    /// A pack is not flushed before it is renamed.
    PackNotSynced,
}
