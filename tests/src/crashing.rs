//! What tests of crashes and of concurrency share: images, what a store should
//! hold, and checking that it does.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail, ensure};
use rustix::mount::{MountFlags, UnmountFlags};
use snapstore_store::{
    CommitRequest, Damage, GcOptions, ImageRole, Input, InputData, InputKind, PageSize,
    ParentChoice, Silent, Store,
};
use tempfile::TempDir;

use crate::harness::{Cli, noise};

/// The length of a page of these images.
pub const PAGE: usize = 4096;
/// The variable that tells [`child_check`] what to check.
const CHECK: &str = "SNAPSTORE_TEST_CHECK";

/// Tags, and for each the images of its snapshot and the files they must equal.
pub type Expected = BTreeMap<String, BTreeMap<String, PathBuf>>;

/// Tags, and for each the images of its snapshot and their bytes.
type Found = BTreeMap<String, BTreeMap<String, Vec<u8>>>;

/// An image with zero pages, pages that occur more than once, and pages that
/// only this seed has.
#[must_use]
pub fn image(seed: u64, pages: usize) -> Vec<u8> {
    let mut bytes = vec![0; pages * PAGE];
    for (number, page) in bytes.chunks_mut(PAGE).enumerate() {
        let unique = seed * 1_000_000 + number as u64;
        let content = match number % 8 {
            0 => continue,
            1 => noise(7, PAGE / 2),
            _ => noise(unique, PAGE / 2),
        };
        page[..content.len()].copy_from_slice(&content);
    }
    bytes
}

/// Changes a few bytes of every `step`-th page, so that deltas are worthwhile.
#[must_use]
pub fn changed(image: &[u8], seed: u64, step: usize) -> Vec<u8> {
    let mut bytes = image.to_vec();
    for (number, page) in bytes.chunks_mut(PAGE).enumerate().step_by(step) {
        page[100..132].copy_from_slice(&noise(seed * 1_000_000 + number as u64, 32));
    }
    bytes
}

/// The tag's snapshot has just this memory.
pub fn expect(expected: &mut Expected, tag: &str, memory: &Path) {
    let images = BTreeMap::from([("memory".to_owned(), memory.to_owned())]);
    expected.insert(tag.to_owned(), images);
}

/// What a store that an operation was interrupted in may hold.
#[derive(Clone, Debug, Default)]
pub struct Check {
    /// What it held before.
    pub before: Expected,
    /// What it holds if the operation came to its end.
    pub after: Expected,
    /// Whether it did; else each tag may have either state.
    pub done: bool,
    /// Whether there may be no store yet.
    pub may_be_missing: bool,
    /// Whether its index may be missing, for a repair to make anew.
    pub may_need_repair: bool,
}

fn load(expected: &Expected) -> anyhow::Result<Found> {
    let mut loaded = Found::new();
    for (tag, images) in expected {
        for (name, path) in images {
            let bytes = fs::read(path).with_context(|| path.display().to_string())?;
            let images = loaded.entry(tag.clone()).or_default();
            images.insert(name.clone(), bytes);
        }
    }
    Ok(loaded)
}

impl Check {
    /// For a store at rest.
    #[must_use]
    pub fn holds(expected: &Expected) -> Self {
        Self {
            before: expected.clone(),
            after: expected.clone(),
            done: true,
            ..Self::default()
        }
    }

    /// Runs this check in a process of its own. A store on a power-cut disk that
    /// this process has mounted must not be read here: its packs are mapped, and
    /// a page fault would wait for a thread of this process.
    ///
    /// # Errors
    /// What the check found.
    pub fn run_in_child(&self, store: &Path) -> anyhow::Result<()> {
        let flags = [self.done, self.may_be_missing, self.may_need_repair];
        let job = serde_json::to_string(&(store, &self.before, &self.after, flags))?;
        let output = Command::new(std::env::current_exe()?)
            .args(["--exact", "child_check", "--nocapture"])
            .env(CHECK, job)
            .output()?;
        let said = String::from_utf8_lossy(&output.stdout);
        let checked = output.status.success() && said.contains("1 passed");
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(checked, "{said}{errors}");
        Ok(())
    }

    /// Checks the store: everything reads back, verification finds nothing, it
    /// can be committed to and collected, and in the end it can be emptied.
    ///
    /// # Errors
    /// What is not as it should be.
    pub fn run(&self, store: &Path) -> anyhow::Result<()> {
        if self.may_be_missing && !store.join("config").exists() {
            Store::create(store, PageSize::default()).context("creating it again")?;
        }
        if self.may_need_repair {
            repair_if_needed(store)?;
        }
        assert_clean(store).context("at first")?;
        let found = read_everything(store)?;
        self.check_tags(&found)?;

        let probe = image(99, 40);
        let file = tempfile::NamedTempFile::new()?;
        fs::write(file.path(), &probe)?;
        commit(store, "probe", file.path())?;
        let mut with_probe = found;
        let images = BTreeMap::from([("memory".to_owned(), probe)]);
        with_probe.insert("probe".to_owned(), images);
        ensure!(read_everything(store)? == with_probe, "after a new commit");
        Store::open(store)?.gc(GcOptions::default(), &Silent)?;
        assert_clean(store).context("after a collection")?;
        ensure!(
            read_everything(store)? == with_probe,
            "after a new commit and a collection"
        );
        assert_nothing_unfinished(store)?;

        let tags: Vec<_> = with_probe.into_keys().collect();
        let opened = Store::open(store)?;
        opened.remove_tags(&tags)?;
        opened.gc(GcOptions::default(), &Silent)?;
        let left = fs::read_dir(store.join("packs"))?.count();
        ensure!(left == 0, "{left} packs are left of an empty store");
        assert_clean(store).context("when empty")
    }

