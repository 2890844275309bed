//! The guest's network interfaces.
//!
//! An interface is looked for by the address that it has. One that has another,
//! because it was given one in the guest or because nobody told an earlier
//! restore of this guest, is still found if it is the only one of its driver.
//!
//! The addresses of one request may be those of another, so an interface that was
//! set is none of what a later request of the same connection looks for.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use snapstore_agent_protocol::MacAddress;

use crate::reply::invalid;

const INTERFACES: &str = "/sys/class/net";
const DRIVER: &str = "virtio_net";

/// The interfaces as one connection sees them.
pub struct Interfaces {
    directory: PathBuf,
    /// Those that this connection has set.
    told: Vec<Told>,
}

/// An interface that has its new address.
struct Told {
    name: String,
    /// The address that it had, if it was found for no address but as the only one.
    guessed: Option<MacAddress>,
}

/// An interface as the kernel shows it.
struct Interface {
    name: String,
    address: Option<MacAddress>,
    is_virtio: bool,
}

impl Interfaces {
    /// Nothing was set yet.
    pub fn new() -> Self {
        Self::at(Path::new(INTERFACES))
    }

    fn at(directory: &Path) -> Self {
        Self {
            directory: directory.to_owned(),
            told: Vec::new(),
        }
    }

    /// Gives the interface whose address is `from` the address `to`.
    pub fn set_mac(&mut self, from: &str, to: &str) -> io::Result<()> {
        let parse = |text: &str| {
            text.parse::<MacAddress>()
                .map_err(|_| invalid("an interface's address is six bytes in hexadecimal"))
        };
        let (from, to) = (parse(from)?, parse(to)?);
        let found = self.find(from, to)?;
        set(&found.name, to)?;
        self.tell(found);
        Ok(())
    }

    /// The interface to be set: the one that has the old address, else the new
    /// one, which was told before, else the only one of its driver.
    fn find(&self, from: MacAddress, to: MacAddress) -> io::Result<Told> {
        let all = interfaces(&self.directory)?;
        let has = |address| {
            let mut left = all.iter().filter(|interface| !self.is_told(interface));
            left.find(|interface| interface.address == Some(address))
        };
        if let Some(interface) = has(from) {
            return Ok(Told::found(interface));
        }
        // The only one was taken for another.
        let guessed = |address| self.told.iter().find(|told| told.guessed == Some(address));
        if let Some(told) = guessed(from).or_else(|| guessed(to)) {
            return Ok(Told {
                name: told.name.clone(),
                guessed: None,
            });
        }
        if let Some(interface) = has(to) {
            return Ok(Told::found(interface));
        }
        let mut of_driver = all.iter().filter(|interface| interface.is_virtio);
        match (of_driver.next(), of_driver.next()) {
            (Some(interface), None) if !self.is_told(interface) => Ok(Told {
                guessed: interface.address,
                ..Told::found(interface)
            }),
            _ => Err(io::Error::new(
                io::ErrorKind::NotFound,
                format!("no network interface has the address {from}"),
            )),
        }
    }

    fn is_told(&self, interface: &Interface) -> bool {
        self.told.iter().any(|told| told.name == interface.name)
    }

    fn tell(&mut self, told: Told) {
        self.told.retain(|other| other.name != told.name);
        self.told.push(told);
    }
}

impl Told {
    fn found(interface: &Interface) -> Self {
        Self {
            name: interface.name.clone(),
            guessed: None,
        }
    }
}

