//! Working sets that go with their snapshots, and what is read before anybody asks for it.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::Relaxed;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use snapstore_store::{ImageReader, Seen, Silent, Store, WorkingSet};

use super::moody::{Mood, begin, begin_in, memory, options, page, with_base};
use super::{Outcome, PAGE, Scene, commit, image, list, read};
use crate::protocol::Options;
use crate::{CACHE, Lazy, LazyOptions};

/// Keeps what a mount would have recorded: these pages, in this order.
pub(super) fn record(store: &Store, tag: &str, touched: &[u32]) -> Outcome {
    let seen = Seen {
        touched: touched.to_vec(),
        ..Seen::default()
    };
    let set = WorkingSet::merged(None, &seen, SystemTime::UNIX_EPOCH);
    store.keep_working_set(store.resolve(tag)?, "memory", &set)?;
    Ok(())
}

pub(super) fn scattered(pages: u32, count: u32) -> Vec<u32> {
    // Odd, so that each page is there once, if the number of pages is even.
    let all = (0..count).map(|number| number * 1_031 % pages);
    all.collect()
}

pub(super) fn until(what: &str, is_so: impl Fn() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < Duration::from_secs(120), "{what}");
        thread::sleep(Duration::from_millis(1));
    }
}

pub(super) fn is_at_hand(reader: &ImageReader, page: u32) -> bool {
    let mut bytes = [0; PAGE];
    let read = reader.read_at_hand(&mut bytes, u64::from(page) * PAGE as u64);
    matches!(read, Ok(Some(_)))
}

/// A bucket with `base` of 4096 pages, and these touched first.
fn with_set(
    scene: &Scene,
    touched: &[u32],
) -> Result<(Store, Vec<u8>), Box<dyn std::error::Error>> {
    let store = scene.store("store")?;
    let bytes = image(&[1; 4096]);
    commit(&store, "base", &bytes, None)?;
    record(&store, "base", touched)?;
    let report = scene
        .remote()?
        .push(&store, "base", "base", false, &Silent)?;
    assert_eq!(report.working_set_pages, touched.len() as u64, "{report:?}");
    assert_eq!(report.pages, 4096, "each page once");
    Ok((scene.store("empty")?, bytes))
}

fn fills(scene: &Scene, limit: u64) -> LazyOptions {
    LazyOptions {
        fills: true,
        cache_limit_bytes: limit,
        ..options(scene)
    }
}

pub fn a_working_set_goes_with_its_snapshot(scene: &Scene) -> Outcome {
    let touched = scattered(4096, 300);
    let (other, bytes) = with_set(scene, &touched)?;
    let remote = scene.remote()?;
    assert!(remote.verify(true)?.findings.is_empty());
    remote.pull(&other, "base", "mine", false, &Silent)?;
    assert_eq!(read(&other, "mine")?, bytes);
    let set = other.working_set(other.resolve("mine")?, "memory")?;
    let pages: Vec<u32> = set.ok_or("it is kept")?.pages().collect();
    assert_eq!(pages, touched);
    // A child reuses what was laid apart, and knows nothing of its own.
    let mut pages = [1; 4096];
    pages[7] = 9;
    commit(&other, "next", &image(&pages), Some("mine"))?;
    let report = remote.push(&other, "next", "next", false, &Silent)?;
    assert_eq!(
        (report.pages, report.working_set_pages),
        (1, 0),
        "{report:?}"
    );
    assert_eq!(report.reused_leaves, 7, "{report:?}");
    // It moves what was touched first of it.
    record(&other, "next", &[7, 8, 9])?;
    let report = remote.push(&other, "next", "again", false, &Silent)?;
    assert_eq!(
        (report.pages, report.working_set_pages),
        (3, 3),
        "{report:?}"
    );
    let last = scene.store("last")?;
    remote.pull(&last, "again", "again", false, &Silent)?;
    assert_eq!(read(&last, "again")?, image(&pages));
    let lazy = scene
        .remote()?
        .lazy(&scene.store("lazy")?, "again", &options(scene))?;
    let reader = memory(&lazy);
    let mut read = vec![0; bytes.len()];
    reader.read_at(&mut read, 0)?;
    assert!(read == image(&pages), "other bytes");
    lazy.end();
    Ok(())
}

