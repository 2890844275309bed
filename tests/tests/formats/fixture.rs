//! Copies of stores that old programs left, and what they hold.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context as _, ensure};
use snapstore_store::{SnapshotId, Store};
use snapstore_tests::harness::{Cli, noise, skipped};
use tempfile::TempDir;

/// A copy of a store that an old program left.
pub struct Fixture {
    pub dir: TempDir,
    pub cli: Cli,
    pub images: Vec<Expected>,
}

/// What an image of a snapshot holds.
pub struct Expected {
    pub tag: String,
    pub image: String,
    pub size_bytes: u64,
    pub blake3: String,
}

impl Fixture {
    /// The store of a path such as `FORMAT/NAME`.
    pub fn unpack(path: &str) -> anyhow::Result<Self> {
        let (format, name) = path.split_once('/').context("a format and a name")?;
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
        let fixtures = fixtures.join(format);
        let dir = tempfile::tempdir()?;
        let status = Command::new("tar")
            .arg("-xf")
            .arg(fixtures.join(name).with_extension("tar"))
            .arg("-C")
            .arg(dir.path())
            .status()
            .context("tar(1)")?;
        ensure!(status.success(), "tar ended with {status}");
        let images = fs::read_to_string(fixtures.join("hashes.txt"))?
            .lines()
            .filter_map(|line| Expected::parse(line.strip_prefix(name)?.strip_prefix(' ')?))
            .collect();
        let cli = Cli::new(&dir.path().join("store"));
        Ok(Self { dir, cli, images })
    }

    /// The images of these tags are as they were committed.
    pub fn holds(&self, wanted: impl Fn(&str) -> bool) -> anyhow::Result<()> {
        let store = Store::open(self.cli.store())?;
        for expected in self.images.iter().filter(|it| wanted(&it.tag)) {
            expected
                .is_in(&store)
                .with_context(|| format!("{} of {}", expected.image, expected.tag))?;
        }
        Ok(())
    }

    pub fn holds_all(&self) -> anyhow::Result<()> {
        ensure!(!self.images.is_empty(), "hashes.txt has no line of it");
        self.holds(|_| true)
    }

    /// Commits something new, and something that is there already under a new name.
    pub fn can_be_committed_to(&self) -> anyhow::Result<()> {
        let path = self.dir.path().join("new");
        let bytes = noise(5, 8 << 14);
        fs::write(&path, &bytes)?;
        let path = path.display().to_string();
        self.cli.ok(&["commit", "new", "--memory", &path])?;
        let store = Store::open(self.cli.store())?;
        let first = &self.images[0];
        let old = store.manifest(store.resolve(&first.tag)?)?;
        let image = old.image(&first.image).context("the image")?;
        let known = store.read_file_image(image, 1 << 30)?;
        let path = self.dir.path().join("known");
        fs::write(&path, known)?;
        let path = path.display().to_string();
        self.cli
            .ok(&["commit", "known", "--memory", &path, "--parent", &first.tag])?;
        let store = Store::open(self.cli.store())?;
        Expected {
            tag: "known".to_owned(),
            image: "memory".to_owned(),
            ..Expected::of("memory", &first.blake3, first.size_bytes)
        }
        .is_in(&store)?;
        let hash = blake3::hash(&bytes).to_hex();
        Expected {
            tag: "new".to_owned(),
            ..Expected::of("memory", &hash, bytes.len() as u64)
        }
        .is_in(&store)
    }

    pub fn has_no_runs(&self) -> anyhow::Result<()> {
        let runs = self.cli.store().join("index/runs");
        ensure!(
            !runs.exists() || list(&runs)?.is_empty(),
            "there are runs of the index"
        );
        Ok(())
    }

    /// Commits a small change of the first image of pages, so that its nodes could be
    /// deltas.
    pub fn changes_little(&self) -> anyhow::Result<()> {
        let store = Store::open(self.cli.store())?;
        let first = self.images.iter().find(|it| it.image == "memory");
        let first = first.context("a memory")?;
        let old = store.manifest(store.resolve(&first.tag)?)?;
        let image = old.image("memory").context("the image")?;
        let mut bytes = store.read_file_image(image, 1 << 30)?;
        for page in bytes.chunks_mut(1 << 14).step_by(5) {
            page[7] ^= 1;
        }
        let path = self.dir.path().join("little");
        fs::write(&path, bytes)?;
        let path = path.display().to_string();
        let arguments = [
            "commit", "little", "--memory", &path, "--parent", &first.tag,
        ];
        self.cli.ok(&arguments).map(drop)
    }

    /// The ids of all tags.
    pub fn ids(&self) -> anyhow::Result<BTreeMap<String, SnapshotId>> {
        Ok(Store::open(self.cli.store())?.tags()?)
    }

    /// `SNAPSTORE_V1_PROGRAM` is the first program, if it is there.
    pub fn first_program(&self, what: &str, arguments: &[&str]) -> Option<Output> {
        let Some(program) = std::env::var_os("SNAPSTORE_V1_PROGRAM") else {
            skipped(what, "SNAPSTORE_V1_PROGRAM is not set");
            return None;
        };
        let mut command = Command::new(program);
        command.arg("--store").arg(self.cli.store()).args(arguments);
        command.output().ok()
    }

    pub fn is_read_by_the_first_program(&self, name: &str) -> anyhow::Result<()> {
        // It does not know encoding 3.
        if name.starts_with("store-v1/")
            && name != "store-v1/dead-delta"
            && let Some(output) =
                self.first_program("they_stay_what_they_are", &["verify", "--read-data"])
        {
            ensure!(output.status.success(), "{name}: {output:?}");
        }
        Ok(())
    }

    pub fn is_refused_by_the_first_program(&self, name: &str) -> anyhow::Result<()> {
        for arguments in [&["tags"][..], &["verify"], &["repair"], &["gc"]] {
            if let Some(output) = self.first_program("they_are_upgraded", arguments) {
                let error = String::from_utf8_lossy(&output.stderr).into_owned();
                ensure!(output.status.code() == Some(1), "{name}: {output:?}");
                ensure!(error.contains("newer snapstore"), "{name}: {error}");
            }
        }
        self.holds_all()
    }

    pub fn is_undamaged(&self) -> anyhow::Result<()> {
        let found = self.cli.ok(&["verify", "--read-data"])?;
        ensure!(found.contains("Nothing is damaged"), "{found}");
        Ok(())
    }
}

impl Expected {
    pub fn parse(line: &str) -> Option<Self> {
        let mut words = line.split(' ');
        Some(Self {
            tag: words.next()?.to_owned(),
            image: words.next()?.to_owned(),
            size_bytes: words.next()?.parse().ok()?,
            blake3: words.next()?.to_owned(),
        })
    }

    pub fn of(image: &str, blake3: &str, size_bytes: u64) -> Self {
        Self {
            tag: String::new(),
            image: image.to_owned(),
            size_bytes,
            blake3: blake3.to_owned(),
        }
    }

    pub fn is_in(&self, store: &Store) -> anyhow::Result<()> {
        let manifest = store.manifest(store.resolve(&self.tag)?)?;
        let image = manifest.image(&self.image).context("no such image")?;
        ensure!(image.size_bytes == self.size_bytes, "{image:?}");
        let bytes = store.read_file_image(image, 1 << 30)?;
        let hash = blake3::hash(&bytes).to_hex();
        ensure!(*hash == *self.blake3, "it has other bytes: {hash}");
        Ok(())
    }
}

/// What is in a directory.
pub fn list(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect()
}