/// All interfaces with a device. Bridges and VLANs, which have their ports'
/// addresses, have none.
fn interfaces(directory: &Path) -> io::Result<Vec<Interface>> {
    let mut interfaces = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let path = entry.path();
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        if !path.join("device").exists() {
            continue;
        }
        let address = fs::read_to_string(path.join("address")).ok();
        let driver = fs::read_link(path.join("device/driver"));
        interfaces.push(Interface {
            name,
            address: address.and_then(|text| text.trim().parse().ok()),
            is_virtio: driver.is_ok_and(|driver| driver.ends_with(DRIVER)),
        });
    }
    Ok(interfaces)
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

    use super::*;

    /// A directory such as the kernel shows.
    struct Shown(tempfile::TempDir);

    impl Shown {
        fn new() -> Self {
            let shown = Self(tempfile::tempdir().unwrap());
            fs::create_dir(shown.path("lo")).unwrap();
            shown
        }

        /// With these addresses at `eth0`, `eth1` and so on.
        fn with(addresses: &[&str]) -> Self {
            let shown = Self::new();
            for (number, address) in addresses.iter().enumerate() {
                shown.add(&format!("eth{number}"), Some(DRIVER), address);
            }
            shown
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn add(&self, name: &str, driver: Option<&str>, address: &str) {
            let path = self.path(name);
            fs::create_dir(&path).unwrap();
            self.change(name, address);
            if let Some(driver) = driver {
                fs::create_dir(path.join("device")).unwrap();
                let driver = Path::new("../../bus/virtio/drivers").join(driver);
                symlink(driver, path.join("device/driver")).unwrap();
            }
        }

        fn change(&self, name: &str, address: &str) {
            fs::write(self.path(name).join("address"), format!("{address}\n")).unwrap();
        }

        fn interfaces(&self) -> Interfaces {
            Interfaces::at(self.0.path())
        }

        /// What a connection finds first.
        fn find(&self, from: &str, to: &str) -> io::Result<String> {
            let found = self.interfaces().find(parse(from), parse(to))?;
            Ok(found.name)
        }

        /// As [`Interfaces::set_mac`] does it; returns which interface was set.
        fn set(&self, interfaces: &mut Interfaces, from: &str, to: &str) -> io::Result<String> {
            let found = interfaces.find(parse(from), parse(to))?;
            self.change(&found.name, to);
            let name = found.name.clone();
            interfaces.tell(found);
            Ok(name)
        }

        /// The same for all of a new connection; `-` for what is not found.
        fn set_all(&self, pairs: &[(&str, &str)]) -> Vec<String> {
            let mut interfaces = self.interfaces();
            let set = pairs
                .iter()
                .map(|(from, to)| self.set(&mut interfaces, from, to));
            set.map(|name| name.unwrap_or_else(|_| "-".to_owned()))
                .collect()
        }

        fn address(&self, name: &str) -> String {
            let address = fs::read_to_string(self.path(name).join("address")).unwrap();
            address.trim().to_owned()
        }
    }

    fn parse(address: &str) -> MacAddress {
        address.parse().unwrap()
    }

    const A: &str = "02:00:00:00:00:01";
    const B: &str = "02:00:00:00:00:02";
    const C: &str = "02:00:00:00:00:03";
    const D: &str = "02:00:00:00:00:04";
    const E: &str = "02:00:00:00:00:05";

    #[test]
    fn an_interface_is_found_by_its_address() {
        let shown = Shown::new();
        shown.add("br0", None, A);
        shown.add("eth0", Some(DRIVER), C);
        shown.add("eth1", Some(DRIVER), A);
        assert_eq!(shown.find(A, B).unwrap(), "eth1");
        assert_eq!(shown.find(B, C).unwrap(), "eth0");
        // The old address says more than the new one.
        assert_eq!(shown.find(A, C).unwrap(), "eth1");
        assert_eq!(shown.find(C, A).unwrap(), "eth0");
        let error = shown.find(B, D).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn the_only_one_of_its_driver_is_found_whatever_its_address() {
        let shown = Shown::new();
        shown.add("br0", None, B);
        shown.add("e1000", Some("e1000"), "02:00:00:00:00:09");
        assert!(shown.find(A, B).is_err());
        shown.add("eth0", Some(DRIVER), C);
        assert_eq!(shown.find(A, B).unwrap(), "eth0");
        shown.add("eth1", Some(DRIVER), C);
        assert!(shown.find(A, B).is_err());
    }

    #[test]
    fn addresses_that_change_places_are_each_set_once() {
        let shown = Shown::with(&[A, B]);
        assert_eq!(shown.set_all(&[(A, B), (B, A)]), ["eth0", "eth1"]);
        assert_eq!((shown.address("eth0"), shown.address("eth1")), own(B, A));
        assert_eq!(shown.set_all(&[(A, B), (B, A)]), ["eth1", "eth0"]);
        assert_eq!((shown.address("eth0"), shown.address("eth1")), own(A, B));
    }

    #[test]
    fn addresses_that_move_on_are_each_set_once() {
        let shown = Shown::with(&[A, B, C]);
        let pairs = [(A, B), (B, C), (C, D)];
        assert_eq!(shown.set_all(&pairs), ["eth0", "eth1", "eth2"]);
        assert_eq!((shown.address("eth0"), shown.address("eth1")), own(B, C));
        assert_eq!(shown.address("eth2"), D);
    }

    #[test]
    fn of_two_the_only_visible_one_keeps_its_own_address() {
        let pairs = [(A, C), (B, D)];
        // The guest shows the first of them, or the second.
        let shown = Shown::with(&[A]);
        assert_eq!(shown.set_all(&pairs), ["eth0", "-"]);
        assert_eq!(shown.address("eth0"), C);
        let shown = Shown::with(&[B]);
        assert_eq!(shown.set_all(&pairs), ["eth0", "eth0"]);
        assert_eq!(shown.address("eth0"), D);
        // Again, by another connection.
        assert_eq!(shown.set_all(&pairs), ["eth0", "eth0"]);
        assert_eq!(shown.address("eth0"), D);
        assert_eq!(shown.set_all(&[pairs[1], pairs[0]]), ["eth0", "-"]);
        assert_eq!(shown.address("eth0"), D);
        // Nobody knows which of them this is: the first one has it.
        let shown = Shown::with(&[E]);
        assert_eq!(shown.set_all(&pairs), ["eth0", "-"]);
        assert_eq!(shown.address("eth0"), C);
        // One that was set is still one of two.
        let shown = Shown::with(&[A, E]);
        assert_eq!(shown.set_all(&pairs), ["eth0", "-"]);
        assert_eq!(shown.address("eth1"), E);
    }

    fn own(first: &str, second: &str) -> (String, String) {
        (first.to_owned(), second.to_owned())
    }

    #[test]
    fn nonsense_changes_nothing() {
        let multicast = "ff:ff:ff:ff:ff:ff";
        for (from, to) in [("", B), (A, ""), (A, multicast)] {
            let error = Interfaces::new().set_mac(from, to).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        }
        assert!(set("no-such-if", parse(B)).is_err());
        assert!(set("a-name-that-is-far-too-long", parse(B)).is_err());
    }
}