    fn check_tags(&self, found: &Found) -> anyhow::Result<()> {
        let (before, after) = (load(&self.before)?, load(&self.after)?);
        for tag in before.keys().chain(after.keys()).chain(found.keys()) {
            let is = found.get(tag);
            let fits = is == after.get(tag) || !self.done && is == before.get(tag);
            ensure!(
                fits,
                "tag {tag} is {} and not what it should be",
                if is.is_some() { "there" } else { "missing" }
            );
        }
        Ok(())
    }
}

/// What a test named `child_check` does: nothing, or what
/// [`Check::run_in_child`] asked for.
///
/// # Errors
/// What the check found.
pub fn child_check() -> anyhow::Result<()> {
    let Ok(job) = std::env::var(CHECK) else {
        return Ok(());
    };
    let (store, before, after, [done, may_be_missing, may_need_repair]): (PathBuf, _, _, _) =
        serde_json::from_str(&job)?;
    let check = Check {
        before,
        after,
        done,
        may_be_missing,
        may_need_repair,
    };
    check.run(&store)
}

/// Commits a memory image in this process, without a parent.
///
/// # Errors
/// Those of the commit.
pub fn commit(store: &Path, tag: &str, memory: &Path) -> anyhow::Result<()> {
    let request = CommitRequest {
        tag: tag.to_owned(),
        parent: ParentChoice::Nothing,
        inputs: vec![Input {
            name: "memory".to_owned(),
            role: ImageRole::Memory,
            data: InputData::File(memory.to_owned()),
            kind: InputKind::Full,
        }],
        ..CommitRequest::default()
    };
    Store::open(store)?
        .commit(&request, &Silent)
        .with_context(|| format!("committing {tag}"))?;
    Ok(())
}

/// Every byte of the store is as it should be.
///
/// # Errors
/// What verification found.
pub fn assert_clean(store: &Path) -> anyhow::Result<()> {
    let report = Store::open(store)?.verify(true, &Silent)?;
    ensure!(report.findings.is_empty(), "{:?}", report.findings);
    Ok(())
}

/// No unsealed packs and no leases: only right while nobody uses the store.
///
/// # Errors
/// What is left.
pub fn assert_nothing_unfinished(store: &Path) -> anyhow::Result<()> {
    for dir in ["packs", "leases"] {
        for entry in fs::read_dir(store.join(dir))? {
            let path = entry?.path();
            let sealed = path.extension().is_some_and(|it| it == "pack");
            ensure!(sealed, "{} is left", path.display());
        }
    }
    Ok(())
}

/// The store has just these tags, and they read back byte by byte.
///
/// # Errors
/// What differs.
pub fn assert_holds(cli: &Cli, expected: &Expected) -> anyhow::Result<()> {
    assert_clean(cli.store())?;
    Check::holds(expected).check_tags(&read_everything(cli.store())?)
}

fn read_everything(store: &Path) -> anyhow::Result<Found> {
    let store = Store::open(store)?;
    let mut found = Found::new();
    for snapshot in store.snapshots()? {
        let mut images = BTreeMap::new();
        for image in &snapshot.manifest.images {
            let reader = store.image_reader(image);
            let mut bytes = vec![0; usize::try_from(reader.size_bytes())?];
            let len = reader
                .read_at(&mut bytes, 0)
                .with_context(|| format!("reading {} of {}", image.name, snapshot.tag))?;
            ensure!(len == bytes.len(), "a short read");
            images.insert(image.name.clone(), bytes);
        }
        found.insert(snapshot.tag, images);
    }
    Ok(found)
}

/// A missing index is damage of the index, and `repair` makes it anew.
fn repair_if_needed(store: &Path) -> anyhow::Result<()> {
    let report = Store::open(store)?.verify(false, &Silent)?;
    if report.findings.is_empty() {
        return Ok(());
    }
    for finding in &report.findings {
        let Damage::Index { .. } = finding.damage else {
            bail!("{}", finding.damage);
        };
    }
    let report = Store::repair(store, &Silent)?;
    ensure!(report.remaining.is_empty() && report.broken_snapshots.is_empty());
    Ok(())
}

/// A small filesystem of its own that can be filled.
pub struct SmallDisk(TempDir);

impl SmallDisk {
    /// Mounts one; needs root.
    ///
    /// # Errors
    /// If that does not work here.
    pub fn mount(size_bytes: u64) -> anyhow::Result<Self> {
        let dir = TempDir::new()?;
        let options = CString::new(format!("size={size_bytes}"))?;
        let flags = MountFlags::NODEV | MountFlags::NOSUID;
        rustix::mount::mount("none", dir.path(), "tmpfs", flags, Some(options.as_c_str()))?;
        Ok(Self(dir))
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Takes up all space but this much, with a file named `ballast`.
    ///
    /// # Errors
    /// I/O errors.
    pub fn leave_free(&self, bytes: u64) -> anyhow::Result<()> {
        let ballast = self.0.path().join("ballast");
        let _ = fs::remove_file(&ballast);
        let stat = rustix::fs::statvfs(self.0.path())?;
        let len = (stat.f_bavail * stat.f_frsize).saturating_sub(bytes);
        fs::write(&ballast, vec![1; usize::try_from(len)?])?;
        Ok(())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.0.path(), UnmountFlags::DETACH);
    }
}

/// Copies a directory, durably.
///
/// # Errors
/// If it cannot be read or written.
pub fn copy_tree(from: &Path, to: &Path) -> anyhow::Result<()> {
    fs::create_dir(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_tree(&entry.path(), &target)?;
        } else {
            fs::write(&target, fs::read(entry.path())?)?;
            File::open(&target)?.sync_all()?;
        }
    }
    Ok(File::open(to)?.sync_all()?)
}
