//! A tap, the host's end of a guest's cable: an interface of the host whose frames
//! a program reads and writes (linux/if_tun.h, Documentation/networking/tuntap).

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, netdevice, socket_with};

use crate::error::{Error, OsContext as _, Result};

/// `struct virtio_net_hdr_v1`, before every frame.
pub(super) const HEADER_BYTES: usize = 12;

const DEVICE: &str = "/dev/net/tun";
/// The longest name of an interface in bytes, one less than `IFNAMSIZ`.
const MAX_NAME_BYTES: usize = libc::IFNAMSIZ - 1;

/// A descriptor that gives a frame a read and takes a frame a write, each behind
/// a header of 12 bytes, and never blocks.
pub struct Tap {
    fd: OwnedFd,
    name: Option<String>,
}

impl Tap {
    /// The tap of this name, which must be there. It is this process's alone until
    /// it is dropped, and stays when it is.
    ///
    /// # Errors
    /// [`Error::NoTap`], [`Error::TapBusy`], [`Error::NotATap`],
    /// [`Error::TapDenied`], [`Error::NoTaps`], or the operating system's.
    pub fn open(name: &str) -> Result<Self> {
        // The kernel would make a tap that is not there.
        if !exists(name)? {
            return Err(Error::NoTap {
                name: name.to_owned(),
            });
        }
        let device = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(DEVICE)
            .map_err(|source| Error::NoTaps { source })?;
        let fd = OwnedFd::from(device);
        attach(&fd, name).map_err(|error| refused(name, error))?;
        let tap = Self {
            fd,
            name: Some(name.to_owned()),
        };
        let failed = |action| {
            move |source| Error::Tap {
                name: name.to_owned(),
                action,
                source,
            }
        };
        // One that is gone when it is closed was made just now.
        if !tap.is_persistent().map_err(failed("examine"))? {
            return Err(Error::NoTap {
                name: name.to_owned(),
            });
        }
        tap.set_up().map_err(failed("set up"))?;
        Ok(tap)
    }

    /// A descriptor that is like a tap's. It must not block.
    #[must_use]
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self { fd, name: None }
    }

    /// Its name, if it has one.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// Takes the next frame, with its header; one that is longer fills `frame`.
    pub(super) fn receive(&self, frame: &mut [u8]) -> rustix::io::Result<usize> {
        retry(|| rustix::io::read(&self.fd, &mut *frame))
    }

    /// Gives a frame with its header.
    pub(super) fn send(&self, frame: &[u8]) -> rustix::io::Result<usize> {
        retry(|| rustix::io::write(&self.fd, frame))
    }

    fn is_persistent(&self) -> io::Result<bool> {
        let mut request = request("", 0);
        // SAFETY: the kernel writes the structure.
        let got = unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TUNGETIFF, &raw mut request) };
        if got < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: flags are what the kernel wrote.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        Ok(libc::c_int::from(flags) & libc::IFF_PERSIST != 0)
    }

    /// Headers are as long as the guest's, and frames are whole: whoever had the tap
    /// before may have agreed on something else.
    fn set_up(&self) -> io::Result<()> {
        let length = HEADER_BYTES as libc::c_int;
        let fd = self.fd.as_raw_fd();
        // SAFETY: the kernel reads the integer.
        if unsafe { libc::ioctl(fd, libc::TUNSETVNETHDRSZ, &raw const length) } < 0 {
            return Err(io::Error::last_os_error());
        }
        let none: libc::c_ulong = 0;
        // SAFETY: takes a number.
        if unsafe { libc::ioctl(fd, libc::TUNSETOFFLOAD, none) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}

/// Whether this host has an interface of this name.
fn exists(name: &str) -> Result<bool> {
    if name.is_empty() || name.len() > MAX_NAME_BYTES || name.contains('\0') {
        return Ok(false);
    }
    let any = socket_with(
        AddressFamily::UNIX,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )
    .os("look for a tap")?;
    match netdevice::name_to_index(&any, name) {
        Ok(_) => Ok(true),
        Err(Errno::NODEV) => Ok(false),
        Err(error) => Err(error).os("look for a tap"),
    }
}

/// `struct ifreq` with flags.
fn request(name: &str, flags: libc::c_int) -> libc::ifreq {
    // SAFETY: a structure of integers, for which zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let name = name.bytes().take(MAX_NAME_BYTES);
    for (to, from) in request.ifr_name.iter_mut().zip(name) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).unwrap_or(0);
    request
}

fn attach(fd: &OwnedFd, name: &str) -> io::Result<()> {
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let mut request = request(name, flags);
    // SAFETY: the kernel reads the structure, and writes the name into it.
    let attached = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if attached < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn refused(name: &str, source: io::Error) -> Error {
    let name = name.to_owned();
    match source.raw_os_error() {
        Some(libc::EBUSY) => Error::TapBusy { name },
        Some(libc::EINVAL) => Error::NotATap { name },
        Some(libc::EPERM) => Error::TapDenied { name, source },
        _ => Error::Tap {
            name,
            action: "use",
            source,
        },
    }
}
