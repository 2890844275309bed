//! Optimising: smaller, whole, once, and within what it may write.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use snapstore_store::{
    Error, GcOptions, OptimizeOptions, OptimizeReport, OptimizeStop, StoreFormat,
};

use super::*;

const PAGE: usize = 4096;

/// Text-like bytes, half of which a better compressor does without.
fn text(seed: u64, len: usize) -> Vec<u8> {
    let words: Vec<Vec<u8>> = (0..64).map(|word| noise(word + 1, 7)).collect();
    let picks = noise(seed + 1000, len);
    let mut out = Vec::with_capacity(len + 8);
    for pick in picks {
        out.extend_from_slice(&words[usize::from(pick % 64)]);
        if out.len() >= len {
            break;
        }
    }
    out.truncate(len);
    out
}

fn commit(fixture: &Fixture, tag: &str, parent: Option<&str>, bytes: &[u8]) {
    let parent = parent.map_or(ParentChoice::Nothing, |tag| {
        ParentChoice::Named(tag.to_owned())
    });
    let input = memory(InputData::Bytes(bytes.to_vec().into()), InputKind::Full);
    fixture.commit(tag, parent, input).unwrap();
}

fn optimize(store: &Store) -> OptimizeReport {
    store.optimize(OptimizeOptions::default(), &Silent).unwrap()
}

/// A chain of images, each with some pages that are a little different.
fn chain(fixture: &Fixture, steps: usize) -> BTreeMap<String, Vec<u8>> {
    let mut images = BTreeMap::new();
    let mut image = text(1, 300 * PAGE);
    image.extend_from_slice(&noise(5, 40 * PAGE));
    for step in 0..steps {
        for edit in 0..20 {
            let at = (step * 37 + edit * 13) % 340 * PAGE + 100 * edit;
            image[at..at + 8].copy_from_slice(&[step as u8; 8]);
        }
        let tag = format!("s{step:02}");
        let parent = (step > 0).then(|| format!("s{:02}", step - 1));
        commit(fixture, &tag, parent.as_deref(), &image);
        images.insert(tag, image.clone());
    }
    images
}

fn assert_whole(fixture: &Fixture, images: &BTreeMap<String, Vec<u8>>) {
    let store = fixture.other();
    for (tag, image) in images {
        let manifest = store.manifest(store.resolve(tag).unwrap()).unwrap();
        assert!(fixture.memory(&manifest) == *image, "{tag} has other bytes");
        let found = store.read_file_image(manifest.image("memory").unwrap(), 1 << 30);
        assert!(found.unwrap() == *image, "{tag} has other bytes");
    }
    let report = store.verify(true, &Silent).unwrap();
    assert_eq!(report.findings, []);
}

fn pack_files(store: &Store) -> BTreeMap<PathBuf, u64> {
    std::fs::read_dir(store.path().join("packs"))
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.path(), entry.metadata().unwrap().len()))
        .collect()
}

fn pack_bytes(store: &Store) -> u64 {
    pack_files(store).values().sum()
}

#[test]
fn what_is_kept_gets_smaller_stays_whole_and_is_left_alone_then() {
    let fixture = Fixture::new(PageSize::default());
    let images = chain(&fixture, 8);
    let before = pack_bytes(&fixture.store);
    let plan = fixture
        .store
        .optimize(
            OptimizeOptions {
                dry_run: true,
                ..OptimizeOptions::default()
            },
            &Silent,
        )
        .unwrap();
    assert_eq!((plan.packs, plan.left_packs), (8, 0));
    assert_eq!(packs(fixture.store.path()), 8, "a plan changes nothing");
    let report = optimize(&fixture.other());
    assert_eq!((report.packs, report.stopped_by), (8, None));
    assert!(report.written_bytes <= plan.written_bytes, "{report:?}");
    assert_eq!(packs(fixture.store.path()), 1);
    let after = pack_bytes(&fixture.store);
    // Noise and patches of it: what is left to win is footers and nodes.
    assert!(after < before, "{before} became {after}");
    assert_eq!(report.freed_bytes, before as i64 - after as i64);
    assert_whole(&fixture, &images);
    let content = fixture.content();
    for _ in 0..2 {
        let again = optimize(&fixture.other());
        assert_eq!((again.packs, again.written_bytes), (0, 0));
        collect(&fixture.other());
    }
    assert!(fixture.content() == content, "the second one does nothing");
    // What comes after it is based on what it has written.
    let mut images = images;
    let mut next = images["s07"].clone();
    next[5000..5008].fill(99);
    commit(&fixture, "s08", Some("s07"), &next);
    images.insert("s08".to_owned(), next);
    assert_whole(&fixture, &images);
    let added = pack_bytes(&fixture.store) - after;
    assert!(added < 20_000, "{added} bytes for a small step");
    assert_eq!(optimize(&fixture.other()).packs, 1);
    assert_whole(&fixture, &images);
}

