//! Snapshots that are read where they are, from buckets that are slow, fail and lie.

use std::fs;
use std::io;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use snapstore_store::{ErrorClass, ImageReader, Region, Silent, Store};

use super::moody::{Mood, Moody, begin, memory, options, page, with_base};
use super::{Outcome, PAGE, Scene, commit, image, read};
use crate::protocol::{self, Options};
use crate::{Error, LazyOptions};

/// With holes, over several leaves, and of packs of two pushes.
pub fn what_stays_there_reads_as_what_is_pulled(scene: &Scene) -> Outcome {
    let mut pages: Vec<u8> = (0..3000).map(|at| (at % 7) as u8).collect();
    pages[700..2060].fill(0);
    let (empty, _) = with_base(scene, &pages)?;
    let store = Store::open(&scene.dir.path().join("store"))?;
    pages[1234] = 99;
    pages[2100..2400].fill(98);
    let bytes = image(&pages);
    commit(&store, "next", &bytes, Some("base"))?;
    let remote = scene.remote()?;
    remote.push(&store, "next", "next", false, &Silent)?;
    let lazy = scene.remote()?.lazy(&empty, "next", &options(scene))?;
    assert_eq!(Some(lazy.snapshot().id()), store.tag("next")?);
    let (reader, local) = (
        memory(&lazy),
        store.snapshot("next")?.image("memory").ok_or("no memory")?,
    );
    assert!(reader.may_wait() && !local.may_wait());
    // A leaf that nobody has yet may be data as a whole; one that there is not is a hole.
    let leaf = 512 * PAGE as u64;
    let holes = |reader: &ImageReader| -> snapstore_store::Result<_> {
        let hole = reader.seek_at_hand(0, Region::Hole)?;
        Ok((hole, reader.seek_at_hand(hole.unwrap_or(0), Region::Data)?))
    };
    assert_eq!(holes(&reader)?, (Some(3 * leaf), Some(4 * leaf)));
    let zeros = holes(&local)?;
    assert_eq!(zeros, (Some(0), Some(PAGE as u64)));
    let mut at = Some(0);
    while let Some(from) = at {
        for region in [Region::Data, Region::Hole] {
            assert_eq!(
                reader.seek(from, region)?,
                local.seek(from, region)?,
                "{from}"
            );
        }
        at = (from + 90_000 < reader.size_bytes()).then_some(from + 90_000);
    }
    let mut read = vec![0; bytes.len()];
    assert_eq!(reader.read_at(&mut read, 0)?, bytes.len());
    assert!(read == bytes, "other bytes");
    // What was read is at hand.
    assert_eq!(holes(&reader)?, zeros);
    let mut again = vec![0; 10_000];
    let got = reader.read_at_hand(&mut again, 5_000_001)?;
    assert_eq!(
        (got, &again[..]),
        (Some(10_000), &bytes[5_000_001..5_010_001])
    );
    assert_eq!(empty.tag_names()?, [""; 0], "it is not stored");
    lazy.end();
    assert!(remote.leases()?.is_empty());
    Ok(())
}

#[test]
fn what_is_not_asked_for_stays_where_it_is() -> Outcome {
    let scene = Scene::new()?;
    let (store, bytes) = with_base(&scene, &[1; 4000])?;
    let (lazy, mood) = begin(&scene, &store, "base", &options(&scene))?;
    let reader = memory(&lazy);
    assert_eq!(reader.read_at_hand(&mut [0; PAGE], 0)?, None);
    for (region, found) in [(Region::Data, 0), (Region::Hole, reader.size_bytes())] {
        assert_eq!(reader.seek_at_hand(0, region)?, Some(found));
    }
    assert_eq!(
        mood.reads.load(Relaxed),
        0,
        "who does not wait asks for nothing"
    );
    for number in [3333, 10, 2000] {
        assert_eq!(page(&reader, number)?, bytes[number * PAGE..][..PAGE]);
    }
    let counts = lazy.counts();
    assert!(counts.fetched_bytes() < 1 << 21, "{counts:?}");
    assert!(counts.demand.requests <= 6, "{counts:?}");
    Ok(())
}

