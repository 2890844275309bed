use std::fs::{self, DirBuilder};
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _};

use super::*;

fn runtime() -> (tempfile::TempDir, Runtime) {
    let dir = tempfile::tempdir().unwrap();
    let runtime = Runtime {
        dir: dir.path().to_owned(),
    };
    make_private(&dir.path().join("vms")).unwrap();
    (dir, runtime)
}

#[test]
fn a_name_is_taken_until_its_machine_ends() {
    let (_dir, runtime) = runtime();
    let vm = runtime.vm("a").unwrap();
    assert!(!vm.is_running());
    let claim = vm.claim().unwrap();
    assert!(vm.is_running());
    assert!(vm.claim().is_err());
    claim.release(None).unwrap();
    assert!(!vm.is_running());
    assert_eq!(runtime.vms().unwrap(), []);
    vm.claim().unwrap();
}

#[test]
fn a_bad_end_is_kept_until_the_name_is_used_again() {
    let (_dir, runtime) = runtime();
    let vm = runtime.vm("a").unwrap();
    vm.claim().unwrap().release(Some("why")).unwrap();
    assert_eq!(vm.ending().as_deref(), Some("why"));
    let error = runtime.running("a").unwrap_err();
    assert!(error.to_string().ends_with("why"), "{error}");
    let claim = vm.claim().unwrap();
    assert_eq!(vm.ending(), None);
    claim.release(None).unwrap();
}

#[test]
fn sockets_beside_that_of_the_guest_go_with_the_machine() {
    let (_dir, runtime) = runtime();
    let vm = runtime.vm("a").unwrap();
    let claim = vm.claim().unwrap();
    for name in ["vsock.sock", "vsock.sock_1234"] {
        fs::write(vm.dir.join(name), "").unwrap();
    }
    claim.release(None).unwrap();
    assert!(!vm.dir.exists());
}

#[test]
fn a_reservation_of_a_command_that_was_killed_goes_with_the_machine() {
    let (_dir, runtime) = runtime();
    let vm = runtime.vm("a").unwrap();
    // As a killed command leaves it: there, and not locked.
    let claim = vm.claim().unwrap();
    fs::write(vm.starter_path(), "").unwrap();
    claim.release(None).unwrap();
    assert!(!vm.dir.exists());
    // One that is held stays, and with it the directory.
    let held = vm.reserve().unwrap().unwrap();
    vm.claim().unwrap().release(None).unwrap();
    assert!(vm.starter_path().exists());
    drop(held);
    assert!(!vm.dir.exists());
}

/// Holds a file's lock for a moment, as who clears away does.
fn hold(path: std::path::PathBuf, text: &str) -> std::thread::JoinHandle<()> {
    let file = fs::File::create(path).unwrap();
    rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive).unwrap();
    (&file).write_all(text.as_bytes()).unwrap();
    std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(300));
        drop(file);
    })
}

#[test]
fn a_name_is_waited_for_that_nobody_will_keep() {
    let (_dir, runtime) = runtime();
    let vm = runtime.vm("a").unwrap();
    make_private(&vm.dir).unwrap();
    // The lock names a process that has ended.
    for said in ["", "4194305 1\n"] {
        let held = hold(vm.lock_path(), said);
        assert!(vm.reserve().unwrap().is_some(), "{said:?}");
        held.join().unwrap();
        let held = hold(vm.lock_path(), said);
        vm.claim().unwrap().release(None).unwrap();
        held.join().unwrap();
        make_private(&vm.dir).unwrap();
        let held = hold(vm.lock_path(), said);
        assert!(vm.reclaim().unwrap().is_some(), "{said:?}");
        held.join().unwrap();
    }
    let held = hold(vm.starter_path(), "");
    let reserved = vm.reserve().unwrap();
    assert!(reserved.is_some());
    held.join().unwrap();
    // Those who will keep it are not.
    assert!(vm.reserve().unwrap().is_none());
    drop(reserved);
    let claim = vm.claim().unwrap();
    claim.name_holder().unwrap();
    assert!(vm.reserve().unwrap().is_none());
}

