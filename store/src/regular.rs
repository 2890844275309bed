//! Opening files of a store, all of which are regular ones.
//!
//! Something else may stand under such a name, by accident or by malice: a directory,
//! a link, a device, a named pipe. To open a pipe could wait for ever, and to write
//! through a link would change a file elsewhere. So what it is is looked at before it is
//! opened and, since it may be exchanged in between, once more afterwards.

use std::fs::{self, File, FileType, OpenOptions};
use std::io::{self, ErrorKind, Read as _};
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::Path;

use rustix::fs::OFlags;
use rustix::io::Errno;

/// What stands under a name.
#[derive(Debug)]
pub enum Opened {
    /// A regular file.
    File(File),
    /// Nothing.
    Absent,
    /// Something else, such as "it is a named pipe, not a file". It was not opened.
    Odd(&'static str),
}

/// Opens a regular file to read it.
///
/// # Errors
/// If the system refuses it.
pub fn open(path: &Path) -> io::Result<Opened> {
    open_with(path, OpenOptions::new().read(true))
}

/// A short regular file as text; `None` for whatever else there is.
pub(crate) fn read_to_string(path: &Path) -> Option<String> {
    let Ok(Opened::File(mut file)) = open(path) else {
        return None;
    };
    let mut text = String::new();
    file.read_to_string(&mut text).ok().map(|_| text)
}

/// Opens a regular file that is there.
pub(crate) fn open_with(path: &Path, options: &OpenOptions) -> io::Result<Opened> {
    let found = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Opened::Absent),
        other => other?,
    };
    if let Some(why) = why_odd(found.file_type()) {
        return Ok(Opened::Odd(why));
    }
    match never_waiting(options).open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Opened::Absent),
        Err(error) if Errno::from_io_error(&error) == Some(Errno::LOOP) => {
            Ok(Opened::Odd("it is a symbolic link, not a file"))
        }
        Err(error) => Err(error),
        Ok(file) => Ok(match why_odd(file.metadata()?.file_type()) {
            Some(why) => Opened::Odd(why),
            None => Opened::File(file),
        }),
    }
}

/// Options that follow no link and do not wait for the other end of a pipe.
pub(crate) fn never_waiting(options: &OpenOptions) -> OpenOptions {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let mut options = options.clone();
    options.custom_flags(flags.bits().cast_signed());
    options
}

/// Why this is no file of a store; `None` for a regular file.
pub(crate) fn why_odd(found: FileType) -> Option<&'static str> {
    if found.is_file() {
        None
    } else if found.is_dir() {
        Some("it is a directory, not a file")
    } else if found.is_symlink() {
        Some("it is a symbolic link, not a file")
    } else if found.is_fifo() {
        Some("it is a named pipe, not a file")
    } else if found.is_socket() {
        Some("it is a socket, not a file")
    } else {
        Some("it is a device, not a file")
    }
}

/// Why what stands under this name is no file of a store; `None` if it is one, or
/// nothing is there.
pub(crate) fn oddity(path: &Path) -> Option<&'static str> {
    let found = fs::symlink_metadata(path).ok()?;
    why_odd(found.file_type())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn only_regular_files_are_opened_and_nothing_waits() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::write(path("file"), "x").unwrap();
        fs::create_dir(path("dir")).unwrap();
        symlink(path("file"), path("link")).unwrap();
        symlink(path("nowhere"), path("dangling")).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            path("pipe"),
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR,
            0,
        )
        .unwrap();
        let _socket = UnixListener::bind(path("socket")).unwrap();
        assert!(matches!(open(&path("file")), Ok(Opened::File(_))));
        assert!(matches!(open(&path("none")), Ok(Opened::Absent)));
        for (name, says) in [
            ("dir", "a directory"),
            ("link", "a symbolic link"),
            ("dangling", "a symbolic link"),
            ("pipe", "a named pipe"),
            ("socket", "a socket"),
        ] {
            let options = OpenOptions::new().read(true).write(true).clone();
            for opened in [open(&path(name)), open_with(&path(name), &options)] {
                let Ok(Opened::Odd(why)) = opened else {
                    panic!("{name} was opened");
                };
                assert!(why.contains(says), "{name}: {why}");
            }
        }
        assert!(matches!(open(Path::new("/dev/null")), Ok(Opened::Odd(_))));
    }
}