#[test]
fn who_reads_in_order_is_read_ahead_of() -> Outcome {
    let scene = Scene::new()?;
    let (store, bytes) = with_base(&scene, &[1; 6000])?;
    let (lazy, _) = begin(&scene, &store, "base", &options(&scene))?;
    let reader = memory(&lazy);
    let mut read = vec![0; bytes.len()];
    for (number, out) in read.chunks_mut(4 * PAGE).enumerate() {
        reader.read_at(out, (number * 4 * PAGE) as u64)?;
    }
    assert!(read == bytes, "other bytes");
    let counts = lazy.counts();
    assert!(counts.ahead.requests > 10, "{counts:?}");
    // Each byte once.
    assert!(
        counts.fetched_bytes() < bytes.len() as u64 * 11 / 10,
        "{counts:?}"
    );
    Ok(())
}

#[test]
fn what_was_read_is_there_for_the_next_one_and_not_trusted() -> Outcome {
    let scene = Scene::new()?;
    let (store, bytes) = with_base(&scene, &[1; 600])?;
    let (lazy, _) = begin(&scene, &store, "base", &options(&scene))?;
    assert_eq!(page(&memory(&lazy), 7)?, bytes[7 * PAGE..][..PAGE]);
    // Beside the first one.
    let (other, mood) = begin(&scene, &store, "base", &options(&scene))?;
    assert_eq!(page(&memory(&other), 7)?, bytes[7 * PAGE..][..PAGE]);
    assert_eq!(mood.reads.load(Relaxed), 0);
    drop((lazy, other));
    // As after a crash of the host: the map is there, and the bytes are not.
    for bucket in super::list(&scene.dir.path().join("cache"))? {
        if !bucket.is_dir() {
            continue;
        }
        for path in super::list(&bucket)? {
            if path.extension().is_none() {
                let len = fs::metadata(&path)?.len();
                fs::write(&path, vec![0; usize::try_from(len)?])?;
            }
        }
    }
    let (lazy, mood) = begin(&scene, &store, "base", &options(&scene))?;
    let reader = memory(&lazy);
    assert_eq!(reader.read_at_hand(&mut [0; PAGE], 7 * PAGE as u64)?, None);
    assert_eq!(page(&reader, 7)?, bytes[7 * PAGE..][..PAGE]);
    assert!(mood.reads.load(Relaxed) > 0 && lazy.counts().thrown_away > 0);
    Ok(())
}

#[test]
fn wrong_bytes_of_the_bucket_are_an_error_that_names_them_until_they_are_right() -> Outcome {
    let scene = Scene::new()?;
    let (store, bytes) = with_base(&scene, &[1; 600])?;
    let (lazy, mood) = begin(&scene, &store, "base", &options(&scene))?;
    let reader = memory(&lazy);
    assert_eq!(page(&reader, 0)?, bytes[..PAGE]);
    mood.flips.store(true, Relaxed);
    let reads = mood.reads.load(Relaxed);
    let error = page(&reader, 400).expect_err("other bytes");
    assert_eq!(error.class(), ErrorClass::Damaged);
    let pack = scene.longest("packs")?;
    assert!(error.to_string().contains(&pack), "{error}");
    assert_eq!(
        mood.reads.load(Relaxed),
        reads + 2,
        "once more, and not again"
    );
    assert_eq!(page(&reader, 0)?, bytes[..PAGE], "what is here already");
    mood.flips.store(false, Relaxed);
    assert_eq!(page(&reader, 400)?, bytes[400 * PAGE..][..PAGE]);
    Ok(())
}

#[test]
fn a_pack_that_is_missing_is_damage_at_once() -> Outcome {
    let scene = Scene::new()?;
    let (store, _) = with_base(&scene, &[1; 600])?;
    let (lazy, _) = begin(&scene, &store, "base", &options(&scene))?;
    fs::remove_file(scene.object("packs"))?;
    let error = page(&memory(&lazy), 0).expect_err("it is not there");
    assert_eq!(error.class(), ErrorClass::Damaged);
    assert!(error.to_string().contains("missing"), "{error}");
    Ok(())
}

#[test]
fn one_that_waits_holds_up_none_that_has_all_at_hand() -> Outcome {
    let scene = Scene::new()?;
    let (store, bytes) = with_base(&scene, &[1; 600])?;
    let (lazy, mood) = begin(&scene, &store, "base", &options(&scene))?;
    let reader = memory(&lazy);
    page(&reader, 0)?;
    mood.hold();
    thread::scope(|scope| -> Outcome {
        let slow = scope.spawn(|| page(&reader, 500));
        mood.wait_until_one_waits();
        let mut out = vec![0; PAGE];
        for _ in 0..100 {
            assert_eq!(reader.read_at_hand(&mut out, 0)?, Some(PAGE));
            assert_eq!(out, bytes[..PAGE]);
        }
        assert!(!slow.is_finished());
        assert_eq!(reader.read_at_hand(&mut out, 500 * PAGE as u64)?, None);
        mood.release();
        assert_eq!(slow.join().expect("no panic")?, bytes[500 * PAGE..][..PAGE]);
        Ok(())
    })
}