#[test]
fn older_snapshots_go_and_the_newest_stays() {
    let fixture = Fixture::new(PageSize::default());
    let mut images = chain(&fixture, 6);
    optimize(&fixture.other());
    for tag in ["s00", "s01", "s04"] {
        remove(&fixture.store, tag);
        images.remove(tag);
        collect(&fixture.other());
        assert_whole(&fixture, &images);
    }
    optimize(&fixture.other());
    for tag in ["s05", "s03"] {
        remove(&fixture.store, tag);
        images.remove(tag);
        collect(&fixture.other());
        assert_whole(&fixture, &images);
    }
    remove(&fixture.store, "s02");
    collect_all(&fixture.other());
}

#[test]
fn one_that_was_stopped_goes_on() {
    let fixture = Fixture::new(PageSize::default());
    // Five leaves.
    let image: Vec<u8> = (0..5).flat_map(|seed| text(seed * 7, 512 * PAGE)).collect();
    commit(&fixture, "image", None, &image);
    let images = BTreeMap::from([("image".to_owned(), image)]);
    let before = pack_bytes(&fixture.store);
    let some = OptimizeOptions {
        most_bytes: Some(before / 3),
        ..OptimizeOptions::default()
    };
    let report = fixture.other().optimize(some, &Silent).unwrap();
    assert_eq!(report.stopped_by, Some(OptimizeStop::Bytes));
    assert_eq!(report.left_packs, 1);
    assert!(report.left_bytes < before * 9 / 10, "{report:?}");
    assert_whole(&fixture, &images);
    // No time at all.
    let none = OptimizeOptions {
        within: Some(Duration::ZERO),
        ..OptimizeOptions::default()
    };
    let report = fixture.other().optimize(none, &Silent).unwrap();
    assert_eq!(
        (report.stopped_by, report.written_bytes),
        (Some(OptimizeStop::Time), 0)
    );
    let report = optimize(&fixture.other());
    assert_eq!((report.stopped_by, report.left_packs), (None, 0));
    assert!(pack_bytes(&fixture.store) < before);
    assert_whole(&fixture, &images);
    assert_eq!(optimize(&fixture.other()).packs, 0);
}

/// Lets the time of an optimisation end when it has arranged so many chunks.
struct Late {
    until: Instant,
    chunks: u64,
}

impl snapstore_store::Progress for Late {
    fn begin(&self, _: &str, _: u64) {}

    fn advance(&self, done: u64) {
        if done >= self.chunks {
            std::thread::sleep(self.until.saturating_duration_since(Instant::now()));
        }
    }
}

