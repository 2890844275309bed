//! What only a newer version knows: it is named, it is no damage, and nothing moves,
//! rewrites or deletes it, nor anything beside it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use snapstore_tests::harness::{Cli, noise};
use tempfile::TempDir;

const PAGE: usize = 4096;
/// Lengths of parts of a pack: docs/FORMAT.md.
const SEAL: usize = 96;
const TRAILER: usize = 20;
/// Where the sets of feature bits are in the payload of `config`.
const COMPATIBLE: usize = 8;
const READ_ONLY: usize = 16;
const INCOMPATIBLE: usize = 24;

/// A store with a chain of two snapshots and garbage to collect.
struct Fixture {
    dir: TempDir,
    cli: Cli,
}

impl Fixture {
    fn new() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let cli = Cli::new(&dir.path().join("store"));
        cli.ok(&["init"])?;
        let fixture = Self { dir, cli };
        let image = noise(1, 200 * PAGE);
        fixture.commit("base", &image, &[])?;
        let mut next = image;
        next[5] ^= 1;
        fixture.commit("next", &next, &["--parent", "base"])?;
        fixture.commit("gone", &noise(9, 50 * PAGE), &["--no-parent"])?;
        fixture.cli.ok(&["rm", "gone"])?;
        Ok(fixture)
    }

    fn image(&self, bytes: &[u8]) -> Result<String> {
        let path = self.dir.path().join("image");
        fs::write(&path, bytes)?;
        Ok(path.display().to_string())
    }

    fn commit(&self, tag: &str, bytes: &[u8], more: &[&str]) -> Result<()> {
        let path = self.image(bytes)?;
        let arguments = [&["commit", tag, "--memory", &path], more].concat();
        self.cli.ok(&arguments).map(drop)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.cli.store().join(name)
    }

    /// Sets a bit of a set of features.
    fn set_feature(&self, set: usize, bit: usize) -> Result<()> {
        for name in ["config", "config-copy"] {
            let path = self.path(name);
            let mut bytes = fs::read(&path)?;
            bytes.truncate(bytes.len() - 32);
            bytes[16 + set + bit / 8] |= 1 << (bit % 8);
            let sealed = [name.as_bytes(), &[0], &bytes].concat();
            bytes.extend_from_slice(blake3::hash(&sealed).as_bytes());
            fs::write(&path, bytes)?;
        }
        Ok(())
    }

    /// All files that are the store.
    fn files(&self) -> Result<BTreeMap<PathBuf, Vec<u8>>> {
        let mut files = BTreeMap::new();
        for dir in ["", "packs", "tags", "index", "damaged"] {
            let Ok(entries) = fs::read_dir(self.path(dir)) else {
                continue;
            };
            for entry in entries {
                let path = entry?.path();
                if path.is_file() {
                    files.insert(path.clone(), fs::read(&path)?);
                }
            }
        }
        Ok(files)
    }

    /// Each of these commands ends with exit code 1, says `what`, and changes nothing.
    fn refuses(&self, what: &str, commands: &[&[&str]]) -> Result<()> {
        let before = self.files()?;
        for arguments in commands {
            let error = self.cli.fails(1, arguments)?;
            ensure!(error.contains(what), "{arguments:?}: {error}");
            ensure!(error.contains("newer snapstore"), "{arguments:?}: {error}");
            ensure!(self.files()? == before, "{arguments:?} has changed a file");
        }
        Ok(())
    }

    /// Changes the entry of a page in the footer of the first pack, as a newer version
    /// would have written it.
    fn rewrite_an_entry(&self, change: impl Fn(u8) -> u8) -> Result<()> {
        let path = self.path("packs/00000001.pack");
        let mut bytes = fs::read(&path)?;
        let seal = bytes.len() - SEAL;
        let footer = usize::try_from(u64::from_le_bytes(bytes[seal + 32..seal + 40].try_into()?))?;
        // Of the second block: the first one has more to do with the first pages.
        let block = footer + 128 * 24 + TRAILER;
        let at = block + 20;
        bytes[at] = change(bytes[at]);
        let entries = u32::from_le_bytes(bytes[seal + 40..seal + 44].try_into()?) - 128;
        let end = block + 24 * usize::try_from(entries)? + 4;
        let identity = &bytes[seal + 8..seal + 24];
        let checked = [identity, &1_u32.to_le_bytes(), &bytes[block..end]].concat();
        let hash = blake3::hash(&checked);
        bytes[end..end + 16].copy_from_slice(&hash.as_bytes()[..16]);
        replace(&path, &bytes)
    }
}

fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::remove_file(path)?;
    fs::write(path, bytes).with_context(|| path.display().to_string())
}

