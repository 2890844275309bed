//! Disks against models: bytes in a vector.

use std::os::unix::fs::FileExt as _;

use proptest::prelude::*;

use super::*;

/// Not a multiple of a block.
const SIZE: usize = 41 * 4096 + 512;

fn bytes_of(seed: u8) -> Vec<u8> {
    (0..SIZE).map(|at| (at / 7) as u8 ^ seed).collect()
}

fn file_of(bytes: &[u8]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(bytes, 0).unwrap();
    file
}

fn overlay(base: &File) -> Disk {
    Disk::overlay("root", base.try_clone().unwrap(), &std::env::temp_dir()).unwrap()
}

fn content(disk: &Disk) -> Vec<u8> {
    let mut bytes = vec![0; SIZE];
    disk.read_at(0, &mut bytes).unwrap();
    bytes
}

/// What a commit does with what changed.
fn applied(frozen: &FrozenDisk, extents: &[Extent], mut image: Vec<u8>) -> Vec<u8> {
    let mut end = 0;
    for extent in extents {
        assert!(extent.image_offset >= end, "extents ascend");
        end = extent.image_offset + extent.length;
        let range = extent.image_offset as usize..end as usize;
        match extent.content {
            Content::Zeros => image[range].fill(0),
            Content::Overlay { file_offset } => frozen
                .overlay()
                .unwrap()
                .read_exact_at(&mut image[range], file_offset)
                .unwrap(),
        }
    }
    image
}

#[derive(Clone, Debug)]
enum Op {
    Write(usize, usize, u8),
    Zero(usize, usize),
    Read(usize, usize),
    Freeze,
    /// Of the living freezes, modulo their number.
    Commit(usize),
    Fail(usize),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let range = || {
        (
            0..SIZE,
            prop_oneof![Just(4096_usize), 1..600_usize, 1..60_000_usize],
            any::<bool>(),
        )
            .prop_map(|(at, length, aligned)| {
                let at = if aligned { at & !4095 } else { at };
                (at, length.min(SIZE - at))
            })
    };
    let op = prop_oneof![
        4 => (range(), any::<u8>()).prop_map(|((at, length), byte)| Op::Write(at, length, byte)),
        2 => range().prop_map(|(at, length)| Op::Zero(at, length)),
        2 => range().prop_map(|(at, length)| Op::Read(at, length)),
        2 => Just(Op::Freeze),
        1 => any::<usize>().prop_map(Op::Commit),
        1 => any::<usize>().prop_map(Op::Fail),
    ];
    proptest::collection::vec(op, 1..60)
}

/// What is true of a freeze for as long as it lives.
fn check(frozen: &FrozenDisk, then: &[u8], base: &[u8]) {
    let mut bytes = vec![0; SIZE];
    frozen.read_at(0, &mut bytes).unwrap();
    assert!(bytes == then, "a frozen disk changed");
    let overlaid = applied(frozen, &frozen.overlaid(), base.to_vec());
    assert!(
        overlaid == then,
        "the base with all that was written differs"
    );
}

/// And of one that can still be committed after what is durable.
fn check_commit(frozen: &FrozenDisk, then: &[u8], durable: &[u8]) {
    let changed = applied(frozen, &frozen.changed(), durable.to_vec());
    assert!(changed == then, "a commit of what changed differs");
}

