//! Overlays with a journal against a model, ended at any moment.

pub(crate) mod power;

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use proptest::prelude::*;

use crate::disk::sync_dir;
use crate::{
    BLOCK_BYTES, Budget, Content, Extent, Frozen, Journal, Overlay, Replayed, SegmentPath,
    Survived, Under,
};

const BLOCK: usize = BLOCK_BYTES as usize;
const DATA: &str = "data";
/// Not a multiple of a block.
const SIZE: usize = 23 * BLOCK + 512;

#[derive(Clone, Debug)]
enum Op {
    Write(usize, usize, u8),
    Zero(usize, usize),
    Freeze,
    /// The base becomes what was frozen last.
    Rebase,
    /// And something is written meanwhile.
    Sync(usize, usize, u8),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let range = || {
        let length = prop_oneof![Just(BLOCK), 1..300_usize, 1..6 * BLOCK];
        (0..SIZE, length, any::<bool>()).prop_map(|(at, length, aligned)| {
            let at = if aligned { at - at % BLOCK } else { at };
            (at, length.min(SIZE - at))
        })
    };
    let op = prop_oneof![
        6 => (range(), any::<u8>()).prop_map(|((at, length), byte)| Op::Write(at, length, byte)),
        3 => range().prop_map(|(at, length)| Op::Zero(at, length)),
        1 => Just(Op::Freeze),
        1 => Just(Op::Rebase),
        1 => (range(), any::<u8>()).prop_map(|((at, length), byte)| Op::Sync(at, length, byte)),
    ];
    proptest::collection::vec(op, 1..50)
}

struct Run {
    dir: tempfile::TempDir,
    base: File,
    overlay: Overlay,
    model: Vec<u8>,
    /// The freezes' number, and what was frozen last.
    freezes: u64,
    frozen: Option<(u64, Frozen, Vec<u8>)>,
    first_segment: u64,
    /// What of each block may be found after a power cut: what it held when it was synced,
    /// and since.
    allowed: Vec<Vec<Vec<u8>>>,
    /// What is frozen and still read, with what it lies over and what it held.
    kept: VecDeque<(Frozen, File, Vec<u8>)>,
}

const KEPT: usize = 3;

fn under(base: &File) -> Under<'_> {
    Under {
        base,
        size_bytes: SIZE as u64,
    }
}

fn path(dir: &Path) -> SegmentPath {
    SegmentPath {
        dir: dir.to_owned(),
        name: "image".to_owned(),
    }
}

fn data_file(dir: &Path) -> File {
    let mut options = OpenOptions::new();
    let options = options.read(true).write(true).create(true).truncate(false);
    options.open(dir.join(DATA)).unwrap()
}

fn file_of(bytes: &[u8]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(bytes, 0).unwrap();
    file
}

fn blocks(at: usize, length: usize) -> std::ops::Range<usize> {
    at / BLOCK..(at + length).div_ceil(BLOCK)
}

fn applied(extents: &[Extent], file: &File, mut image: Vec<u8>) -> Vec<u8> {
    for extent in extents {
        let start = extent.image_offset as usize;
        let range = start..start + extent.length as usize;
        match extent.content {
            Content::Zeros => image[range].fill(0),
            Content::Overlay { file_offset } => {
                file.read_exact_at(&mut image[range], file_offset).unwrap();
            }
        }
    }
    image
}

