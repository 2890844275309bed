//! The kernel's table of mounted filesystems (proc(5), `/proc/PID/mountinfo`).
//!
//! Names in it are bytes: a mount elsewhere on the host may be called anything,
//! and must not keep anybody from reading the rest.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::PathBuf;

/// A mount, as a line of the table tells.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MountEntry {
    /// Its number, which another one may get as soon as it is gone.
    pub id: u64,
    /// The mount that it is on.
    pub parent: u64,
    /// Major and minor number of its filesystem: no two that exist have the same.
    pub device: (u32, u32),
    /// Where it is mounted, as this process sees it.
    pub dir: PathBuf,
    /// The type of its filesystem, such as `ext4` or `fuse.sshfs`.
    pub filesystem: OsString,
    /// What is mounted, as whoever mounted it says.
    pub source: OsString,
    /// The filesystem's own options.
    pub options: Vec<OsString>,
}

impl MountEntry {
    /// The value of an option `name=VALUE`.
    #[must_use]
    pub fn option(&self, name: &str) -> Option<&OsStr> {
        self.options.iter().find_map(|option| {
            let value = option.as_bytes().strip_prefix(name.as_bytes())?;
            value.strip_prefix(b"=").map(OsStr::from_bytes)
        })
    }
}

/// All mounts that this process sees, in the order in which the kernel lists them.
///
/// # Errors
/// If the table cannot be read.
pub fn mount_table() -> io::Result<Vec<MountEntry>> {
    let table = fs::read("/proc/self/mountinfo")?;
    Ok(table
        .split(|byte| *byte == b'\n')
        .filter_map(parse_line)
        .collect())
}

/// The number of the mount that an open file is on. No filesystem is asked, so
/// that one which does not answer, or not to this user, does not matter.
///
/// # Errors
/// If `/proc` cannot be read.
pub fn mount_id(file: impl AsFd) -> io::Result<u64> {
    let path = format!("/proc/self/fdinfo/{}", file.as_fd().as_raw_fd());
    let info = fs::read_to_string(path)?;
    let id = info.lines().find_map(|line| line.strip_prefix("mnt_id:"));
    id.and_then(|id| id.trim().parse().ok())
        .ok_or_else(|| io::Error::from(io::ErrorKind::Unsupported))
}

/// `ID PARENT MAJOR:MINOR ROOT DIR OPTIONS [FIELDS] - TYPE SOURCE SUPER`
fn parse_line(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|byte| *byte == b' ');
    let id = number(fields.next()?)?;
    let parent = number(fields.next()?)?;
    let mut device = fields.next()?.splitn(2, |byte| *byte == b':');
    let device = (number(device.next()?)?, number(device.next()?)?);
    let dir = unescape(fields.nth(1)?).into();
    fields.find(|field| *field == b"-")?;
    Some(MountEntry {
        id,
        parent,
        device,
        dir,
        filesystem: unescape(fields.next()?),
        source: unescape(fields.next()?),
        options: fields
            .next()?
            .split(|byte| *byte == b',')
            .map(unescape)
            .collect(),
    })
}

fn number<T: std::str::FromStr>(field: &[u8]) -> Option<T> {
    std::str::from_utf8(field).ok()?.parse().ok()
}

/// Undoes the kernel's escapes: a backslash and three octal digits.
fn unescape(field: &[u8]) -> OsString {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, after @ ..] = rest {
        rest = after;
        let escaped = (*first == b'\\').then(|| octal(after)).flatten();
        plain.push(escaped.unwrap_or(*first));
        if escaped.is_some() {
            rest = &after[3..];
        }
    }
    OsString::from_vec(plain)
}

fn octal(digits: &[u8]) -> Option<u8> {
    let digits = digits.get(..3)?;
    if !digits.iter().all(|digit| (b'0'..=b'7').contains(digit)) {
        return None;
    }
    let value = digits
        .iter()
        .fold(0_u32, |value, digit| value * 8 + u32::from(digit - b'0'));
    u8::try_from(value).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_bytes() {
        let line = b"36 25 0:40 / /mnt/a\\040b\\134\xe9\\012\\043 ro,nosuid shared:7 master:1 - \
            fuse.snapstore snapstore:/srv/a,b ro,user_id=1000,group_id=0";
        let entry = parse_line(line).expect("a line");
        assert_eq!((entry.id, entry.parent, entry.device), (36, 25, (0, 40)));
        assert_eq!(entry.dir.as_os_str().as_bytes(), b"/mnt/a b\\\xe9\n#");
        assert_eq!(entry.filesystem, "fuse.snapstore");
        assert_eq!(entry.source, "snapstore:/srv/a,b");
        assert_eq!(entry.option("user_id"), Some(OsStr::new("1000")));
        assert_eq!(entry.option("user"), None);
    }

    #[test]
    fn odd_lines_and_escapes_are_left_as_they_are() {
        for odd in [
            &b""[..],
            b"36 25",
            b"a b 0:40 / /mnt ro - ext4 x ro",
            b"\xff",
        ] {
            assert_eq!(parse_line(odd), None);
        }
        assert_eq!(unescape(b"a\\04"), "a\\04");
        assert_eq!(unescape(b"a\\999\\777"), "a\\999\\777");
        assert_eq!(unescape(b"\\"), "\\");
    }

    #[test]
    fn an_open_file_is_on_a_mount_of_the_table() {
        let file = fs::File::open("/proc/self/mountinfo").unwrap();
        let id = mount_id(&file).unwrap();
        let table = mount_table().unwrap();
        let entry = table.iter().find(|entry| entry.id == id).expect("/proc");
        assert_eq!(entry.filesystem, "proc");
    }
}
