//! What a power cut leaves of an overlay's directory: what was synced, and any part of what
//! was written since.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::{BLOCK, DATA, Run, ops};
use crate::Survived;
use crate::disk::sync_dir;

/// What is known to be on the disk.
#[derive(Default)]
struct Disk {
    files: BTreeMap<PathBuf, Vec<u8>>,
    names: BTreeSet<PathBuf>,
}

thread_local! {
    static DISK: RefCell<Disk> = RefCell::default();
    static FAILS: Cell<bool> = const { Cell::new(false) };
}

/// A disk that cannot write tells it once.
pub(crate) fn fails() -> io::Result<()> {
    match FAILS.take() {
        true => Err(rustix::io::Errno::IO.into()),
        false => Ok(()),
    }
}

pub(crate) fn synced(file: &File) {
    let path = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
    // It may have no name any more.
    if let Ok(bytes) = fs::read(&path) {
        DISK.with_borrow_mut(|disk| disk.files.insert(path, bytes));
    }
}

pub(crate) fn synced_dir(dir: &Path) {
    DISK.with_borrow_mut(|disk| {
        disk.names.retain(|path| !path.starts_with(dir));
        disk.names.extend(listed(dir));
    });
}

fn listed(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}

/// A row of numbers that a seed begins.
struct Random(u64);

impl Random {
    fn coin(&mut self) -> bool {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005);
        self.0 = self.0.wrapping_add(1);
        self.0 >> 63 == 0
    }
}

/// Bytes that the disk writes together: a sector of a journal; of the overlay's file a block,
/// which is what its readers know.
fn unit(path: &Path) -> usize {
    if path.ends_with(DATA) { BLOCK } else { 512 }
}

/// Leaves in `dir` what a disk may have: of each unit what was synced, or what is there.
fn cut_power(dir: &Path, random: u64) {
    let mut random = Random(random);
    DISK.with_borrow_mut(|disk| {
        let known = disk.files.keys().chain(&disk.names);
        let mut paths: BTreeSet<PathBuf> =
            known.filter(|it| it.starts_with(dir)).cloned().collect();
        paths.extend(listed(dir));
        for path in paths {
            let old = disk.files.remove(&path).unwrap_or_default();
            let is_there = fs::read(&path).ok();
            let survives = match (disk.names.remove(&path), is_there.is_some()) {
                (true, true) => true,
                (false, false) => false,
                _ => random.coin(),
            };
            if !survives {
                let _ = fs::remove_file(&path);
                continue;
            }
            let new = is_there.unwrap_or_else(|| old.clone());
            let left = torn(&old, &new, unit(&path), &mut random);
            fs::write(&path, &left).unwrap();
            disk.files.insert(path.clone(), left);
            disk.names.insert(path);
        }
    });
}

fn torn(old: &[u8], new: &[u8], unit: usize, random: &mut Random) -> Vec<u8> {
    let length = if random.coin() { old.len() } else { new.len() };
    let mut left = Vec::new();
    while left.len() < length {
        let from = if random.coin() { old } else { new };
        let mut piece = from.get(left.len()..).unwrap_or_default().to_vec();
        piece.resize(unit, 0);
        left.extend(piece);
    }
    left.truncate(length);
    left
}

impl Run {
    /// The whole system ends, perhaps within a sync, and what was synced is found again.
    fn cut_and_found(&mut self, random: u64) -> Result<(), TestCaseError> {
        if random & 1 == 1 {
            let mut point = self.overlay.sync_point();
            point.sync_data().unwrap();
            self.overlay.mark(&mut point).unwrap();
        }
        cut_power(self.dir.path(), random);
        let again = self.find_again(Survived::OnlySynced);
        let found = self.content(&again);
        for (block, is) in found.chunks(BLOCK).enumerate() {
            let allowed = &self.allowed[block];
            let is_allowed = allowed.iter().any(|it| it == is);
            prop_assert!(is_allowed, "block {block} is none of {}", allowed.len());
        }
        self.model.clone_from(&found);
        self.all_is_synced();
        self.goes_on(again);
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(250) })]

    #[test]
    fn what_was_synced_is_found_again_after_power_cuts(
        rounds in proptest::collection::vec((ops(), any::<u64>()), 1..4),
    ) {
        let mut run = Run::begin();
        for (ops, random) in rounds {
            for op in ops {
                run.act(op);
            }
            run.cut_and_found(random)?;
        }
    }

    #[test]
    fn what_a_process_found_again_is_found_after_a_power_cut(
        ops in ops(), more in ops(), random in any::<u64>(), is_told in any::<bool>(),
    ) {
        let mut run = Run::begin();
        for op in ops {
            run.act(op);
        }
        // All was there, and is on the disk once it is found again.
        let again = run.find_again(Survived::Everything);
        if is_told {
            run.all_is_synced();
            run.goes_on(again);
            for op in more {
                run.act(op);
            }
        }
        run.cut_and_found(random)?;
    }

    /// Power is cut twice, the second time before anybody was told where the journal of
    /// what was found begins.
    #[test]
    fn what_was_lost_stays_lost(ops in ops(), random in any::<u64>(), twice in any::<u64>()) {
        let mut run = Run::begin();
        for op in ops {
            run.act(op);
        }
        cut_power(run.dir.path(), random);
        let first = run.content(&run.find_again(Survived::OnlySynced));
        cut_power(run.dir.path(), twice);
        let second = run.content(&run.find_again(Survived::OnlySynced));
        prop_assert!(first == second);
        sync_dir(run.dir.path()).unwrap();
        let third = run.content(&run.find_again(Survived::OnlySynced));
        prop_assert!(first == third);
    }
}

#[test]
fn what_a_disk_could_not_write_stays_lost_though_it_is_told_once() {
    let mut run = Run::begin();
    let write = |run: &mut Run, byte: u8| run.act(super::Op::Write(0, BLOCK, byte));
    write(&mut run, 1);
    FAILS.set(true);
    let sync = |run: &Run| run.overlay.sync_point().sync_data();
    assert!(sync(&run).is_err());
    assert!(
        sync(&run).is_err(),
        "the second one is told that all is well"
    );
    assert!(
        run.overlay.freeze(100).is_err(),
        "what was lost is committed"
    );
}
