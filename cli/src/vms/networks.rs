//! What machines' network interfaces are connected to: taps, which are their
//! user's to make.

use std::str::FromStr;

use anyhow::bail;
use serde::{Deserialize, Serialize};
use snapstore_vmm::virtio::{MacAddress, Net, Tap};

/// Stands for the machine's number in the name of a tap.
const NUMBER: &str = "{}";
/// The longest name of an interface in bytes.
const MAX_NAME_BYTES: usize = 15;

/// What a user said of an interface.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NetSpec {
    pub tap: String,
    pub mac: Option<MacAddress>,
}

/// `TAP` or `TAP,mac=MAC`.
impl FromStr for NetSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (tap, mac) = match text.split_once(',') {
            None => (text, None),
            Some((tap, option)) => {
                let mac = option.strip_prefix("mac=");
                let mac = mac.ok_or("it has the form TAP or TAP,mac=MAC")?;
                let mac = mac.parse().map_err(|error| format!("{mac:?} is {error}"))?;
                (tap, Some(mac))
            }
        };
        if !is_name(&tap.replace(NUMBER, "1")) {
            return Err(format!(
                "{tap:?} cannot name a tap; a name has 1 to {MAX_NAME_BYTES} bytes, none of them a \
                 slash, a colon or a space"
            ));
        }
        Ok(Self {
            tap: tap.to_owned(),
            mac,
        })
    }
}

fn is_name(name: &str) -> bool {
    let reserved = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
    (1..=MAX_NAME_BYTES).contains(&name.len()) && !name.contains(reserved)
}

/// The interfaces of each machine, called `names` after `base`. All taps must be
/// there and free: nothing was started yet.
pub fn of_machines(
    specs: &[NetSpec],
    base: &str,
    names: &[String],
) -> anyhow::Result<Vec<Vec<NetSpec>>> {
    if names.len() > 1 {
        for NetSpec { tap, mac } in specs {
            if !tap.contains(NUMBER) {
                bail!(
                    "several machines cannot share the tap {tap}; put {NUMBER} into its name, \
                     which stands for each machine's number"
                );
            }
            if let Some(mac) = mac {
                bail!("several machines cannot share the address {mac}; leave mac= out");
            }
        }
    }
    let machines: Vec<Vec<NetSpec>> = names
        .iter()
        .map(|name| {
            let number = number(base, name);
            specs.iter().map(|spec| numbered(spec, number)).collect()
        })
        .collect::<anyhow::Result<_>>()?;
    // All at once, so that one that is named twice is found, too.
    let taps = machines.iter().flatten().map(|spec| Tap::open(&spec.tap));
    taps.collect::<Result<Vec<_>, _>>()?;
    Ok(machines)
}

/// The number that a machine was given to tell it from others; 1 if it has none.
fn number(base: &str, name: &str) -> u64 {
    let rest = name
        .strip_prefix(base)
        .and_then(|rest| rest.strip_prefix('.'));
    rest.and_then(|rest| rest.parse().ok()).unwrap_or(1)
}

fn numbered(spec: &NetSpec, number: u64) -> anyhow::Result<NetSpec> {
    let tap = spec.tap.replace(NUMBER, &number.to_string());
    if !is_name(&tap) {
        bail!("{tap:?} cannot name a tap; a name has at most {MAX_NAME_BYTES} bytes");
    }
    Ok(NetSpec { tap, ..*spec })
}

/// The device of an interface; without a spec its link is down.
pub fn device(spec: Option<&NetSpec>) -> snapstore_vmm::Result<Net> {
    let tap = spec.map(|spec| Tap::open(&spec.tap)).transpose()?;
    Net::new(tap, spec.and_then(|spec| spec.mac))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(text: &str) -> NetSpec {
        text.parse().unwrap()
    }

    #[test]
    fn a_tap_and_an_address() {
        assert_eq!(spec("tap0").mac, None);
        let given = spec("tap-{},mac=02:00:00:00:00:0A");
        assert_eq!(given.tap, "tap-{}");
        assert_eq!(given.mac.unwrap().to_string(), "02:00:00:00:00:0a");
        for text in [
            "",
            ",mac=02:00:00:00:00:01",
            "a/b",
            "a b",
            "a:b",
            "sixteen-bytes-16",
            "tap0,mac=01:00:00:00:00:01",
            "tap0,mac=",
            "tap0,mtu=9000",
            "tap0,",
        ] {
            assert!(text.parse::<NetSpec>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn machines_have_the_numbers_of_their_names() {
        assert_eq!(number("base", "base"), 1);
        assert_eq!(number("base", "base.17"), 17);
        assert_eq!(number("base", "other.3"), 1);
        assert_eq!(numbered(&spec("t{}-{}"), 12).unwrap().tap, "t12-12");
        assert!(numbered(&spec("thirteen-13b{}"), 1000).is_err());
    }

    #[test]
    fn machines_share_neither_tap_nor_address() {
        let names = ["b.1", "b.2"].map(str::to_owned);
        let error = |text| of_machines(&[spec(text)], "b", &names).unwrap_err();
        assert!(error("tap0").to_string().contains("{}"));
        assert!(
            error("t{},mac=02:00:00:00:00:01")
                .to_string()
                .contains("mac=")
        );
        assert_eq!(of_machines(&[], "b", &names).unwrap(), [vec![], vec![]]);
    }
}
