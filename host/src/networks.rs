//! What machines' network interfaces are connected to: taps, which are their
//! user's to make.

use std::collections::HashSet;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::bail;
use serde::{Deserialize, Serialize};
use snapstore_vmm::Error;
use snapstore_vmm::virtio::{MacAddress, Net, Tap};

/// Stands for the machine's number in the name of a tap.
const NUMBER: &str = "{}";
/// The longest name of an interface in bytes.
const MAX_NAME_BYTES: usize = 15;
/// How long a tap may be busy whose machine has just ended, and how often it is
/// looked at: a machine's name is free a moment before its process is gone.
const PATIENCE: Duration = Duration::from_secs(1);
const RETRY: Duration = Duration::from_millis(20);

/// What a user said of an interface.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NetSpec {
    /// The tap; `{}` in its name stands for the machine's number.
    pub tap: String,
    /// The address of the interface; a random one without it.
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

/// The interfaces of each machine of these names. All taps must be there and
/// free: nothing was started yet.
pub fn of_machines(specs: &[NetSpec], names: &[String]) -> anyhow::Result<Vec<Vec<NetSpec>>> {
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
            let number = number(name);
            specs.iter().map(|spec| numbered(spec, number)).collect()
        })
        .collect::<anyhow::Result<_>>()?;
    check_unlike(machines.iter().flatten())?;
    // One by one: a command may have fewer descriptors than machines.
    for spec in machines.iter().flatten() {
        check_free(&spec.tap)?;
    }
    Ok(machines)
}

/// That no two interfaces have the same tap or address.
fn check_unlike<'a>(specs: impl Iterator<Item = &'a NetSpec>) -> anyhow::Result<()> {
    let (mut taps, mut macs) = (HashSet::new(), HashSet::new());
    for NetSpec { tap, mac } in specs {
        if !taps.insert(tap) {
            bail!("the tap {tap} is named twice; each interface needs a tap of its own");
        }
        if let Some(mac) = mac.filter(|mac| !macs.insert(*mac)) {
            bail!("the address {mac} is named twice; each interface needs one of its own");
        }
    }
    Ok(())
}

fn check_free(tap: &str) -> snapstore_vmm::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match Tap::open(tap) {
            Err(Error::TapBusy { .. }) if Instant::now() < deadline => std::thread::sleep(RETRY),
            other => return other.map(drop),
        }
    }
}

/// A machine's number, which its name ends in after a dot; 1 if it has none.
fn number(name: &str) -> u64 {
    let (_, number) = name.rsplit_once('.').unwrap_or_default();
    let is_number = number.bytes().all(|byte| byte.is_ascii_digit());
    number.parse().ok().filter(|_| is_number).unwrap_or(1)
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
        for (name, wanted) in [
            ("base", 1),
            ("base.17", 17),
            ("a.b.3", 3),
            ("base.x", 1),
            ("base.+3", 1),
            ("base.", 1),
            ("base3", 1),
            ("3", 1),
        ] {
            assert_eq!(number(name), wanted, "{name}");
        }
        assert_eq!(numbered(&spec("t{}-{}"), 12).unwrap().tap, "t12-12");
        assert!(numbered(&spec("thirteen-13b{}"), 1000).is_err());
    }

    /// Why these interfaces of these machines are refused.
    fn error(specs: &[&str], names: &[&str]) -> String {
        let specs: Vec<_> = specs.iter().map(|text| spec(text)).collect();
        let names: Vec<_> = names.iter().copied().map(str::to_owned).collect();
        of_machines(&specs, &names).unwrap_err().to_string()
    }

    #[test]
    fn machines_share_neither_tap_nor_address() {
        let names = ["b.1", "b.2"];
        assert!(error(&["tap0"], &names).contains("{}"));
        assert!(error(&["t{},mac=02:00:00:00:00:01"], &names).contains("mac="));
        let names = names.map(str::to_owned);
        assert_eq!(of_machines(&[], &names).unwrap(), [vec![], vec![]]);
    }

    #[test]
    fn what_is_named_twice_is_refused_before_any_tap_is_looked_at() {
        let began = Instant::now();
        for (specs, names) in [
            (&["no-such-tap", "no-such-tap"][..], &["b"][..]),
            (&["t{}", "t3"], &["b.3"]),
            (&["t1{}", "t{}"], &["b.1", "b.11"]),
            (
                &["t1,mac=02:00:00:00:00:0a", "t2,mac=02:00:00:00:00:0A"],
                &["b"],
            ),
        ] {
            let error = error(specs, names);
            assert!(error.contains("named twice"), "{error}");
        }
        assert!(began.elapsed() < PATIENCE);
        // Nobody waits for a tap that is not there.
        assert!(error(&["no-such-tap"], &["b"]).contains("no-such-tap"));
        assert!(began.elapsed() < PATIENCE);
    }
}
