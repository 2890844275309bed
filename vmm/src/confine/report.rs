//! What is in force, for `ps` and whoever starts a machine.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::refused::refused;
use crate::error::Result;
use crate::proc;

/// The namespaces that a machine of root's has for itself.
pub(super) const NAMESPACES: [&str; 5] = ["mount", "net", "ipc", "uts", "cgroup"];

/// How a machine's process is confined.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Confinement {
    /// The user that it is.
    pub uid: u32,
    /// Whether nothing that it might execute gives it rights.
    pub no_new_privs: bool,
    /// Its capabilities, effective or not, as a mask in hexadecimal; "0" is none.
    pub capabilities: String,
    /// Whether each of its threads may make the system calls of its role only.
    pub seccomp: bool,
    /// The namespaces that are its own. With "mount", its root directory is the
    /// machine's, read-only.
    pub namespaces: Vec<String>,
    /// Whether the guest's sockets reach those of the host that listen in the
    /// machine's directory, as its user does: else only those open to everybody.
    pub owns_directory: bool,
    /// "full" or "partial": how much of what is asked of Landlock the kernel enforces.
    pub landlock: Option<String>,
    /// Limits by name.
    pub limits: BTreeMap<String, u64>,
    /// The control group of its own.
    pub cgroup: Option<String>,
    /// Why that does not bound its memory or tasks, or why there is none.
    #[serde(default)]
    pub cgroup_lacks: Option<String>,
    /// Whether its address-space layout is that of the machines started with it.
    #[serde(default)]
    pub shares_layout: bool,
}

impl Confinement {
    /// What the kernel says of this thread, rather than what was asked of it.
    pub(super) fn read_back(&mut self) -> Result<()> {
        let status = proc::read("self/status").map_err(refused("see how it is confined"))?;
        let mask = |name| {
            let bits = field(&status, name).and_then(|bits| u64::from_str_radix(bits, 16).ok());
            bits.unwrap_or(u64::MAX)
        };
        self.uid = rustix::process::getuid().as_raw();
        self.no_new_privs = field(&status, "NoNewPrivs") == Some("1");
        let capabilities = ["CapEff", "CapPrm", "CapInh", "CapAmb"].map(mask);
        self.capabilities = format!("{:x}", capabilities.iter().fold(0, |all, set| all | set));
        self.seccomp = super::filter::is_confined();
        Ok(())
    }
}

/// A line of `/proc/PID/status`.
pub(super) fn field<'s>(status: &'s str, name: &str) -> Option<&'s str> {
    let mut lines = status.lines();
    lines.find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(':')?.trim()))
}

/// One line.
impl std::fmt::Display for Confinement {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "user {}, capabilities {}", self.uid, self.capabilities)?;
        if self.no_new_privs {
            write!(out, ", no new privileges")?;
        }
        if self.seccomp {
            write!(out, ", system calls by thread")?;
        }
        if !self.namespaces.is_empty() {
            write!(out, ", own {} namespaces", self.namespaces.join("/"))?;
        }
        if let Some(landlock) = &self.landlock {
            write!(out, ", Landlock ({landlock})")?;
        }
        let limits = self.limits.iter();
        let limits: Vec<_> = limits
            .map(|(name, limit)| format!("{name} {limit}"))
            .collect();
        write!(out, ", limits: {}", limits.join(" "))?;
        match &self.cgroup {
            Some(cgroup) => write!(out, ", control group {cgroup}")?,
            None => write!(out, ", no control group")?,
        }
        if let Some(lacks) = &self.cgroup_lacks {
            write!(out, " ({lacks})")?;
        }
        if self.shares_layout {
            write!(out, "; shares its address-space layout")?;
        }
        Ok(())
    }
}
