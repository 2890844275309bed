//! What a host, a store and a user's machines are like, for a person who asks why
//! something does not work or is slow.
//!
//! Each check looks at one thing, changes nothing and says what it found, what a bad
//! finding costs and what mends it. [`mend_leftovers`] is the only one that changes
//! anything.

mod check;
mod devices;
mod kernel;
mod leftovers;
mod limits;
mod storage;

use std::path::Path;

pub use check::{Check, Level};
pub use leftovers::mend as mend_leftovers;

/// Looks at everything. The store is looked at if it is there.
#[must_use]
pub fn examine(store: &Path) -> Vec<Check> {
    let mut checks = devices::checks();
    checks.extend(kernel::checks());
    checks.extend(limits::checks());
    checks.extend(storage::checks(store));
    checks.extend(leftovers::checks());
    checks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_is_wrong_says_what_it_costs() {
        let dir = tempfile::tempdir().unwrap();
        let checks = examine(&dir.path().join("none"));
        for name in ["kvm", "fuse", "kernel", "store"] {
            assert!(checks.iter().any(|check| check.name == name), "{name}");
        }
        for check in checks {
            assert!(!check.found.is_empty(), "{check:?}");
            assert_eq!(
                check.level == Level::Ok,
                check.costs.is_empty(),
                "{check:?}"
            );
        }
    }
}
