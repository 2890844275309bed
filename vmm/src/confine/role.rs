//! What the threads of a machine's process are for.

/// What a thread of a machine's process is for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Role {
    /// Waits for the machine's end.
    Main,
    /// Runs a vCPU, and the devices that its guest notifies.
    Vcpu,
    /// Accepts clients and serves one each: also pauses, freezes and resumes. Heeds signals
    /// and the starter.
    Control,
    /// Hears from the host's ends of the guest's sockets.
    Vsock,
    /// Hears from a tap.
    Net,
    /// Heeds the starter, where the guest stops when it is ready.
    Watch,
    /// Tells the guest's agent what a restored guest has to know, and the time after a pause.
    Agent,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Main,
        Self::Vcpu,
        Self::Control,
        Self::Vsock,
        Self::Net,
        Self::Watch,
        Self::Agent,
    ];
}
