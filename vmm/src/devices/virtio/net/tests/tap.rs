//! A real tap, where there is a right to make one.

use super::super::*;
use super::{HEADER, config, device, eventually, mac};
use crate::devices::virtio::testing::Driver;
use crate::devices::virtio::testing::Part::{Readable, Writable};
use crate::error::Error;

/// A network of this thread's own with a tap `t0`, whose host is 10.9.8.1; `None`,
/// and a line that says so, where there is no right to it.
fn tap_of_our_own(test: &str) -> Option<()> {
    let skipped = |why: &dyn std::fmt::Display| {
        println!("SKIPPED {test}: {why}");
        None
    };
    if let Err(error) = std::fs::File::open("/dev/net/tun") {
        return skipped(&format_args!("/dev/net/tun: {error}"));
    }
    // SAFETY: takes no address; this thread's network is another one from here on.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        return skipped(&std::io::Error::last_os_error());
    }
    for command in [
        "link set lo up",
        "tuntap add t0 mode tap",
        "link set t0 up",
        "address add 10.9.8.1/24 dev t0",
    ] {
        match std::process::Command::new("ip")
            .args(command.split(' '))
            .status()
        {
            Ok(status) if status.success() => {}
            Ok(status) => return skipped(&format_args!("ip {command}: {status}")),
            Err(error) => return skipped(&format_args!("ip: {error}")),
        }
    }
    Some(())
}

#[test]
fn taps_that_cannot_be_used_are_told_apart() {
    let Some(()) = tap_of_our_own("taps_that_cannot_be_used_are_told_apart") else {
        return;
    };
    let error = |name: &str| Tap::open(name).err().unwrap();
    for name in ["t1", "", "a name that is too long", "t0\0"] {
        assert!(matches!(error(name), Error::NoTap { .. }), "{name:?}");
    }
    assert!(
        error("t1")
            .to_string()
            .contains("`ip tuntap add t1 mode tap`")
    );
    assert!(matches!(error("lo"), Error::NotATap { .. }));
    let tap = Tap::open("t0").unwrap();
    assert_eq!(tap.name(), Some("t0"));
    assert!(matches!(error("t0"), Error::TapBusy { .. }));
    drop(tap);
    Tap::open("t0").unwrap();
    // Nothing was made by looking.
    assert!(matches!(error("t1"), Error::NoTap { .. }));
}

#[test]
fn a_tap_that_is_deleted_takes_the_link_down() {
    let Some(()) = tap_of_our_own("a_tap_that_is_deleted_takes_the_link_down") else {
        return;
    };
    // The device has no thread here: it notices when it is notified.
    let tap = Tap::open("t0").unwrap();
    let mut driver = Driver::running(device(Some(tap), 1));
    driver.submit(&[Writable(2000)]);
    driver.notify();
    assert_eq!(config(&driver)[6..8], [1, 0]);
    let deleted = std::process::Command::new("ip")
        .args(["link", "delete", "t0"])
        .status();
    assert!(deleted.unwrap().success());
    // The host's own first frames may have taken the buffer.
    driver.submit(&[Writable(2000)]);
    driver.notify();
    assert_eq!(config(&driver)[6..8], [0, 0]);
}

#[test]
fn a_real_tap_answers() {
    let Some(()) = tap_of_our_own("a_real_tap_answers") else {
        return;
    };
    // Who has 10.9.8.1? 10.9.8.2 at 02:00:00:00:00:01 asks.
    let mut question = [0xff; 6].to_vec();
    question.extend(mac(1).bytes());
    question.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    question.extend(mac(1).bytes());
    question.extend([10, 9, 8, 2, 0, 0, 0, 0, 0, 0, 10, 9, 8, 1]);

    let tap = Tap::open("t0").unwrap();
    let mut driver = Driver::running_on(device(Some(tap), 1), SEND as u32);
    // The host's end needs a moment to notice its cable.
    eventually("10.9.8.1 answers", || {
        driver.queue = SEND as u32;
        driver.start(u64::MAX);
        driver.request(&[Readable(&[0; HEADER_BYTES]), Readable(&question)]);
        driver.queue = RECEIVE as u32;
        driver.start(u64::MAX);
        loop {
            let parts = [Writable(2000)];
            driver.submit(&parts);
            driver.notify();
            let Some((_, length)) = driver.take_used() else {
                return false;
            };
            let bytes = driver.written(&parts);
            let frame = &bytes[HEADER_BYTES..length as usize];
            assert_eq!(bytes[..HEADER_BYTES], HEADER);
            if frame[12..14] == [8, 6] && frame[20..22] == [0, 2] {
                assert_eq!(frame[..6], mac(1).bytes());
                assert_eq!(frame[28..32], [10, 9, 8, 1]);
                return true;
            }
        }
    });
}
