//! Why machines end.

use serde::{Deserialize, Serialize};

/// Why a machine ended.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "ending")]
pub enum Ending {
    /// The guest reset the machine, through ACPI or the keyboard controller: to
    /// boot again, after a panic, or to power off where it knows no better.
    Reset,
    /// The guest powered the machine off.
    PoweredOff,
    /// Someone asked the monitor to end it.
    Stopped,
    /// A vCPU met a fault while it handled a double fault.
    TripleFault,
    /// Guest memory could not be read: its server or file went away.
    MemoryLost {
        /// Where the guest wanted to read, if KVM told.
        #[serde(skip_serializing_if = "Option::is_none")]
        guest_address: Option<u64>,
    },
    /// Its guest could not be given randomness of its own, and was not to run without.
    NotReseeded {
        /// Why not.
        reason: String,
    },
    /// KVM could not go on.
    Failed {
        /// What it said.
        reason: String,
    },
}

impl Ending {
    /// Whether the machine ended as it or its owner wanted.
    #[must_use]
    pub fn is_orderly(&self) -> bool {
        matches!(self, Self::Reset | Self::PoweredOff | Self::Stopped)
    }
}

impl std::fmt::Display for Ending {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Reset => write!(out, "the guest reset the machine"),
            Self::PoweredOff => write!(out, "the guest powered the machine off"),
            Self::Stopped => write!(out, "stopped on request"),
            Self::TripleFault => write!(out, "the guest crashed (triple fault)"),
            Self::NotReseeded { reason } => write!(
                out,
                "the guest could not be reseeded (--require-reseed): {reason}"
            ),
            Self::MemoryLost { guest_address } => {
                write!(out, "guest memory can no longer be read")?;
                if let Some(address) = guest_address {
                    write!(out, " (at guest address {address:#x})")?;
                }
                write!(
                    out,
                    ": the server of the mounted snapshot ended or met damaged data; \
                     restore again, and see `snapstore verify`"
                )
            }
            Self::Failed { reason } => write!(out, "the machine cannot go on: {reason}"),
        }
    }
}
