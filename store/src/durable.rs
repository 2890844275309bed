//! The one place where the store asks the kernel to make something durable.
//!
//! Every fsync, rename, unlink and directory fsync of the store goes through
//! here (RocksDB's own excepted). That makes the order of durable steps
//! readable in one place per operation, and gives tests a seam: in builds with
//! debug assertions, `SNAPSTORE_KILL_AT_STEP=N` ends the process with SIGKILL
//! just before its N-th durable step, and `SNAPSTORE_STOP_AT_STEP=N` stops it
//! there with SIGSTOP until it is continued. The simulator is told of every step
//! too (`sim`), and of some that make nothing durable. There is deliberately no
//! way to skip a step.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use crate::error::{IoContext as _, Result};
use crate::sim::{self, Fault, StepKind};

/// Flushes a file's data and length to the disk.
pub(crate) fn sync_file(file: &File, path: &Path) -> Result<()> {
    step("sync file", path);
    sim::before(StepKind::SyncFile, path).context("flush", path)?;
    file.sync_all().context("flush", path)?;
    sim::synced_file(path);
    Ok(())
}

/// Makes the creations, renames and removals inside `dir` durable.
pub(crate) fn sync_dir(dir: &Path) -> Result<()> {
    step("sync directory", dir);
    sim::before(StepKind::SyncDir, dir)
        .and_then(|()| File::open(dir))
        .and_then(|handle| handle.sync_all())
        .context("flush directory", dir)?;
    sim::synced_dir(dir);
    Ok(())
}

/// Renames `from` to `to`, replacing what is there. Durable after [`sync_dir`].
pub(crate) fn rename(from: &Path, to: &Path) -> Result<()> {
    step("rename", to);
    sim::before(StepKind::Rename, to)
        .and_then(|()| fs::rename(from, to))
        .context("rename", from)?;
    sim::changed(from);
    sim::changed(to);
    Ok(())
}

/// Removes a file. Durable after [`sync_dir`]. A file that is already gone is
/// no error: removal is retried after a crash.
pub(crate) fn unlink(path: &Path) -> Result<()> {
    step("unlink", path);
    sim::before(StepKind::Unlink, path).context("remove", path)?;
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        other => other.context("remove", path)?,
    }
    sim::changed(path);
    Ok(())
}

/// Removes a file that nobody needs, if it can: a later collection removes what
/// is left.
pub(crate) fn discard(path: &Path) {
    if sim::before(StepKind::Discard, path).is_ok() {
        let _ = fs::remove_file(path);
        sim::changed(path);
    }
}

/// Opens a file that `options` may create.
pub(crate) fn create(path: &Path, options: &OpenOptions) -> io::Result<File> {
    sim::before(StepKind::Create, path)?;
    let file = options.open(path)?;
    sim::changed(path);
    Ok(file)
}

/// Appends to a file.
pub(crate) fn write_all(mut file: &File, path: &Path, bytes: &[u8]) -> Result<()> {
    sim::before(StepKind::Write, path)
        .and_then(|()| file.write_all(bytes))
        .context("write", path)
}

/// Writes at a place in a file.
pub(crate) fn write_at(file: &File, path: &Path, bytes: &[u8], offset: u64) -> Result<()> {
    sim::before(StepKind::Write, path)
        .and_then(|()| file.write_all_at(bytes, offset))
        .context("write", path)
}

/// Reads exactly `out.len()` bytes at `offset` of a pack.
pub(crate) fn read_at(file: &File, path: &Path, out: &mut [u8], offset: u64) -> Result<()> {
    sim::before(StepKind::ReadPack, path)
        .and_then(|()| file.read_exact_at(out, offset))
        .context("read", path)
}

/// Makes a directory and those above it. Durable after [`sync_dir`].
pub(crate) fn make_dir(path: &Path) -> Result<()> {
    sim::before(StepKind::MakeDir, path)
        .and_then(|()| fs::create_dir_all(path))
        .context("create", path)?;
    sim::changed(path);
    Ok(())
}

/// Removes a directory and all in it, if it is there.
pub(crate) fn remove_dir(path: &Path) -> Result<()> {
    sim::before(StepKind::RemoveDir, path).context("remove", path)?;
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        other => other.context("remove", path)?,
    }
    sim::changed(path);
    Ok(())
}

/// Marks a step that another library makes durable (RocksDB's flush), so that
/// tests can stop there too.
pub(crate) fn foreign_step(what: &'static str, path: &Path) {
    step(what, path);
}

/// Replaces the file at `path` by `bytes`, whole or not at all.
///
/// Order: write and flush the temporary file, rename it, flush the directory.
/// Were the rename first, a power cut could leave an empty file under the final
/// name; without the last flush the old file could come back after this call
/// has returned.
pub(crate) fn replace_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let dir = path
        .parent()
        .expect("files of a store have a parent directory");
    let name = path.file_name().expect("files of a store have a name");
    let mut temporary_name = std::ffi::OsString::from(".");
    temporary_name.push(name);
    temporary_name.push(".new");
    let temporary = dir.join(temporary_name);
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true);
    let file = create(&temporary, &options).context("create", &temporary)?;
    write_all(&file, &temporary, bytes)?;
    if !sim::on(Fault::SmallFileNotSynced) {
        sync_file(&file, &temporary)?;
    }
    rename(&temporary, path)?;
    if sim::on(Fault::SmallFileNameNotSynced) {
        return Ok(());
    }
    sync_dir(dir)
}

#[cfg(debug_assertions)]
fn step(what: &'static str, path: &Path) {
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    use rustix::process::{Signal, getpid, kill_process};

    static KILL_AT: LazyLock<Option<u64>> = LazyLock::new(|| number("SNAPSTORE_KILL_AT_STEP"));
    static STOP_AT: LazyLock<Option<u64>> = LazyLock::new(|| number("SNAPSTORE_STOP_AT_STEP"));
    static STEPS: AtomicU64 = AtomicU64::new(0);

    fn number(variable: &str) -> Option<u64> {
        std::env::var(variable).ok()?.parse().ok()
    }

    if KILL_AT.is_none() && STOP_AT.is_none() {
        return;
    }
    let number = STEPS.fetch_add(1, Ordering::SeqCst) + 1;
    if *STOP_AT == Some(number) {
        eprintln!("stopped before step {number}: {what} {}", path.display());
        let _ = kill_process(getpid(), Signal::STOP);
    }
    if *KILL_AT == Some(number) {
        eprintln!("killed before step {number}: {what} {}", path.display());
        let _ = kill_process(getpid(), Signal::KILL);
        loop {
            std::thread::park();
        }
    }
}

#[cfg(not(debug_assertions))]
fn step(_what: &'static str, _path: &Path) {}
