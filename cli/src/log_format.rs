//! How a line that is no answer looks: for people, or as a JSON object.

use std::sync::OnceLock;

use serde_json::json;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime as _, SystemTime};

/// How lines look.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// An object a line, with `timestamp`, `level` and `fields.message`
    Json,
}

/// That of this process.
static FORMAT: OnceLock<LogFormat> = OnceLock::new();

impl LogFormat {
    /// From what a process that is started in the background is told by.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "text" => Some(Self::Text),
            "json" => Some(Self::Json),
            _ => None,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Json => "json",
        }
    }

    /// Makes it this process's. It is set once.
    pub fn choose(self) {
        let _ = FORMAT.set(self);
    }

    /// That of this process.
    pub fn chosen() -> Self {
        FORMAT.get().copied().unwrap_or(Self::Text)
    }

    /// What is said to the user, as a line of this format, with its end. Text begins with
    /// how grave it is, unless it is neither.
    pub fn line(self, text: &str) -> String {
        if self == Self::Text {
            return format!("{text}\n");
        }
        let (level, message) = match text.split_once(": ") {
            Some(("error", rest)) => ("ERROR", rest),
            Some(("warning", rest)) => ("WARN", rest),
            _ => ("INFO", text),
        };
        let mut timestamp = String::new();
        // A clock that cannot be read leaves it empty.
        let _ = SystemTime.format_time(&mut Writer::new(&mut timestamp));
        let line = json!({
            "timestamp": timestamp,
            "level": level,
            "fields": {"message": message},
        });
        format!("{line}\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_json_parses_whatever_it_says() {
        let line = LogFormat::Json.line("error: a \"thing\"\nof two lines: gone");
        assert_eq!(line.lines().count(), 1);
        let line: serde_json::Value = serde_json::from_str(&line).expect("JSON");
        assert_eq!(line["level"], "ERROR");
        assert_eq!(line["fields"]["message"], "a \"thing\"\nof two lines: gone");
        assert!(line["timestamp"].as_str().is_some_and(|it| it.len() > 20));
        let line = LogFormat::Json.line("note: it is so");
        assert!(line.contains("\"INFO\"") && line.contains("note: it is so"));
        assert_eq!(LogFormat::Text.line("warning: x"), "warning: x\n");
    }
}
