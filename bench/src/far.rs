//! A bucket that is far away: a directory behind a server and a line in this process. Each
//! request takes a round trip, and all share a bandwidth.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::ensure;
use snapstore_tests::harness::Cli;
use snapstore_tests::object_server::{Kind, ObjectServer, Requests};
use snapstore_tests::proxy::{Line, Proxy};

use crate::tools::figure;
use crate::utf8;

/// What every client gives as its key; nobody looks.
pub const KEY: (&str, &str) = ("a", "b");
/// The region that the server is in.
pub const REGION: &str = "here";

/// A line's round trip in milliseconds, and what it carries in Mbit/s.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Way(pub u64, pub u64);

/// All that lazy mounts are measured with.
pub const WAYS: [Way; 6] = [
    Way(1, 100),
    Way(10, 100),
    Way(50, 100),
    Way(1, 1000),
    Way(10, 1000),
    Way(50, 1000),
];

impl Way {
    /// The line.
    #[must_use]
    pub fn line(self) -> Line {
        Line {
            round_trip: self.round_trip(),
            bytes_per_second: Some(figure(self.1) * 1e6 / 8.0),
        }
    }

    /// From a request to its answer, at least.
    #[must_use]
    pub fn round_trip(self) -> Duration {
        Duration::from_millis(self.0)
    }
}

impl std::fmt::Display for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ms, {} Mbit/s", self.0, self.1)
    }
}

/// The bucket.
pub struct Far {
    bucket: PathBuf,
    keys: PathBuf,
    server: ObjectServer,
}

/// What something took that was done with the bucket.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    /// The clock's.
    pub seconds: f64,
    /// That went over the line, both ways.
    pub bytes: u64,
    /// As the server counts them.
    pub requests: Requests,
}

impl Cost {
    /// All three as figures.
    #[must_use]
    pub fn figures(&self) -> [f64; 3] {
        [
            self.seconds,
            figure(self.bytes),
            figure(self.requests.all()),
        ]
    }
}

impl Far {
    /// An empty one in a new directory.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn new(dir: &Path) -> anyhow::Result<Self> {
        let bucket = dir.join("bucket");
        fs::create_dir_all(&bucket)?;
        let keys = dir.join("credentials");
        let text = format!(
            "AWS_ACCESS_KEY_ID={}\nAWS_SECRET_ACCESS_KEY={}\n",
            KEY.0, KEY.1
        );
        fs::write(&keys, text)?;
        fs::set_permissions(&keys, fs::Permissions::from_mode(0o600))?;
        Ok(Self {
            server: ObjectServer::start(&bucket)?,
            bucket,
            keys,
        })
    }

    /// The bucket's directory.
    #[must_use]
    pub fn bucket(&self) -> &Path {
        &self.bucket
    }

    /// What the server was asked for so far.
    #[must_use]
    pub fn requests(&self) -> Requests {
        self.server.requests()
    }

    /// A line to the server.
    ///
    /// # Errors
    /// If it cannot listen.
    pub fn line(&self, line: Line) -> anyhow::Result<Proxy> {
        Ok(Proxy::start(self.server.address(), line)?)
    }

    /// Makes the part below `prefix` known to a store as its remote `site`.
    ///
    /// # Errors
    /// If that fails.
    pub fn reach(&self, cli: &Cli, prefix: &str, through: &Proxy) -> anyhow::Result<()> {
        let url = format!("s3://snaps{prefix}");
        let endpoint = format!("http://{}", through.address());
        let add = ["remote", "add", "site", &url, "--region", REGION];
        let keys = ["--credentials", utf8(&self.keys)?];
        let way = ["--allow-http", "--endpoint", &endpoint];
        cli.ok(&[&add[..], &keys, &way].concat())?;
        Ok(())
    }

    /// What this takes.
    ///
    /// # Errors
    /// The work's.
    pub fn cost(
        &self,
        through: &Proxy,
        work: impl FnOnce() -> anyhow::Result<()>,
    ) -> anyhow::Result<Cost> {
        let (bytes, requests) = (through.moved_bytes(), self.requests());
        let began = Instant::now();
        work()?;
        Ok(Cost {
            seconds: began.elapsed().as_secs_f64(),
            bytes: through.moved_bytes() - bytes,
            requests: self.requests().since(&requests),
        })
    }
}

