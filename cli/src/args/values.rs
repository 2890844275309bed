//! What values of arguments look like.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use clap::builder::{OsStringValueParser, TypedValueParser};

use crate::form::Form;

/// Of commands that list or show.
#[derive(Args, Clone, Default)]
pub struct FormArgs {
    /// table; json, as --json; or a line for each row with fields of the JSON in it, such as
    /// '{tag} {id}'. A field that there is not makes it name those that there are
    #[arg(id = "form", short = 'o', long = "format", value_name = "FORMAT")]
    pub form: Option<Form>,
}

pub fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() && !value.is_empty() => {
            Ok((key.to_owned(), value.to_owned()))
        }
        _ => Err("a label has the form KEY=VALUE, and neither is empty".to_owned()),
    }
}

/// A tag that is to be set.
pub fn tag(text: &str) -> Result<String, snapstore_store::Error> {
    snapstore_store::check_new_tag(text).map(|()| text.to_owned())
}

/// A tag that may be there: earlier versions allowed more names.
pub fn existing_tag(text: &str) -> Result<String, snapstore_store::Error> {
    snapstore_store::check_tag(text).map(|()| text.to_owned())
}

/// A tag, or the beginning of an id.
pub fn snapshot(text: &str) -> Result<String, snapstore_store::Error> {
    snapstore_store::check_snapshot(text).map(|()| text.to_owned())
}

/// What a store calls a remote, which has the characters of a tag.
pub fn remote(text: &str) -> Result<String, snapstore_store::Error> {
    use snapstore_store::Error;
    match snapstore_store::check_tag(text) {
        Err(Error::BadName { name, rule, .. }) => Err(Error::BadName {
            name,
            what: "the name of a remote",
            rule,
        }),
        checked => checked.map(|()| text.to_owned()),
    }
}

/// `REMOTE/TAG`; `None` without a slash.
pub fn of_remote(text: &str) -> Result<Option<(String, String)>, snapstore_store::Error> {
    let parts = text.split_once('/');
    let parts = parts.map(|(name, tag)| Ok((remote(name)?, existing_tag(tag)?)));
    parts.transpose()
}

/// A tag, the beginning of an id, or a tag of a remote.
pub fn snapshot_anywhere(text: &str) -> Result<String, snapstore_store::Error> {
    if of_remote(text)?.is_none() {
        snapstore_store::check_snapshot(text)?;
    }
    Ok(text.to_owned())
}

/// A time such as `12h` or `7d`.
pub fn span(text: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text)
        .map_err(|_| "a time is a number with m, h, d or w, such as 12h or 7d".to_owned())?;
    match time <= Duration::from_secs(LONGEST_SECONDS.into()) {
        true => Ok(time),
        false => Err("a time is at most 31 years".to_owned()),
    }
}

/// A number of tags to keep. None is more likely a variable gone wrong than a wish.
pub fn how_many(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("that keeps nothing; `snapstore rm` removes tags".to_owned()),
        Ok(number) => Ok(number),
        Err(_) => Err("it is no number".to_owned()),
    }
}

/// Names of tags.
pub fn pattern(text: &str) -> Result<glob::Pattern, String> {
    if text.is_empty() {
        return Err("it matches no tag; is a variable not set?".to_owned());
    }
    // The library has more: sets of letters, and `**`, which only paths need.
    let mut plain = String::new();
    for letter in text.chars() {
        match letter {
            '*' if plain.ends_with('*') => {}
            '[' | ']' => plain.extend(['[', letter, ']']),
            other => plain.push(other),
        }
    }
    glob::Pattern::new(&plain).map_err(|error| error.to_string())
}

/// What `forget` counts together.
#[derive(Clone)]
pub enum GroupBy {
    /// All tags.
    None,
    /// Snapshots that descend from each other.
    Chain,
    /// Snapshots with the same value of this label.
    Label(String),
}

pub fn group_by(text: &str) -> Result<GroupBy, String> {
    match (text, text.strip_prefix("label:")) {
        ("none", _) => Ok(GroupBy::None),
        ("chain", _) => Ok(GroupBy::Chain),
        (_, Some(key)) if !key.is_empty() => Ok(GroupBy::Label(key.to_owned())),
        _ => Err("it is none, chain or label:KEY".to_owned()),
    }
}

pub fn label(text: &str) -> Result<(String, String), String> {
    let (key, value) = key_value(text)?;
    snapstore_store::check_label(&key, &value).map_err(|error| error.to_string())?;
    Ok((key, value))
}

/// `NAME=FILE`, where the file may have any name that a file can have.
pub fn named_path() -> impl TypedValueParser<Value = (String, PathBuf)> {
    OsStringValueParser::new().try_map(|text: OsString| {
        let bytes = text.as_bytes();
        let at = bytes.iter().position(|byte| *byte == b'=');
        let (name, path) = match at {
            Some(at) if at > 0 && at + 1 < bytes.len() => (&bytes[..at], &bytes[at + 1..]),
            _ => return Err("it has the form NAME=FILE".to_owned()),
        };
        let name = std::str::from_utf8(name).map_err(|_| "the name is no text".to_owned())?;
        snapstore_store::check_image(name).map_err(|error| error.to_string())?;
        let path = OsString::from_vec(path.to_vec());
        Ok((name.to_owned(), PathBuf::from(path)))
    })
}

/// The longest time that can be asked for in seconds, 31 years: clocks of the
/// system have room for it.
pub const LONGEST_SECONDS: u32 = 1_000_000_000;

pub fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if (0.0..=f64::from(LONGEST_SECONDS)).contains(&seconds) {
        Ok(Duration::from_secs_f64(seconds))
    } else {
        Err(format!(
            "a time is a number of seconds from 0 to {LONGEST_SECONDS}"
        ))
    }
}

/// A width that a map fits in.
pub fn columns(text: &str) -> Result<usize, String> {
    let columns: Option<usize> = text.parse().ok();
    columns
        .filter(|columns| (20..=4096).contains(columns))
        .ok_or_else(|| "a width is a number of columns from 20 to 4096".to_owned())
}

/// Some time between two looks: no less than what is to be measured.
pub fn interval(text: &str) -> Result<Duration, String> {
    match seconds(text)? {
        time if time >= Duration::from_millis(100) => Ok(time),
        _ => Err("it is at least 0.1 seconds".to_owned()),
    }
}

/// `UID:GID`, in numbers.
pub fn owner(text: &str) -> Result<(u32, u32), String> {
    let ids = text.split_once(':');
    let ids = ids.and_then(|(uid, gid)| Some((uid.parse().ok()?, gid.parse().ok()?)));
    ids.ok_or_else(|| "it has the form UID:GID, both numbers".to_owned())
}

/// The permissions of a file, in octal.
pub fn mode(text: &str) -> Result<u32, String> {
    let mode = u32::from_str_radix(text, 8).ok();
    mode.filter(|mode| *mode <= 0o777)
        .ok_or_else(|| "a mode is an octal number of at most 777, such as 644".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_has_two_letters_that_are_others() {
        for (text, matched, other) in [
            ("b**", "b1", "a1"),
            ("***", "anything", ""),
            ("b[01]", "b[01]", "b0"),
            ("[", "[", "x"),
            ("v?", "v1", "v12"),
        ] {
            let pattern = pattern(text).expect(text);
            assert!(pattern.matches(matched), "{text}");
            assert!(other.is_empty() || !pattern.matches(other), "{text}");
        }
        assert!(pattern("").is_err());
    }
}
