//! A store in the lower layer of an overlayfs, as in a container's image: its directories
//! cannot be renamed or exchanged there (EXDEV), its files are copied when they are
//! written.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::ensure;
use snapstore_store::{PageSize, Store, StoreFormat};
use snapstore_tests::harness::{Cli, noise, skipped};
use tempfile::TempDir;

use crate::PAGE;

/// All together are more than an index keeps in runs.
const PARTS: u64 = 6;
const PAGES_OF_A_PART: usize = 3500;

struct Overlay {
    dir: TempDir,
}

impl Overlay {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// With what is in the directory `lower` as its lower layer; `None` where there is no
    /// overlayfs.
    fn mount(dir: TempDir, test: &str) -> anyhow::Result<Option<Self>> {
        let overlay = Self { dir };
        for name in ["upper", "work", "merged"] {
            fs::create_dir(overlay.path(name))?;
        }
        let path = |name: &str| overlay.path(name).display().to_string();
        let options = format!(
            "lowerdir={},upperdir={},workdir={},redirect_dir=off",
            path("lower"),
            path("upper"),
            path("work")
        );
        let mounted = Command::new("mount")
            .args(["-t", "overlay", "overlay", "-o", &options])
            .arg(overlay.path("merged"))
            .output()?;
        if !mounted.status.success() {
            let why = String::from_utf8_lossy(&mounted.stderr);
            skipped(test, &format!("no overlayfs: {}", why.trim()));
            return Ok(None);
        }
        Ok(Some(overlay))
    }

    fn cli(&self) -> Cli {
        Cli::new(&self.path("merged/store"))
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        let merged = self.path("merged");
        let _ = Command::new("umount").arg("-l").arg(merged).output();
    }
}

fn commit(cli: &Cli, dir: &Path, tag: &str, bytes: &[u8]) -> anyhow::Result<()> {
    let image = dir.join("image");
    fs::write(&image, bytes)?;
    let image = image.display().to_string();
    cli.ok(&["commit", tag, "--memory", &image, "--no-parent"])?;
    Ok(())
}

fn holds(cli: &Cli, tag: &str, bytes: &[u8]) -> anyhow::Result<()> {
    let store = Store::open(cli.store())?;
    let manifest = store.manifest(store.resolve(tag)?)?;
    let image = manifest.image("memory").expect("it has memory");
    ensure!(store.read_file_image(image, 1 << 30)? == bytes, "{tag}");
    Ok(())
}

/// A store whose files are all in the lower layer, with `one`, `two` and what is left of
/// `gone`.
fn store_below(format: StoreFormat, test: &str) -> anyhow::Result<Option<Overlay>> {
    let dir = tempfile::tempdir()?;
    let lower = dir.path().join("lower/store");
    fs::create_dir(dir.path().join("lower"))?;
    Store::create_in_format(&lower, PageSize::KIB_4, format)?;
    let cli = Cli::new(&lower);
    for (tag, seed) in [("gone", 1), ("one", 2), ("two", 3)] {
        commit(&cli, dir.path(), tag, &noise(seed, 64 * PAGE))?;
    }
    cli.ok(&["rm", "gone"])?;
    Overlay::mount(dir, test)
}

fn others_are_whole(cli: &Cli) -> anyhow::Result<()> {
    holds(cli, "one", &noise(2, 64 * PAGE))?;
    holds(cli, "two", &noise(3, 64 * PAGE))
}

#[test]
fn everything_works_where_all_is_in_the_lower_layer() -> anyhow::Result<()> {
    const TEST: &str = "everything_works_where_all_is_in_the_lower_layer";
    // Each command finds all as it was: a layer of its own.
    for commands in [
        &["verify --read-data"][..],
        &["gc", "gc"],
        &["repair"],
        &["commit", "gc", "repair"],
        &["rm two", "gc", "stats"],
        &["upgrade"],
    ] {
        for format in [StoreFormat::One, StoreFormat::Two] {
            let Some(overlay) = store_below(format, TEST)? else {
                return Ok(());
            };
            let cli = overlay.cli();
            for command in commands {
                if *command == "commit" {
                    commit(&cli, overlay.dir.path(), "new", &noise(4, 64 * PAGE))?;
                    continue;
                }
                cli.ok(&command.split(' ').collect::<Vec<_>>())?;
            }
            cli.ok(&["verify", "--read-data"])?;
            holds(&cli, "one", &noise(2, 64 * PAGE))?;
        }
    }
    Ok(())
}

#[test]
fn runs_of_the_lower_layer_become_a_sorted_file() -> anyhow::Result<()> {
    const TEST: &str = "runs_of_the_lower_layer_become_a_sorted_file";
    let Some(overlay) = store_below(StoreFormat::Two, TEST)? else {
        return Ok(());
    };
    let cli = overlay.cli();
    // Each few enough for a run.
    for part in 0..PARTS {
        let bytes = noise(10 + part, PAGES_OF_A_PART * PAGE);
        commit(&cli, overlay.dir.path(), &format!("part{part}"), &bytes)?;
    }
    let runs = fs::read_dir(overlay.path("merged/store/index/runs"))?;
    let lengths = runs.map(|run| Ok(run?.metadata()?.len()));
    let left: u64 = lengths.sum::<std::io::Result<u64>>()?;
    // 25 bytes an entry; what came after them is.
    ensure!(left < 150_000, "{left} bytes are still in runs");
    cli.ok(&["verify"])?;
    others_are_whole(&cli)?;
    for part in 0..PARTS {
        let bytes = noise(10 + part, PAGES_OF_A_PART * PAGE);
        holds(&cli, &format!("part{part}"), &bytes)?;
    }
    cli.ok(&["rm", "part0", "part1"])?;
    cli.ok(&["gc"])?;
    others_are_whole(&cli)
}

#[test]
fn damage_in_the_lower_layer_is_repaired() -> anyhow::Result<()> {
    const TEST: &str = "damage_in_the_lower_layer_is_repaired";
    for lost in ["index", "pack"] {
        let Some(overlay) = store_below(StoreFormat::Two, TEST)? else {
            return Ok(());
        };
        let cli = overlay.cli();
        let below = overlay.path("lower/store");
        // As an image that was built so.
        if lost == "index" {
            fs::write(below.join("index/CURRENT"), "spoilt")?;
        } else {
            let pack = below.join("packs/00000001.pack");
            let mut bytes = fs::read(&pack)?;
            bytes[5000] ^= 1;
            fs::write(&pack, bytes)?;
        }
        cli.ok(&["repair"])?;
        cli.ok(&["verify", "--read-data"])?;
        others_are_whole(&cli)?;
        let aside = overlay.path("merged/store/damaged/00000001.pack");
        ensure!(aside.exists() == (lost == "pack"));
    }
    Ok(())
}
