//! What a machine's process gives up before its guest first runs, so that a fault
//! in a device is not the host.
//!
//! Everything is opened first: memory, disks, taps, sockets, KVM. Then, while the
//! process still has one thread, [`Preparation::confine`] takes from the process
//! (docs/SECURITY-MODEL.md):
//!
//! - `cgroup`: where it is delegated, a control group with bounds on memory and tasks;
//! - `limits`: how many descriptors and tasks it may have, how long its files may be;
//! - `identity`: root becomes a user of its own without capabilities;
//! - `root`: as root, new namespaces, and a root directory that holds only the
//!   machine's directory, read-only;
//! - `landlock`: no file but those of its own `/proc`, for those who have no rights for more;
//! - `filter`, `program`, `rules`: each thread then allows itself the system calls of its
//!   [`Role`], with [`enter`]. Any other ends the process.
//!
//! `server` is what servers of mounts give up, which are no machines.
//!
//! Deliberately absent: PID namespaces, since a frozen copy is found by the number
//! that its committer is told; and a list of files that may be opened, since none may.

mod cgroup;
mod descriptors;
mod filter;
mod identity;
mod landlock;
mod limits;
mod program;
mod refused;
mod report;
mod role;
mod root;
mod rules;
mod server;
#[cfg(test)]
pub(crate) mod testing;
mod user_namespace;

use std::os::fd::AsFd as _;
use std::path::Path;

use rustix::io::Errno;

use crate::error::{Error, OsContext as _, Result};
use crate::proc;
pub use cgroup::{Group, Groups, Made, remove_group};
pub use descriptors::keep_only;
pub use filter::{enter, is_confined};
use identity::MachineUser;
pub use identity::{FIRST_UID, UIDS};
pub use limits::Limits;
use refused::refused;
pub use report::Confinement;
use report::NAMESPACES;
pub use role::Role;
pub use server::forbid_for_server;

/// What has to be had before the machine is built.
pub struct Preparation {
    /// For root: whom the process becomes, and the namespace that makes its
    /// directory that user's.
    user: Option<(MachineUser, std::os::fd::OwnedFd)>,
}

impl Preparation {
    /// Chooses a user for the machine, if this process is root's.
    ///
    /// # Errors
    /// [`Error::Threads`], or no user is free, or the kernel refuses a user namespace.
    pub fn new() -> Result<Self> {
        check_single_thread()?;
        if !rustix::process::geteuid().is_root() {
            return Ok(Self { user: None });
        }
        let user = MachineUser::claim()?;
        let namespace = user_namespace::mapping_root_to(user.id())
            .os("make a user namespace for the machine's directory")?;
        Ok(Self {
            user: Some((user, namespace)),
        })
    }

    /// Confines this process, which has one thread, to `dir`, and bounds the group that it
    /// has entered. What was opened before stays usable. Each thread still has to [`enter`] its role.
    ///
    /// # Errors
    /// [`Error::Confine`]: the kernel refuses a part. The process may be confined in
    /// part then, and has to end.
    pub fn confine(
        self,
        dir: &Path,
        limits: &Limits,
        group: Option<&mut Group>,
    ) -> Result<Confinement> {
        check_single_thread()?;
        let mut report = Confinement {
            limits: limits.apply(self.user.is_some())?,
            ..Confinement::default()
        };
        // Where its group is still to be found, and it may still write there.
        if let Some(group) = group {
            group.limit(limits, &mut report);
        }
        let root = match self.user {
            Some((user, namespace)) => {
                let entered = root::enter(dir, &namespace)?;
                report.namespaces = NAMESPACES.map(str::to_owned).to_vec();
                report.owns_directory = entered.owns_directory;
                user.become_it()?;
                entered.proc
            }
            None => root::host_proc()?,
        };
        let proc = proc::use_root(root);
        rustix::thread::set_no_new_privs(true).map_err(refused("forbid new privileges"))?;
        // By its name from outside, or as root by the only one that there is.
        let dir = match report.namespaces.is_empty() {
            true => dir,
            false => Path::new("/"),
        };
        let dir = root::directory(dir)?;
        report.landlock = landlock::restrict(proc, dir.as_fd())?;
        if report.landlock.is_none() && report.namespaces.is_empty() {
            return Err(Error::Confine {
                action: "forbid files with Landlock, which this kernel does not have",
                source: Errno::OPNOTSUPP.into(),
            });
        }
        filter::prepare(proc);
        report.read_back()?;
        Ok(report)
    }
}

/// Identities, namespaces and rights are a thread's: all later ones inherit those of
/// the only one.
fn check_single_thread() -> Result<()> {
    let status = proc::read("self/status").os("count this process's threads")?;
    match report::field(&status, "Threads").and_then(|count| count.parse().ok()) {
        Some(1) => Ok(()),
        threads => Err(Error::Threads {
            threads: threads.unwrap_or(0),
        }),
    }
}
