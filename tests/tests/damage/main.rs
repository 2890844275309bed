//! Damaged bytes anywhere in a store: they are found and named, never served,
//! and what can be rebuilt is.

mod blocks;
mod found;
mod lengths;
mod parents;
mod rebuilt;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use snapstore_store::{Damage, Error, ErrorClass, Silent, Store};
use snapstore_tests::harness::{Cli, noise};
use tempfile::TempDir;

const PAGE: usize = 4096;
const PAGES: usize = 48;

/// Three snapshots in three packs, with every kind of chunk and encoding.
struct Fixture {
    dir: TempDir,
    cli: Cli,
    images: BTreeMap<String, Vec<u8>>,
}

/// A chunk in a pack file.
#[derive(Clone, Debug)]
struct Chunk {
    kind: u8,
    encoding: u8,
    start: usize,
    end: usize,
}

/// Lengths of parts of a pack: docs/FORMAT.md.
const HEADER: usize = 64;
const SEAL: usize = 96;
const TRAILER: usize = 20;

const PAGE_KIND: u8 = 0;
const NODE: u8 = 1;
const MANIFEST: u8 = 2;
const RAW: u8 = 0;
const DELTA: u8 = 2;
const PATCH: u8 = 4;

impl Fixture {
    fn empty() -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        let cli = Cli::new(&dir.path().join("store"));
        cli.ok(&["init"])?;
        Ok(Self {
            dir,
            cli,
            images: BTreeMap::new(),
        })
    }

    fn new() -> anyhow::Result<Self> {
        let mut fixture = Self::empty()?;
        let mut image = noise(1, PAGES * PAGE);
        // Noise is stored as it is, text is compressed.
        for page in 30..PAGES {
            let text = format!("page {page} of text; ").repeat(PAGE);
            image[page * PAGE..(page + 1) * PAGE].copy_from_slice(&text.as_bytes()[..PAGE]);
        }
        fixture.commit("base", image.clone())?;
        for (tag, seed) in [("next", 7), ("last", 8)] {
            // Small changes become patches, larger ones deltas; two pages are new.
            for page in 0..10 {
                let changed = if page < 5 { 1 } else { 600 };
                let at = page * PAGE + seed;
                image[at..at + changed]
                    .iter_mut()
                    .for_each(|byte| *byte ^= 0x5a);
            }
            let fresh = noise(seed as u64, 2 * PAGE);
            image[20 * PAGE..22 * PAGE].copy_from_slice(&fresh);
            fixture.commit(tag, image.clone())?;
        }
        Ok(fixture)
    }

    fn commit(&mut self, tag: &str, image: Vec<u8>) -> anyhow::Result<()> {
        let path = self.dir.path().join("image");
        fs::write(&path, &image)?;
        self.cli
            .ok(&["commit", tag, "--memory", &path.display().to_string()])?;
        self.images.insert(tag.to_owned(), image);
        Ok(())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.cli.store().join(name)
    }

    fn packs(&self) -> anyhow::Result<Vec<PathBuf>> {
        list(&self.path("packs"))
    }

    /// Runs `check` with one byte of a file flipped, then puts it back.
    fn with_flip(
        &self,
        file: &Path,
        at: usize,
        check: impl FnOnce() -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let good = fs::read(file)?;
        flip(file, at)?;
        let result = check().with_context(|| format!("byte {at} of {}", file.display()));
        replace(file, &good)?;
        result
    }

    /// `verify --read-data`, or opening the store, finds damage and names it.
    fn is_found(&self, name: &str) -> anyhow::Result<()> {
        let report = Store::open(self.cli.store()).and_then(|store| store.verify(true, &Silent));
        let found: Vec<String> = match report {
            Ok(report) => report
                .findings
                .iter()
                .map(|finding| finding.damage.to_string())
                .collect(),
            Err(error) => {
                ensure!(is_damage(&error), "{error}");
                vec![error.to_string()]
            }
        };
        ensure!(
            found.iter().any(|damage| damage.contains(name)),
            "{name} is not named: {found:?}"
        );
        Ok(())
    }

    /// The command finds damage, says so in its exit code, and names the file.
    fn command_names(&self, name: &str) -> anyhow::Result<()> {
        let output = self.cli.run(&["verify", "--read-data"])?;
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8(text)?;
        ensure!(output.status.code() == Some(4), "{}: {text}", output.status);
        ensure!(text.contains(name), "{name} is not named: {text}");
        ensure!(!text.contains("panicked"), "{text}");
        Ok(())
    }

    /// Every page of every snapshot is right or an error. Returns the number of
    /// snapshots that are right as a whole.
    fn nothing_wrong_is_read(&self) -> anyhow::Result<usize> {
        let mut whole = 0;
        for (tag, image) in &self.images {
            whole += usize::from(self.read(tag, image)?);
        }
        Ok(whole)
    }

    fn read(&self, tag: &str, image: &[u8]) -> anyhow::Result<bool> {
        let opened = Store::open(self.cli.store()).and_then(|store| {
            let manifest = store.manifest(store.resolve(tag)?)?;
            Ok((store, manifest))
        });
        let (store, manifest) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                ensure!(is_damage(&error), "{tag}: {error}");
                return Ok(false);
            }
        };
        let entry = manifest.image("memory").context("no memory")?;
        ensure!(entry.size_bytes == image.len() as u64, "the size of {tag}");
        let reader = store.image_reader(entry);
        let mut whole = true;
        let mut page = vec![0; PAGE];
        for (number, expected) in image.chunks(PAGE).enumerate() {
            match reader.read_at(&mut page, (number * PAGE) as u64) {
                Ok(_) => ensure!(page == expected, "page {number} of {tag} is wrong"),
                Err(error) => {
                    ensure!(is_damage(&error), "page {number} of {tag}: {error}");
                    whole = false;
                }
            }
        }
        Ok(whole)
    }

    /// What `verify --read-data` says of the snapshots is what readers see: those that it
    /// calls lost cannot be read, the others can. Each chunk is told of once, with the
    /// snapshots that have it: all chunks here are some snapshot's.
    fn verify_agrees_with_readers(&self) -> anyhow::Result<()> {
        let report = Store::open(self.cli.store())?.verify(true, &Silent)?;
        let mut places = BTreeSet::new();
        let mut lost = BTreeSet::new();
        for finding in &report.findings {
            if let Damage::Chunk {
                path, offset_bytes, ..
            } = &finding.damage
            {
                ensure!(places.insert((path, offset_bytes)), "twice: {finding:?}");
                ensure!(!finding.snapshots.is_empty(), "whose is it? {finding:?}");
            }
            // Of a pack, the chunks may be found all the same.
            if !finding.read_all_the_same && !matches!(finding.damage, Damage::Pack { .. }) {
                lost.extend(finding.snapshots.clone());
            }
        }
        for (tag, image) in &self.images {
            let is_whole = self.read(tag, image)?;
            ensure!(
                is_whole != lost.contains(tag),
                "{tag} is whole: {is_whole}, and of it: {:?}",
                report.findings
            );
        }
        Ok(())
    }

    fn all_is_well(&self) -> anyhow::Result<()> {
        self.cli.ok(&["verify", "--read-data"])?;
        ensure!(
            self.nothing_wrong_is_read()? == self.images.len(),
            "a snapshot is broken"
        );
        Ok(())
    }
}

