//! Extents and bytes as inputs; sources that go away.

use std::fs;
use std::process::Stdio;
use std::sync::Mutex;
use std::time::Instant;

use snapstore_store::{Error, ErrorClass, Progress, Unchanging};

use super::*;

#[test]
fn a_first_commit_from_extents() {
    let fixture = Fixture::new(PageSize::KIB_4);
    let bytes = noise(1, 3 * 4096);
    let list = vec![extent(4096, 0, 8192), extent(5 * KIB_4, 8192, 4096)];
    let data = extents(&file_of(&bytes), 8 * KIB_4, list);
    let input = memory(data, InputKind::Full);
    let committed = fixture
        .commit("base", ParentChoice::Automatic, input)
        .unwrap();
    assert_eq!(committed.manifest.images[0].nonzero_pages, 3);
    let mut expected = vec![0; 8 * 4096];
    expected[4096..3 * 4096].copy_from_slice(&bytes[..8192]);
    expected[5 * 4096..6 * 4096].copy_from_slice(&bytes[8192..]);
    assert_eq!(fixture.memory(&committed.manifest), expected);
}

#[test]
fn no_extents_are_an_empty_image_or_no_changes() {
    let fixture = Fixture::new(PageSize::KIB_4);
    let file = file_of(&[]);
    let size = 4096 * KIB_4;
    let empty = |kind| memory(extents(&file, size, vec![]), kind);
    let zero = fixture
        .commit("zero", ParentChoice::Nothing, empty(InputKind::Full))
        .unwrap();
    assert_eq!(zero.manifest.images[0].nonzero_pages, 0);
    let list = vec![extent(size - KIB_4, 0, KIB_4)];
    let data = extents(&file_of(&noise(1, 4096)), size, list);
    let named = |name: &str| ParentChoice::Named(name.to_owned());
    let one = fixture
        .commit("one", named("zero"), memory(data, InputKind::Diff))
        .unwrap();
    let same = fixture
        .commit("same", named("one"), empty(InputKind::Diff))
        .unwrap();
    let [one, same] = [one, same].map(|committed| committed.manifest.images[0].clone());
    assert_eq!(one.content_key(), same.content_key());
    assert_eq!((same.nonzero_pages, same.changed_pages), (1, 0));
}

/// 16 TiB have 4 Gi pages and 8 Mi leaves: whatever looked at each would not end.
#[test]
fn the_cost_follows_the_extents() {
    let fixture = Fixture::new(PageSize::KIB_4);
    let size = 16 << 40;
    let file = file_of(&noise(1, 10 * 4096));
    let far = |step: u64| -> Vec<Extent> {
        let place = |n: u64| size / 10 * n / KIB_4 * KIB_4;
        (0..10)
            .map(|n| extent(place(n), (n + step) % 10 * KIB_4, KIB_4))
            .collect()
    };
    let began = Instant::now();
    let base = memory(extents(&file, size, far(0)), InputKind::Full);
    fixture.commit("0", ParentChoice::Automatic, base).unwrap();
    for step in 1..4 {
        let diff = memory(extents(&file, size, far(step)), InputKind::Diff);
        let parent = ParentChoice::Named((step - 1).to_string());
        let committed = fixture.commit(&step.to_string(), parent, diff).unwrap();
        let image = &committed.manifest.images[0];
        assert_eq!((image.nonzero_pages, image.changed_pages), (10, 10));
        // At most a page, and a node of each of four levels, per extent.
        assert!(committed.manifest.added_chunks <= 10 * 5 + 1);
    }
    let took = began.elapsed();
    assert!(took < Duration::from_secs(20), "took {took:?}");
}

#[test]
fn bytes_are_an_attached_file() {
    let fixture = Fixture::new(PageSize::KIB_16);
    let state = noise(5, 70_001);
    let input = Input {
        name: "vmstate".to_owned(),
        role: ImageRole::File,
        data: InputData::Bytes(state.clone().into()),
        kind: InputKind::Full,
    };
    let committed = fixture
        .commit("base", ParentChoice::Nothing, input)
        .unwrap();
    let image = &committed.manifest.images[0];
    let read = |limit| fixture.store.read_file_image(image, limit);
    assert_eq!(read(70_001).unwrap(), state);
    assert!(matches!(
        read(70_000),
        Err(Error::TooLarge {
            limit_bytes: 70_000,
            ..
        })
    ));
}