#[test]
fn an_incompatible_feature_stops_everything() -> Result<()> {
    let fixture = Fixture::new()?;
    let image = fixture.image(&noise(3, PAGE))?;
    let mountpoint = fixture.dir.path().join("mnt");
    fs::create_dir(&mountpoint)?;
    let mountpoint = mountpoint.display().to_string();
    fixture.set_feature(INCOMPATIBLE, 42)?;
    fixture.refuses(
        "config has incompatible feature bit 42",
        &[
            &["tags"],
            &["log"],
            &["show", "base"],
            &["diff", "base", "next"],
            &["stats"],
            &["verify"],
            &["mount", "base", &mountpoint],
            &["commit", "x", "--memory", &image],
            &["tag", "base", "x"],
            &["rm", "base"],
            &["gc"],
            &["gc", "--dry-run"],
            &["repair"],
            &["upgrade"],
        ],
    )
}

#[test]
fn a_read_only_compatible_feature_allows_reading() -> Result<()> {
    let fixture = Fixture::new()?;
    let image = fixture.image(&noise(3, PAGE))?;
    fixture.set_feature(READ_ONLY, 3)?;
    let before = fixture.files()?;
    for arguments in [
        &["tags"][..],
        &["log"],
        &["show", "base"],
        &["diff", "base", "next"],
        &["stats"],
        &["verify", "--read-data"],
        &["gc", "--dry-run"],
    ] {
        fixture.cli.ok(arguments)?;
        ensure!(
            fixture.files()? == before,
            "{arguments:?} has changed a file"
        );
    }
    fixture.refuses(
        "read-only compatible feature bit 3",
        &[
            &["commit", "x", "--memory", &image],
            &["tag", "base", "x"],
            &["rm", "base"],
            &["gc"],
            &["repair"],
            &["upgrade"],
        ],
    )
}

#[test]
fn a_compatible_feature_is_ignored_and_kept() -> Result<()> {
    let fixture = Fixture::new()?;
    fixture.set_feature(COMPATIBLE, 63)?;
    let config = fs::read(fixture.path("config"))?;
    fixture.commit("x", &noise(3, 9 * PAGE), &[])?;
    fixture.cli.ok(&["gc"])?;
    fixture.cli.ok(&["verify", "--read-data"])?;
    fs::remove_file(fixture.path("config-copy"))?;
    fixture.cli.ok(&["repair"])?;
    ensure!(fs::read(fixture.path("config"))? == config);
    fixture.cli.ok(&["verify", "--read-data"]).map(drop)
}

#[test]
fn a_pack_of_another_version() -> Result<()> {
    let fixture = Fixture::new()?;
    let path = fixture.path("packs/00000001.pack");
    let mut bytes = fs::read(&path)?;
    bytes[8..12].copy_from_slice(&3_u32.to_le_bytes());
    let hash = blake3::hash(&bytes[..24]);
    bytes[24..32].copy_from_slice(&hash.as_bytes()[..8]);
    replace(&path, &bytes)?;
    fixture.refuses("format version 3", &[&["repair"], &["gc"]])?;
    let verified = fixture.cli.run(&["verify", "--read-data"])?;
    let text = String::from_utf8(verified.stdout)?;
    ensure!(verified.status.code() == Some(1), "{text}");
    ensure!(text.contains("NOT CHECKED"), "{text}");
    ensure!(!text.contains("DAMAGED"), "{text}");
    // What does not need it goes on.
    fixture.commit("x", &noise(3, 9 * PAGE), &["--no-parent"])
}

fn is_named_and_kept(fixture: &Fixture, what: &str) -> Result<()> {
    fixture.refuses(what, &[&["repair"]])?;
    let before = fs::read(fixture.path("packs/00000001.pack"))?;
    for arguments in [
        &["gc", "--keep-percent", "100"][..],
        &["verify", "--read-data"],
    ] {
        let ended = fixture.cli.run(arguments)?;
        let text = String::from_utf8([ended.stdout, ended.stderr].concat())?;
        ensure!(!text.contains("DAMAGED"), "{arguments:?}: {text}");
        let now = fs::read(fixture.path("packs/00000001.pack"))?;
        ensure!(now == before, "{arguments:?}: {text}");
    }
    Ok(())
}

#[test]
fn a_chunk_in_another_encoding() -> Result<()> {
    let fixture = Fixture::new()?;
    fixture.rewrite_an_entry(|byte| byte & 0xf | 0x90)?;
    let verified = fixture.cli.run(&["verify", "--read-data"])?;
    let text = String::from_utf8(verified.stdout)?;
    ensure!(verified.status.code() == Some(1), "{text}");
    ensure!(text.contains("with encoding 9, made by a newer"), "{text}");
    is_named_and_kept(&fixture, "with encoding 9")
}

#[test]
fn a_chunk_of_another_kind() -> Result<()> {
    let fixture = Fixture::new()?;
    // Of a snapshot that nobody has any more.
    fixture.cli.ok(&["rm", "base", "next"])?;
    fixture.rewrite_an_entry(|byte| byte & 0xf0 | 7)?;
    is_named_and_kept(&fixture, "kind 7")
}
