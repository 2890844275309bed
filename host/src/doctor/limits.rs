//! Limits of this process, which what it starts inherits.

use rustix::process::{Resource, getrlimit};

use super::check::{Check, number};

pub(super) fn checks() -> Vec<Check> {
    let mut checks = vec![descriptors()];
    checks.extend(mappings());
    checks
}

/// What a machine with some disks and a mount of a large store need at most, and what a
/// restore of a hundred machines at once needs.
const ENOUGH_DESCRIPTORS: u64 = 1024;

fn descriptors() -> Check {
    let limit = getrlimit(Resource::Nofile);
    let hard = limit.maximum.unwrap_or(u64::MAX);
    let soft = limit.current.unwrap_or(u64::MAX);
    if soft >= ENOUGH_DESCRIPTORS {
        return Check::ok("descriptors", format!("{soft} open files"));
    }
    Check::warning(
        "descriptors",
        format!("{soft} open files"),
        "large stores are slower, and fewer machines can be restored at once",
        match hard >= ENOUGH_DESCRIPTORS {
            true => format!("`ulimit -n {ENOUGH_DESCRIPTORS}`"),
            false => "raise nofile in /etc/security/limits.conf".to_owned(),
        },
    )
}

/// The kernel's default, for which everything here is made.
const DEFAULT_MAPPINGS: u64 = 65_530;

fn mappings() -> Option<Check> {
    let mappings = number("/proc/sys/vm/max_map_count")?;
    Some(match mappings {
        DEFAULT_MAPPINGS.. => Check::ok(
            "max_map_count",
            format!("{mappings} pieces of memory in a process"),
        ),
        _ => Check::warning(
            "max_map_count",
            mappings.to_string(),
            "a restored machine whose memory is in many pieces may not start",
            format!("`sysctl vm.max_map_count={DEFAULT_MAPPINGS}`"),
        ),
    })
}
