//! Requests, as the clients of S3 write them.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;

use super::Kind;

const BUCKET: &str = "/snaps";

pub(super) struct Request {
    pub method: String,
    /// Of the object, or of the bucket if it is empty.
    pub key: String,
    pub query: Vec<(String, String)>,
    pub range: Option<(u64, u64)>,
    pub body: Vec<u8>,
}

impl Request {
    pub fn parameter(&self, name: &str) -> Option<&str> {
        let found = self.query.iter().find(|(known, _)| known == name);
        found.map(|(_, value)| value.as_str())
    }

    pub fn kind(&self) -> Kind {
        let has = |name| self.parameter(name).is_some();
        match self.method.as_str() {
            "GET" if self.key.is_empty() && has("location") => Kind::Other,
            "GET" if self.key.is_empty() => Kind::Listing,
            _ if self.key.is_empty() => Kind::Other,
            "GET" => Kind::Read,
            "HEAD" => Kind::Look,
            "PUT" => Kind::Write,
            "POST" => Kind::Parts,
            "DELETE" if has("uploadId") => Kind::Parts,
            "DELETE" => Kind::Deletion,
            _ => Kind::Other,
        }
    }
}

/// The next one, if there is one. Who asks whether to go on is told so.
pub(super) fn read(
    reader: &mut BufReader<TcpStream>,
    answers: &mut TcpStream,
) -> io::Result<Option<Request>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split(' ');
    let method = words.next().unwrap_or_default().to_owned();
    let target = words.next().unwrap_or_default();
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let key = decoded(path.strip_prefix(BUCKET).unwrap_or(path));
    let key = key.trim_start_matches('/').to_owned();
    let query = parameters(query);
    let (mut range, mut len, mut is_in_chunks) = (None, 0, false);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? <= 2 {
            break;
        }
        let (name, value) = line.split_once(':').unwrap_or((&line, ""));
        let value = value.trim();
        match name.to_ascii_lowercase().as_str() {
            "content-length" => len = value.parse().unwrap_or(0),
            "range" => range = part(value),
            "expect" => answers.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?,
            "x-amz-content-sha256" => is_in_chunks = value.starts_with("STREAMING-"),
            _ => {}
        }
    }
    let mut body = Vec::new();
    reader.take(len).read_to_end(&mut body)?;
    if is_in_chunks {
        body = unchunked(&body)?;
    }
    Ok(Some(Request {
        method,
        key,
        query,
        range,
        body,
    }))
}

fn parameters(query: &str) -> Vec<(String, String)> {
    let words = query.split('&').filter(|word| !word.is_empty());
    words
        .map(|word| {
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            (decoded(name), decoded(value))
        })
        .collect()
}

/// `bytes=FIRST-LAST`, or to the end.
fn part(range: &str) -> Option<(u64, u64)> {
    let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
    let last = match last {
        "" => u64::MAX,
        last => last.parse().ok()?,
    };
    Some((first.parse().ok()?, last))
}

/// What is in chunks that are signed each: `LENGTH;chunk-signature=...`, the bytes, and so on.
fn unchunked(mut rest: &[u8]) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(rest.len());
    loop {
        let mut line = String::new();
        rest.read_line(&mut line)?;
        let (len, _) = line.trim_end().split_once(';').unwrap_or((&line, ""));
        let len = usize::from_str_radix(len.trim(), 16).map_err(io::Error::other)?;
        if len == 0 {
            return Ok(bytes);
        }
        let chunk = rest.get(..len).ok_or(io::ErrorKind::UnexpectedEof)?;
        bytes.extend_from_slice(chunk);
        rest = rest.get(len + 2..).ok_or(io::ErrorKind::UnexpectedEof)?;
    }
}

fn decoded(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        let hex = after.get(..2).and_then(|hex| std::str::from_utf8(hex).ok());
        let byte = hex.and_then(|hex| u8::from_str_radix(hex, 16).ok());
        match (first, byte) {
            (b'%', Some(byte)) => {
                bytes.push(byte);
                rest = &after[2..];
            }
            _ => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::{parameters, part, unchunked};

    #[test]
    fn signed_chunks_are_put_together() {
        let body = b"5;chunk-signature=ab\r\nhello\r\na;chunk-signature=cd\r\n, world \r\n\r\n\
            0;chunk-signature=ef\r\n\r\n";
        assert_eq!(unchunked(body).unwrap(), b"hello, world \r\n");
        assert!(unchunked(b"5;chunk-signature=ab\r\nhel").is_err());
    }

    #[test]
    fn what_is_asked_for_is_read() {
        assert_eq!(part("bytes=3-9"), Some((3, 9)));
        assert_eq!(part("bytes=3-"), Some((3, u64::MAX)));
        let asked = parameters("uploads&prefix=a%2Fb&x=");
        let asked: Vec<_> = asked
            .iter()
            .map(|(a, b)| (a.as_str(), b.as_str()))
            .collect();
        assert_eq!(asked, [("uploads", ""), ("prefix", "a/b"), ("x", "")]);
    }
}
