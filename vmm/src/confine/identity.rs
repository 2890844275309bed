//! A user for each machine that root starts.
//!
//! The users are numbers that no system gives away: 65 536 from [`FIRST_UID`], above
//! those of containers (systemd, "Users, Groups, UIDs and GIDs"). A machine holds a
//! lock (flock(2)) on a file with its number in `/run/snapstore/uids`, whatever
//! runtime directory it is in, so that no two that run are the same user, and one
//! that has ended has no claim.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;

use rustix::fs::FlockOperation;
use rustix::io::Errno;
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::thread::{
    CapabilitySet, CapabilitySets, Gid, Uid, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_thread_groups, set_thread_res_gid,
    set_thread_res_uid,
};

use super::refused::refused;
use crate::error::{Error, Result};

/// The first of the machines' users and groups.
pub const FIRST_UID: u32 = 0x7000_0000;
/// How many there are.
pub const UIDS: u32 = 0x1_0000;

const CLAIMS: &str = "/run/snapstore/uids";

/// A user that is one machine's as long as the process lives that has this.
pub(super) struct MachineUser {
    id: u32,
    claim: File,
}

impl MachineUser {
    /// One that no running machine has.
    pub fn claim() -> Result<Self> {
        let dir = Path::new(CLAIMS);
        DirBuilder::new()
            .mode(0o700)
            .recursive(true)
            .create(dir)
            .map_err(refused("make /run/snapstore/uids"))?;
        // Where others are unlikely to have looked.
        let start = std::process::id() % UIDS;
        for number in (start..UIDS).chain(0..start) {
            let claim = OpenOptions::new()
                .create(true)
                .truncate(false)
                .write(true)
                .mode(0o600)
                .open(dir.join(number.to_string()))
                .map_err(refused("open a file in /run/snapstore/uids"))?;
            match rustix::fs::flock(&claim, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {
                    return Ok(Self {
                        id: FIRST_UID + number,
                        claim,
                    });
                }
                Err(Errno::WOULDBLOCK) => {}
                Err(error) => return Err(refused("lock a file in /run/snapstore/uids")(error)),
            }
        }
        Err(Error::Confine {
            action: "find a free user for it",
            source: io::ErrorKind::QuotaExceeded.into(),
        })
    }

    /// Its number.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Makes this thread that user's, without any capability, for as long as the
    /// process lives.
    pub fn become_it(self) -> Result<()> {
        clear_ambient_capability_set().map_err(refused("give up ambient capabilities"))?;
        for number in 0..64 {
            let capability = CapabilitySet::from_bits_retain(1 << number);
            match remove_capability_from_bounding_set(capability) {
                // Beyond the last one that this kernel knows.
                Err(Errno::INVAL) => break,
                other => other.map_err(refused("give up capabilities"))?,
            }
        }
        let (uid, gid) = (Uid::from_raw(self.id), Gid::from_raw(self.id));
        set_thread_groups(&[]).map_err(refused("leave its groups"))?;
        set_thread_res_gid(gid, gid, gid).map_err(refused("change its group"))?;
        set_thread_res_uid(uid, uid, uid).map_err(refused("change its user"))?;
        let none = CapabilitySets {
            effective: CapabilitySet::empty(),
            permitted: CapabilitySet::empty(),
            inheritable: CapabilitySet::empty(),
        };
        set_capabilities(None, none).map_err(refused("give up capabilities"))?;
        // The kernel takes this away with a change of user. Without it nobody but root
        // may open the memory of a frozen copy, which the machine has to hand over. No
        // other process is this user's.
        set_dumpable_behavior(DumpableBehavior::Dumpable).map_err(refused("be readable"))?;
        // Until the process ends.
        std::mem::forget(self.claim);
        Ok(())
    }
}