pub fn a_working_set_that_is_recorded_later_is_pushed_by_the_next_push(scene: &Scene) -> Outcome {
    let (store, remote) = (scene.store("store")?, scene.remote()?);
    let bytes = image(&[1; 2000]);
    commit(&store, "base", &bytes, None)?;
    remote.push(&store, "base", "base", false, &Silent)?;
    record(&store, "base", &scattered(2000, 100))?;
    let report = remote.push(&store, "base", "base", false, &Silent)?;
    let pushed = (report.already, report.working_set_pages, report.pages);
    assert_eq!(pushed, (true, 100, 100), "{report:?}");
    let report = remote.push(&store, "base", "base", false, &Silent)?;
    let pushed = (report.already, report.working_set_pages, report.bytes);
    assert_eq!(pushed, (true, 0, 0), "{report:?}");
    assert_eq!(remote.tags()?.len(), 1);
    // The head before goes, and nothing that is needed.
    assert!(!remote.collect(Options::default())?.deleted.is_empty());
    assert_eq!(scene.keys("heads")?.len(), 1);
    assert!(remote.verify(true)?.findings.is_empty());
    let other = scene.store("other")?;
    remote.pull(&other, "base", "base", false, &Silent)?;
    assert_eq!(read(&other, "base")?, bytes);
    Ok(())
}

#[test]
fn a_working_set_is_there_before_it_is_asked_for_and_nothing_else_is() -> Outcome {
    let scene = Scene::new()?;
    let touched = scattered(4096, 500);
    let (store, bytes) = with_set(&scene, &touched)?;
    let (lazy, mood) = begin(&scene, &store, "base", &options(&scene))?;
    let reader = memory(&lazy);
    until("the set is there", || {
        touched.iter().all(|page| is_at_hand(&reader, *page))
    });
    let before = mood.reads.load(Relaxed);
    for number in touched.iter().map(|number| *number as usize) {
        assert_eq!(page(&reader, number)?, bytes[number * PAGE..][..PAGE]);
    }
    let counts = lazy.counts();
    assert_eq!(mood.reads.load(Relaxed), before, "{counts:?}");
    assert_eq!(
        counts.demand.requests + counts.ahead.requests,
        0,
        "{counts:?}"
    );
    // Eight leaves have records of 22 KiB.
    let used = 500 * PAGE as u64 + 8 * (24 << 10);
    assert!(counts.working_set.bytes < used + (128 << 10), "{counts:?}");
    // Who does not want it reads none of it.
    let quiet = LazyOptions {
        prefetches: false,
        cache: None,
        ..options(&scene)
    };
    let (lazy, mood) = begin(&scene, &store, "base", &quiet)?;
    page(&memory(&lazy), 3)?;
    assert_eq!(lazy.counts().working_set.requests, 0);
    assert!(mood.reads.load(Relaxed) <= 2);
    Ok(())
}

#[test]
fn who_asks_does_not_wait_for_the_working_set() -> Outcome {
    let scene = Scene::new()?;
    // 11 MiB of the first four leaves: many requests.
    let touched: Vec<u32> = (0..2048).rev().collect();
    let (store, bytes) = with_set(&scene, &touched)?;
    let mood = Mood::held();
    let lazy = begin_in(&scene, &store, "base", &options(&scene), &mood)?;
    let reader = memory(&lazy);
    until("the set is asked for", || mood.waiting.load(Relaxed) == 4);
    thread::scope(|scope| -> Outcome {
        let asked = scope.spawn(|| page(&reader, 3000));
        until("it is asked for beside them", || {
            mood.waiting.load(Relaxed) == 5
        });
        assert_eq!(lazy.counts().demand.requests, 1);
        mood.release();
        assert_eq!(
            asked.join().expect("no panic")?,
            bytes[3000 * PAGE..][..PAGE]
        );
        Ok(())
    })?;
    until("the set is there", || {
        touched.iter().all(|page| is_at_hand(&reader, *page))
    });
    Ok(())
}

