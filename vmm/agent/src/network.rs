//! The guest's network interfaces.
//!
//! An interface is looked for by the address that it has. One that has another,
//! because it was given one in the guest or because nobody told an earlier
//! restore of this guest, is still found if it is the only one of its driver.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::Path;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use crate::mac::MacAddress;
use crate::protocol::invalid;

const INTERFACES: &str = "/sys/class/net";
const DRIVER: &str = "virtio_net";

/// Gives the interface whose address is `from` the address `to`.
pub fn set_mac(from: &str, to: &str) -> io::Result<()> {
    let parse = |text: &str| {
        text.parse::<MacAddress>()
            .map_err(|_| invalid("an interface's address is six bytes in hexadecimal"))
    };
    let (from, to) = (parse(from)?, parse(to)?);
    let name = find(Path::new(INTERFACES), from, to)?;
    set(&name, to)
}

/// The name of the interface. One that has the new address has been told.
fn find(interfaces: &Path, from: MacAddress, to: MacAddress) -> io::Result<String> {
    let mut of_driver = Vec::new();
    for entry in fs::read_dir(interfaces)? {
        let entry = entry?;
        let path = entry.path();
        // Bridges and VLANs have their ports' addresses, but no device.
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        if !path.join("device").exists() {
            continue;
        }
        let address = fs::read_to_string(path.join("address")).ok();
        let address = address.and_then(|text| text.trim().parse::<MacAddress>().ok());
        if address == Some(from) || address == Some(to) {
            return Ok(name);
        }
        let driver = fs::read_link(path.join("device/driver"));
        if driver.is_ok_and(|driver| driver.ends_with(DRIVER)) {
            of_driver.push(name);
        }
    }
    match (of_driver.pop(), of_driver.is_empty()) {
        (Some(name), true) => Ok(name),
        _ => Err(io::Error::new(
            io::ErrorKind::NotFound,
            format!("no network interface has the address {from}"),
        )),
    }
}

/// netdevice(7); virtio_net takes an address while it is up.
fn set(name: &str, address: MacAddress) -> io::Result<()> {
    let name = CString::new(name).map_err(io::Error::other)?;
    let name = name.as_bytes_with_nul();
    // SAFETY: a structure of integers, for which zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() > request.ifr_name.len() {
        return Err(invalid("an interface's name is longer than it can be"));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name) {
        *to = libc::c_char::from_ne_bytes([*from]);
    }
    let mut data = [0; 14];
    for (to, from) in data.iter_mut().zip(address.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request.ifr_ifru.ifru_hwaddr = libc::sockaddr {
        sa_family: libc::ARPHRD_ETHER,
        sa_data: data,
    };
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    // SAFETY: the kernel reads the structure.
    let set = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFHWADDR, &raw const request) };
    if set < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::path::PathBuf;

    use super::*;

    /// A directory such as the kernel shows.
    struct Interfaces(tempfile::TempDir);

    impl Interfaces {
        fn new() -> Self {
            let interfaces = Self(tempfile::tempdir().unwrap());
            fs::create_dir(interfaces.path("lo")).unwrap();
            interfaces
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn add(&self, name: &str, driver: Option<&str>, address: &str) {
            let path = self.path(name);
            fs::create_dir(&path).unwrap();
            fs::write(path.join("address"), format!("{address}\n")).unwrap();
            if let Some(driver) = driver {
                fs::create_dir(path.join("device")).unwrap();
                let driver = Path::new("../../bus/virtio/drivers").join(driver);
                symlink(driver, path.join("device/driver")).unwrap();
            }
        }

        fn find(&self, from: &str, to: &str) -> io::Result<String> {
            find(self.0.path(), from.parse().unwrap(), to.parse().unwrap())
        }
    }

    const OLD: &str = "02:00:00:00:00:01";
    const NEW: &str = "02:00:00:00:00:02";
    const OTHER: &str = "02:00:00:00:00:03";

    #[test]
    fn an_interface_is_found_by_its_address() {
        let interfaces = Interfaces::new();
        interfaces.add("br0", None, OLD);
        interfaces.add("eth0", Some(DRIVER), OTHER);
        interfaces.add("eth1", Some(DRIVER), OLD);
        assert_eq!(interfaces.find(OLD, NEW).unwrap(), "eth1");
        assert_eq!(interfaces.find(NEW, OTHER).unwrap(), "eth0");
        let error = interfaces.find(NEW, "02:00:00:00:00:04").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn the_only_one_of_its_driver_is_found_whatever_its_address() {
        let interfaces = Interfaces::new();
        interfaces.add("br0", None, NEW);
        interfaces.add("e1000", Some("e1000"), "02:00:00:00:00:09");
        assert!(interfaces.find(OLD, NEW).is_err());
        interfaces.add("eth0", Some(DRIVER), OTHER);
        assert_eq!(interfaces.find(OLD, NEW).unwrap(), "eth0");
        interfaces.add("eth1", Some(DRIVER), OTHER);
        assert!(interfaces.find(OLD, NEW).is_err());
    }

    #[test]
    fn nonsense_changes_nothing() {
        for (from, to) in [("", NEW), (OLD, ""), (OLD, "ff:ff:ff:ff:ff:ff")] {
            let error = set_mac(from, to).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        }
        assert!(set("no-such-if", NEW.parse().unwrap()).is_err());
        assert!(set("a-name-that-is-far-too-long", NEW.parse().unwrap()).is_err());
    }
}
