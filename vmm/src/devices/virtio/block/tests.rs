//! The block device as a driver sees it.

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use proptest::prelude::*;
use virtio_bindings::virtio_blk::*;

use super::super::Host;
use super::super::testing::Driver;
use super::super::testing::Part::{Readable, Writable};
use super::*;

const SECTORS: u64 = 200;
const SIZE: usize = SECTORS as usize * 512;

fn image() -> (File, Vec<u8>) {
    let bytes: Vec<u8> = (0..SIZE).map(|at| (at / 3) as u8).collect();
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&bytes, 0).unwrap();
    (file, bytes)
}

fn overlay(base: &File) -> Disk {
    Disk::overlay("root", base.try_clone().unwrap(), &std::env::temp_dir()).unwrap()
}

fn driver(disk: &Disk) -> Driver {
    Driver::running(Box::new(Block::new(disk.clone())))
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    bytes
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(sectors.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

/// Status and data of a request.
fn ask(driver: &mut Driver, kind: u32, sector: u64, out: &[u8], room: usize) -> (u32, Vec<u8>) {
    let header = header(kind, sector);
    let (_, mut written) = driver.request(&[
        Readable(&header),
        Readable(out),
        Writable(room),
        Writable(1),
    ]);
    let status = written.pop().unwrap();
    (status.into(), written)
}

#[derive(Clone, Debug)]
struct Ask {
    kind: u32,
    sector: u64,
    sectors: u32,
    byte: u8,
    flags: u32,
    indirect: bool,
}

fn asks() -> impl Strategy<Value = Vec<Ask>> {
    let kinds = prop::sample::select(vec![
        VIRTIO_BLK_T_IN,
        VIRTIO_BLK_T_OUT,
        VIRTIO_BLK_T_OUT,
        VIRTIO_BLK_T_FLUSH,
        VIRTIO_BLK_T_DISCARD,
        VIRTIO_BLK_T_WRITE_ZEROES,
    ]);
    let ask = (
        kinds,
        0..SECTORS + 10,
        0..64_u32,
        any::<u8>(),
        0..2_u32,
        any::<bool>(),
    )
        .prop_map(|(kind, sector, sectors, byte, flags, indirect)| Ask {
            kind,
            sector,
            sectors,
            byte,
            flags,
            indirect,
        });
    proptest::collection::vec(ask, 1..40)
}

fn check(disk: &Disk, mut model: Vec<u8>, asks: Vec<Ask>) {
    let mut driver = driver(disk);
    for ask_for in asks {
        let Ask {
            kind,
            sector,
            sectors,
            byte,
            flags,
            indirect,
        } = ask_for;
        driver.indirect = indirect;
        let fits = sector + u64::from(sectors) <= SECTORS;
        let here = (sector * 512) as usize..((sector + u64::from(sectors)) * 512) as usize;
        let inside = if fits {
            VIRTIO_BLK_S_OK
        } else {
            VIRTIO_BLK_S_IOERR
        };
        match kind {
            VIRTIO_BLK_T_IN => {
                let (status, data) = ask(&mut driver, kind, sector, &[], here.len());
                assert_eq!(status, inside);
                assert!(!fits || data == model[here]);
            }
            VIRTIO_BLK_T_OUT => {
                let data: Vec<u8> = (0..here.len()).map(|at| (at / 9) as u8 ^ byte).collect();
                let (status, _) = ask(&mut driver, kind, sector, &data, 0);
                assert_eq!(status, inside);
                if fits {
                    model[here].copy_from_slice(&data);
                }
            }
            VIRTIO_BLK_T_FLUSH => {
                assert_eq!(ask(&mut driver, kind, 0, &[], 0).0, VIRTIO_BLK_S_OK);
            }
            _ => {
                let (status, _) = ask(&mut driver, kind, 0, &range(sector, sectors, flags), 0);
                if kind == VIRTIO_BLK_T_DISCARD && flags != 0 {
                    assert_eq!(status, VIRTIO_BLK_S_UNSUPP);
                    continue;
                }
                assert_eq!(status, inside);
                if fits {
                    model[here].fill(0);
                }
            }
        }
    }
    let mut bytes = vec![0; SIZE];
    disk.read_at(0, &mut bytes).unwrap();
    assert!(bytes == model);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn an_overlay_answers_as_a_disk_does_and_leaves_its_base_alone(asks in asks()) {
        let (base, bytes) = image();
        check(&overlay(&base), bytes.clone(), asks);
        let mut after = vec![0; SIZE];
        base.read_exact_at(&mut after, 0).unwrap();
        assert!(after == bytes);
    }

    #[test]
    fn a_file_written_in_place_answers_as_a_disk_does(asks in asks()) {
        let (file, bytes) = image();
        check(&Disk::in_place("data", file).unwrap(), bytes, asks);
    }
}

#[test]
fn the_driver_is_told_of_the_disk() {
    let (base, _) = image();
    let mut driver = driver(&overlay(&base));
    let mut config = [0xff; 70];
    driver.transport.read(0x100, &mut config);
    assert_eq!(config[..8], SECTORS.to_le_bytes());
    assert_eq!(config[20..24], 512_u32.to_le_bytes());
    assert_eq!(config[60..], [0; 10]);
    for offset in [0x100 + 59, 0x100 + 60, 0x1000, u64::MAX] {
        driver.transport.read(offset, &mut [0; 8]);
        driver.transport.write(offset, &[0; 8]);
    }
    let has = |features: u64, bit: u32| features & 1 << bit != 0;
    let features = driver.features();
    assert!(has(features, VIRTIO_BLK_F_DISCARD) && !has(features, VIRTIO_BLK_F_RO));
    let (status, id) = ask(&mut driver, VIRTIO_BLK_T_GET_ID, 0, &[], 20);
    assert_eq!((status, &id[..5]), (VIRTIO_BLK_S_OK, &b"root\0"[..]));
    assert_eq!(id[4..], [0; 16]);
}

#[test]
fn a_read_only_disk_refuses_to_be_written() {
    let (base, bytes) = image();
    let mut driver = driver(&Disk::read_only("tools", base).unwrap());
    let features = driver.features();
    assert_ne!(features & 1 << VIRTIO_BLK_F_RO, 0);
    assert_eq!(features & 1 << VIRTIO_BLK_F_DISCARD, 0);
    for (kind, out) in [
        (VIRTIO_BLK_T_OUT, vec![1; 512]),
        (VIRTIO_BLK_T_DISCARD, range(0, 1, 0)),
        (VIRTIO_BLK_T_WRITE_ZEROES, range(0, 1, 0)),
    ] {
        assert_eq!(ask(&mut driver, kind, 0, &out, 0).0, VIRTIO_BLK_S_IOERR);
    }
    let (status, data) = ask(&mut driver, VIRTIO_BLK_T_IN, 1, &[], 1024);
    assert_eq!((status, data), (VIRTIO_BLK_S_OK, bytes[512..1536].to_vec()));
}

#[test]
fn requests_that_cannot_be_are_answered_with_errors() {
    let (base, _) = image();
    let mut driver = driver(&overlay(&base));
    let many: Vec<u8> = (0..17).flat_map(|_| range(0, 1, 0)).collect();
    let second_is_bad = [range(0, 8, 0), range(SECTORS, 1, 0)].concat();
    let cases: &[(u32, u64, &[u8], usize, u32)] = &[
        (VIRTIO_BLK_T_IN, 0, &[], 511, VIRTIO_BLK_S_IOERR),
        (VIRTIO_BLK_T_IN, u64::MAX, &[], 512, VIRTIO_BLK_S_IOERR),
        (
            VIRTIO_BLK_T_IN,
            u64::MAX / 512,
            &[],
            512,
            VIRTIO_BLK_S_IOERR,
        ),
        (VIRTIO_BLK_T_OUT, 0, &[0; 100], 0, VIRTIO_BLK_S_IOERR),
        (VIRTIO_BLK_T_DISCARD, 0, &[0; 15], 0, VIRTIO_BLK_S_IOERR),
        (VIRTIO_BLK_T_DISCARD, 0, &[], 0, VIRTIO_BLK_S_IOERR),
        (VIRTIO_BLK_T_DISCARD, 0, &many, 0, VIRTIO_BLK_S_IOERR),
        (
            VIRTIO_BLK_T_WRITE_ZEROES,
            0,
            &second_is_bad,
            0,
            VIRTIO_BLK_S_IOERR,
        ),
        (VIRTIO_BLK_T_SECURE_ERASE, 0, &[], 0, VIRTIO_BLK_S_UNSUPP),
        (0xffff_ffff, 0, &[], 0, VIRTIO_BLK_S_UNSUPP),
    ];
    for (kind, sector, out, room, status) in cases {
        let answer = ask(&mut driver, *kind, *sector, out, *room);
        assert_eq!(answer.0, *status, "type {kind}, {} bytes", out.len());
    }
    // Of two ranges none was zeroed when one cannot be.
    let (_, data) = ask(&mut driver, VIRTIO_BLK_T_IN, 0, &[], 512);
    assert_ne!(data, [0; 512]);
}

#[test]
fn what_the_host_could_not_do_is_done_once_it_can() {
    let (base, _) = image();
    let disk = overlay(&base);
    let length = base.metadata().unwrap().len();
    let mut driver = driver(&disk);
    let host = Host::default();
    driver.transport.set_host(host.clone());
    // A read, and a part of a block whose rest cannot be read.
    for (kind, out, room) in [(VIRTIO_BLK_T_IN, 0, 512), (VIRTIO_BLK_T_OUT, 512, 0)] {
        base.set_len(4096).unwrap();
        let (header, out) = (header(kind, 100), vec![1; out]);
        let parts = [
            Readable(&header),
            Readable(&out),
            Writable(room),
            Writable(1),
        ];
        driver.submit(&parts);
        for _ in 0..3 {
            driver.notify();
            assert!(
                host.fault()
                    .is_some_and(|what| what.starts_with("root: cannot "))
            );
            assert_eq!(driver.take_used(), None, "the driver hears of nothing");
            assert_eq!(driver.interrupts(), 0);
            // Tried once more, in vain.
            driver.transport.quiesce();
            host.mended();
            driver.transport.resume();
            assert!(host.has_fault());
        }
        base.set_len(length).unwrap();
        driver.transport.quiesce();
        host.mended();
        driver.transport.resume();
        assert!(!host.has_fault());
        assert_eq!(driver.take_used().map(|(head, _)| head), Some(1));
        assert_eq!(driver.interrupts(), 1);
        assert_eq!(driver.written(&parts).last(), Some(&0), "status");
    }
}

#[test]
fn a_request_that_waits_for_the_host_is_in_the_saved_state() {
    let (base, _) = image();
    let length = base.metadata().unwrap().len();
    let disk = overlay(&base);
    let mut driver = driver(&disk);
    let header = header(VIRTIO_BLK_T_IN, 100);
    let parts = [Readable(&header), Writable(512), Writable(1)];
    base.set_len(4096).unwrap();
    driver.submit(&parts);
    driver.notify();
    assert_eq!(driver.take_used(), None);
    driver.transport.quiesce();
    let state = driver.transport.save();
    base.set_len(length).unwrap();
    let mut driver = driver.restored(Box::new(Block::new(overlay(&base))), &state);
    driver.transport.resume();
    assert_eq!(driver.take_used().map(|(head, _)| head), Some(1));
}

#[test]
fn a_machine_that_stops_begins_no_request() {
    let (base, _) = image();
    let mut driver = driver(&overlay(&base));
    let host = Host::default();
    driver.transport.set_host(host.clone());
    let header = header(VIRTIO_BLK_T_IN, 0);
    let parts = [Readable(&header), Writable(512), Writable(1)];
    host.set_pausing(true);
    driver.submit(&parts);
    driver.notify();
    assert_eq!(driver.take_used(), None);
    // It did not stop after all.
    host.set_pausing(false);
    driver.transport.catch_up();
    assert_eq!(driver.take_used().map(|(head, _)| head), Some(1));
}
