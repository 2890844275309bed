//! A store on a filesystem of its own, in a file behind a loop device: on a full
//! disk, and on one of which a block cannot be read.
//!
//! Needs root, `mkfs.ext4` and loop devices; without them each test says SKIPPED.

#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use snapstore_tests::harness::{Cli, noise, skipped};

/// An ext4 filesystem in a file, unmounted when dropped.
struct Disk {
    dir: tempfile::TempDir,
}

impl Disk {
    /// `None`, told as skipped, where this machine offers none.
    fn new(test: &str, mebibytes: u64) -> Result<Option<Self>> {
        let dir = tempfile::tempdir()?;
        let disk = Self { dir };
        File::create(disk.device())?.set_len(mebibytes << 20)?;
        fs::create_dir(disk.path())?;
        let options = ["-q", "-b", "4096", "-O", "^has_journal", "-m", "0"];
        let made = run(Command::new("mkfs.ext4").args(options).arg(disk.device()));
        let mounted = made.and_then(|()| {
            let mut mount = Command::new("mount");
            mount
                .args(["-o", "loop"])
                .arg(disk.device())
                .arg(disk.path());
            run(&mut mount)
        });
        match mounted {
            Ok(()) => Ok(Some(disk)),
            Err(error) => {
                skipped(test, &format!("no filesystem in a file: {error:#}"));
                Ok(None)
            }
        }
    }

    fn device(&self) -> PathBuf {
        self.dir.path().join("device")
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    /// Writes until nothing fits any more.
    fn fill(&self) -> Result<()> {
        let mut file = File::create(self.path().join("fill"))?;
        let bytes = vec![7; 4096];
        while file.write_all(&bytes).is_ok() {}
        // What the last page left, too.
        let mut rest = File::create(self.path().join("rest"))?;
        while rest.write_all(&[7]).is_ok() {}
        Ok(())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.path()).output();
    }
}

fn run(command: &mut Command) -> Result<()> {
    let output = command
        .output()
        .with_context(|| format!("{:?}", command.get_program()))?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{}", said.trim());
    Ok(())
}

fn write_image(dir: &Path, name: &str, seed: u64, mebibytes: usize) -> Result<String> {
    let path = dir.join(name);
    fs::write(&path, noise(seed, mebibytes << 20))?;
    Ok(path.to_str().context("a path of a test")?.to_owned())
}

#[test]
fn a_full_disk_is_collected_and_can_be_written_again() -> Result<()> {
    const TEST: &str = "a_full_disk_is_collected_and_can_be_written_again";
    let Some(disk) = Disk::new(TEST, 64)? else {
        return Ok(());
    };
    let cli = Cli::new(&disk.path().join("store"));
    let images = tempfile::tempdir()?;
    cli.ok(&["init"])?;
    let mut files = Vec::new();
    for number in 0..3 {
        let name = format!("s{number}");
        let file = write_image(images.path(), &name, number, 10)?;
        cli.ok(&["commit", &name, "--memory", &file])?;
        files.push(file);
    }
    disk.fill()?;
    let new = write_image(images.path(), "new", 9, 4)?;
    let said = cli.fails(1, &["commit", "new", "--memory", &new])?;
    ensure!(said.contains("No space left"), "{said}");
    cli.ok(&["rm", "s1"])?;
    let report = cli.json(&["gc"])?;
    ensure!(report["deleted_packs"] == 1, "{report}");
    ensure!(report["freed_bytes"].as_i64() > Some(9 << 20), "{report}");
    cli.ok(&["verify", "--read-data"])?;
    cli.ok(&["commit", "new", "--memory", &new])?;
    for (tag, file) in [("s0", &files[0]), ("s2", &files[2]), ("new", &new)] {
        holds(&cli, tag, file)?;
    }
    Ok(())
}

