//! What the guest does to the machine by a device.

/// What a port write led to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Effect {
    /// Nothing beyond the device.
    None,
    /// The guest asked for a reset of the machine.
    Reset,
    /// The guest powered the machine off.
    PowerOff,
    /// The guest says that it is ready.
    Ready,
}