fn run(ops: Vec<Op>) {
    let base_bytes = bytes_of(1);
    let base = file_of(&base_bytes);
    let disk = overlay(&base);
    let mut model = base_bytes.clone();
    let mut durable = base_bytes.clone();
    let mut frozen: Vec<(FrozenDisk, Vec<u8>)> = Vec::new();
    let mut outdated: Vec<(FrozenDisk, Vec<u8>)> = Vec::new();
    for op in ops {
        match op {
            Op::Write(at, length, byte) => {
                let bytes: Vec<u8> = (0..length).map(|i| (i / 5) as u8 ^ byte).collect();
                disk.write_at(at as u64, &bytes).unwrap();
                model[at..at + length].copy_from_slice(&bytes);
            }
            Op::Zero(at, length) => {
                disk.zero(at as u64, length as u64).unwrap();
                model[at..at + length].fill(0);
            }
            Op::Read(at, length) => {
                let mut bytes = vec![0xee; length];
                disk.read_at(at as u64, &mut bytes).unwrap();
                assert!(bytes == model[at..at + length]);
            }
            Op::Freeze => frozen.push((disk.freeze().unwrap(), model.clone())),
            Op::Commit(which) if !frozen.is_empty() => {
                // Commits become durable in order; older freezes are only read.
                let which = which % frozen.len();
                outdated.extend(frozen.drain(..which));
                let (one, then) = frozen.remove(0);
                disk.committed(one.number());
                durable = then.clone();
                outdated.push((one, then));
            }
            Op::Fail(which) if which % 3 == 0 => outdated.clear(),
            Op::Fail(which) if !frozen.is_empty() => {
                let _ = frozen.remove(which % frozen.len());
            }
            Op::Commit(_) | Op::Fail(_) => {}
        }
        for (one, then) in frozen.iter().chain(&outdated) {
            check(one, then, &base_bytes);
        }
        for (one, then) in &frozen {
            check_commit(one, then, &durable);
        }
    }
    assert!(content(&disk) == model);
    let mut after = vec![0; SIZE];
    base.read_exact_at(&mut after, 0).unwrap();
    assert!(after == base_bytes, "the base changed");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn an_overlay_is_a_disk_that_can_be_frozen_and_committed(ops in ops()) {
        run(ops);
    }
}

#[test]
fn much_that_is_discarded_is_zeros() {
    const MIB: u64 = 1 << 20;
    let base = file_of(&vec![0xaa; 9 * MIB as usize]);
    let disk = overlay(&base);
    disk.write_at(3 * MIB, &[1; 8192]).unwrap();
    disk.zero(MIB + 512, 7 * MIB).unwrap();
    disk.write_at(5 * MIB, &[2; 4096]).unwrap();
    let byte = |at| {
        let mut byte = [0];
        disk.read_at(at, &mut byte).unwrap();
        byte[0]
    };
    let end = 8 * MIB + 512;
    assert_eq!(
        [0, MIB + 511, MIB + 512, 3 * MIB, 5 * MIB, 5 * MIB + 4096].map(byte),
        [0xaa, 0xaa, 0, 0, 2, 0]
    );
    assert_eq!([end - 1, end, 9 * MIB - 1].map(byte), [0, 0xaa, 0xaa]);
    // And a commit is told so.
    let frozen = disk.freeze().unwrap();
    let zeros = frozen.changed().into_iter();
    let zeros = zeros.filter(|extent| extent.content == Content::Zeros);
    assert_eq!(
        zeros.map(|extent| extent.length).sum::<u64>(),
        7 * MIB - 4096 - 4096
    );
}

#[test]
fn commits_that_always_fail_lose_nothing_and_stay_few_maps() {
    let base_bytes = bytes_of(2);
    let base = file_of(&base_bytes);
    let disk = overlay(&base);
    let mut model = base_bytes.clone();
    for round in 0..40_usize {
        let at = round * 4096;
        disk.write_at(at as u64, &[round as u8; 100]).unwrap();
        model[at..at + 100].fill(round as u8);
        disk.write_at(0, &[round as u8; 4096]).unwrap();
        model[..4096].fill(round as u8);
        let frozen = disk.freeze().unwrap();
        check(&frozen, &model, &base_bytes);
        check_commit(&frozen, &model, &base_bytes);
        assert!(frozen.overlay.as_ref().unwrap().layers() <= 9);
    }
    let last = disk.freeze().unwrap();
    let number = last.number();
    drop(last);
    disk.committed(number);
    let next = disk.freeze().unwrap();
    assert_eq!(next.changed(), []);
    assert!(applied(&next, &next.overlaid(), base_bytes) == model);
}

#[test]
fn room_is_used_again() {
    use std::os::unix::fs::MetadataExt as _;
    let disk = overlay(&file_of(&bytes_of(3)));
    let whole = vec![7; SIZE];
    for _ in 0..20 {
        disk.write_at(0, &whole).unwrap();
        let frozen = disk.freeze().unwrap();
        disk.committed(frozen.number());
    }
    let frozen = disk.freeze().unwrap();
    let length = frozen.overlay().unwrap().metadata().unwrap().len();
    assert!(length <= 3 * 42 * 4096, "{length} bytes for {SIZE}");
    drop(frozen);
    disk.zero(0, SIZE as u64).unwrap();
    disk.committed(disk.freeze().unwrap().number());
    let frozen = disk.freeze().unwrap();
    let blocks = frozen.overlay().unwrap().metadata().unwrap().blocks();
    assert_eq!(blocks, 0, "blocks of the host are kept for zeros");
}

