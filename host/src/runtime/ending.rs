//! Why a machine ended, as its log tells.

/// Why a machine ended that could not say so itself.
pub const KILLED: &str = "its process was killed";

/// How the line begins that a machine's process logs last, when it ends as wanted.
pub const IN_ORDER: &str = "ended in order: ";

/// Whether a machine's last word is that it ended as wanted.
pub(super) fn said_in_order(log: &str) -> bool {
    let last = log.lines().next_back();
    last.is_some_and(|line| line.starts_with(IN_ORDER))
}

/// What a process said at its end: what it logged while it ran, lines that begin
/// with a time, is left out.
pub(super) fn last_words(log: &str) -> String {
    let words = log.lines().filter(|line| !is_logged(line));
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
