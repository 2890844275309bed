//! libfuse's setuid helper, through which users other than root mount.

use std::ffi::{OsStr, OsString};
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::io::FdFlags;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use crate::error::{Error, Result, cannot};

const NAME: &str = "fusermount3";
/// Where it is on systems whose `PATH` does not lead there.
const PLACES: &[&str] = &["/usr/bin", "/bin", "/usr/local/bin", "/run/wrappers/bin"];
/// In which the helper looks for the socket to send `/dev/fuse` through.
const SOCKET_VARIABLE: &str = "_FUSE_COMMFD";

/// Mounts on `dir`. Returns `/dev/fuse`, open, as the mount's server has it.
pub(crate) fn mount(dir: &Path, source: &OsStr, options: &str) -> Result<OwnedFd> {
    let failed = |source| cannot("mount (fusermount3) on", dir, source);
    let (theirs, ours) = UnixStream::pair().map_err(failed)?;
    rustix::io::fcntl_setfd(&theirs, FdFlags::empty()).map_err(|errno| failed(errno.into()))?;
    let mut all = OsString::from(format!("{options},fsname="));
    all.push(escaped(source));
    let child = start(|command| {
        command.arg("-o").arg(&all).arg("--").arg(dir);
        command.env(SOCKET_VARIABLE, theirs.as_raw_fd().to_string());
    })?;
    drop(theirs);
    let received = receive(&ours).map_err(failed)?;
    let output = child.wait_with_output().map_err(failed)?;
    received.ok_or_else(|| failed(said(&output.stderr)))
}

/// Unmounts what is mounted on `dir`, if it is this user's.
pub(crate) fn unmount(dir: &Path, lazy: bool) -> Result<()> {
    let failed = |source| cannot("unmount (fusermount3)", dir, source);
    let child = start(|command| {
        command.arg("-u").args(lazy.then_some("-z"));
        command.arg("--").arg(dir);
    })?;
    let output = child.wait_with_output().map_err(failed)?;
    if output.status.success() {
        Ok(())
    } else if String::from_utf8_lossy(&output.stderr).contains("busy") {
        Err(Error::InUse {
            path: dir.to_owned(),
        })
    } else {
        Err(failed(said(&output.stderr)))
    }
}

/// Options are split at commas.
fn escaped(source: &OsStr) -> OsString {
    let mut escaped = Vec::new();
    for byte in source.as_bytes() {
        if matches!(byte, b',' | b'\\') {
            escaped.push(b'\\');
        }
        escaped.push(*byte);
    }
    OsString::from_vec(escaped)
}

fn start(arguments: impl Fn(&mut Command)) -> Result<Child> {
    let places = PLACES.iter().map(|place| Path::new(place).join(NAME));
    let mut missing = io::Error::from(io::ErrorKind::NotFound);
    for program in std::iter::once(NAME.into()).chain(places) {
        let mut command = Command::new(program);
        arguments(&mut command);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        // Its messages are looked into.
        command.stderr(Stdio::piped()).env("LC_ALL", "C");
        match command.spawn() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => missing = error,
            // That there are no processes or descriptors left is no lack of a program.
            other => return other.map_err(|source| cannot("start", NAME.as_ref(), source)),
        }
    }
    Err(Error::NoHelper { source: missing })
}

/// The descriptor that the helper sends; `None` if it ends without.
fn receive(socket: &UnixStream) -> io::Result<Option<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    rustix::io::retry_on_intr(|| {
        let mut bytes = [IoSliceMut::new(&mut byte)];
        recvmsg(socket, &mut bytes, &mut ancillary, RecvFlags::CMSG_CLOEXEC)
    })?;
    Ok(ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    }))
}

fn said(stderr: &[u8]) -> io::Error {
    let text = String::from_utf8_lossy(stderr);
    io::Error::other(match text.trim() {
        "" => "it ended without a word".to_owned(),
        text => text.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_separates_options_is_escaped() {
        assert_eq!(escaped(OsStr::new("a,b\\c d")), "a\\,b\\\\c d");
    }
}