impl Run {
    fn begin() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let model: Vec<u8> = (0..SIZE).map(|at| (at / 5) as u8 | 1).collect();
        let journal = Journal::create(path(dir.path())).unwrap();
        let file = data_file(dir.path());
        let overlay = Overlay::journaled(file, SIZE as u64, Budget::new(None), journal);
        Self {
            base: file_of(&model),
            overlay,
            freezes: 0,
            frozen: None,
            first_segment: 0,
            allowed: model.chunks(BLOCK).map(|it| vec![it.to_vec()]).collect(),
            kept: VecDeque::new(),
            model,
            dir,
        }
    }

    fn act(&mut self, op: Op) {
        match op {
            Op::Write(at, length, byte) => {
                let bytes: Vec<u8> = (0..length).map(|i| (i / 3) as u8 ^ byte).collect();
                self.overlay
                    .write(under(&self.base), at as u64, &bytes)
                    .unwrap();
                self.model[at..at + length].copy_from_slice(&bytes);
                self.wrote(blocks(at, length));
            }
            Op::Zero(at, length) => {
                self.overlay
                    .zero(under(&self.base), at as u64, length as u64)
                    .unwrap();
                self.model[at..at + length].fill(0);
                self.wrote(blocks(at, length));
            }
            Op::Freeze => {
                self.freezes += 1;
                let frozen = self.overlay.freeze(self.freezes).unwrap();
                let base = self.base.try_clone().unwrap();
                let kept = (frozen.clone(), base, self.model.clone());
                self.kept.push_back(kept);
                if self.kept.len() > KEPT {
                    self.kept.pop_front();
                }
                self.frozen = Some((self.freezes, frozen, self.model.clone()));
            }
            Op::Rebase => {
                let Some((number, frozen, then)) = self.frozen.take() else {
                    return;
                };
                let mut old = vec![0; SIZE];
                self.base.read_exact_at(&mut old, 0).unwrap();
                let new = applied(&frozen.changed(), frozen.file(), old);
                assert!(new == then, "a commit of what changed differs");
                drop(frozen);
                self.base = file_of(&new);
                self.first_segment = self.overlay.first_segment_after(number);
                sync_dir(self.dir.path()).unwrap();
                self.overlay.rebased(number);
            }
            Op::Sync(at, length, byte) => {
                let mut point = self.overlay.sync_point();
                point.sync_data().unwrap();
                self.all_is_synced();
                self.act(Op::Write(at, length, byte));
                self.overlay.mark(&mut point).unwrap();
                point.sync_journal().unwrap();
                self.overlay.synced(&point);
            }
        }
    }

    fn wrote(&mut self, blocks: std::ops::Range<usize>) {
        for block in blocks {
            let end = SIZE.min((block + 1) * BLOCK);
            self.allowed[block].push(self.model[block * BLOCK..end].to_vec());
        }
    }

    /// What is frozen does not change.
    fn check_frozen(&self) {
        for (frozen, base, then) in &self.kept {
            let mut bytes = vec![0; SIZE];
            frozen.read_at(under(base), 0, &mut bytes).unwrap();
            assert!(bytes == *then, "what was frozen changed");
        }
    }

    fn content(&self, overlay: &Overlay) -> Vec<u8> {
        let mut bytes = vec![0; SIZE];
        overlay.read(under(&self.base), 0, &mut bytes).unwrap();
        bytes
    }

    fn find_again(&self, survived: Survived) -> Overlay {
        let path = path(self.dir.path());
        let count = SIZE.div_ceil(BLOCK) as u64;
        let replayed = Replayed::read(&path, self.first_segment, count, survived).unwrap();
        let file = data_file(self.dir.path());
        let journal = Journal::go_on(path, &replayed, &file).unwrap();
        Overlay::found_again(file, SIZE as u64, Budget::new(None), replayed, journal)
    }

    /// Whoever looks for the overlay is told where its journal begins now.
    fn goes_on(&mut self, mut again: Overlay) {
        sync_dir(self.dir.path()).unwrap();
        again.begins_here();
        self.first_segment = again.first_segment_after(0);
        self.kept.clear();
        // What a process had frozen is uncommitted for the next one.
        self.frozen = None;
        self.freezes = 0;
        self.overlay = again;
    }

    fn all_is_synced(&mut self) {
        let blocks = self.model.chunks(BLOCK);
        self.allowed = blocks.map(|it| vec![it.to_vec()]).collect();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(250) })]

    #[test]
    fn all_is_found_again_after_a_process_has_ended(ops in ops(), more in ops(), few in any::<bool>()) {
        let mut run = Run::begin();
        if few {
            run.overlay = run.overlay.with_most_zero_runs(2);
        }
        for op in ops {
            run.act(op);
            prop_assert!(run.content(&run.overlay) == run.model);
            run.check_frozen();
        }
        let again = run.find_again(Survived::Everything);
        prop_assert!(run.content(&again) == run.model, "found again");
        run.goes_on(again);
        for op in more {
            run.act(op);
        }
        prop_assert!(run.content(&run.overlay) == run.model, "went on");
        let twice = run.find_again(Survived::Everything);
        prop_assert!(run.content(&twice) == run.model, "found again twice");
    }
}

/// The first of two entries is changed.
fn damage(run: &Run) {
    let segment = run.dir.path().join("image.0000000000000000.journal");
    let mut bytes = fs::read(&segment).unwrap();
    bytes[48 + 8] ^= 1;
    fs::write(&segment, bytes).unwrap();
}

fn replay(run: &Run, survived: Survived) -> std::io::Result<Replayed> {
    let count = SIZE.div_ceil(BLOCK) as u64;
    Replayed::read(&path(run.dir.path()), run.first_segment, count, survived)
}

#[test]
fn an_entry_that_is_damaged_is_told() {
    let damaged = Some(std::io::ErrorKind::InvalidData);
    let told = |run: &Run, survived| replay(run, survived).err().map(|error| error.kind());
    let mut run = Run::begin();
    run.act(Op::Write(0, BLOCK, 1));
    run.act(Op::Write(5 * BLOCK, BLOCK, 2));
    damage(&run);
    assert_eq!(told(&run, Survived::Everything), damaged);
    // After a power cut what was not synced may be missing, in whatever order.
    assert_eq!(told(&run, Survived::OnlySynced), None);
    let mut run = Run::begin();
    run.act(Op::Write(0, BLOCK, 1));
    run.act(Op::Sync(5 * BLOCK, BLOCK, 2));
    assert_eq!(told(&run, Survived::OnlySynced), None);
    damage(&run);
    assert_eq!(told(&run, Survived::Everything), damaged);
    assert_eq!(told(&run, Survived::OnlySynced), damaged);
}

