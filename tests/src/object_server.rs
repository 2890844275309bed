//! A directory as a bucket of S3, for clients that are not refused anything: as fast as
//! this machine, where moto takes milliseconds for each request. It knows no keys, no
//! conditions, and one date. What it was asked for is counted.

mod counts;
mod listing;
mod request;

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::fs;
use std::io::{self, BufReader, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

pub use counts::{Kind, Requests};
use request::Request;

const DATE: &str = "Sun, 29 Nov 2026 00:00:00 GMT";
const ISO_DATE: &str = "2026-11-29T00:00:00.000Z";

/// Serves the objects in a directory as those of the bucket `snaps`, until this process
/// ends. Returns where.
///
/// # Errors
/// If it cannot listen.
pub fn serve(dir: &Path) -> io::Result<SocketAddr> {
    Ok(ObjectServer::start(dir)?.address())
}

/// The same, and what it was asked for.
#[derive(Debug)]
pub struct ObjectServer {
    address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    dir: PathBuf,
    requests: Mutex<Requests>,
    /// Objects that come in parts, by the number of their upload.
    uploads: Mutex<HashMap<u64, Parts>>,
}

type Parts = BTreeMap<u32, Vec<u8>>;

impl ObjectServer {
    /// Serves this directory until the process ends.
    ///
    /// # Errors
    /// If it cannot listen.
    pub fn start(dir: &Path) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            dir: dir.to_owned(),
            requests: Mutex::default(),
            uploads: Mutex::default(),
        });
        let serving = shared.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = serving.clone();
                // Whoever hangs up is done.
                thread::spawn(move || shared.answer_all(stream));
            }
        });
        Ok(Self { address, shared })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What it was asked for so far.
    #[must_use]
    pub fn requests(&self) -> Requests {
        *lock(&self.shared.requests)
    }
}

/// Status, fields, body.
type Answer = (&'static str, String, Vec<u8>);

fn nothing(status: &'static str) -> Answer {
    (status, String::new(), Vec::new())
}

fn xml(body: impl Into<Vec<u8>>) -> Answer {
    let field = "Content-Type: application/xml\r\n".to_owned();
    ("200 OK", field, body.into())
}

impl Shared {
    fn answer_all(&self, mut stream: TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let mut reader = BufReader::new(stream.try_clone()?);
        while let Some(request) = request::read(&mut reader, &mut stream)? {
            lock(&self.requests).add(request.kind());
            let (status, more, body) = self.answer(&request)?;
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

    fn answer(&self, request: &Request) -> io::Result<Answer> {
        let upload = request.parameter("uploadId");
        match (request.method.as_str(), upload) {
            ("GET", _) if request.key.is_empty() => {
                if request.parameter("location").is_some() {
                    return Ok(xml("<LocationConstraint></LocationConstraint>"));
                }
                Ok(xml(listing::listing(&self.dir, request)?))
            }
            // The bucket is there, however often it is made.
            ("HEAD" | "PUT", _) if request.key.is_empty() => Ok(nothing("200 OK")),
            ("POST" | "PUT" | "DELETE", Some(id)) => self.in_parts(request, id),
            ("POST", None) if request.parameter("uploads").is_some() => {
                let mut uploads = lock(&self.uploads);
                let number = uploads.keys().max().map_or(1, |last| last + 1);
                uploads.insert(number, Parts::new());
                Ok(xml(format!(
                    "<InitiateMultipartUploadResult><Bucket>snaps</Bucket><Key>{}</Key>\
                     <UploadId>{number}</UploadId></InitiateMultipartUploadResult>",
                    request.key
                )))
            }
            ("PUT", None) => {
                self.write(&request.key, &request.body)?;
                Ok(nothing("200 OK"))
            }
            ("DELETE", None) => {
                let _ = fs::remove_file(self.dir.join(&request.key));
                Ok(nothing("204 No Content"))
            }
            ("GET" | "HEAD", _) => read(&self.dir.join(&request.key), request),
            _ => Ok(nothing("501 Not Implemented")),
        }
    }

    /// A part of an object, or the end of one that came in parts.
    fn in_parts(&self, request: &Request, id: &str) -> io::Result<Answer> {
        let mut uploads = lock(&self.uploads);
        let known = id.parse().ok().filter(|id| uploads.contains_key(id));
        let Some(id) = known else {
            return Ok(nothing("404 Not Found"));
        };
        if request.method == "PUT" {
            let number = request.parameter("partNumber").map(str::parse);
            let Some(Ok(number)) = number else {
                return Ok(nothing("400 Bad Request"));
            };
            let parts = uploads.get_mut(&id).expect("it was just there");
            parts.insert(number, request.body.clone());
            return Ok(nothing("200 OK"));
        }
        let parts = uploads.remove(&id).expect("it was just there");
        drop(uploads);
        if request.method == "DELETE" {
            return Ok(nothing("204 No Content"));
        }
        let bytes: Vec<u8> = parts.into_values().flatten().collect();
        self.write(&request.key, &bytes)?;
        Ok(xml(format!(
            "<CompleteMultipartUploadResult><Bucket>snaps</Bucket><Key>{}</Key>\
             <ETag>\"a\"</ETag></CompleteMultipartUploadResult>",
            request.key
        )))
    }

    fn write(&self, key: &str, bytes: &[u8]) -> io::Result<()> {
        let path = self.dir.join(key);
        fs::create_dir_all(path.parent().unwrap_or(&self.dir))?;
        fs::write(path, bytes)
    }
}

/// What is in an object, or about it.
fn read(path: &Path, request: &Request) -> io::Result<Answer> {
    let file = fs::File::open(path).ok();
    let metadata = file.as_ref().and_then(|file| file.metadata().ok());
    let (Some(file), Some(metadata)) = (file, metadata.filter(fs::Metadata::is_file)) else {
        let body = "<Error><Code>NoSuchKey</Code></Error>";
        let body = if request.method == "HEAD" { "" } else { body };
        return Ok(("404 Not Found", String::new(), body.into()));
    };
    let size = metadata.len();
    if request.method == "HEAD" {
        let len = format!("Content-Length: {size}\r\n");
        return Ok(("200 OK", len, Vec::new()));
    }
    let Some((first, last)) = request.range else {
        return Ok(("200 OK", String::new(), fs::read(path)?));
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

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
