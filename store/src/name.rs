//! Names that users choose: tags, images, labels.

use crate::error::{Error, Result};
use crate::id::SnapshotId;

const MAX_LEN: usize = 128;

/// Checks a tag's name. Tags become directory names of a mount.
///
/// # Errors
/// [`Error::BadName`] if it is not 1 to 128 characters out of `A-Z a-z 0-9`
/// and `. _ + - @ : =`, beginning with a letter or digit.
pub fn check_tag(name: &str) -> Result<()> {
    check(name, "a tag")
}

/// Checks the name of a tag that is to be set.
///
/// # Errors
/// [`Error::BadName`] as [`check_tag`], and for a name that is written as the whole id of a
/// snapshot is: that stands for this snapshot and no other.
pub fn check_new_tag(name: &str) -> Result<()> {
    check_tag(name)?;
    match SnapshotId::from_hex(name) {
        None => Ok(()),
        Some(_) => Err(Error::BadName {
            name: name.to_owned(),
            what: "a tag",
            rule: "64 digits of this kind are the id of a snapshot",
        }),
    }
}

/// Checks what is to be a tag or the beginning of an id, which has no other
/// characters than a tag may have.
///
/// # Errors
/// [`Error::BadName`] as [`check_tag`].
pub fn check_snapshot(name: &str) -> Result<()> {
    check(name, "a tag or the id of a snapshot")
}

/// Checks the name of an image.
///
/// # Errors
/// [`Error::BadName`] as [`check_tag`].
pub fn check_image(name: &str) -> Result<()> {
    check(name, "an image name")
}

/// Checks a label: its key is as a tag.
///
/// # Errors
/// [`Error::BadName`] also for a value of more than 4096 bytes or with control
/// characters.
pub fn check_label(key: &str, value: &str) -> Result<()> {
    check(key, "a label's key")?;
    if value.len() > 4096 || value.chars().any(char::is_control) {
        return Err(Error::BadName {
            name: value.to_owned(),
            what: "a label's value",
            rule: "at most 4096 bytes without control characters",
        });
    }
    Ok(())
}

fn check(name: &str, what: &'static str) -> Result<()> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._+-@:=".contains(c);
    let good = name.len() <= MAX_LEN
        && name.chars().all(allowed)
        && name.starts_with(|c: char| c.is_ascii_alphanumeric());
    if good {
        return Ok(());
    }
    Err(Error::BadName {
        name: name.to_owned(),
        what,
        rule: "use 1 to 128 letters, digits and . _ + - @ : = with a letter or digit first",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_a_directory_are_refused() {
        for name in [
            "",
            ".",
            "..",
            "a/b",
            "-x",
            ".hidden",
            "a b",
            "ü",
            "a\n",
            &"x".repeat(129),
        ] {
            assert!(check_tag(name).is_err(), "{name:?}");
        }
        let id = "0123456789abcdef".repeat(4);
        assert!(check_tag(&id).is_ok() && check_new_tag(&id).is_err());
        assert!(check_new_tag(&id.to_uppercase()).is_err() && check_new_tag(&id[1..]).is_ok());
        for name in ["base", "base+1", "v1.2_3@host:4=5", "7", &"x".repeat(128)] {
            assert!(check_tag(name).is_ok(), "{name:?}");
        }
    }
}
