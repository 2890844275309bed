//! The log of a process that lives long: bounded in length, in rate, and in the
//! time that anybody waits for it.
//!
//! A thread writes the lines. Those that come faster than it writes are left
//! out, as are lines that say again what was said in the same minute, and more
//! than [`LINES_A_MINUTE`]; the log tells how many. A line that cannot be written
//! is lost. A file that is longer than [`FILE_BYTES`] becomes `NAME.1`, in place of
//! the one before.
//!
//! Several processes append to one file: each opens it anew for each line, so
//! that it matters to none of them who has renamed it.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::hash::{BuildHasher as _, RandomState};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, OFlags, flock};

use crate::log_format::LogFormat;

/// A file of more bytes is renamed before the next line.
const FILE_BYTES: u64 = 1 << 20;
const LINES_A_MINUTE: u32 = 100;
const MINUTE: Duration = Duration::from_secs(60);
/// Lines that wait for the thread.
const WAITING_LINES: usize = 256;
/// How long the end of a process waits for its last lines.
const PATIENCE: Duration = Duration::from_secs(1);
/// Longer lines are cut.
const LINE_BYTES: usize = 4096;

/// Where the lines go.
pub enum Sink {
    /// A file, made if it is not there.
    File(PathBuf),
    Stderr,
}

/// A handle to the log.
#[derive(Clone)]
pub struct BoundedLog {
    messages: SyncSender<Message>,
}

enum Message {
    Line(Vec<u8>),
    /// Answered when all lines before it are written.
    Flush(SyncSender<()>),
}

impl BoundedLog {
    /// # Errors
    /// No thread can be started.
    pub fn start(sink: Sink) -> io::Result<Self> {
        let (messages, waiting) = sync_channel(WAITING_LINES);
        std::thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || write_lines(&sink, &waiting))?;
        Ok(Self { messages })
    }

    /// Logs a line, or leaves it out.
    pub fn line(&self, line: &[u8]) {
        let line = match LogFormat::chosen() {
            // Half an object would be none.
            LogFormat::Json if line.len() > LINE_BYTES => {
                let begun = String::from_utf8_lossy(&line[..LINE_BYTES / 4]);
                LogFormat::Json
                    .line(&format!("a line that is too long begins: {begun}"))
                    .into()
            }
            _ => line[..line.len().min(LINE_BYTES)].to_vec(),
        };
        let _ = self.messages.try_send(Message::Line(line));
    }

    /// Waits until what was logged is written, but not for long.
    pub fn flush(&self) {
        let (answer, answered) = sync_channel(1);
        if self.messages.try_send(Message::Flush(answer)).is_ok() {
            let _ = answered.recv_timeout(PATIENCE);
        }
    }
}

fn write_lines(sink: &Sink, waiting: &Receiver<Message>) {
    let mut limit = Limit::default();
    for message in waiting {
        let mut line = match message {
            Message::Line(line) => line,
            Message::Flush(answer) => {
                let _ = answer.send(());
                continue;
            }
        };
        let Some(left_out) = limit.admit(&line, Instant::now()) else {
            continue;
        };
        if left_out > 0 {
            let told = format!("{left_out} messages before this one were left out");
            let told = LogFormat::chosen().line(&told);
            line.splice(0..0, told.into_bytes());
        }
        let _ = match sink {
            Sink::File(path) => append(path, &line, FILE_BYTES),
            Sink::Stderr => io::stderr().write_all(&line),
        };
    }
}

fn append(path: &Path, line: &[u8], file_bytes: u64) -> io::Result<()> {
    let mut file = open(path)?;
    if file.metadata()?.len() >= file_bytes {
        rename_if_same(&file, path)?;
        file = open(path)?;
    }
    file.write_all(line)
}

fn open(path: &Path) -> io::Result<File> {
    // Neither a link elsewhere nor a pipe that nobody reads.
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o644)
        .custom_flags(flags.bits().cast_signed())
        .open(path)
}