/// Removes a store whose mount is gone. Its server may keep something for a moment yet.
///
/// # Errors
/// If it stays.
pub fn remove(store: &Path) -> anyhow::Result<()> {
    for _ in 0..200 {
        if fs::remove_dir_all(store).is_ok() {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(fs::remove_dir_all(store)?)
}

/// Requests by kind, in words: those that there are.
#[must_use]
pub fn in_words(requests: &Requests) -> String {
    let kinds = [
        (Kind::Read, "reads"),
        (Kind::Look, "looks"),
        (Kind::Listing, "listings"),
        (Kind::Write, "writes"),
        (Kind::Parts, "begin and end of parts"),
        (Kind::Deletion, "deletions"),
        (Kind::Other, "others"),
    ];
    let some = kinds.iter().filter(|(kind, _)| requests.of(*kind) > 0);
    let words = some.map(|(kind, name)| format!("{} {name}", requests.of(*kind)));
    words.collect::<Vec<_>>().join(", ")
}

/// Reads parts of an object of the bucket, so many at once.
///
/// # Errors
/// If a part does not come, and `take`'s.
pub fn get_all(
    address: SocketAddr,
    key: &str,
    parts: Vec<(u64, u64)>,
    at_once: usize,
    take: impl Fn(u64, &[u8]) -> anyhow::Result<()> + Sync,
) -> anyhow::Result<()> {
    let left = Mutex::new(parts.into_iter());
    let work = || -> anyhow::Result<()> {
        let mut client = Client::new(address)?;
        let mut bytes = Vec::new();
        loop {
            let next = left.lock().expect("no panic").next();
            let Some((start, len)) = next else {
                return Ok(());
            };
            client.get(key, start, len, &mut bytes)?;
            take(start, &bytes)?;
        }
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..at_once).map(|_| scope.spawn(work)).collect();
        let mut done = threads.into_iter().map(|one| one.join().expect("no panic"));
        done.try_for_each(|done| done)
    })
}

/// All of an object, in parts as a client asks for them that wants to be quick.
///
/// # Errors
/// As [`get_all`].
pub fn download(
    address: SocketAddr,
    key: &str,
    len: u64,
    take: impl Fn(u64, &[u8]) -> anyhow::Result<()> + Sync,
) -> anyhow::Result<()> {
    const BYTES: u64 = 8 << 20;
    const AT_ONCE: usize = 4;
    let parts = (0..len).step_by(BYTES as usize);
    let parts = parts.map(|start| (start, BYTES.min(len - start)));
    get_all(address, key, parts.collect(), AT_ONCE, take)
}

/// The least that a client of the bucket can be: a connection.
pub struct Client(BufReader<TcpStream>);

impl Client {
    /// Connects.
    ///
    /// # Errors
    /// If nobody listens.
    pub fn new(address: SocketAddr) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        Ok(Self(BufReader::new(stream)))
    }

    /// Reads a part of an object.
    ///
    /// # Errors
    /// If it does not come.
    pub fn get(
        &mut self,
        key: &str,
        start: u64,
        len: u64,
        bytes: &mut Vec<u8>,
    ) -> anyhow::Result<()> {
        let last = start + len - 1;
        let request = format!("GET /snaps/{key} HTTP/1.1\r\nRange: bytes={start}-{last}\r\n\r\n");
        self.0.get_mut().write_all(request.as_bytes())?;
        let mut line = String::new();
        self.0.read_line(&mut line)?;
        ensure!(line.starts_with("HTTP/1.1 206"), "{line}");
        while line.len() > 2 {
            line.clear();
            self.0.read_line(&mut line)?;
        }
        bytes.resize(usize::try_from(len)?, 0);
        Ok(self.0.read_exact(bytes)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_over_the_line_is_counted() {
        let dir = tempfile::tempdir().unwrap();
        let far = Far::new(dir.path()).unwrap();
        fs::write(far.bucket().join("object"), [7; 100_000]).unwrap();
        let line = far.line(Line::default()).unwrap();
        let cost = far.cost(&line, || {
            download(line.address(), "object", 100_000, |start, bytes| {
                ensure!((start, bytes.len()) == (0, 100_000));
                Ok(())
            })
        });
        let cost = cost.unwrap();
        assert_eq!(in_words(&cost.requests), "1 reads");
        assert!((100_000..101_000).contains(&cost.bytes), "{}", cost.bytes);
        assert!((cost.figures()[2] - 1.0).abs() < 1e-9);
    }

    #[test]
    fn lines_are_as_they_are_called() {
        let way = Way(10, 100);
        assert_eq!(way.to_string(), "10 ms, 100 Mbit/s");
        assert_eq!(way.line().bytes_per_second, Some(12.5e6));
    }
}