/// Nobody answers at first.
#[test]
fn a_working_set_that_does_not_come_is_asked_for_again() -> Outcome {
    let scene = Scene::new()?;
    let (store, _) = with_set(&scene, &[5, 900])?;
    let mood = Mood::gone();
    let lazy = begin_in(&scene, &store, "base", &options(&scene), &mood)?;
    until("it is asked for", || lazy.counts().working_set.failed > 0);
    mood.come_back();
    let reader = memory(&lazy);
    until("it is there", || {
        is_at_hand(&reader, 5) && is_at_hand(&reader, 900)
    });
    assert_eq!(lazy.counts().demand.requests, 0);
    Ok(())
}

fn all_at_hand(lazy: &Lazy) -> bool {
    let reader = memory(lazy);
    let pages = u32::try_from(reader.size_bytes() / PAGE as u64).expect("few pages");
    (0..pages).all(|page| is_at_hand(&reader, page))
}

#[test]
fn all_of_it_is_there_in_the_end_if_that_is_wanted() -> Outcome {
    for touched in [&scattered(4096, 300)[..], &[]] {
        let scene = Scene::new()?;
        let (store, bytes) = match touched {
            [] => with_base(&scene, &[1; 4096])?,
            touched => with_set(&scene, touched)?,
        };
        let (lazy, mood) = begin(&scene, &store, "base", &fills(&scene, u64::MAX))?;
        until("all of it is there", || all_at_hand(&lazy));
        let counts = lazy.counts();
        assert_eq!(counts.demand.requests, 0, "{counts:?}");
        assert!(counts.fill.bytes > 0);
        // Each byte once.
        let most = bytes.len() as u64 * 11 / 10;
        assert!(counts.fetched_bytes() < most, "{counts:?}");
        // Nobody is needed any more.
        mood.go();
        let mut read = vec![0; bytes.len()];
        memory(&lazy).read_at(&mut read, 0)?;
        assert!(read == bytes, "other bytes");
    }
    Ok(())
}

#[test]
fn a_fill_ends_where_the_cache_is_full() -> Outcome {
    const LIMIT: u64 = 8 << 20;
    let scene = Scene::new()?;
    let (store, _) = with_base(&scene, &[1; 4096])?;
    let (lazy, _) = begin(&scene, &store, "base", &fills(&scene, LIMIT))?;
    until("some of it is there", || lazy.counts().fill.bytes > 3 << 20);
    // Nothing goes so that something comes which nobody has asked for.
    let reader = memory(&lazy);
    page(&reader, 0)?;
    until("it has ended", || !lazy.fills());
    assert!(lazy.counts().fill.bytes <= LIMIT, "{:?}", lazy.counts());
    assert!(is_at_hand(&reader, 0));
    // One that keeps nothing has nothing to fill.
    let (lazy, _) = begin(&scene, &store, "base", &fills(&scene, 0))?;
    assert!(!lazy.fills());
    Ok(())
}

/// It waits for all others.
#[test]
fn a_fill_waits_for_who_asks() -> Outcome {
    let scene = Scene::new()?;
    let (store, bytes) = with_base(&scene, &[1; 4096])?;
    let mood = Mood::held();
    let lazy = begin_in(&scene, &store, "base", &fills(&scene, u64::MAX), &mood)?;
    until("it fills", || mood.waiting.load(Relaxed) == 1);
    let reader = memory(&lazy);
    thread::scope(|scope| -> Outcome {
        let asked = scope.spawn(|| page(&reader, 3000));
        until("it is asked for beside it", || {
            mood.waiting.load(Relaxed) == 2
        });
        mood.release();
        assert_eq!(
            asked.join().expect("no panic")?,
            bytes[3000 * PAGE..][..PAGE]
        );
        Ok(())
    })?;
    until("all of it is there", || all_at_hand(&lazy));
    Ok(())
}