fn is_damage(error: &Error) -> bool {
    error.class() == ErrorClass::Damaged
}

/// Other bytes in a file of another inode: a mapped one must not change.
fn replace(file: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let new = file.with_extension("replacing");
    fs::write(&new, bytes)?;
    fs::rename(&new, file)?;
    Ok(())
}

fn flip(file: &Path, at: usize) -> anyhow::Result<()> {
    let mut bytes = fs::read(file)?;
    *bytes.get_mut(at).context("the file is shorter")? ^= 0x01;
    replace(file, &bytes)
}

/// All files of the index, of its runs and of RocksDB.
fn files_of_the_index(fixture: &Fixture) -> anyhow::Result<Vec<PathBuf>> {
    let mut files = list(&fixture.path("index/runs"))?;
    files.extend(
        list(&fixture.path("index"))?
            .into_iter()
            .filter(|file| file.is_file()),
    );
    Ok(files)
}

fn list(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let entries = fs::read_dir(dir)?.map(|entry| Ok(entry?.path()));
    let mut paths = entries.collect::<anyhow::Result<Vec<_>>>()?;
    paths.sort();
    Ok(paths)
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

/// The chunks of a pack, from its footer (docs/FORMAT.md). Also the footer's
/// offset.
fn chunks(pack: &[u8]) -> anyhow::Result<(Vec<Chunk>, usize)> {
    let seal = &pack[pack.len() - SEAL..];
    let footer = usize::try_from(u64::from_le_bytes(seal[32..40].try_into()?))?;
    let mut chunks: Vec<Chunk> = Vec::new();
    let blocks = pack[footer..pack.len() - SEAL].chunks(128 * 24 + TRAILER);
    let entries = blocks.flat_map(|block| block[..block.len() - TRAILER].chunks_exact(24));
    for entry in entries {
        let start = u32::from_le_bytes(entry[16..20].try_into()?) as usize;
        if let Some(before) = chunks.last_mut() {
            before.end = start;
        }
        chunks.push(Chunk {
            kind: entry[20] & 0xf,
            encoding: entry[20] >> 4,
            start,
            end: footer - SEAL,
        });
    }
    Ok((chunks, footer))
}