/// Two processes may find the same file too long: the lock keeps the second one
/// from renaming the new file, too. It goes with the file's descriptor.
fn rename_if_same(file: &File, path: &Path) -> io::Result<()> {
    let _ = flock(file, FlockOperation::LockExclusive);
    let (ours, there) = (file.metadata()?, fs::metadata(path)?);
    if (ours.dev(), ours.ino()) == (there.dev(), there.ino()) {
        let mut older = path.as_os_str().to_owned();
        older.push(".1");
        fs::rename(path, older)?;
    }
    Ok(())
}

/// Which lines are written.
#[derive(Default)]
struct Limit {
    hasher: RandomState,
    /// When what a line says was last written.
    said: HashMap<u64, Instant>,
    minute: Option<Instant>,
    written: u32,
    left_out: u64,
}

impl Limit {
    /// `None` for a line that is left out, else how many were since the last one.
    fn admit(&mut self, line: &[u8], now: Instant) -> Option<u64> {
        if self.minute.is_none_or(|began| now - began >= MINUTE) {
            self.minute = Some(now);
            self.written = 0;
            self.said.retain(|_, said| now - *said < MINUTE);
        }
        // All but the time, which a line begins with.
        let end = if line.starts_with(b"{") { b',' } else { b' ' };
        let text = line.splitn(2, |byte| *byte == end).nth(1).unwrap_or(line);
        let text = self.hasher.hash_one(text);
        let is_new = self
            .said
            .get(&text)
            .is_none_or(|said| now - *said >= MINUTE);
        if !is_new || self.written >= LINES_A_MINUTE {
            self.left_out += 1;
            return None;
        }
        self.said.insert(text, now);
        self.written += 1;
        Some(std::mem::take(&mut self.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_bounded_and_its_last_lines_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        for number in 0..100 {
            append(&path, format!("line {number}\n").as_bytes(), 64).unwrap();
            assert!(fs::metadata(&path).unwrap().len() < 64 + 10);
        }
        let last = fs::read_to_string(&path).unwrap();
        assert!(last.ends_with("line 99\n"), "{last}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn neither_links_nor_pipes_without_readers_are_written() {
        let dir = tempfile::tempdir().unwrap();
        let (link, pipe) = (dir.path().join("link"), dir.path().join("pipe"));
        std::os::unix::fs::symlink(dir.path().join("elsewhere"), &link).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &pipe,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
            0,
        )
        .unwrap();
        assert!(append(&link, b"line\n", 64).is_err());
        assert!(append(&pipe, b"line\n", 64).is_err());
        assert!(append(Path::new("/dev/full"), b"line\n", 64).is_err());
    }

    #[test]
    fn what_is_said_again_is_counted() {
        let mut limit = Limit::default();
        let began = Instant::now();
        assert_eq!(limit.admit(b"1 damaged", began), Some(0));
        for _ in 0..3 {
            assert_eq!(limit.admit(b"2 damaged", began), None);
        }
        let json = |second| format!("{{\"timestamp\":\"{second}\",\"level\":\"WARN\"}}");
        assert_eq!(limit.admit(json(1).as_bytes(), began), Some(3));
        assert_eq!(limit.admit(json(2).as_bytes(), began), None);
        assert_eq!(limit.admit(b"2 other", began), Some(1));
        assert_eq!(limit.admit(b"3 damaged", began + MINUTE), Some(0));
    }

    #[test]
    fn a_minute_has_room_for_so_many_lines() {
        let mut limit = Limit::default();
        let began = Instant::now();
        let written = (0..1000_u32)
            .filter(|number| {
                limit
                    .admit(format!("now {number}").as_bytes(), began)
                    .is_some()
            })
            .count();
        assert_eq!(written, LINES_A_MINUTE as usize);
        assert_eq!(limit.admit(b"now more", began + MINUTE), Some(900));
        assert!(limit.said.len() <= 2, "what was said long ago is forgotten");
    }
}
