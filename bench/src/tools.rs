//! Other programs, and files.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, ensure};

/// Where a program is, if it is installed.
#[must_use]
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join(program))
        .find(|candidate| candidate.is_file())
}

/// Runs a program to its end, which must be good; returns the seconds it took.
///
/// # Errors
/// If it cannot be started or fails; the message holds its standard error.
pub fn timed(command: &mut Command) -> anyhow::Result<f64> {
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let start = Instant::now();
    let output = command.stderr(Stdio::piped()).output();
    let seconds = start.elapsed().as_secs_f64();
    let output = output.with_context(|| format!("cannot start {command:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?} ended with {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(seconds)
}

/// Waits until the disk has nothing left to do for what ran before, and reads
/// `inputs`, so that they come from memory. The machine may have dropped them.
///
/// # Errors
/// If an input cannot be read.
pub fn settle(inputs: &[&Path]) -> io::Result<()> {
    rustix::fs::sync();
    inputs.iter().try_for_each(|input| warm(input))
}

fn warm(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return fs::read_dir(path)?.try_for_each(|entry| warm(&entry?.path()));
    }
    read_all(path, 1 << 20).map(|_| ())
}

/// Reads a file to its end through a buffer; returns how long it is.
///
/// # Errors
/// If it cannot be read.
pub fn read_all(path: &Path, buffer_len: usize) -> io::Result<u64> {
    let mut file = File::open(path)?;
    let mut buffer = vec![0; buffer_len];
    let mut len = 0;
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(len),
            some => len += some as u64,
        }
    }
}

/// The length of a directory's files, with all below.
///
/// # Errors
/// If it cannot be listed.
pub fn bytes_under(path: &Path) -> io::Result<u64> {
    let metadata = fs::symlink_metadata(path)?;
    if !metadata.is_dir() {
        return Ok(metadata.len());
    }
    let mut total = 0;
    for entry in fs::read_dir(path)? {
        total += bytes_under(&entry?.path())?;
    }
    Ok(total)
}

/// The id of everything in a file.
///
/// # Errors
/// If it cannot be read.
pub fn hash(path: &Path) -> io::Result<blake3::Hash> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open(path)?)?;
    Ok(hasher.finalize())
}

/// A size as a figure.
#[must_use]
#[expect(clippy::cast_precision_loss, reason = "sizes here are far below 2^52")]
pub fn figure(bytes: u64) -> f64 {
    bytes as f64
}
