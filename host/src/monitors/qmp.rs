//! A client of QEMU's monitor protocol (QMP): a JSON object a line, each way.
//!
//! Source: docs/interop/qmp-spec of QEMU. Only one client is served at a time, so one that
//! is not greeted waits behind another. What QEMU answers to a client that is gone it may send
//! to the next one: each command has an id of its own, and other answers are not ours.

use std::io::IoSlice;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};

use super::step::step;
use super::wire::Wire;

/// How long an answer may take, unless it is known to take longer.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long the answer of a command may take that writes or reads the devices' state.
const LONG_PATIENCE: Duration = Duration::from_secs(120);
/// The longest line that is read.
const LONGEST_LINE_BYTES: usize = 16 << 20;

/// A connection to QEMU.
pub struct Qmp {
    wire: Wire,
    version: Version,
    /// Commands so far.
    commands: u64,
}

/// QEMU's version.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Version {
    /// The first number.
    pub major: u64,
    /// The second.
    pub minor: u64,
    /// The third.
    pub micro: u64,
}

impl std::fmt::Display for Version {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

impl Version {
    /// The first version in a text.
    pub fn parse(text: &str) -> Option<Self> {
        let mut words = text.split(|c: char| !(c.is_ascii_digit() || c == '.'));
        words.find_map(|word| {
            let mut numbers = word.trim_matches('.').split('.').map(str::parse);
            Some(Self {
                major: numbers.next()?.ok()?,
                minor: numbers.next()?.ok()?,
                micro: numbers.next().and_then(Result::ok).unwrap_or(0),
            })
        })
    }
}

impl Qmp {
    /// Connects, and waits to be greeted.
    pub fn connect(path: &Path) -> anyhow::Result<Self> {
        let mut wire = Wire::connect(path)?;
        let line = wire.line(LONGEST_LINE_BYTES, Instant::now() + PATIENCE)?;
        let greeting: Value = serde_json::from_slice(&line).unwrap_or_default();
        let numbers = &greeting["QMP"]["version"]["qemu"];
        let number = |name: &str| numbers[name].as_u64();
        let (Some(major), Some(minor), Some(micro)) =
            (number("major"), number("minor"), number("micro"))
        else {
            bail!(
                "{} is no QMP socket of QEMU; start QEMU with -qmp unix:PATH,server=on,wait=off",
                path.display()
            );
        };
        let mut qmp = Self {
            wire,
            version: Version {
                major,
                minor,
                micro,
            },
            commands: 0,
        };
        qmp.run("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// QEMU's version.
    pub fn version(&self) -> Version {
        self.version
    }

    /// The process that listens at the socket.
    pub fn peer(&self) -> anyhow::Result<u32> {
        self.wire.peer()
    }

    /// Runs a command, and returns what it returned.
    pub fn run(&mut self, command: &str, arguments: Value) -> anyhow::Result<Value> {
        self.command(command, arguments, None, PATIENCE)
    }

    /// The same of one that takes long.
    pub fn run_long(&mut self, command: &str, arguments: Value) -> anyhow::Result<Value> {
        self.command(command, arguments, None, LONG_PATIENCE)
    }

    /// The same, with a descriptor.
    pub fn run_with(
        &mut self,
        command: &str,
        arguments: Value,
        fd: BorrowedFd<'_>,
    ) -> anyhow::Result<Value> {
        self.command(command, arguments, Some(fd), PATIENCE)
    }

    /// A command of the monitor for people, and its text.
    pub fn human(&mut self, line: &str) -> anyhow::Result<String> {
        let answer = self.run("human-monitor-command", json!({"command-line": line}))?;
        Ok(answer.as_str().unwrap_or_default().replace('\r', ""))
    }

    fn command(
        &mut self,
        command: &str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
        patience: Duration,
    ) -> anyhow::Result<Value> {
        let deadline = Instant::now() + patience;
        self.commands += 1;
        // Of no other process, and no other connection of this one that is served at that time.
        let id = json!(format!("{}-{}", std::process::id(), self.commands));
        let told = json!({"execute": command, "arguments": arguments, "id": id});
        let mut line = serde_json::to_vec(&told)?;
        line.push(b'\n');
        step("send a command");
        match fd {
            None => self.wire.send(&line, deadline)?,
            Some(fd) => {
                let fds = [fd];
                let mut space = [std::mem::MaybeUninit::uninit(); 64];
                let mut ancillary = SendAncillaryBuffer::new(&mut space);
                ensure!(
                    ancillary.push(SendAncillaryMessage::ScmRights(&fds)),
                    "a descriptor takes too much space"
                );
                let sent = sendmsg(
                    self.wire.stream().as_fd(),
                    &[IoSlice::new(&line)],
                    &mut ancillary,
                    SendFlags::NOSIGNAL,
                )
                .with_context(|| format!("cannot send to {}", self.wire.path().display()))?;
                self.wire.send(&line[sent..], deadline)?;
            }
        }
        step("wait for an answer");
        loop {
            let line = self.wire.line(LONGEST_LINE_BYTES, deadline)?;
            let mut answer: Value = serde_json::from_slice(&line)
                .with_context(|| format!("{} answers no JSON", self.wire.path().display()))?;
            if answer.get("event").is_some() || answer.get("id") != Some(&id) {
                continue;
            }
            if let Some(error) = answer.get("error") {
                bail!(
                    "QEMU refuses {command}: {}",
                    error["desc"].as_str().unwrap_or("it does not say why")
                );
            }
            return Ok(answer["return"].take());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read() {
        let of = |text| Version::parse(text).map(|version| version.to_string());
        let debian = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)";
        assert_eq!(of(debian).as_deref(), Some("7.2.22"));
        assert_eq!(
            of("QEMU emulator version 10.0.2").as_deref(),
            Some("10.0.2")
        );
        assert_eq!(of("nothing"), None);
        assert!(Version::parse("8.2.0") > Version::parse("7.2.22"));
    }
}