#[test]
fn those_who_need_the_same_ask_once() -> Outcome {
    let scene = Scene::new()?;
    let (store, bytes) = with_base(&scene, &[1; 600])?;
    let (lazy, mood) = begin(&scene, &store, "base", &options(&scene))?;
    let reader = memory(&lazy);
    page(&reader, 0)?;
    mood.hold();
    let before = mood.reads.load(Relaxed);
    let all = Barrier::new(9);
    thread::scope(|scope| -> Outcome {
        let readers: Vec<_> = (0..8)
            .map(|_| {
                scope.spawn(|| {
                    all.wait();
                    page(&reader, 500)
                })
            })
            .collect();
        all.wait();
        mood.wait_until_one_waits();
        mood.release();
        for one in readers {
            assert_eq!(one.join().expect("no panic")?, bytes[500 * PAGE..][..PAGE]);
        }
        assert_eq!(mood.reads.load(Relaxed), before + 1);
        Ok(())
    })
}

#[test]
fn a_bucket_that_does_not_answer_is_waited_for_and_then_an_error_that_passes() -> Outcome {
    let scene = Scene::new()?;
    let (store, bytes) = with_base(&scene, &[1; 600])?;
    let patient = begin(&scene, &store, "base", &options(&scene))?;
    let (lazy, mood) = &patient;
    let reader = memory(lazy);
    mood.go();
    thread::scope(|scope| -> Outcome {
        let reading = scope.spawn(|| page(&reader, 3));
        while lazy.counts().failed_requests() < 2 {
            thread::yield_now();
        }
        mood.come_back();
        assert_eq!(
            reading.join().expect("no panic")?,
            bytes[3 * PAGE..][..PAGE]
        );
        Ok(())
    })?;
    let impatient = LazyOptions {
        timeout: Duration::from_millis(200),
        ..options(&scene)
    };
    let (lazy, mood) = begin(&scene, &store, "base", &impatient)?;
    let reader = memory(&lazy);
    mood.go();
    let error = page(&reader, 500).expect_err("nobody answers");
    assert_eq!(error.class(), ErrorClass::Io);
    assert!(error.to_string().contains("nobody answers"), "{error}");
    // As the kernel does, which has read ahead: it is not waited for a second time.
    let (before, began) = (mood.reads.load(Relaxed), Instant::now());
    page(&reader, 501).expect_err("nobody answers");
    let is_late = began.elapsed() > Duration::from_millis(500);
    assert!(mood.reads.load(Relaxed) == before + 1 || is_late);
    mood.come_back();
    assert_eq!(page(&reader, 500)?, bytes[500 * PAGE..][..PAGE]);
    Ok(())
}

