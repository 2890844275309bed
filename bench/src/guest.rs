//! A guest that goes on running: the real images, and small steps from them.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, ensure};
use snapstore_store::is_zero;

use crate::stats::Random;

/// The size of a page.
pub const PAGE: usize = 4096;
/// The images' names, in the order in which they are committed.
pub const NAMES: [&str; 5] = ["base", "base+1", "base+2", "base+3", "other"];

/// Real guest memory, a file per image.
#[derive(Debug)]
pub struct Images {
    dir: PathBuf,
}

impl Images {
    /// The images in `$SNAPSTORE_IMAGES`.
    ///
    /// # Errors
    /// If one is missing.
    pub fn from_env() -> anyhow::Result<Self> {
        let dir = std::env::var_os("SNAPSTORE_IMAGES")
            .context("SNAPSTORE_IMAGES must name the directory of the guest images")?;
        let images = Self { dir: dir.into() };
        for name in NAMES {
            let path = images.path(name);
            ensure!(path.is_file(), "{} is missing", path.display());
        }
        Ok(images)
    }

    /// No images, for benchmarks that use none.
    #[must_use]
    pub fn none() -> Self {
        Self {
            dir: PathBuf::from("/nonexistent"),
        }
    }

    /// The file of an image.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.ram"))
    }

    /// An image's bytes.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn read(&self, name: &str) -> anyhow::Result<Vec<u8>> {
        let path = self.path(name);
        fs::read(&path).with_context(|| format!("cannot read {}", path.display()))
    }
}

/// The numbers of the pages that hold anything.
#[must_use]
pub fn nonzero_pages(memory: &[u8]) -> Vec<u64> {
    (0..)
        .zip(memory.chunks(PAGE))
        .filter(|(_, page)| !is_zero(page))
        .map(|(number, _)| number)
        .collect()
}

/// The pages that hold anything, each content once.
#[must_use]
pub fn distinct_pages(memory: &[u8]) -> Vec<&[u8]> {
    let mut seen = HashSet::new();
    memory
        .chunks(PAGE)
        .filter(|page| !is_zero(page) && seen.insert(*page))
        .collect()
}

/// A guest's memory that changes step by step.
#[derive(Clone, Debug)]
pub struct Guest {
    first: Arc<Vec<u8>>,
    changed: HashMap<u64, Vec<u8>>,
    used: Vec<u64>,
    unused: Vec<u64>,
}

/// The pages that a step changed, as they are after it.
pub type Step = BTreeMap<u64, Vec<u8>>;

impl Guest {
    /// A guest that has this memory.
    #[must_use]
    pub fn new(memory: Vec<u8>) -> Self {
        let used = nonzero_pages(&memory);
        let known: HashSet<u64> = used.iter().copied().collect();
        let pages = (memory.len() / PAGE) as u64;
        Self {
            unused: (0..pages).filter(|page| !known.contains(page)).collect(),
            first: Arc::new(memory),
            changed: HashMap::new(),
            used,
        }
    }

    /// A page as it is now.
    #[must_use]
    pub fn page(&self, number: u64) -> &[u8] {
        let start = usize::try_from(number).map_or(usize::MAX, |number| number * PAGE);
        match self.changed.get(&number) {
            Some(page) => page,
            None => &self.first[start..start + PAGE],
        }
    }

    /// Pages that are in use.
    #[must_use]
    pub fn used(&self) -> &[u64] {
        &self.used
    }

    /// Runs on: 8 to 64 bytes change in each of `edits` pages that are in use,
    /// and `fresh` unused pages are filled with what pages in use hold, changed
    /// in 16 places. The bytes written are random, so that they do not compress.
    pub fn run(&mut self, random: &mut Random, edits: usize, fresh: usize) -> Step {
        let mut step = Step::new();
        for number in random.choose(&self.used, edits) {
            let mut page = self.page(number).to_vec();
            edit(random, &mut page);
            step.insert(number, page);
        }
        for _ in 0..fresh.min(self.unused.len()) {
            let number = self.unused.swap_remove(random.below(self.unused.len()));
            let model = self.used[random.below(self.used.len())];
            let mut page = self.page(model).to_vec();
            (0..16).for_each(|_| edit(random, &mut page));
            step.insert(number, page);
        }
        for (number, page) in &step {
            self.changed.insert(*number, page.clone());
        }
        self.used.extend(step.keys());
        self.used.sort_unstable();
        self.used.dedup();
        step
    }

    /// Writes all memory into a new file.
    ///
    /// # Errors
    /// If that fails.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        fs::write(path, self.first.as_slice())?;
        let file = File::options().write(true).open(path)?;
        self.changed
            .iter()
            .try_for_each(|(number, page)| file.write_all_at(page, number * PAGE as u64))
    }

    /// Writes a step into a new file of which the rest is holes.
    ///
    /// # Errors
    /// If that fails.
    pub fn write_diff(&self, step: &Step, path: &Path) -> io::Result<()> {
        let file = File::create(path)?;
        file.set_len(self.first.len() as u64)?;
        step.iter()
            .try_for_each(|(number, page)| file.write_all_at(page, number * PAGE as u64))
    }
}

fn edit(random: &mut Random, page: &mut [u8]) {
    let len = 8 * (1 + random.below(8));
    let start = 8 * random.below((page.len() - len) / 8 + 1);
    for word in page[start..start + len].chunks_mut(8) {
        word.copy_from_slice(&random.word().to_le_bytes());
    }
}
