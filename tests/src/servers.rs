//! Object stores on this machine, for tests: moto's S3, Azurite's Azure, Garage, and Ceph's
//! S3. Each is started once for all tests of this process, and ends with it.

pub mod garage;
pub mod radosgw;

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::LazyLock;
use std::{env, fs, thread};

const BUCKET: &str = "snaps";
/// What installs these, but Garage and Ceph.
const OBJECT_SERVERS: &str = "scripts/object-servers.sh";

/// Makes a container in Azurite: a request that is signed with the account's key.
const MAKE_CONTAINER: &str = r"
const [url, account, key, name] = process.argv.slice(1);
const date = new Date().toUTCString(), version = '2021-08-06';
const text = `PUT${'\n'.repeat(12)}x-ms-date:${date}\nx-ms-version:${version}\n` +
    `/${account}/${account}/${name}\nrestype:container`;
const mac = require('crypto').createHmac('sha256', Buffer.from(key, 'base64')).update(text);
fetch(`${url}/${account}/${name}?restype=container`, {method: 'PUT', headers: {
    'x-ms-date': date, 'x-ms-version': version,
    authorization: `SharedKey ${account}:${mac.digest('base64')}`,
}}).then(async answer => {
    if (answer.status != 201) { console.error(answer.status, await answer.text()); process.exit(1); }
});
";

/// Where a bucket is, and how it is reached.
#[derive(Clone, Debug)]
pub struct Place {
    /// `s3://BUCKET/PREFIX` or `az://CONTAINER/PREFIX`.
    pub url: String,
    /// The server's URL, in clear.
    pub endpoint: String,
    /// The region, if it has one.
    pub region: Option<String>,
    /// A file with the keys.
    pub credentials: PathBuf,
}

impl Place {
    /// The same bucket by another way, such as a proxy that listens at this address.
    #[must_use]
    pub fn through(&self, address: SocketAddr) -> Self {
        let rest = self.endpoint.split('/').skip(3).collect::<Vec<_>>();
        let mut endpoint = format!("http://{address}");
        for part in rest {
            endpoint += &format!("/{part}");
        }
        Self {
            endpoint,
            ..self.clone()
        }
    }

    /// How `snapstore remote add NAME` is told of it.
    #[must_use]
    pub fn arguments(&self) -> Vec<String> {
        let mut arguments = vec![self.url.clone(), "--allow-http".to_owned()];
        let credentials = self.credentials.display().to_string();
        let region = self.region.as_ref().map(|region| ("--region", region));
        let options = [
            ("--endpoint", &self.endpoint),
            ("--credentials", &credentials),
        ];
        for (option, value) in options.into_iter().chain(region) {
            arguments.extend([option.to_owned(), value.clone()]);
        }
        arguments
    }
}

/// A server that runs.
#[derive(Debug)]
pub struct Server {
    place: Place,
    address: SocketAddr,
    /// It ends when the other end of its standard input does. Without one, the server ends
    /// when this process does.
    _process: Option<Child>,
}