/// As a network filesystem that is not mounted for a while.
#[test]
fn a_directory_that_goes_and_comes_back_is_waited_for() -> Outcome {
    for stays in [true, false] {
        let scene = Scene::new()?;
        let (store, bytes) = with_base(&scene, &[1; 600])?;
        let (lazy, _) = begin(&scene, &store, "base", &options(&scene))?;
        let reader = memory(&lazy);
        let away = scene.dir.path().join("away");
        fs::rename(scene.bucket(), &away)?;
        if stays {
            fs::create_dir(scene.bucket())?;
        }
        thread::scope(|scope| -> Outcome {
            let reading = scope.spawn(|| page(&reader, 3));
            while lazy.counts().failed_requests() < 2 {
                assert!(!reading.is_finished(), "an empty directory is no bucket");
                thread::yield_now();
            }
            // Over the empty one, if it is there.
            fs::rename(&away, scene.bucket())?;
            assert_eq!(
                reading.join().expect("no panic")?,
                bytes[3 * PAGE..][..PAGE]
            );
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn what_is_read_stays_though_its_tag_goes_and_goes_when_nobody_reads_it() -> Outcome {
    let scene = Scene::new()?;
    let (store, bytes) = with_base(&scene, &[1; 600])?;
    let (lazy, _) = begin(&scene, &store, "base", &options(&scene))?;
    let remote = scene.remote()?;
    remote.remove("base")?;
    remote.collect(Options::default())?;
    assert_eq!(scene.keys("packs")?.len(), 1);
    assert_eq!(page(&memory(&lazy), 599)?, bytes[599 * PAGE..][..PAGE]);
    assert_eq!(remote.leases()?.len(), 1);
    lazy.end();
    remote.collect(Options::default())?;
    assert_eq!(scene.keys("packs")?.len(), 0);
    Ok(())
}

/// Its tag is gone, and a view keeps it: whether that is so, only its head says.
#[test]
fn a_view_whose_head_does_not_come_is_no_snapshot_that_is_gone() -> Outcome {
    let scene = Scene::new()?;
    let (store, bytes) = with_base(&scene, &[1; 600])?;
    let (lazy, _) = begin(&scene, &store, "base", &options(&scene))?;
    scene.remote()?.remove("base")?;
    let mood = Arc::new(Mood::default());
    let mut remote = scene.remote()?;
    remote.bucket = Box::new(Moody {
        bucket: remote.bucket,
        mood: mood.clone(),
    });
    let id = *lazy.snapshot().id().as_bytes();
    mood.keeps_heads.store(true, Relaxed);
    let error = remote.pull_snapshot(&store, "base", id, "base", &Silent);
    let error = error.expect_err("nobody answers");
    assert!(error.to_string().contains("nobody answers"), "{error}");
    mood.keeps_heads.store(false, Relaxed);
    remote.pull_snapshot(&store, "base", id, "base", &Silent)?;
    assert_eq!(read(&store, "base")?, bytes);
    lazy.end();
    let gone = remote.pull_snapshot(&store, "base", [7; 32], "other", &Silent);
    let gone = gone.expect_err("nobody has it");
    assert!(
        matches!(gone, Error::Protocol(protocol::Error::Gone { .. })),
        "{gone}"
    );
    Ok(())
}

/// Nothing can be kept on the disk: what was read is in memory for a while.
#[test]
fn without_a_cache_all_is_read_as_well() -> Outcome {
    let scene = Scene::new()?;
    let (store, bytes) = with_base(&scene, &[1; 600])?;
    let none = LazyOptions {
        cache: None,
        ..options(&scene)
    };
    let blocked = scene.dir.path().join("blocked");
    fs::write(&blocked, "no directory")?;
    let refused = LazyOptions {
        cache: Some(blocked),
        ..options(&scene)
    };
    for options in [none, refused] {
        let (lazy, mood) = begin(&scene, &store, "base", &options)?;
        let reader = memory(&lazy);
        let mut all = vec![0; bytes.len()];
        reader.read_at(&mut all, 0)?;
        assert!(all == bytes, "other bytes");
        let reads = mood.reads.load(Relaxed);
        assert_eq!(page(&reader, 3)?, bytes[3 * PAGE..][..PAGE]);
        assert_eq!(mood.reads.load(Relaxed), reads);
    }
    Ok(())
}

/// A reader whose limit is far below what it reads.
#[test]
fn a_small_cache_keeps_its_limit() -> Outcome {
    let scene = Scene::new()?;
    let (store, bytes) = with_base(&scene, &[1; 3000])?;
    let small = LazyOptions {
        cache_limit_bytes: 1 << 20,
        ..options(&scene)
    };
    let (lazy, _) = begin(&scene, &store, "base", &small)?;
    let mut all = vec![0; bytes.len()];
    memory(&lazy).read_at(&mut all, 0)?;
    assert!(all == bytes, "other bytes");
    lazy.end();
    let kept = du(&scene.dir.path().join("cache"))?;
    assert!(kept <= 2 << 20, "{kept} bytes are kept");
    Ok(())
}

fn du(dir: &std::path::Path) -> io::Result<u64> {
    use std::os::unix::fs::MetadataExt as _;
    let mut total = 0;
    for path in super::list(dir)? {
        total += match path.is_dir() {
            true => du(&path)?,
            false => fs::metadata(&path)?.blocks() * 512,
        };
    }
    Ok(total)
}

#[test]
fn a_pull_after_it_stores_the_same() -> Outcome {
    let scene = Scene::new()?;
    let (store, bytes) = with_base(&scene, &[1; 600])?;
    let (lazy, _) = begin(&scene, &store, "base", &options(&scene))?;
    page(&memory(&lazy), 3)?;
    scene
        .remote()?
        .pull(&store, "base", "base", false, &Silent)?;
    assert_eq!(read(&store, "base")?, bytes);
    assert_eq!(store.tag("base")?, Some(lazy.snapshot().id()));
    Ok(())
}