#[test]
fn a_block_that_cannot_be_read_costs_its_chunks_only() -> Result<()> {
    const TEST: &str = "a_block_that_cannot_be_read_costs_its_chunks_only";
    let Some(disk) = Disk::new(TEST, 64)? else {
        return Ok(());
    };
    // The packs alone are on that disk: bound over those of the store.
    let dir = tempfile::tempdir()?;
    let cli = Cli::new(&dir.path().join("store"));
    cli.ok(&["init"])?;
    let bad = write_image(dir.path(), "bad", 1, 16)?;
    let good = write_image(dir.path(), "good", 2, 1)?;
    cli.ok(&["commit", "bad", "--memory", &bad])?;
    cli.ok(&["commit", "good", "--memory", &good])?;
    let packs = cli.store().join("packs");
    run(Command::new("cp")
        .arg("-a")
        .arg(packs.join("."))
        .arg(disk.path()))?;
    let bound = Bound::over(&packs, &disk.path())?;
    if !cut_off(&disk, "00000001.pack", 12 << 20)? {
        skipped(TEST, "the disk can still be read");
        return Ok(());
    }
    let verified = cli.run(&["verify", "--read-data"])?;
    let text = String::from_utf8_lossy(&verified.stdout).into_owned();
    ensure!(
        verified.status.code() == Some(4),
        "{}: {text}",
        verified.status
    );
    ensure!(
        text.contains("00000001.pack") && text.contains("cannot read"),
        "{text}"
    );
    ensure!(text.contains("needed by bad"), "{text}");
    ensure!(!text.contains("needed by good"), "{text}");
    holds(&cli, "good", &good)?;
    // What is in front of the block is read as before.
    let whole = fs::read(&bad)?;
    let store = snapstore_store::Store::open(cli.store())?;
    let manifest = store.manifest(store.resolve("bad")?)?;
    let reader = store.image_reader(manifest.image("memory").context("no memory")?);
    let mut bytes = vec![0; 4 << 20];
    reader.read_at(&mut bytes, 0)?;
    ensure!(bytes == whole[..bytes.len()], "other bytes");
    let lost = (0..whole.len() as u64 / 4096)
        .filter(|page| reader.read_at(&mut [0; 4096], page * 4096).is_err())
        .count();
    ensure!(lost > 0 && lost < 2048, "{lost} pages are lost");
    drop(bound);
    Ok(())
}

/// A directory bound over another one.
struct Bound(PathBuf);

impl Bound {
    fn over(over: &Path, what: &Path) -> Result<Self> {
        run(Command::new("mount").arg("--bind").arg(what).arg(over))?;
        Ok(Self(over.to_owned()))
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).output();
    }
}

/// Makes the disk end where a file is `at` bytes in, after all else of it was
/// read into the cache. False if what is behind can be read all the same.
fn cut_off(disk: &Disk, file: &str, at: u64) -> Result<bool> {
    run(Command::new("sync").arg("-f").arg(disk.path()))?;
    run(Command::new("mount")
        .args(["-o", "remount,ro"])
        .arg(disk.path()))?;
    let path = disk.path().join(file);
    let script = "import fcntl, os, struct, sys
path, device, at = sys.argv[1], sys.argv[2], int(sys.argv[3])
f = os.open(path, os.O_RDONLY)
os.pread(f, 1 << 30, 0)
for name in os.listdir(os.path.dirname(path)):
    if name.endswith('.pack'):
        open(os.path.join(os.path.dirname(path), name), 'rb').read()
block = struct.unpack('i', fcntl.ioctl(f, 1, struct.pack('i', at // 4096)))[0]
os.posix_fadvise(f, at, 1 << 20, os.POSIX_FADV_DONTNEED)
os.truncate(device, block * 4096)
try:
    os.pread(f, 4096, at + 8192)
except OSError:
    sys.exit(0)
sys.exit(1)";
    let mut python = Command::new("python3");
    python.args(["-c", script]).arg(&path).arg(disk.device());
    Ok(python.arg(at.to_string()).status()?.success())
}

/// The snapshot's memory is this file.
fn holds(cli: &Cli, tag: &str, file: &str) -> Result<()> {
    let store = snapstore_store::Store::open(cli.store())?;
    let manifest = store.manifest(store.resolve(tag)?)?;
    let image = manifest.image("memory").context("no memory")?;
    let bytes = store.read_file_image(image, 1 << 30)?;
    ensure!(bytes == fs::read(file)?, "{tag} has other bytes");
    Ok(())
}