#[test]
fn neighbouring_blocks_are_one_extent() {
    let disk = overlay(&file_of(&bytes_of(4)));
    disk.write_at(4096, &[1; 8 * 4096]).unwrap();
    disk.zero(20 * 4096, 21 * 4096 + 512).unwrap();
    let changed = disk.freeze().unwrap().changed();
    let extents: Vec<_> = changed.iter().map(|e| (e.image_offset, e.length)).collect();
    assert_eq!(extents, [(4096, 8 * 4096), (20 * 4096, 21 * 4096 + 512)]);
    assert_eq!(changed[1].content, Content::Zeros);
}

#[test]
fn a_disk_in_place_writes_its_file_and_is_never_frozen() {
    let file = file_of(&bytes_of(5));
    let disk = Disk::in_place("data", file.try_clone().unwrap()).unwrap();
    disk.write_at(1000, b"written").unwrap();
    disk.zero(5000, 5000).unwrap();
    disk.flush().unwrap();
    let mut model = bytes_of(5);
    model[1000..1007].copy_from_slice(b"written");
    model[5000..10000].fill(0);
    let mut bytes = vec![0; SIZE];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == model && content(&disk) == model);
    let refused = disk.freeze().err().unwrap();
    assert!(matches!(&refused, Error::DiskInPlace { name } if name == "data"));
    assert!(refused.to_string().contains("overlay"));
}

#[test]
fn a_read_only_disk_is_frozen_without_changes() {
    let disk = Disk::read_only("tools", file_of(&bytes_of(6))).unwrap();
    assert!(disk.write_at(0, b"x").is_err());
    assert!(disk.zero(0, 1).is_err());
    let frozen = disk.freeze().unwrap();
    assert!(frozen.changed().is_empty() && frozen.overlay().is_none());
    let mut bytes = vec![0; SIZE];
    frozen.read_at(0, &mut bytes).unwrap();
    assert!(bytes == bytes_of(6));
}

#[test]
fn nothing_is_read_or_written_past_the_end() {
    let base = file_of(&bytes_of(7));
    let disks = [
        overlay(&base),
        Disk::read_only("a", base.try_clone().unwrap()).unwrap(),
        Disk::in_place("b", file_of(&bytes_of(7))).unwrap(),
    ];
    for disk in disks {
        for offset in [SIZE as u64 - 1, SIZE as u64, u64::MAX - 1, u64::MAX] {
            assert!(disk.read_at(offset, &mut [0; 2]).is_err());
            assert!(disk.write_at(offset, &[0; 2]).is_err());
            assert!(disk.zero(offset, 2).is_err());
        }
        assert!(disk.zero(1, u64::MAX).is_err());
        assert_eq!(content(&disk), bytes_of(7));
    }
}

#[test]
fn files_that_are_no_disks_are_refused() {
    for length in [0, 511, 513, MAX_DISK_BYTES + 512] {
        let file = tempfile::tempfile().unwrap();
        file.set_len(length).unwrap();
        let refused = Disk::read_only("odd", file).err().unwrap();
        assert!(matches!(refused, Error::DiskSize { bytes, .. } if bytes == length));
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(4096).unwrap();
    let _writer = Disk::in_place("one", file.reopen().unwrap()).unwrap();
    let second = Disk::read_only("one", file.reopen().unwrap());
    assert!(matches!(second.err().unwrap(), Error::DiskBusy { .. }));
}

#[test]
fn an_overlay_is_not_larger_than_it_may_be() {
    let base = tempfile::tempfile().unwrap();
    base.set_len(1 << 20).unwrap();
    let disk = Disk::limited_overlay("root", base, &std::env::temp_dir(), Some(5 << 12)).unwrap();
    for block in 0..5 {
        disk.write_at(block * 8192, &[1; 4096]).unwrap();
    }
    let full = disk.write_at(100 << 10, &[2; 4096]).unwrap_err();
    assert_eq!(full.kind(), std::io::ErrorKind::StorageFull, "{full}");
    // What is there can be written again, and what was given back be used.
    disk.write_at(8192, &[3; 4096]).unwrap();
    disk.zero(0, 4096).unwrap();
    disk.write_at(100 << 10, &[2; 4096]).unwrap();
}
