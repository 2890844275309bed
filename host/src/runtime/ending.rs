//! Why a machine ended, as its log tells.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::Path;

/// So much of a log's end is looked at: its machine's process may make it of any length.
const END_BYTES: u64 = 64 << 10;

/// Why a machine ended that could not say so itself.
pub const KILLED: &str = "its process was killed";

/// How the line begins that a machine's process logs last, when it ends as wanted.
pub const IN_ORDER: &str = "ended in order: ";

/// The last whole lines of a log, and no more of them than anybody reads.
pub(super) fn end_of_log(path: &Path) -> io::Result<String> {
    let mut log = File::open(path)?;
    let from = log.metadata()?.len().saturating_sub(END_BYTES);
    log.seek(SeekFrom::Start(from))?;
    let mut bytes = Vec::new();
    log.take(END_BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    Ok(match (from, text.split_once('\n')) {
        (1.., Some((_, whole))) => whole.to_owned(),
        _ => text.into_owned(),
    })
}

/// Whether a machine's last word is that it ended as wanted.
pub(super) fn said_in_order(log: &str) -> bool {
    let last = log.lines().next_back();
    last.is_some_and(|line| line.starts_with(IN_ORDER))
}

/// What a process said at its end: what it logged while it ran, lines that begin
/// with a time, is left out, and so is what would do something to a terminal.
pub(super) fn last_words(log: &str) -> String {
    let words = log.lines().filter(|line| !is_logged(line));
    let words = words.map(|line| line.replace(char::is_control, " "));
    words.collect::<Vec<_>>().join("\n")
}

/// Whether a line begins with a time such as 2026-01-31T09:26:53.589793Z, or is an object
/// that does.
fn is_logged(line: &str) -> bool {
    let line = line.strip_prefix("{\"timestamp\":\"").unwrap_or(line);
    // Colours, if there are some.
    let line = line.strip_prefix("\x1b[2m").unwrap_or(line).as_bytes();
    let pattern = b"dddd-dd-ddTdd:dd:dd";
    line.len() > pattern.len()
        && line.iter().zip(pattern).all(|(byte, wanted)| match wanted {
            b'd' => byte.is_ascii_digit(),
            wanted => byte == wanted,
        })
}