/// By mounts of this host, of a snapshot whose pusher knew nothing.
#[test]
fn what_was_touched_here_is_read_first_next_time_and_goes_with_the_snapshot() -> Outcome {
    let scene = Scene::new()?;
    let (store, bytes) = with_base(&scene, &[1; 4096])?;
    let cache = store.path().join(CACHE);
    let options = LazyOptions {
        cache: Some(cache.clone()),
        ..options(&scene)
    };
    let touched = scattered(4096, 60);
    let seen = Seen {
        touched: touched.clone(),
        ..Seen::default()
    };
    let set = WorkingSet::merged(None, &seen, SystemTime::UNIX_EPOCH);
    let (lazy, _) = begin(&scene, &store, "base", &options)?;
    assert_eq!(lazy.snapshot().working_set("memory"), None);
    lazy.snapshot().keep_working_set("memory", &set);
    // Names come from the bucket.
    lazy.snapshot().keep_working_set("../memory", &set);
    lazy.end();
    let files = |dir: &Path| -> std::io::Result<Vec<PathBuf>> {
        let buckets = list(dir)?.into_iter().filter(|path| path.is_dir());
        let lists = buckets.map(|bucket| list(&bucket));
        Ok(lists.collect::<Result<Vec<_>, _>>()?.concat())
    };
    let is_set = |path: &PathBuf| path.extension().is_some_and(|suffix| suffix == "set");
    let recorded: Vec<PathBuf> = files(&cache)?.into_iter().filter(is_set).collect();
    assert_eq!(recorded.len(), 1, "{recorded:?}");
    for path in files(&cache)?.iter().filter(|path| !is_set(path)) {
        fs::remove_file(path)?;
    }
    let (lazy, _) = begin(&scene, &store, "base", &options)?;
    let reader = memory(&lazy);
    until("what was touched is not here", || {
        touched.iter().all(|page| is_at_hand(&reader, *page))
    });
    let counts = lazy.counts();
    assert_eq!(counts.demand.requests, 0, "{counts:?}");
    assert!(counts.working_set.requests > 0, "{counts:?}");
    assert!(
        counts.fetched_bytes() < bytes.len() as u64 / 2,
        "{counts:?}"
    );
    for number in &touched {
        let at = *number as usize * PAGE;
        assert_eq!(page(&reader, *number as usize)?, bytes[at..][..PAGE]);
    }
    lazy.end();
    // It goes with a pull, and back with a push of the same.
    let remote = scene.remote()?;
    remote.pull(&store, "base", "base", false, &Silent)?;
    let pulled = store.working_set(store.resolve("base")?, "memory")?;
    assert_eq!(pulled.as_ref(), Some(&set));
    let report = remote.push(&store, "base", "base", false, &Silent)?;
    assert!(report.already, "{report:?}");
    assert_eq!(report.working_set_pages, touched.len() as u64, "{report:?}");
    // One that is damaged is as good as none, and recorded anew.
    let mut damaged = fs::read(&recorded[0])?;
    let half = damaged.len() / 2;
    damaged[half] ^= 1;
    fs::write(&recorded[0], damaged)?;
    let (lazy, _) = begin(&scene, &store, "base", &options)?;
    assert_eq!(lazy.snapshot().working_set("memory"), None);
    lazy.snapshot().keep_working_set("memory", &set);
    assert_eq!(lazy.snapshot().working_set("memory"), Some(set));
    lazy.end();
    Ok(())
}
