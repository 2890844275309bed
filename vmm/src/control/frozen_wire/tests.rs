//! What is handed over arrives as it was sent, and what is malformed is refused.

use std::collections::VecDeque;
use std::os::unix::fs::MetadataExt as _;

use super::*;

fn file() -> File {
    tempfile::tempfile().unwrap()
}

fn inode(file: &File) -> u64 {
    file.metadata().unwrap().ino()
}

fn slots() -> Vec<HostSlot> {
    vec![HostSlot {
        guest_address: 0,
        image_offset: 0,
        host_address: 0x7000_0000_0000,
        length: 1 << 30,
    }]
}

fn disk(number: u64, overlay: bool) -> FrozenDisk {
    let overlaid = Content::Overlay { file_offset: 8192 };
    FrozenDisk {
        name: format!("disk{number}"),
        size_bytes: 1 << 20,
        base: file(),
        base_modified: Some((7, 8)),
        overlay: overlay.then(file),
        extents: vec![
            Extent {
                image_offset: 4096,
                length: 4096,
                content: Content::Zeros,
            },
            Extent {
                image_offset: 65536,
                length: 8192,
                content: match overlay {
                    true => overlaid,
                    false => Content::Zeros,
                },
            },
        ],
    }
}

fn record(process: bool, changed: bool) -> FrozenRecord {
    FrozenRecord {
        memory: file(),
        process: process.then(|| (42, file())),
        slots: slots(),
        state: b"state".to_vec(),
        changed: changed.then(|| vec![0..4096, 8192..65536]),
        after: Some(3),
        disks: vec![disk(0, true), disk(1, false), disk(2, true)],
        origin: Origin {
            snapshot: Some("id".to_owned()),
            tag: Some("tag".to_owned()),
        },
        timings: [("pause".to_owned(), 0.5)].into(),
    }
}

/// Which files a record has, in the order in which it names them.
fn inodes(record: &FrozenRecord) -> Vec<u64> {
    let mut inodes = vec![inode(&record.memory)];
    inodes.extend(record.process.as_ref().map(|(_, pagemap)| inode(pagemap)));
    for disk in &record.disks {
        inodes.push(inode(&disk.base));
        inodes.extend(disk.overlay.as_ref().map(inode));
    }
    inodes
}

fn decode(reply: Reply, fds: Vec<OwnedFd>) -> Result<FrozenRecord, Malformed> {
    let mut fds = VecDeque::from(fds);
    let decoded = FrozenRecord::decode(reply, || fds.pop_front())?;
    assert!(fds.is_empty(), "{} descriptors were left", fds.len());
    Ok(decoded)
}

#[test]
fn a_record_arrives_as_it_was_sent() {
    for (process, changed) in [(true, true), (true, false), (false, true)] {
        let sent = record(process, changed);
        let (files, disks) = (inodes(&sent), sent.disks.len());
        let (reply, fds) = sent.encode().unwrap();
        let line = serde_json::to_string(&reply).unwrap();
        let got = decode(serde_json::from_str(&line).unwrap(), fds).unwrap();
        let want = record(process, changed);
        assert_eq!(inodes(&got), files);
        assert_eq!(got.slots, want.slots);
        assert_eq!(got.process.map(|(pid, _)| pid), process.then_some(42));
        assert_eq!(got.state, want.state);
        assert_eq!(got.changed, want.changed);
        assert_eq!(got.after, want.after);
        assert_eq!((got.origin, got.timings), (want.origin, want.timings));
        assert_eq!(got.disks.len(), disks);
        for (got, want) in got.disks.iter().zip(&want.disks) {
            assert_eq!(got.name, want.name);
            assert_eq!(got.size_bytes, want.size_bytes);
            assert_eq!(got.base_modified, want.base_modified);
            assert_eq!(got.overlay.is_some(), want.overlay.is_some());
            assert_eq!(got.extents, want.extents);
        }
    }
}

#[test]
fn what_is_read_live_arrives_as_it_was_sent() {
    let live = LiveMemory {
        memory: file(),
        slots: slots(),
        written: vec![4096..8192, 16384..65536],
        origin: Origin::default(),
    };
    let memory = inode(&live.memory);
    let (reply, fds) = live.encode(9).unwrap();
    let mut fds = VecDeque::from(fds);
    let (got, round) = LiveMemory::decode(reply, || fds.pop_front()).unwrap();
    assert_eq!((inode(&got.memory), round), (memory, 9));
    assert_eq!(
        (got.slots, got.written),
        (slots(), vec![4096..8192, 16384..65536])
    );
    assert!(fds.is_empty());
}

#[test]
fn a_record_that_lacks_a_descriptor_is_refused() {
    let (reply, fds) = record(true, true).encode().unwrap();
    let whole = fds.len();
    drop(fds);
    for missing in 1..=whole {
        let (_, mut fds) = record(true, true).encode().unwrap();
        fds.truncate(whole - missing);
        let got = decode(reply.clone(), fds);
        assert!(matches!(got, Err(Malformed::Unexpected)), "{missing}");
    }
    let other = decode(Reply::Done, Vec::new());
    assert!(matches!(other, Err(Malformed::Unexpected)));
}

#[test]
fn lists_that_are_none_are_refused() {
    let refused = |extents: Vec<Extent>, overlay: bool| {
        let mut sent = record(false, true);
        let (file, name) = (overlay.then(file), "disk0".to_owned());
        sent.disks = vec![FrozenDisk {
            extents,
            overlay: file,
            name,
            ..disk(0, false)
        }];
        let (reply, fds) = sent.encode().unwrap();
        matches!(decode(reply, fds), Err(Malformed::Io(_)))
    };
    let extent = |image_offset, length, overlaid| Extent {
        image_offset,
        length,
        content: match overlaid {
            true => Content::Overlay { file_offset: 0 },
            false => Content::Zeros,
        },
    };
    assert!(!refused(vec![extent(0, 1 << 20, true)], true));
    assert!(refused(vec![extent(0, 1 << 20, true)], false), "no overlay");
    assert!(refused(vec![extent(4096, 1 << 20, false)], true), "beyond");
    assert!(refused(vec![extent(4096, u64::MAX, false)], true));
    assert!(refused(vec![extent(0, 0, false)], true), "empty");
    let twice = vec![extent(0, 8192, false), extent(4096, 8192, false)];
    assert!(refused(twice, true), "overlap");
    for (first, second) in [
        ((8, 4), (16, 20)),
        ((4, 4), (8, 12)),
        ((0, 8), (4, 12)),
        ((8, 12), (0, 4)),
    ] {
        let changed = vec![first.0..first.1, second.0..second.1];
        let mut sent = record(false, true);
        sent.changed = Some(changed.clone());
        let (reply, fds) = sent.encode().unwrap();
        let got = decode(reply, fds);
        assert!(matches!(got, Err(Malformed::Io(_))), "{changed:?}");
    }
    for (at, odd) in [(1, 15), (2, 33)] {
        let (reply, mut fds) = record(false, true).encode().unwrap();
        // After the memory and the state: the ranges, a base, an overlay, extents.
        let list = if at == 1 { 2 } else { 5 };
        fds[list] = memory_file("odd", &vec![0; odd]).unwrap();
        assert!(matches!(decode(reply, fds), Err(Malformed::Io(_))), "{odd}");
    }
}
