//! The log of a machine: its process's standard error, which is a file of bounded length.
//!
//! The process is confined and can neither open nor rename a file, so when the log is full
//! the process makes it anew in place, out of its end. How often something is logged that a guest or
//! a client can cause is bounded where it is logged (`rate` of `vmm`).

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use rustix::fs::ftruncate;
use rustix::io::pread;

/// The most that a log holds, in bytes, but for a process's last words.
const LOG_BYTES: u64 = 1 << 20;
/// What stays of a log that was full.
const KEPT_BYTES: u64 = LOG_BYTES / 4;
/// Longer lines are cut.
const LINE_BYTES: usize = 4096;

/// What the log holds, once standard error is one.
static LENGTH: Mutex<Option<u64>> = Mutex::new(None);

/// Makes a file this process's log, and its standard error.
pub(crate) fn begin(path: &Path) -> io::Result<()> {
    let log = open(path)?;
    rustix::stdio::dup2_stderr(&log)?;
    // Once the process is confined it cannot ask.
    let mut length = LENGTH.lock().unwrap_or_else(PoisonError::into_inner);
    *length = Some(log.metadata()?.len());
    Ok(())
}

fn open(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.read(true).append(true).create(true).mode(0o600);
    options.open(path)
}

/// Standard error as a log. To write to it never fails: what cannot be logged is lost.
pub struct CappedStderr;

impl Write for CappedStderr {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut length = LENGTH.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = match length.as_mut() {
            Some(length) => append(io::stderr(), length, line),
            None => io::stderr().write_all(line),
        };
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Adds a line to a log, which is open for appending and for reading.
fn append(log: impl AsFd, length: &mut u64, line: &[u8]) -> io::Result<()> {
    let mut bytes = line[..line.len().min(LINE_BYTES)].to_vec();
    if bytes.len() < line.len() {
        bytes.push(b'\n');
    }
    let added = bytes.len() as u64;
    if *length + added <= LOG_BYTES {
        *length += added;
        return write_all(&log, &bytes);
    }
    let kept = end(&log, *length)?;
    let gone = *length - kept.len() as u64;
    let mut anew = format!("[{gone} bytes of this log are gone: it was full]\n").into_bytes();
    anew.extend(kept);
    anew.append(&mut bytes);
    ftruncate(&log, 0)?;
    *length = anew.len() as u64;
    write_all(&log, &anew)
}

/// The last whole lines of a log.
fn end(log: impl AsFd, length: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(KEPT_BYTES).map_err(io::Error::other)?];
    let mut read = 0;
    let from = length.saturating_sub(KEPT_BYTES);
    while read < bytes.len() {
        match pread(&log, &mut bytes[read..], from + read as u64)? {
            0 => break,
            got => read += got,
        }
    }
    bytes.truncate(read);
    let begin = bytes.iter().position(|byte| *byte == b'\n');
    Ok(bytes.split_off(begin.map_or(bytes.len(), |begin| begin + 1)))
}

fn write_all(log: impl AsFd, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let written = rustix::io::retry_on_intr(|| rustix::io::write(&log, bytes))?;
        bytes = &bytes[written..];
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_bounded_and_keeps_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let log = open(&path).unwrap();
        let mut length = 0;
        for number in 0..100_000 {
            let line = format!("line {number} of what a guest makes its machine say\n");
            append(&log, &mut length, line.as_bytes()).unwrap();
            if number % 5000 == 0 {
                assert!(log.metadata().unwrap().len() <= LOG_BYTES);
            }
        }
        assert_eq!(log.metadata().unwrap().len(), length);
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.len() as u64 <= LOG_BYTES);
        assert!(text.starts_with("["), "{}", &text[..80]);
        assert!(text.contains("gone: it was full]\nline "));
        assert!(text.ends_with("line 99999 of what a guest makes its machine say\n"));
        let lines: Vec<_> = text.lines().skip(1).collect();
        assert!(lines.iter().all(|line| line.starts_with("line ")));
        assert!(lines.len() as u64 * 60 > KEPT_BYTES, "{}", lines.len());
    }

    #[test]
    fn a_log_that_is_full_already_and_lines_without_end_are_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        std::fs::write(&path, vec![b'x'; 3 << 20]).unwrap();
        let log = open(&path).unwrap();
        let mut length = 3 << 20;
        append(&log, &mut length, &vec![b'y'; 2 << 20]).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.len() < 2 * LINE_BYTES, "{}", text.len());
        assert!(text.starts_with("[3145728 bytes") && text.ends_with("y\n"));
    }
}