#[test]
fn wrong_extents_and_sizes_are_refused_without_a_trace() {
    let fixture = Fixture::new(PageSize::KIB_16);
    let before = fixture.content();
    let file = file_of(&noise(1, 65536));
    let commit = |size, list| {
        let input = memory(extents(&file, size, list), InputKind::Full);
        let error = fixture
            .commit("base", ParentChoice::Nothing, input)
            .unwrap_err();
        assert_eq!(error.class(), ErrorClass::Invalid, "{error}");
        error
    };
    let overlapping = vec![extent(0, 0, 8192), extent(4096, 0, 4096)];
    assert!(matches!(
        commit(65536, overlapping),
        Error::BadExtent { number: 1, .. }
    ));
    assert!(matches!(commit(4096, vec![]), Error::PartialPage { .. }));
    assert!(matches!(commit(0, vec![]), Error::EmptyInput { .. }));
    assert_eq!(fixture.content(), before);
}

#[test]
fn timings_cover_the_commit() {
    let fixture = Fixture::new(PageSize::KIB_4);
    let data = InputData::Bytes(noise(1, 1 << 20).into());
    let began = Instant::now();
    let committed = fixture
        .commit("base", ParentChoice::Nothing, memory(data, InputKind::Full))
        .unwrap();
    let timings = committed.timings;
    assert!(timings.total() <= began.elapsed());
    assert!(timings.pages > Duration::ZERO && timings.seal > Duration::ZERO);
    assert!(timings.publish > Duration::ZERO);
}

/// Does something once the first batch is through.
struct AfterFirstBatch<F: FnOnce() + Send>(Mutex<Option<F>>);

impl<F: FnOnce() + Send> Progress for AfterFirstBatch<F> {
    fn begin(&self, _what: &str, _total: u64) {}

    fn advance(&self, _done: u64) {
        if let Some(action) = self.0.lock().unwrap().take() {
            action();
        }
    }
}

#[test]
fn a_source_that_goes_away_in_between_leaves_no_trace() {
    let fixture = Fixture::new(PageSize::KIB_4);
    let small = memory(InputData::Bytes(noise(9, 8192).into()), InputKind::Full);
    fixture
        .commit("small", ParentChoice::Nothing, small)
        .unwrap();
    let before = fixture.content();
    let len = 1 << 20;
    let file = file_of(&noise(1, len));
    // Every MiB of the image is the same MiB of the file.
    let list = (0..128).map(|n| extent(n << 20, 0, 1 << 20)).collect();
    let input = memory(extents(&file, 128 << 20, list), InputKind::Full);
    let truncate = {
        let file = file.clone();
        AfterFirstBatch(Mutex::new(Some(move || file.set_len(4096).unwrap())))
    };
    let request = request("new", ParentChoice::Nothing, vec![input]);
    let error = fixture.store.commit(&request, &truncate).unwrap_err();
    assert!(matches!(error, Error::InputLost { .. }), "{error}");
    assert_eq!(error.class(), ErrorClass::Io);
    assert_eq!(fixture.store.tag("new").unwrap(), None);
    assert_eq!(fixture.content(), before);
    // The same request succeeds once the source is there again.
    file.write_all_at(&noise(1, len), 0).unwrap();
    let committed = fixture.store.commit(&request, &Silent).unwrap();
    assert_eq!(committed.manifest.images[0].nonzero_pages, 128 * 256);
}

/// A child whose memory can be read until it is killed.
struct Frozen {
    child: Killed,
    memory: Arc<File>,
    /// Where the file has 4 KiB that can be read.
    readable: Vec<u64>,
}

impl Frozen {
    fn start() -> std::io::Result<Self> {
        let child = Killed::start(Stdio::null());
        // Until it has loaded its program.
        std::thread::sleep(Duration::from_millis(200));
        let id = child.0.id();
        let memory = File::open(format!("/proc/{id}/mem"))?;
        let maps = fs::read_to_string(format!("/proc/{id}/maps"))?;
        let mut frozen = Self {
            child,
            memory: Arc::new(memory),
            readable: Vec::new(),
        };
        for line in maps.lines().filter(|line| line.contains(" r")) {
            let range = line.split(' ').next().unwrap();
            let (start, end) = range.split_once('-').unwrap();
            let parse = |hex| u64::from_str_radix(hex, 16).unwrap();
            let mut page = vec![0; 4096];
            for at in (parse(start)..parse(end)).step_by(4096) {
                if i64::try_from(at).is_ok() && frozen.memory.read_exact_at(&mut page, at).is_ok() {
                    frozen.readable.push(at);
                }
            }
        }
        Ok(frozen)
    }
}