/// Wherever their time ends, all of them together write what one would that had enough.
#[test]
fn those_whose_time_ends_do_nothing_twice() {
    let images = |fixture: &Fixture| {
        let image: Vec<u8> = (0..5).flat_map(|seed| text(seed * 7, 512 * PAGE)).collect();
        commit(fixture, "image", None, &image);
        BTreeMap::from([("image".to_owned(), image)])
    };
    let fixture = Fixture::new(PageSize::default());
    images(&fixture);
    let alone = optimize(&fixture.store);
    assert_eq!((alone.packs, alone.stopped_by), (1, None));

    let fixture = Fixture::new(PageSize::default());
    let images = images(&fixture);
    let reader = fixture.other().snapshot("image").unwrap();
    let reader = reader.image("memory").unwrap();
    let mut within = Duration::from_millis(300);
    let (mut written, mut stopped, mut left) = (0, 0, u64::MAX);
    loop {
        let options = OptimizeOptions {
            within: Some(within),
            ..OptimizeOptions::default()
        };
        let late = Late {
            until: Instant::now() + within,
            chunks: 400,
        };
        let report = fixture.other().optimize(options, &late).unwrap();
        written += report.written_bytes;
        assert_eq!(report.rewritten_bytes, written);
        // What was open before reads what is in other places now.
        let mut bytes = vec![0; images["image"].len()];
        reader.read_at(&mut bytes, 0).unwrap();
        assert!(bytes == images["image"]);
        match report.stopped_by {
            None => break,
            Some(OptimizeStop::Time) if report.written_bytes > 0 => {
                assert!(report.left_bytes < left, "{report:?}");
                left = report.left_bytes;
                stopped += 1;
            }
            // It could not even begin.
            Some(OptimizeStop::Time) => within *= 2,
            other => panic!("{other:?}"),
        }
    }
    assert!(stopped > 1, "they were stopped {stopped} times");
    // Each writes a file of its own.
    let (most, alone) = (alone.written_bytes * 21 / 20, alone.written_bytes);
    assert!(written <= most, "{written} and not {alone} bytes written");
    assert_whole(&fixture, &images);
    assert_eq!(optimize(&fixture.other()).written_bytes, 0);
}

#[test]
fn without_time_nothing_is_told_as_done() {
    let fixture = Fixture::new(PageSize::default());
    chain(&fixture, 3);
    let options = OptimizeOptions {
        within: Some(Duration::ZERO),
        ..OptimizeOptions::default()
    };
    let report = fixture.store.optimize(options, &Silent).unwrap();
    assert_eq!((report.packs, report.pack_bytes), (0, 0));
    assert_eq!(report.written_bytes, 0);
    assert_eq!(report.left_packs, pack_files(&fixture.store).len() as u64);
    assert_eq!(report.stopped_by, Some(OptimizeStop::Time));
}

#[test]
fn a_small_pack_that_is_live_as_a_whole_is_left_alone() {
    let fixture = Fixture::new(PageSize::default());
    // Zeros are not stored: the pack has a manifest, and its header and seals are the most of it.
    commit(&fixture, "zeros", None, &[0; 16 * PAGE]);
    let before = pack_files(&fixture.store);
    for _ in 0..3 {
        let report = fixture.store.gc(GcOptions::default(), &Silent).unwrap();
        assert_eq!(report.freed_bytes, 0);
    }
    assert_eq!(pack_files(&fixture.store), before);
}

/// In a store's life: counted by who was at work when a file came.
#[test]
fn collections_write_at_most_twice_what_commits_wrote() {
    let fixture = Fixture::new(PageSize::default());
    let mut images: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let (mut committed, mut rewritten) = (0, 0);
    let mut known = BTreeMap::new();
    let mut new_bytes = |store: &Store| -> u64 {
        let files = pack_files(store);
        let new = files.iter().filter(|(path, _)| !known.contains_key(*path));
        let bytes = new.map(|(_, len)| len).sum();
        known.extend(files);
        bytes
    };
    let mut image = text(3, 64 * PAGE);
    for step in 0_usize..120 {
        for edit in 0..3 {
            let at = (step * 7 + edit * 31) % 64 * PAGE;
            image[at..at + 64].copy_from_slice(&noise((step * 3 + edit) as u64, 64));
        }
        if step % 10 == 0 {
            image[..8 * PAGE].copy_from_slice(&noise(step as u64, 8 * PAGE));
        }
        let tag = format!("t{step:03}");
        let parent = images.keys().next_back().cloned();
        commit(&fixture, &tag, parent.as_deref(), &image);
        images.insert(tag, image.clone());
        committed += new_bytes(&fixture.store);
        if step % 3 == 0 && images.len() > 20 {
            let (oldest, _) = images.pop_first().unwrap();
            remove(&fixture.store, &oldest);
        }
        match step % 4 {
            0 => drop(optimize(&fixture.other())),
            2 => drop(fixture.other().gc(GcOptions::default(), &Silent).unwrap()),
            _ => {}
        }
        rewritten += new_bytes(&fixture.store);
        assert!(
            rewritten <= 2 * committed,
            "{rewritten} bytes were rewritten of {committed} by step {step}"
        );
    }
    assert!(rewritten > committed / 4, "{rewritten} of {committed}");
    assert_whole(&fixture, &images);
    let report = optimize(&fixture.other());
    assert!(
        report.rewritten_bytes >= rewritten,
        "{report:?} and {rewritten}"
    );
}

