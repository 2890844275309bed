//! What the agent changes in the guest's system.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::AsRawFd as _;

use rustix::time::{ClockId, Timespec, clock_settime};

use snapstore_agent_protocol::{MAX_ENTROPY_BYTES, from_hex};

use crate::reply::invalid;

const NANOS: u64 = 1_000_000_000;
/// Where the kernel's entropy goes and comes from, random(4).
const RANDOM: &str = "/dev/urandom";
const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
const RNDRESEEDCRNG: libc::Ioctl = 0x5207;
const MACHINE_ID: &str = "/etc/machine-id";

/// Sets the clock.
pub fn set_time(unix_nanoseconds: u64) -> io::Result<()> {
    let time = Timespec {
        tv_sec: i64::try_from(unix_nanoseconds / NANOS).map_err(io::Error::other)?,
        tv_nsec: i64::try_from(unix_nanoseconds % NANOS).map_err(io::Error::other)?,
    };
    Ok(clock_settime(ClockId::Realtime, time)?)
}

/// `struct rand_pool_info` of random(4), with room for the entropy.
#[repr(C)]
struct PoolInfo {
    entropy_bits: libc::c_int,
    length: libc::c_int,
    bytes: [u8; MAX_ENTROPY_BYTES],
}

/// Adds entropy, and has the kernel's generator use it from now on rather than in
/// some minutes.
pub fn reseed(hex: &str) -> io::Result<()> {
    let entropy = from_hex(hex)
        .filter(|entropy| (1..=MAX_ENTROPY_BYTES).contains(&entropy.len()))
        .ok_or_else(|| invalid("entropy is 1 to 512 bytes in hexadecimal"))?;
    let length = libc::c_int::try_from(entropy.len()).map_err(io::Error::other)?;
    let mut info = PoolInfo {
        entropy_bits: length * 8,
        length,
        bytes: [0; MAX_ENTROPY_BYTES],
    };
    info.bytes[..entropy.len()].copy_from_slice(&entropy);
    let random = OpenOptions::new().write(true).open(RANDOM)?;
    // SAFETY: the kernel reads the structure and the bytes that it names, all of
    // which are in it.
    let added = unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &raw const info) };
    if added < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: takes no argument.
    let reseeded = unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) };
    if reseeded < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Names the machine, as far as names are given. Both are checked before either
/// is set.
pub fn identify(hostname: Option<&str>, machine_id: Option<&str>) -> io::Result<()> {
    if hostname.is_some_and(|name| name.is_empty() || name.len() > 64) {
        return Err(invalid("a host name has 1 to 64 bytes"));
    }
    let is_id = |id: &str| {
        id.len() == 32
            && id
                .bytes()
                .all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'))
    };
    if machine_id.is_some_and(|id| !is_id(id)) {
        return Err(invalid("a machine id has 32 lower-case hexadecimal digits"));
    }
    if let Some(name) = hostname {
        rustix::system::sethostname(name.as_bytes())?;
    }
    if let Some(id) = machine_id {
        fs::write(MACHINE_ID, format!("{id}\n"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nonsense_changes_nothing() {
        let long = "00".repeat(MAX_ENTROPY_BYTES + 1);
        for hex in ["", "0", "zz", &long] {
            assert!(reseed(hex).is_err());
        }
        let id = "0123456789abcdef0123456789abcdef";
        for (hostname, machine_id) in [
            (Some(""), None),
            (Some(""), Some(id)),
            (None, Some("0123")),
            (None, Some("0123456789ABCDEF0123456789ABCDEF")),
        ] {
            assert!(identify(hostname, machine_id).is_err());
        }
        identify(None, None).unwrap();
    }
}