#[test]
fn the_process_of_a_machine_is_known_while_it_is_said_again() {
    let (_dir, runtime) = runtime();
    let vm = runtime.vm("a").unwrap();
    // An earlier machine may have said more.
    make_private(&vm.dir).unwrap();
    fs::write(vm.lock_path(), "4194304 18446744073709551615\n").unwrap();
    let claim = vm.claim().unwrap();
    assert!(vm.process().is_none());
    claim.name_holder().unwrap();
    let unknown = std::thread::scope(|scope| {
        let again = scope.spawn(|| (0..20_000).try_for_each(|_| claim.name_holder()));
        let mut unknown = 0;
        while !again.is_finished() {
            unknown += u32::from(vm.process().is_none());
        }
        again.join().unwrap().unwrap();
        unknown
    });
    assert_eq!(unknown, 0, "times");
    claim.release(None).unwrap();
}

#[test]
fn a_name_of_a_machine_that_never_was_goes_with_its_command() {
    let (_dir, runtime) = runtime();
    make_private(&runtime.mounts()).unwrap();
    let vm = runtime.vm("a").unwrap();
    let held = vm.reserve().unwrap().unwrap();
    let listed = runtime.vms().unwrap();
    assert_eq!(listed, std::slice::from_ref(&vm), "it is about to start");
    assert!(vm.starter_path().exists());
    // As if its command had been killed.
    std::mem::forget(held);
    fs::remove_file(vm.starter_path()).unwrap();
    fs::write(vm.starter_path(), "").unwrap();
    assert_eq!(runtime.vms().unwrap(), []);
    assert!(!vm.dir.exists());
}

#[test]
fn what_was_logged_is_no_cause_of_an_end() {
    let (_dir, runtime) = runtime();
    let vm = runtime.vm("a").unwrap();
    let claim = vm.claim().unwrap();
    // As tracing-subscriber writes them, with colours and without, and as JSON.
    let plain = "2026-01-31T09:26:53.589793Z  WARN the guest's tap is gone error=x\n";
    let coloured = "\x1b[2m2026-01-31T09:26:53.589793Z\x1b[0m \x1b[33m WARN\x1b[0m gone\n";
    let json = "{\"timestamp\":\"2026-01-31T09:26:53.589793Z\",\"level\":\"WARN\",\"fields\":{}}\n";
    fs::write(vm.log(), [plain, coloured, json].concat()).unwrap();
    drop(claim);
    assert_eq!(vm.ending().as_deref(), Some(KILLED));
    let said = [
        plain,
        "error: memory\n",
        json,
        coloured,
        "2026 was a year\n",
    ]
    .concat();
    fs::write(vm.log(), said).unwrap();
    assert_eq!(vm.ending().as_deref(), Some("memory\n2026 was a year"));
}

/// A machine that was taken over may have made its log of any length, and of anything.
#[test]
fn only_the_end_of_a_log_is_read() {
    let (_dir, runtime) = runtime();
    let vm = runtime.vm("a").unwrap();
    drop(vm.claim().unwrap());
    let log = fs::File::create(vm.log()).unwrap();
    log.set_len(1 << 40).unwrap();
    assert_eq!(vm.ending().as_deref(), Some(KILLED));
    let mut end = vec![b'x'; 64 << 10];
    end.extend(b"\nerror: \x1b[2Jmemory \xff\n");
    log.write_all_at(&end, 1 << 40).unwrap();
    assert_eq!(vm.ending().as_deref(), Some(" [2Jmemory \u{fffd}"));
    assert!(!vm.has_ended_in_order());
    let length = log.metadata().unwrap().len();
    log.write_all_at(b"ended in order: powered off\n", length)
        .unwrap();
    assert!(vm.has_ended_in_order());
    assert_eq!(vm.ending(), None);
}

#[test]
fn names_cannot_leave_the_directory() {
    let (_dir, runtime) = runtime();
    for name in ["", ".", "..", "a/b", "/etc"] {
        assert!(runtime.vm(name).is_err(), "{name:?}");
    }
}

#[test]
fn a_directory_that_others_can_enter_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let open = dir.path().join("open");
    DirBuilder::new().mode(0o755).create(&open).unwrap();
    assert!(make_private(&open).is_err());
}
