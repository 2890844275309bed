//! Buckets that are slow, fail and lie, and snapshots that are read in them.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

use snapstore_store::{ImageReader, Silent, Store};

use super::{PAGE, Scene, commit, image};
use crate::objects::{Objects, Part, Requests, no};
use crate::protocol::{Listed, Unanswered};
use crate::{Lazy, LazyOptions};

/// What a bucket does to those who read it.
#[derive(Debug, Default)]
pub struct Mood {
    /// Reads of packs that are held.
    held: Mutex<bool>,
    released: Condvar,
    pub waiting: AtomicUsize,
    pub reads: AtomicUsize,
    is_gone: AtomicBool,
    /// Of heads alone nothing comes.
    pub keeps_heads: AtomicBool,
    pub flips: AtomicBool,
}

impl Mood {
    pub fn hold(&self) {
        *self.held.lock().expect("no panic") = true;
    }

    /// One that holds reads from the beginning.
    pub fn held() -> Arc<Self> {
        let mood = Self::default();
        mood.hold();
        Arc::new(mood)
    }

    /// One of a bucket that does not answer.
    pub fn gone() -> Arc<Self> {
        let mood = Self::default();
        mood.go();
        Arc::new(mood)
    }

    pub fn go(&self) {
        self.is_gone.store(true, Relaxed);
    }

    pub fn come_back(&self) {
        self.is_gone.store(false, Relaxed);
    }

    pub fn release(&self) {
        *self.held.lock().expect("no panic") = false;
        self.released.notify_all();
    }

    pub fn wait_until_one_waits(&self) {
        while self.waiting.load(Relaxed) == 0 {
            thread::yield_now();
        }
    }
}

/// A bucket in such a mood.
#[derive(Debug)]
pub struct Moody {
    pub bucket: Box<dyn Objects>,
    pub mood: Arc<Mood>,
}

impl Objects for Moody {
    fn create(&self) -> Result<(), Unanswered> {
        self.bucket.create()
    }
    fn is_absent(&self) -> bool {
        self.bucket.is_absent()
    }
    fn put(&self, key: &str, bytes: &[u8]) -> Result<(), Unanswered> {
        self.bucket.put(key, bytes)
    }
    fn get(&self, key: &str, part: Option<Part>) -> Result<Option<Vec<u8>>, Unanswered> {
        self.mood.reads.fetch_add(1, Relaxed);
        self.mood.waiting.fetch_add(1, Relaxed);
        let mut held = self.mood.held.lock().expect("no panic");
        while *held {
            held = self.mood.released.wait(held).expect("no panic");
        }
        drop(held);
        self.mood.waiting.fetch_sub(1, Relaxed);
        let keeps = self.mood.keeps_heads.load(Relaxed) && key.starts_with("heads/");
        if keeps || self.mood.is_gone.load(Relaxed) {
            return Err(no("read", key, "nobody answers".to_owned()));
        }
        let mut bytes = self.bucket.get(key, part)?;
        if self.mood.flips.load(Relaxed) {
            bytes.iter_mut().flatten().for_each(|byte| *byte ^= 1);
        }
        Ok(bytes)
    }
    fn exists(&self, key: &str) -> Result<bool, Unanswered> {
        self.bucket.exists(key)
    }
    fn list(&self, prefix: &str) -> Result<Vec<Listed>, Unanswered> {
        self.bucket.list(prefix)
    }
    fn delete(&self, key: &str) -> Result<(), Unanswered> {
        self.bucket.delete(key)
    }
    fn requests(&self) -> Option<Requests> {
        self.bucket.requests()
    }
}

pub fn options(scene: &Scene) -> LazyOptions {
    LazyOptions {
        cache: Some(scene.dir.path().join("cache")),
        cache_limit_bytes: u64::MAX,
        timeout: Duration::from_secs(60),
        prefetches: true,
        fills: false,
    }
}

pub fn begin(
    scene: &Scene,
    store: &Store,
    tag: &str,
    options: &LazyOptions,
) -> Result<(Lazy, Arc<Mood>), Box<dyn std::error::Error>> {
    let mood = Arc::new(Mood::default());
    let lazy = begin_in(scene, store, tag, options, &mood)?;
    Ok((lazy, mood))
}

/// The same of a bucket in this mood.
pub fn begin_in(
    scene: &Scene,
    store: &Store,
    tag: &str,
    options: &LazyOptions,
    mood: &Arc<Mood>,
) -> Result<Lazy, Box<dyn std::error::Error>> {
    let demanded = Box::new(Moody {
        bucket: scene.remote()?.bucket,
        mood: mood.clone(),
    });
    Ok(scene.remote()?.lazy_by(store, tag, options, demanded)?)
}

pub fn memory(lazy: &Lazy) -> ImageReader {
    let snapshot = lazy.snapshot();
    let image = snapshot.manifest().image("memory").expect("it has memory");
    snapshot.image_reader(image)
}

pub fn page(reader: &ImageReader, number: usize) -> snapstore_store::Result<Vec<u8>> {
    let mut bytes = vec![0; PAGE];
    reader.read_at(&mut bytes, (number * PAGE) as u64)?;
    Ok(bytes)
}

/// A bucket with `base`, and what is in it.
pub fn with_base(
    scene: &Scene,
    pages: &[u8],
) -> Result<(Store, Vec<u8>), Box<dyn std::error::Error>> {
    let store = scene.store("store")?;
    let bytes = image(pages);
    commit(&store, "base", &bytes, None)?;
    scene
        .remote()?
        .push(&store, "base", "base", false, &Silent)?;
    Ok((scene.store("empty")?, bytes))
}