impl Server {
    /// A bucket of one's own: a prefix that nobody else has.
    #[must_use]
    pub fn place(&self) -> Place {
        let mut place = self.place.clone();
        place.url += &format!("/{:032x}", fastrand::u128(..));
        place
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

/// The server, or why there is none.
pub type Found = Result<Server, String>;

/// moto's S3.
pub static S3: LazyLock<Found> = LazyLock::new(|| {
    let program = program("moto/bin/moto_server", OBJECT_SERVERS)?;
    let dir = directory("s3")?;
    let args = ["-H", "127.0.0.1", "-p", "0"];
    let (process, address) = start(&program, &args, &dir)?;
    let told = |error: std::io::Error| format!("{address} does not answer: {error}");
    let mut stream = TcpStream::connect(address).map_err(told)?;
    let request = format!(
        "PUT /{BUCKET} HTTP/1.1\r\nHost: {address}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    );
    let mut answer = String::new();
    stream
        .write_all(request.as_bytes())
        .and_then(|()| stream.read_to_string(&mut answer))
        .map_err(told)?;
    if !answer.starts_with("HTTP/1.1 200") {
        return Err(format!("it makes no bucket: {answer}"));
    }
    let credentials = "AWS_ACCESS_KEY_ID=tests\nAWS_SECRET_ACCESS_KEY=tests\n";
    Ok(Server {
        place: Place {
            url: format!("s3://{BUCKET}"),
            endpoint: format!("http://{address}"),
            region: Some("us-east-1".to_owned()),
            credentials: secret(&dir, credentials)?,
        },
        address,
        _process: Some(process),
    })
});

/// Azurite's Azure.
pub static AZURE: LazyLock<Found> = LazyLock::new(|| {
    let program = program("node_modules/.bin/azurite-blob", OBJECT_SERVERS)?;
    let dir = directory("azure")?;
    let files = dir.display().to_string();
    let args = [
        "--blobHost",
        "127.0.0.1",
        "--blobPort",
        "0",
        "--location",
        &files,
        "--skipApiVersionCheck",
        "--disableTelemetry",
    ];
    let (process, address) = start(&program, &args, &dir)?;
    let made = Command::new("node")
        .args(["-e", MAKE_CONTAINER])
        .args([&format!("http://{address}"), "tests", "dGVzdHM=", BUCKET])
        .output()
        .map_err(|error| error.to_string())?;
    if !made.status.success() {
        return Err(String::from_utf8_lossy(&made.stderr).into_owned());
    }
    let credentials = "AZURE_STORAGE_ACCOUNT_NAME=tests\nAZURE_STORAGE_ACCOUNT_KEY=dGVzdHM=\n";
    Ok(Server {
        place: Place {
            url: format!("az://{BUCKET}"),
            endpoint: format!("http://{address}/tests"),
            region: None,
            credentials: secret(&dir, credentials)?,
        },
        address,
        _process: Some(process),
    })
});

fn program(name: &str, installer: &str) -> Result<PathBuf, String> {
    let cache = env::var_os("SNAPSTORE_CACHE").map(PathBuf::from);
    let cache =
        cache.or_else(|| Some(PathBuf::from(env::var_os("XDG_CACHE_HOME")?).join("snapstore")));
    let cache =
        cache.or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cache/snapstore")));
    let found = cache.map(|cache| cache.join("object-servers").join(name));
    found
        .filter(|path| path.exists())
        .ok_or_else(|| format!("there is no {name}; {installer} installs it"))
}

/// Removed by whoever clears temporary files: the server outlives the last test.
fn directory(name: &str) -> Result<PathBuf, String> {
    directory_in(&env::temp_dir(), name)
}

fn directory_in(base: &Path, name: &str) -> Result<PathBuf, String> {
    let dir = tempfile::Builder::new()
        .prefix(&format!("snapstore-{name}-"))
        .tempdir_in(base)
        .map_err(|error| error.to_string())?;
    Ok(dir.keep())
}

fn secret(dir: &Path, text: &str) -> Result<PathBuf, String> {
    let path = dir.join("credentials");
    fs::write(&path, text)
        .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o600)))
        .map_err(|error| error.to_string())?;
    Ok(path)
}

/// Starts a server and waits until it says where it listens. A shell ends it, and removes
/// its files, when this process is gone, however it ends.
fn start(program: &Path, args: &[&str], dir: &Path) -> Result<(Child, SocketAddr), String> {
    const KEEP: &str = "dir=$1; shift; \"$@\" 2>&1 & read -r _; kill -9 $!; rm -rf \"$dir\"";
    let mut process = Command::new("sh")
        .args(["-c", KEEP, "sh"])
        .arg(dir)
        .arg(program)
        .args(args)
        .current_dir(dir)
        .env("AZURITE_ACCOUNTS", "tests:dGVzdHM=")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| error.to_string())?;
    let output = process.stdout.take().ok_or("it has no output")?;
    let mut lines = BufReader::new(output).lines();
    let mut said = String::new();
    for line in lines.by_ref() {
        let line = line.map_err(|error| error.to_string())?;
        let address = line.split_once("http://127.0.0.1:").map(|(_, port)| port);
        let port: String = address
            .unwrap_or_default()
            .chars()
            .take_while(char::is_ascii_digit)
            .collect();
        if let Ok(port) = port.parse::<u16>() {
            // It must never wait for a reader.
            thread::spawn(move || lines.for_each(drop));
            return Ok((process, (Ipv4Addr::LOCALHOST, port).into()));
        }
        said += &line;
        said.push('\n');
    }
    Err(format!("{} does not start: {said}", program.display()))
}
