//! A client of a monitor's REST interface: HTTP/1.1 on a UNIX socket, a connection each
//! request, JSON both ways.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;

use super::step::step;
use super::wire::Wire;

/// How long an answer may take. To write or to load a state takes longer than others.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long the first answer may take: a monitor that hangs does not give it.
pub const FIRST_PATIENCE: Duration = Duration::from_secs(10);
/// The longest line of a header, and the longest body.
const LONGEST_LINE_BYTES: usize = 16 << 10;
const LONGEST_BODY_BYTES: usize = 4 << 20;
const MOST_HEADERS: usize = 100;

/// A request that was answered, and not done.
#[derive(Debug)]
pub struct Refused {
    name: &'static str,
    request: String,
    /// As HTTP has it.
    pub status: u16,
    why: String,
}

impl std::fmt::Display for Refused {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            name,
            request,
            status,
            why,
        } = self;
        write!(out, "{name} refuses {request} ({status}): {why}")
    }
}

impl std::error::Error for Refused {}

/// A monitor's interface.
pub struct Http {
    socket: PathBuf,
    /// What messages call the monitor.
    name: &'static str,
    /// What all paths begin with.
    prefix: &'static str,
}

impl Http {
    pub fn new(socket: &Path, name: &'static str, prefix: &'static str) -> Self {
        Self {
            socket: socket.to_owned(),
            name,
            prefix,
        }
    }

    /// The process that listens.
    pub fn peer(&self) -> anyhow::Result<u32> {
        Wire::connect(&self.socket)?.peer()
    }

    /// What is there.
    pub fn get(&self, path: &str) -> anyhow::Result<Value> {
        self.ask("GET", path, None, PATIENCE)
    }

    /// The first thing that is asked.
    pub fn first(&self, path: &str) -> anyhow::Result<Value> {
        self.ask("GET", path, None, FIRST_PATIENCE)
    }

    /// Puts something there.
    pub fn put(&self, path: &str, body: Option<&Value>) -> anyhow::Result<Value> {
        self.ask("PUT", path, body, PATIENCE)
    }

    /// Changes what is there.
    pub fn patch(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        self.ask("PATCH", path, Some(body), PATIENCE)
    }

    fn ask(
        &self,
        method: &str,
        path: &str,
        body: Option<&Value>,
        patience: Duration,
    ) -> anyhow::Result<Value> {
        let deadline = Instant::now() + patience;
        let mut wire = Wire::connect(&self.socket)?;
        let body = body.map(serde_json::to_vec).transpose()?;
        let mut request = format!(
            "{method} {}{path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n",
            self.prefix
        );
        if let Some(body) = &body {
            request += &format!(
                "Content-Type: application/json\r\nContent-Length: {}\r\n",
                body.len()
            );
        }
        request += "\r\n";
        let mut bytes = request.into_bytes();
        bytes.extend(body.unwrap_or_default());
        step("send a request");
        wire.send(&bytes, deadline)?;
        step("wait for an answer");
        let (status, said) = self.answer(&mut wire, deadline)?;
        let parsed: Option<Value> = serde_json::from_slice(&said).ok();
        if (200..300).contains(&status) {
            return Ok(parsed.unwrap_or(Value::Null));
        }
        // Firecracker says why in an object, Cloud Hypervisor in text or a list.
        let why = match &parsed {
            Some(Value::Object(fault)) => fault
                .get("fault_message")
                .and_then(Value::as_str)
                .map(str::to_owned),
            Some(Value::Array(chain)) => {
                let chain: Vec<&str> = chain.iter().filter_map(Value::as_str).collect();
                Some(chain.join(": "))
            }
            _ => None,
        };
        let why = why.unwrap_or_else(|| String::from_utf8_lossy(&said).trim().to_owned());
        bail!(Refused {
            name: self.name,
            request: format!("{method} {path}"),
            status,
            why,
        })
    }

    fn answer(&self, wire: &mut Wire, deadline: Instant) -> anyhow::Result<(u16, Vec<u8>)> {
        let line = wire.line(LONGEST_LINE_BYTES, deadline)?;
        let line = String::from_utf8_lossy(&line).into_owned();
        let status = line
            .strip_prefix("HTTP/1.")
            .and_then(|rest| rest.split(' ').nth(1)?.parse().ok());
        let status = status.with_context(|| {
            format!(
                "{} is no API socket of {}: it answers {:?}",
                self.socket.display(),
                self.name,
                line.chars().take(80).collect::<String>()
            )
        })?;
        let mut length = 0;
        for _ in 0..MOST_HEADERS {
            let line = wire.line(LONGEST_LINE_BYTES, deadline)?;
            if line.is_empty() {
                return Ok((status, wire.take(length, deadline)?));
            }
            let line = String::from_utf8_lossy(&line).into_owned();
            if let Some((key, value)) = line.split_once(':')
                && key.eq_ignore_ascii_case("content-length")
            {
                length = value.trim().parse().with_context(|| {
                    format!(
                        "{} answers with the length {value:?}",
                        self.socket.display()
                    )
                })?;
                ensure!(
                    length <= LONGEST_BODY_BYTES,
                    "{} answers with {length} bytes, more than a monitor of this kind does",
                    self.socket.display()
                );
            }
        }
        bail!("{} answers with too many headers", self.socket.display())
    }
}
