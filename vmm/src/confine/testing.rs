//! The tests of devices once more, under the filters of the threads that devices work on.

use std::os::fd::AsFd as _;
use std::process::Command;

use super::filter::{enter, is_confined, prepare};
use super::role::Role;

/// Set in a process whose devices are filtered.
const FILTERED: &str = "SNAPSTORE_TEST_FILTERED";

/// Does what a vCPU's thread does: in a process whose devices are filtered, on a thread
/// that is filtered as one. Threads of devices filter themselves.
pub(crate) fn as_vcpu<T: Send>(act: impl FnOnce() -> T + Send) -> T {
    if std::env::var_os(FILTERED).is_none() {
        return act();
    }
    if !is_confined() {
        prepare(std::fs::File::open("/proc").unwrap().as_fd());
    }
    std::thread::scope(|scope| {
        let vcpu = scope.spawn(|| {
            enter(Role::Vcpu);
            act()
        });
        vcpu.join().unwrap()
    })
}

/// A call that is missing in a filter ends the process with SIGSYS.
#[test]
fn devices_need_no_call_that_their_threads_may_not_make() {
    let output = Command::new(std::env::current_exe().unwrap())
        // What a hostile driver does makes no other calls, and takes long.
        .args(["devices::virtio", "--skip", "hostile", "--test-threads=2"])
        .env(FILTERED, "1")
        // As a machine's process has it, which is told while it has one thread.
        .env("MALLOC_ARENA_MAX", "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}: {said}", output.status);
    let passed = said.matches(" ... ok").count();
    assert!(passed > 50, "only {passed} tests: {said}");
}
