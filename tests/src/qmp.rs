//! QEMU's monitor, for a client that stays connected.

use std::fs::File;
use std::io::{BufRead as _, BufReader, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};

/// How long anything may take before it counts as hanging.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often it is looked whether somebody listens.
const RETRY: Duration = Duration::from_millis(1);

/// Waits until somebody listens there.
///
/// # Errors
/// If nobody does.
pub fn connect(socket: &Path) -> anyhow::Result<BufReader<UnixStream>> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => {
                stream.set_read_timeout(Some(PATIENCE))?;
                return Ok(BufReader::new(stream));
            }
            Err(_) if Instant::now() < deadline => std::thread::sleep(RETRY),
            Err(error) => bail!("{}: {error}", socket.display()),
        }
    }
}

/// QEMU's monitor.
pub struct Qmp(BufReader<UnixStream>);

impl Qmp {
    /// Waits until it listens there.
    ///
    /// # Errors
    /// If it does not.
    pub fn connect(socket: &Path) -> anyhow::Result<Self> {
        let mut qmp = Self(connect(socket)?);
        qmp.0.read_line(&mut String::new())?;
        qmp.run("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Has it do something.
    ///
    /// # Errors
    /// If it does not.
    pub fn run(&mut self, command: &str, arguments: &Value) -> anyhow::Result<Value> {
        self.run_with(command, arguments, None)
    }

    /// The same, and gives it a file.
    ///
    /// # Errors
    /// If it does not.
    pub fn run_with(
        &mut self,
        command: &str,
        arguments: &Value,
        file: Option<&File>,
    ) -> anyhow::Result<Value> {
        let line = format!("{}\n", json!({"execute": command, "arguments": arguments}));
        let fds: Vec<_> = file.iter().map(|file| file.as_fd()).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            ensure!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
        }
        let bytes = [IoSlice::new(line.as_bytes())];
        sendmsg(self.0.get_ref(), &bytes, &mut ancillary, SendFlags::empty())?;
        loop {
            let mut line = String::new();
            ensure!(self.0.read_line(&mut line)? > 0, "QEMU has ended");
            let mut said: Value = serde_json::from_str(&line)?;
            if said.get("event").is_none() {
                ensure!(said.get("error").is_none(), "{command}: {said}");
                return Ok(said["return"].take());
            }
        }
    }
}