#[test]
fn a_torn_entry_ends_a_journal() {
    let mut run = Run::begin();
    run.act(Op::Write(0, BLOCK, 1));
    let before = run.model.clone();
    run.act(Op::Write(5 * BLOCK, BLOCK, 2));
    let segment = run.dir.path().join("image.0000000000000000.journal");
    let length = fs::metadata(&segment).unwrap().len();
    let whole = fs::read(&segment).unwrap();
    // Cut off, or some of its bytes not written.
    for odd in 0..64_usize {
        let mut bytes = whole.clone();
        match odd {
            0..32 => bytes.truncate(length as usize - 1 - odd % 31),
            _ => bytes[length as usize - 1 - odd % 32] ^= 0x10,
        }
        fs::write(&segment, &bytes).unwrap();
        let path = path(run.dir.path());
        let replayed = Replayed::read(&path, 0, 24, Survived::Everything).unwrap();
        let file = data_file(run.dir.path());
        let journal = Journal::create(SegmentPath {
            name: format!("other{odd}"),
            ..path
        });
        let budget = Budget::new(None);
        let again = Overlay::found_again(file, SIZE as u64, budget, replayed, journal.unwrap());
        assert!(run.content(&again) == before, "way {odd} of being torn");
    }
}

#[test]
fn an_entry_that_leads_out_of_the_image_is_refused() {
    let mut run = Run::begin();
    run.act(Op::Write(20 * BLOCK, BLOCK, 1));
    let path = path(run.dir.path());
    let refused = Replayed::read(&path, 0, 20, Survived::Everything);
    assert_eq!(
        refused.err().unwrap().kind(),
        std::io::ErrorKind::InvalidData
    );
}

#[test]
fn runs_are_told_across_what_is_not_known() {
    const FAR: u64 = 3000 * BLOCK_BYTES;
    let base = tempfile::tempfile().unwrap();
    base.set_len(8000 * BLOCK_BYTES).unwrap();
    let mut overlay = Overlay::new(
        tempfile::tempfile().unwrap(),
        8000 * BLOCK_BYTES,
        Budget::new(None),
    );
    let under = Under {
        base: &base,
        size_bytes: 8000 * BLOCK_BYTES,
    };
    overlay.write(under, FAR, &[1; 2 * BLOCK]).unwrap();
    overlay
        .zero(under, FAR + 2 * BLOCK_BYTES, BLOCK_BYTES)
        .unwrap();
    assert_eq!(overlay.run_at(5), (None, FAR));
    assert_eq!(overlay.run_at(FAR + 1), (Some(true), FAR + 2 * BLOCK_BYTES));
    let zeros = FAR + 2 * BLOCK_BYTES;
    assert_eq!(overlay.run_at(zeros), (Some(false), zeros + BLOCK_BYTES));
    assert_eq!(
        overlay.run_at(zeros + BLOCK_BYTES),
        (None, 8000 * BLOCK_BYTES)
    );
}

#[test]
fn very_many_runs_of_zeros_are_not_kept() {
    const MOST: usize = 16;
    let size_bytes = 4096 * BLOCK_BYTES - 512;
    let mut model = vec![7; size_bytes as usize];
    let base = file_of(&model);
    let under = Under {
        base: &base,
        size_bytes,
    };
    let file = tempfile::tempfile().unwrap();
    let overlay = Overlay::new(file, size_bytes, Budget::new(None));
    let mut overlay = overlay.with_most_zero_runs(MOST as u64);
    let mut zero = |overlay: &mut Overlay, blocks: std::ops::Range<usize>| {
        let bytes = blocks.start * BLOCK..(blocks.end * BLOCK).min(size_bytes as usize);
        let length = bytes.len() as u64;
        overlay.zero(under, bytes.start as u64, length).unwrap();
        model[bytes].fill(0);
        model.clone()
    };
    let runs = |frozen: &Frozen| {
        let all = frozen.overlaid().into_iter();
        all.filter(|it| it.content == Content::Zeros).count()
    };
    let content = |overlay: &Overlay| {
        let mut bytes = vec![0; size_bytes as usize];
        overlay.read(under, 0, &mut bytes).unwrap();
        bytes
    };
    // As a guest that discards every second block, again and again.
    for number in 1..4 {
        for block in (0..2000).step_by(2) {
            zero(&mut overlay, block..block + 1);
        }
        let then = zero(&mut overlay, 4095..4096);
        let frozen = overlay.freeze(number).unwrap();
        assert!(runs(&frozen) <= MOST, "{}", runs(&frozen));
        assert!(content(&overlay) == then);
        overlay.committed(number);
    }
    // What is large takes no room, but for its ends.
    let before = overlay.uncommitted_bytes();
    let then = zero(&mut overlay, 2040..3590);
    assert!(content(&overlay) == then);
    assert_eq!(overlay.uncommitted_bytes() - before, 14 * BLOCK_BYTES);
    // Once there are few again, there may be more.
    zero(&mut overlay, 0..4096);
    zero(&mut overlay, 0..4096);
    let frozen = overlay.freeze(9).unwrap();
    assert!(runs(&frozen) <= 2, "{}", runs(&frozen));
    overlay.committed(9);
    let then = zero(&mut overlay, 5..6);
    assert!(content(&overlay) == then);
    assert_eq!(overlay.uncommitted_bytes(), 0);
}
