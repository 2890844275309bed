//! The address of a network interface.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The address of an Ethernet interface, one that a single station can have:
/// neither a group's nor all zeros.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddress([u8; 6]);

/// A text or bytes that are no interface's address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NotAMacAddress;

/// Of the first byte: the address of a group.
const GROUP: u8 = 1;
/// Of the first byte: an address that no manufacturer has given.
const LOCAL: u8 = 2;

impl MacAddress {
    /// The address of these bytes.
    ///
    /// # Errors
    /// No interface can have it.
    pub fn new(bytes: [u8; 6]) -> Result<Self, NotAMacAddress> {
        if bytes[0] & GROUP != 0 || bytes == [0; 6] {
            return Err(NotAMacAddress);
        }
        Ok(Self(bytes))
    }

    /// A locally administered address made of random bytes.
    #[must_use]
    pub fn local(mut random: [u8; 6]) -> Self {
        random[0] = random[0] & !GROUP | LOCAL;
        Self(random)
    }

    /// Its bytes, as they are sent.
    #[must_use]
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Display for NotAMacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "not an interface's address: six bytes in hexadecimal between colons, as in \
             02:00:00:00:00:01, the first of them even",
        )
    }
}

impl std::error::Error for NotAMacAddress {}

impl FromStr for MacAddress {
    type Err = NotAMacAddress;

    fn from_str(text: &str) -> Result<Self, NotAMacAddress> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().ok_or(NotAMacAddress)?;
            let digits = part.bytes().all(|digit| digit.is_ascii_hexdigit());
            if part.len() != 2 || !digits {
                return Err(NotAMacAddress);
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| NotAMacAddress)?;
        }
        match parts.next() {
            None => Self::new(bytes),
            Some(_) => Err(NotAMacAddress),
        }
    }
}

impl TryFrom<String> for MacAddress {
    type Error = NotAMacAddress;

    fn try_from(text: String) -> Result<Self, NotAMacAddress> {
        text.parse()
    }
}

impl From<MacAddress> for String {
    fn from(address: MacAddress) -> Self {
        address.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_bytes_are_the_same_address() {
        let address: MacAddress = "02:aB:00:01:fE:7f".parse().unwrap();
        assert_eq!(address.bytes(), [2, 0xab, 0, 1, 0xfe, 0x7f]);
        assert_eq!(address.to_string(), "02:ab:00:01:fe:7f");
        assert_eq!(address.to_string().parse(), Ok(address));
    }

    #[test]
    fn what_no_interface_can_have_is_refused() {
        for text in [
            "",
            "02:00:00:00:00",
            "02:00:00:00:00:01:02",
            "2:0:0:0:0:1",
            "02-00-00-00-00-01",
            "02:00:00:00:00:+1",
            "02:00:00:00:00:0g",
            "02:00:00:00:00:é",
            "01:00:5e:00:00:01",
            "ff:ff:ff:ff:ff:ff",
            "00:00:00:00:00:00",
        ] {
            assert_eq!(text.parse::<MacAddress>(), Err(NotAMacAddress), "{text}");
        }
    }

    #[test]
    fn a_random_address_is_a_local_one() {
        for first in 0..=255 {
            let address = MacAddress::local([first, 0, 0, 0, 0, 0]);
            assert_eq!(address.bytes()[0] & 3, 2);
            assert_eq!(MacAddress::new(address.bytes()), Ok(address));
        }
    }
}