#[test]
fn memory_of_a_process_is_committed_while_it_lives() {
    let frozen = match Frozen::start() {
        Ok(frozen) => frozen,
        Err(error) => {
            println!("SKIPPED memory_of_a_process_is_committed_while_it_lives: {error}");
            return;
        }
    };
    assert!(frozen.readable.len() > 8);
    let fixture = Fixture::new(PageSize::KIB_16);
    // Backwards, with a hole of one block after every three.
    let list: Vec<Extent> = (frozen.readable.iter().rev().zip(0..))
        .map(|(at, n)| extent((n + n / 3) * KIB_4, *at, KIB_4))
        .collect();
    let size = list.last().unwrap().image_offset + KIB_4;
    let size = size.next_multiple_of(16384);
    let input = || memory(extents(&frozen.memory, size, list.clone()), InputKind::Full);
    let mut expected = vec![0; size as usize];
    for extent in &list {
        let out = &mut expected[extent.image_offset as usize..][..4096];
        frozen
            .memory
            .read_exact_at(out, extent.file_offset)
            .unwrap();
    }
    let committed = fixture
        .commit("alive", ParentChoice::Nothing, input())
        .unwrap();
    assert_eq!(fixture.memory(&committed.manifest), expected);

    let before = fixture.content();
    let dead = input();
    drop(frozen.child);
    let error = fixture
        .commit("dead", ParentChoice::Nothing, dead)
        .unwrap_err();
    assert!(matches!(error, Error::InputLost { .. }), "{error}");
    let message = error.to_string();
    assert!(message.contains("the frozen memory went away"), "{message}");
    assert_eq!(fixture.store.tag("dead").unwrap(), None);
    assert_eq!(fixture.content(), before);
}

/// Does something when an input's reading begins, and no more than once.
struct OnBegin<F: FnOnce() + Send>(Mutex<Option<F>>);

impl<F: FnOnce() + Send> Progress for OnBegin<F> {
    fn begin(&self, _what: &str, _total: u64) {
        if let Some(action) = self.0.lock().unwrap().take() {
            action();
        }
    }

    fn advance(&self, _done: u64) {}
}

#[test]
fn a_file_that_changes_while_it_is_read_is_refused() {
    let fixture = Fixture::new(PageSize::KIB_4);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let file = File::create(&path).unwrap();
    type Change = fn(&File);
    let changes: [Change; 4] = [
        |file| file.set_len(1 << 20).unwrap(),
        |file| file.set_len(8192).unwrap(),
        |file| file.write_all_at(&[9; 4096], 4096).unwrap(),
        |file| file.set_modified(std::time::UNIX_EPOCH).unwrap(),
    ];
    for (number, change) in changes.into_iter().enumerate() {
        file.set_len(0).unwrap();
        file.write_all_at(&noise(3, 65536), 0).unwrap();
        // A clock may tell whole ticks only.
        file.set_modified(std::time::UNIX_EPOCH + Duration::from_secs(1))
            .unwrap();
        let before = fixture.content();
        let progress = OnBegin(Mutex::new(Some(|| change(&file))));
        let input = memory(InputData::File(path.clone()), InputKind::Full);
        let request = request("new", ParentChoice::Nothing, vec![input]);
        let error = fixture.store.commit(&request, &progress).unwrap_err();
        assert!(
            matches!(error, Error::InputChanged { .. }),
            "{number}: {error}"
        );
        assert_eq!(fixture.content(), before, "{number}");
    }
}

#[test]
fn a_file_under_extents_that_changes_is_refused_if_it_is_watched() {
    let fixture = Fixture::new(PageSize::KIB_4);
    let file = Arc::new(tempfile::tempfile().unwrap());
    file.write_all_at(&noise(3, 65536), 0).unwrap();
    file.set_modified(std::time::UNIX_EPOCH).unwrap();
    let list = vec![Extent {
        image_offset: 0,
        file: 0,
        file_offset: 0,
        length: 65536,
    }];
    let input = memory(extents(&file, 65536, list), InputKind::Full);
    let watched = Unchanging::now(file.clone(), "the file of the disk").unwrap();
    for unchanging in [vec![watched], vec![]] {
        let is_watched = !unchanging.is_empty();
        let request = CommitRequest {
            unchanging,
            ..request("new", ParentChoice::Nothing, vec![input.clone()])
        };
        let change = || file.write_all_at(&[9; 4096], 4096).unwrap();
        let progress = OnBegin(Mutex::new(Some(change)));
        let done = fixture.store.commit(&request, &progress);
        if is_watched {
            let error = done.unwrap_err().to_string();
            assert!(error.contains("the file of the disk changed"), "{error}");
            assert!(fixture.store.tag("new").unwrap().is_none());
        } else {
            done.unwrap();
        }
    }
}
