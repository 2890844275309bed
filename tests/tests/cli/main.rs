//! The program as its users see it: answers, exit codes, and what it leaves.

mod answers;
mod chains;
mod completions;
mod creating;
mod exhausted;
mod findings;
mod foreign_pack_files;
mod forms;
mod inputs;
mod killed_pulls;
mod log_format;
mod lost_places;
mod metrics;
mod odd_places;
mod overlay;
mod paging;
mod pictures;
mod remote_formats;
mod remote_places;
mod remote_repack;
mod remote_verify;
mod remotes;
mod retention;
mod stopped;
mod streams;
mod transfer;
mod unreadable;
mod wrong_usage;

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use anyhow::Context as _;
use snapstore_store::Store;
use snapstore_tests::harness::Cli;
use tempfile::TempDir;

const PAGE: usize = 4096;

/// A store of a test's own and a place for its inputs.
struct Fixture {
    dir: TempDir,
    cli: Cli,
}

impl Fixture {
    /// With an empty store.
    fn new() -> anyhow::Result<Self> {
        let fixture = Self::without_store()?;
        fixture.cli.ok(&["init"])?;
        Ok(fixture)
    }

    fn without_store() -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        // Whoever runs the tests may have machines, and `stop --all` is tested.
        let runtime = dir.path().join("run").display().to_string();
        let cli = Cli::new(&dir.path().join("store")).with_env("SNAPSTORE_RUNTIME_DIR", &runtime);
        Ok(Self { dir, cli })
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    /// Writes an input file; returns its path.
    fn file(&self, name: &str, bytes: &[u8]) -> anyhow::Result<String> {
        let path = self.path(name);
        fs::write(&path, bytes)?;
        Ok(path)
    }

    /// Writes a file of this length with these pages, the rest holes.
    fn sparse(&self, name: &str, len: u64, pages: &[(u64, &[u8])]) -> anyhow::Result<String> {
        let path = self.path(name);
        let file = File::create(&path)?;
        file.set_len(len)?;
        for (page, bytes) in pages {
            file.write_all_at(bytes, page * PAGE as u64)?;
        }
        Ok(path)
    }

    /// Commits bytes as the memory of a snapshot.
    fn commit(&self, tag: &str, bytes: &[u8], more: &[&str]) -> anyhow::Result<serde_json::Value> {
        let path = self.file("memory", bytes)?;
        let arguments = [&["commit", tag, "--memory", &path], more].concat();
        self.cli.json(&arguments)
    }

    /// The memory of a snapshot.
    fn memory(&self, tag: &str) -> anyhow::Result<Vec<u8>> {
        let store = Store::open(self.cli.store())?;
        let manifest = store.manifest(store.resolve(tag)?)?;
        let image = manifest.image("memory").context("no memory")?;
        let mut bytes = vec![0; usize::try_from(image.size_bytes)?];
        store.image_reader(image).read_at(&mut bytes, 0)?;
        Ok(bytes)
    }

    fn packs(&self) -> anyhow::Result<Vec<PathBuf>> {
        list(&self.cli.store().join("packs"))
    }

    /// Everything that a command that was refused must leave as it was.
    fn state(&self) -> anyhow::Result<(Vec<PathBuf>, Vec<PathBuf>, String)> {
        let tags = self.cli.ok(&["tags", "--json"])?;
        Ok((self.packs()?, list(&self.cli.store().join("tags"))?, tags))
    }

    /// The command ends with this code, says this, and leaves no trace.
    fn refused(&self, code: i32, says: &str, arguments: &[&str]) -> anyhow::Result<()> {
        let before = self.state()?;
        let error = self.cli.fails(code, arguments)?;
        anyhow::ensure!(error.contains(says), "{arguments:?} says: {error}");
        anyhow::ensure!(!error.contains("panicked"), "{arguments:?} says: {error}");
        anyhow::ensure!(self.state()? == before, "{arguments:?} left a trace");
        Ok(())
    }
}

fn list(dir: &std::path::Path) -> anyhow::Result<Vec<PathBuf>> {
    let entries = fs::read_dir(dir)?.map(|entry| Ok(entry?.path()));
    let mut paths = entries.collect::<anyhow::Result<Vec<_>>>()?;
    paths.sort();
    Ok(paths)
}
