//! Requests and answers as they are on the line, as far as is needed to know where they end.

use std::io::{self, BufRead, Read as _};

/// Longer than what any client or server of the tests sends.
const MOST_HEAD_BYTES: u64 = 256 << 10;

#[derive(Debug)]
pub struct Request {
    pub bytes: Vec<u8>,
    method: String,
}

#[derive(Debug)]
pub struct Answer {
    pub bytes: Vec<u8>,
    head_len: usize,
}

impl Request {
    /// Whether it is of an object with a session's sign of life.
    pub fn is_of_lease(&self) -> bool {
        let line = self.bytes.split(|byte| *byte == b'\n').next();
        let line = String::from_utf8_lossy(line.unwrap_or_default()).into_owned();
        line.contains("/lease/") || line.contains("/lease%2F")
    }

    /// The next one, or none if the client has hung up.
    pub fn read(from: &mut impl BufRead) -> io::Result<Option<Self>> {
        let Some(head) = read_head(from)? else {
            return Ok(None);
        };
        let method = head.split(' ').next().unwrap_or_default().to_owned();
        let mut bytes = head.clone().into_bytes();
        read_body(from, &head, &mut bytes, false)?;
        Ok(Some(Self { bytes, method }))
    }

    pub fn changes_something(&self) -> bool {
        !matches!(self.method.as_str(), "GET" | "HEAD")
    }
}

impl Answer {
    pub fn read(from: &mut impl BufRead, request: &Request) -> io::Result<Self> {
        let ended = || io::Error::from(io::ErrorKind::UnexpectedEof);
        let head = read_head(from)?.ok_or_else(ended)?;
        let mut bytes = head.clone().into_bytes();
        let status = head.split(' ').nth(1).unwrap_or_default();
        let has_body = request.method != "HEAD" && !matches!(status, "204" | "304");
        if has_body {
            read_body(from, &head, &mut bytes, true)?;
        }
        Ok(Self {
            bytes,
            head_len: head.len(),
        })
    }

    /// What is left of it: some of the body, or some of the head if there is none.
    pub fn cut(&self, draw: f64) -> &[u8] {
        let (from, to) = match self.bytes.len() - self.head_len {
            0 => (1, self.head_len),
            _ => (self.head_len, self.bytes.len()),
        };
        let drawn = ((to - from) as f64 * draw) as usize;
        &self.bytes[..from + drawn]
    }
}

fn read_head(from: &mut impl BufRead) -> io::Result<Option<String>> {
    let mut head = String::new();
    loop {
        let before = head.len();
        let len = from.by_ref().take(MOST_HEAD_BYTES).read_line(&mut head)?;
        match head.get(before..) {
            _ if len == 0 && before == 0 => return Ok(None),
            Some("\r\n") => return Ok(Some(head)),
            _ if len == 0 || head.len() as u64 > MOST_HEAD_BYTES => {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            _ => {}
        }
    }
}

fn field<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    let mut fields = head.lines().filter_map(|line| line.split_once(':'));
    let found = fields.find(|(found, _)| found.eq_ignore_ascii_case(name))?;
    Some(found.1.trim())
}

/// Without a length, an answer's body is all that comes, and a request has none.
fn read_body(
    from: &mut impl BufRead,
    head: &str,
    into: &mut Vec<u8>,
    is_answer: bool,
) -> io::Result<()> {
    if field(head, "transfer-encoding").is_some_and(|coding| coding.contains("chunked")) {
        return read_chunks(from, into);
    }
    match field(head, "content-length").and_then(|len| len.parse().ok()) {
        Some(len) => exactly(from, len, into),
        None if is_answer => from.read_to_end(into).map(drop),
        None => Ok(()),
    }
}

fn exactly(from: &mut impl BufRead, len: u64, into: &mut Vec<u8>) -> io::Result<()> {
    match from.by_ref().take(len).read_to_end(into)? as u64 == len {
        true => Ok(()),
        false => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

fn read_chunks(from: &mut impl BufRead, into: &mut Vec<u8>) -> io::Result<()> {
    loop {
        let mut line = String::new();
        from.read_line(&mut line)?;
        into.extend_from_slice(line.as_bytes());
        let len = line.split(';').next().unwrap_or_default().trim();
        let len = u64::from_str_radix(len, 16).map_err(io::Error::other)?;
        // And the end of its line. Nobody here sends fields after the last one.
        exactly(from, len + 2, into)?;
        if len == 0 {
            return Ok(());
        }
    }
}
