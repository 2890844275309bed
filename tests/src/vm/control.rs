//! Control sockets, spoken by hand.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

/// One control connection, spoken by hand.
pub struct Control(pub BufReader<UnixStream>);

impl Control {
    /// Sends bytes as they are.
    ///
    /// # Errors
    /// If the machine has closed the connection.
    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        Ok(self.0.get_mut().write_all(bytes)?)
    }

    /// Sends a request.
    ///
    /// # Errors
    /// As [`Control::send`].
    pub fn request(&mut self, request: &Value) -> Result<()> {
        self.send(format!("{request}\n").as_bytes())
    }

    /// The next reply; `None` when the machine closed the connection.
    ///
    /// # Errors
    /// If it is no JSON.
    pub fn reply(&mut self) -> Result<Option<Value>> {
        let mut line = String::new();
        match self.0.read_line(&mut line) {
            Ok(0) => Ok(None),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => Ok(None),
            Err(error) => bail!("no reply: {error}"),
            Ok(_) => Ok(Some(serde_json::from_str(&line)?)),
        }
    }

    /// Asks, and waits for the reply.
    ///
    /// # Errors
    /// If there is none.
    pub fn ask(&mut self, request: &Value) -> Result<Value> {
        self.request(request)?;
        self.reply()?.context("the connection was closed")
    }
}
