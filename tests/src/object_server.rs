//! A directory as a bucket of S3, for one client that is not refused anything: as fast as
//! this machine, where moto takes milliseconds for each request. It knows no keys, no
//! writes in parts, and one date.

use std::fmt::Write as _;
use std::fs;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::thread;

const BUCKET: &str = "/snaps";
const DATE: &str = "Sun, 29 Nov 2026 00:00:00 GMT";
const ISO_DATE: &str = "2026-11-29T00:00:00.000Z";

/// Serves the objects in a directory as those of the bucket `snaps`, until this process
/// ends. Returns where.
///
/// # Errors
/// If it cannot listen.
pub fn serve(dir: &Path) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?;
    let dir = dir.to_owned();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let dir = dir.clone();
            // Whoever hangs up is done.
            thread::spawn(move || answer_all(&dir, stream));
        }
    });
    Ok(address)
}

struct Request {
    method: String,
    /// Of the object, or of the bucket if it is empty.
    key: String,
    query: String,
    range: Option<(u64, u64)>,
    body: Vec<u8>,
}

fn answer_all(dir: &Path, stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut stream = stream;
    while let Some(request) = read(&mut reader)? {
        let (status, more, body) = answer(dir, &request)?;
        let len = body.len();
        let mut out =
            format!("HTTP/1.1 {status}\r\nETag: \"a\"\r\nLast-Modified: {DATE}\r\n{more}");
        // What a HEAD is told is how long the object is.
        if !more.contains("Content-Length") {
            let _ = write!(out, "Content-Length: {len}\r\n");
        }
        out += "\r\n";
        let mut bytes = out.into_bytes();
        bytes.extend_from_slice(&body);
        stream.write_all(&bytes)?;
    }
    Ok(())
}

fn read(reader: &mut BufReader<TcpStream>) -> io::Result<Option<Request>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split(' ');
    let method = words.next().unwrap_or_default().to_owned();
    let target = words.next().unwrap_or_default();
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let key = decoded(path.strip_prefix(BUCKET).unwrap_or(path));
    let query = decoded(query);
    let (mut range, mut len) = (None, 0);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? <= 2 {
            break;
        }
        let (name, value) = line.split_once(':').unwrap_or((&line, ""));
        match name.to_ascii_lowercase().as_str() {
            "content-length" => len = value.trim().parse().unwrap_or(0),
            "range" => range = part(value.trim()),
            _ => {}
        }
    }
    let mut body = Vec::new();
    reader.take(len).read_to_end(&mut body)?;
    let key = key.trim_start_matches('/').to_owned();
    Ok(Some(Request {
        method,
        key,
        query,
        range,
        body,
    }))
}

/// `bytes=FIRST-LAST`
fn part(range: &str) -> Option<(u64, u64)> {
    let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
    Some((first.parse().ok()?, last.parse().ok()?))
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

/// Status, fields, body.
type Answer = (&'static str, String, Vec<u8>);

fn answer(dir: &Path, request: &Request) -> io::Result<Answer> {
    let path = dir.join(&request.key);
    let nothing = |status| (status, String::new(), Vec::new());
    match request.method.as_str() {
        "GET" if request.key.is_empty() => {
            let words = request.query.split('&');
            let prefix = words
                .into_iter()
                .find_map(|word| word.strip_prefix("prefix="));
            let xml = "Content-Type: application/xml\r\n".to_owned();
            Ok(("200 OK", xml, listing(dir, prefix.unwrap_or_default())?))
        }
        "PUT" => {
            fs::create_dir_all(path.parent().unwrap_or(dir))?;
            fs::write(&path, &request.body)?;
            Ok(nothing("200 OK"))
        }
        "DELETE" => {
            let _ = fs::remove_file(&path);
            Ok(nothing("204 No Content"))
        }
        _ => {
            let Ok(file) = fs::File::open(&path) else {
                let body = "<Error><Code>NoSuchKey</Code></Error>";
                return Ok(("404 Not Found", String::new(), body.into()));
            };
            let size = file.metadata()?.len();
            if request.method == "HEAD" {
                let len = format!("Content-Length: {size}\r\n");
                return Ok(("200 OK", len, Vec::new()));
            }
            let Some((first, last)) = request.range else {
                return Ok(("200 OK", String::new(), fs::read(&path)?));
            };
            if first >= size {
                return Ok(nothing("416 Range Not Satisfiable"));
            }
            let last = last.min(size - 1);
            let len = usize::try_from(last + 1 - first).map_err(io::Error::other)?;
            let mut body = vec![0; len];
            file.read_exact_at(&mut body, first)?;
            let range = format!("Content-Range: bytes {first}-{last}/{size}\r\n");
            Ok(("206 Partial Content", range, body))
        }
    }
}

fn listing(dir: &Path, prefix: &str) -> io::Result<Vec<u8>> {
    let mut out = "<?xml version=\"1.0\"?><ListBucketResult><Name>snaps</Name>\
         <IsTruncated>false</IsTruncated>"
        .to_owned();
    for (key, size) in objects(dir, dir)? {
        if key.starts_with(prefix) {
            let _ = write!(
                out,
                "<Contents><Key>{key}</Key><LastModified>{ISO_DATE}</LastModified>\
                 <ETag>\"a\"</ETag><Size>{size}</Size><StorageClass>STANDARD</StorageClass>\
                 </Contents>"
            );
        }
    }
    out += "</ListBucketResult>";
    Ok(out.into_bytes())
}

fn objects(dir: &Path, root: &Path) -> io::Result<Vec<(String, u64)>> {
    let mut found = Vec::new();
    let mut paths: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(dir)? {
        paths.push(entry?.path());
    }
    paths.sort();
    for path in paths {
        // One that is deleted meanwhile is not there.
        let Ok(metadata) = fs::metadata(&path) else {
            continue;
        };
        if metadata.is_dir() {
            found.extend(objects(&path, root)?);
            continue;
        }
        let key = path.strip_prefix(root).map_err(io::Error::other)?;
        found.push((key.to_string_lossy().into_owned(), metadata.len()));
    }
    Ok(found)
}
