//! What a machine hands over to be committed, from a machine that was taken over: never a
//! panic, and what a commit would read lies in the image and on the disks.
//!
//! The input is the reply's line, then what is in each of the files that come with it.

#![no_main]

use std::fs::File;
use std::io::{IoSlice, Write as _};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;

use libfuzzer_sys::fuzz_target;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use snapstore_vmm::control::Client;

const FILES: usize = 6;

fuzz_target!(|bytes: &[u8]| {
    let end = bytes.iter().position(|byte| *byte == b'\n');
    let Some((line, rest)) = end.map(|end| bytes.split_at(end + 1)) else {
        return;
    };
    let share = rest.len() / FILES;
    let mut files = Vec::new();
    for number in 0..FILES {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let fd = rustix::fs::memfd_create("handed over", flags).expect("a file in memory");
        let mut file = File::from(fd);
        let part = &rest[number * share..][..share];
        file.write_all(part).expect("room");
        files.push(file);
    }
    let (ours, theirs) = UnixStream::pair().expect("two sockets");
    theirs.set_nonblocking(true).expect("a socket");
    let fds: Vec<_> = files.iter().map(|file| file.as_fd()).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
    if sendmsg(&theirs, &[IoSlice::new(line)], &mut ancillary, SendFlags::NOSIGNAL).is_err() {
        return;
    }
    theirs.shutdown(Shutdown::Write).expect("a socket");
    let Ok(frozen) = Client::over(ours).freeze() else {
        return;
    };
    let mut end = 0;
    for range in frozen.written() {
        assert!(end <= range.start && range.start < range.end);
        end = range.end;
    }
    for disk in frozen.disks() {
        let mut end = 0;
        for extent in &disk.extents {
            assert!(end <= extent.image_offset && extent.length > 0);
            end = extent.image_offset + extent.length;
        }
        assert!(end <= disk.size_bytes);
    }
    let _ = frozen.size_bytes();
    let mut page = [0; 4096];
    let _ = frozen.read_exact_at(&mut page, u64::from(bytes[0]) << 12);
});