/// Optimises when the commit that it watches has begun.
struct Meanwhile<'a>(&'a (dyn Fn() + Sync));

impl snapstore_store::Progress for Meanwhile<'_> {
    fn begin(&self, _: &str, _: u64) {
        (self.0)();
    }

    fn advance(&self, _: u64) {}
}

#[test]
fn beside_a_commit_that_began_before_nothing_becomes_a_delta_that_it_may_rely_on() {
    let fixture = Fixture::new(PageSize::default());
    let mut images = chain(&fixture, 3);
    let began = AtomicBool::new(false);
    let meanwhile = || {
        if began.swap(true, Ordering::SeqCst) {
            return;
        }
        std::thread::scope(|scope| {
            // It waits for the commit, which goes on after a while.
            scope.spawn(|| {
                let cancel = snapstore_store::Cancel::default();
                let store = fixture.other().with_cancel(cancel.clone());
                let stopper = std::thread::spawn(move || {
                    std::thread::sleep(Duration::from_secs(2));
                    cancel.cancel();
                });
                let done = store.optimize(OptimizeOptions::default(), &Silent);
                assert!(matches!(done, Err(Error::Cancelled)), "{done:?}");
                stopper.join().unwrap();
            });
        });
    };
    let mut next = images["s02"].clone();
    next[9000..9008].fill(77);
    let input = memory(InputData::Bytes(next.clone().into()), InputKind::Full);
    let parent = ParentChoice::Named("s02".to_owned());
    let request = request("next", parent, vec![input]);
    fixture
        .store
        .commit(&request, &Meanwhile(&meanwhile))
        .unwrap();
    assert!(began.load(Ordering::SeqCst));
    images.insert("next".to_owned(), next);
    assert_whole(&fixture, &images);
    optimize(&fixture.other());
    assert_whole(&fixture, &images);
}

#[test]
fn what_it_needs_to_know_is_checked_and_mended() {
    let fixture = Fixture::new(PageSize::default());
    let images = chain(&fixture, 2);
    optimize(&fixture.other());
    let path = fixture.store.path().join("rewrites");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[30] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    let found = fixture.other().verify(false, &Silent).unwrap();
    assert_eq!(found.findings.len(), 1, "{found:?}");
    let done = fixture.other().gc(GcOptions::default(), &Silent);
    assert!(matches!(done, Err(Error::Damaged(_))), "{done:?}");
    let report = Store::repair(fixture.store.path(), &Silent).unwrap();
    assert!(report.rebuilt_files.contains(&"rewrites".to_owned()));
    assert_whole(&fixture, &images);
    optimize(&fixture.other());
    assert_whole(&fixture, &images);
}

#[test]
fn a_store_of_format_1_has_to_be_upgraded_first() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let store = Store::create_in_format(&path, PageSize::default(), StoreFormat::One).unwrap();
    let done = store.optimize(OptimizeOptions::default(), &Silent);
    assert!(matches!(done, Err(Error::OldFormat { .. })), "{done:?}");
    Store::upgrade(&path, false, &Silent).unwrap();
    optimize(&Store::open(&path).unwrap());
}
