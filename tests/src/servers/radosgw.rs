//! Ceph's S3: a monitor, a disk in a file, and three gateways. The disk and each of the
//! gateways may be killed, stopped and started while hosts work on the bucket. Nobody has to be
//! root for it. Ceph's `vstart.sh` does much the same.
//!
//! It takes a minute and much of a machine, so it is only for who asks: `SNAPSTORE_RADOSGW=1`.

use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Signal, kill_process};

use super::{BUCKET, Found, Place, Server, directory_in, secret};

/// How many gateways there are.
pub const GATEWAYS: usize = 3;
/// The monitor and the disk are started before them.
const BEFORE: usize = 2;
const ASKED: &str = "SNAPSTORE_RADOSGW";
const REGION: &str = "default";
/// The access key, and the secret one.
const KEY: &str = "tests";
/// Below those that the system gives to connections: a gateway that is started again has the
/// same one.
const PORTS: std::ops::Range<u16> = 20_000..32_000;
/// How long it may take until a gateway answers.
const READY: Duration = Duration::from_secs(120);

/// So much of memory has to be free for what the gateways keep to be there.
const ROOM_BYTES: u64 = 8 << 30;

/// Starts the process of each number that it reads, and prints its id. It ends all of them,
/// also those that are stopped, and removes their files, when nobody can ask it any more,
/// however that came to be.
const KEEPER: &str = r#"
trap '' INT TERM HUP
dir=$1 processes=
cd "$dir" || exit
while read -r number; do
    sh "./$number.sh" >>"$number.log" 2>&1 </dev/null &
    processes="$processes $!"
    echo $!
done
for process in $processes; do
    # A number may be another process's by now.
    [ "$(readlink "/proc/$process/cwd")" != "$dir" ] || kill -9 "$process"
done
wait
rm -rf "$dir"
"#;

/// A request with a body to a path, signed in the way of the second version, which is short.
/// Python is there, since Ceph's own programs need it.
const SIGNED: &str = r"
import base64, email.utils, hashlib, hmac, http.client, sys
address, key, path, body = sys.argv[1:]
date = email.utils.formatdate(usegmt=True)
md5 = base64.b64encode(hashlib.md5(body.encode()).digest()).decode()
text = f'PUT\n{md5}\n\n{date}\n{path}'
mac = hmac.new(key.encode(), text.encode(), hashlib.sha1).digest()
connection = http.client.HTTPConnection(address, timeout=60)
connection.request('PUT', path, body, {'Date': date, 'Content-MD5': md5,
    'Authorization': f'AWS {key}:{base64.b64encode(mac).decode()}'})
answer = connection.getresponse()
if answer.status != 200: sys.exit(f'{answer.status} {answer.read().decode()}')
";

/// A rule that deletes what is a day old, where a day is as long as the gateways say.
const RULE: &str = "<LifecycleConfiguration><Rule><ID>gone</ID><Prefix></Prefix>\
    <Status>Enabled</Status><Expiration><Days>1</Days></Expiration></Rule>\
    </LifecycleConfiguration>";

/// To the shell, and from it.
type Pipes = (ChildStdin, BufReader<ChildStdout>);

/// Processes that run, for as long as it lives. All of them work in one directory, and nobody
/// else does.
#[derive(Debug)]
pub struct Cluster {
    dir: PathBuf,
    credentials: PathBuf,
    addresses: Vec<SocketAddr>,
    processes: Mutex<Vec<Pid>>,
    keeper: Mutex<Option<Pipes>>,
    process: Child,
}

/// A process that may be away for a while.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part {
    /// It alone has all objects: nobody is answered until it is there again.
    Disk,
    /// It keeps nothing.
    Gateway(usize),
}

impl Part {
    fn number(self) -> usize {
        match self {
            Self::Disk => BEFORE - 1,
            Self::Gateway(number) => BEFORE + number,
        }
    }
}

/// The first gateway of a cluster that nobody disturbs, until this process ends.
pub static RADOSGW: LazyLock<Found> = LazyLock::new(|| {
    let cluster = Box::leak(Box::new(Cluster::start()?));
    let mut place = cluster.place(0);
    place.url = format!("s3://{BUCKET}");
    Ok(Server {
        place,
        address: cluster.addresses[0],
        _process: None,
    })
});

impl Cluster {
    /// Starts one with a bucket in it.
    ///
    /// # Errors
    /// Why there is none: nobody asked for it, or Ceph is not installed, or does not start.
    pub fn start() -> Result<Self, String> {
        if env::var_os(ASKED).is_none() {
            return Err(format!(
                "it is only run with {ASKED}=1 (scripts/soak.sh SECONDS radosgw)"
            ));
        }
        for name in ["radosgw", "radosgw-admin", "ceph-mon", "ceph-osd", "ceph"] {
            let paths = env::var_os("PATH").unwrap_or_default();
            if !env::split_paths(&paths).any(|dir| dir.join(name).exists()) {
                return Err(format!(
                    "there is no {name}; scripts/radosgw.sh installs it"
                ));
            }
        }
        let mut tries = 3;
        loop {
            match Self::try_start() {
                Err(why) if tries > 1 => {
                    // Somebody else took a port.
                    println!("radosgw is started once more: {why}");
                    tries -= 1;
                }
                done => return done,
            }
        }
    }

    fn try_start() -> Result<Self, String> {
        let dir = directory_in(&room(), "radosgw")?;
        let dir = dir.canonicalize().map_err(told)?;
        let mut addresses = free_addresses(1 + GATEWAYS)?;
        let monitor = addresses.remove(0);
        let lines = format!("AWS_ACCESS_KEY_ID={KEY}\nAWS_SECRET_ACCESS_KEY={KEY}\n");
        let credentials = secret(&dir, &lines)?;
        let mut process = Command::new("sh")
            .args(["-c", KEEPER, "sh"])
            .arg(&dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(told)?;
        let input = process.stdin.take().ok_or("it has no input")?;
        let output = BufReader::new(process.stdout.take().ok_or("it has no output")?);
        let cluster = Self {
            dir,
            credentials,
            addresses,
            processes: Mutex::default(),
            keeper: Mutex::new(Some((input, output))),
            process,
        };
        cluster.lay_out(monitor)?;
        Ok(cluster)
    }

    /// Starts all processes, the monitor first, and makes a user and a bucket.
    fn lay_out(&self, monitor: SocketAddr) -> Result<(), String> {
        let (id, disk) = (uuid()?, uuid()?);
        let config = config(&self.dir, &id, monitor, &self.addresses);
        fs::write(self.dir.join("ceph.conf"), config).map_err(told)?;
        for name in ["mon", "osd"] {
            fs::create_dir(self.dir.join(name)).map_err(told)?;
        }
        let at = format!("[v2:{monitor}]");
        let map = ["--create", "--addv", "a", &at, "--fsid", &id, "monmap"];
        self.ceph("monmaptool", &map)?;
        self.ceph("ceph-mon", &["-i", "a", "--mkfs", "--monmap", "monmap"])?;
        self.add("ceph-mon", ["-i", "a"])?;
        self.ceph("ceph", &["osd", "new", &disk, "0"])?;
        self.ceph("ceph-osd", &["-i", "0", "--mkfs", "--osd-uuid", &disk])?;
        self.add("ceph-osd", ["-i", "0"])?;
        let user = ["user", "create", "--uid", KEY, "--display-name", KEY];
        let keys = ["--access-key", KEY, "--secret-key", KEY];
        self.ceph("radosgw-admin", &[&user[..], &keys].concat())?;
        for number in 0..GATEWAYS {
            self.add("radosgw", ["-n", &format!("client.rgw.{number}")])?;
            self.until_listening(number)?;
        }
        self.put(&format!("/{BUCKET}"), "")?;
        if env::var_os("SNAPSTORE_RADOSGW_FAULT").is_some() {
            self.put(&format!("/{BUCKET}?lifecycle"), RULE)?;
        }
        Ok(())
    }

    /// A program of Ceph that does something and ends.
    fn ceph(&self, program: &str, arguments: &[&str]) -> Result<(), String> {
        // It waits for the cluster for ever, and a test that is killed cannot end it.
        let mut command = Command::new("timeout");
        command.args(["-s", "KILL", "120", program, "-c", "ceph.conf"]);
        command.args(arguments).current_dir(&self.dir);
        answer_of(program, command.env("LC_ALL", "C"))
    }

    /// Starts another process, which goes on.
    fn add(&self, program: &str, who: [&str; 2]) -> Result<(), String> {
        let number = self.processes().len();
        let script = format!("exec {program} -c ceph.conf -f {} {}\n", who[0], who[1]);
        fs::write(self.dir.join(format!("{number}.sh")), script).map_err(told)?;
        let started = self.start_process(number)?;
        self.processes().push(started);
        Ok(())
    }

    fn until_listening(&self, gateway: usize) -> Result<(), String> {
        let end = Instant::now() + READY;
        while TcpStream::connect(self.addresses[gateway]).is_err() {
            if Instant::now() > end {
                let said = self.log(Part::Gateway(gateway).number());
                return Err(format!("a gateway does not start: {said}"));
            }
            thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    fn put(&self, path: &str, body: &str) -> Result<(), String> {
        let address = self.addresses[0].to_string();
        let mut command = Command::new("python3");
        command.args(["-c", SIGNED, &address, KEY, path, body]);
        answer_of(&format!("a request for {path}"), &mut command)
    }

    /// A bucket of one's own, by way of a gateway.
    #[must_use]
    pub fn place(&self, gateway: usize) -> Place {
        Place {
            url: format!("s3://{BUCKET}/{:032x}", fastrand::u128(..)),
            endpoint: self.endpoint(gateway),
            region: Some(REGION.to_owned()),
            credentials: self.credentials.clone(),
        }
    }

    /// How a gateway is reached.
    #[must_use]
    pub fn endpoint(&self, gateway: usize) -> String {
        format!("http://{}", self.addresses[gateway])
    }

    /// Ends a process as a fault of its machine would.
    ///
    /// # Errors
    /// If it has ended by itself.
    pub fn kill(&self, part: Part) -> Result<(), String> {
        self.signal(part, Signal::KILL)
    }

    /// A process does nothing any more, and its connections stay.
    ///
    /// # Errors
    /// If it has ended by itself.
    pub fn stop(&self, part: Part) -> Result<(), String> {
        self.signal(part, Signal::STOP)
    }

    /// One that was stopped goes on.
    ///
    /// # Errors
    /// If it has ended by itself.
    pub fn go_on(&self, part: Part) -> Result<(), String> {
        self.signal(part, Signal::CONT)
    }

    /// One that was killed is started again.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn restart(&self, part: Part) -> Result<(), String> {
        let started = self.start_process(part.number())?;
        self.processes()[part.number()] = started;
        Ok(())
    }

    /// The last lines of what a process has said.
    fn log(&self, number: usize) -> String {
        let said = fs::read(self.dir.join(format!("{number}.log"))).unwrap_or_default();
        let said = String::from_utf8_lossy(&said);
        let lines: Vec<&str> = said.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }

    fn processes(&self) -> std::sync::MutexGuard<'_, Vec<Pid>> {
        self.processes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// A number may be another process's once this one has ended.
    fn signal(&self, part: Part, signal: Signal) -> Result<(), String> {
        let pid = self.processes()[part.number()];
        let works_in = fs::read_link(format!("/proc/{pid}/cwd"));
        if works_in.is_ok_and(|dir| dir == self.dir) {
            return kill_process(pid, signal).map_err(told);
        }
        let said = self.log(part.number());
        Err(format!("{part:?} has ended by itself: {said}"))
    }

    fn start_process(&self, number: usize) -> Result<Pid, String> {
        let mut keeper = self.keeper.lock().unwrap_or_else(PoisonError::into_inner);
        let (input, output) = keeper.as_mut().ok_or("the processes are ended")?;
        writeln!(input, "{number}").map_err(told)?;
        let mut line = String::new();
        output.read_line(&mut line).map_err(told)?;
        let pid = line.trim().parse().ok().and_then(Pid::from_raw);
        pid.ok_or_else(|| format!("process {number} is not started"))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let keeper = self.keeper.get_mut();
        drop(keeper.unwrap_or_else(PoisonError::into_inner).take());
        // It ends once it has ended the others.
        let _ = self.process.wait();
    }
}

fn told(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// Where a disk is quick: in memory, if there is room and the system lets a file there be
/// written past the page cache, as Ceph does; not every Linux does.
fn room() -> PathBuf {
    let memory = Path::new("/dev/shm");
    let has_room = rustix::fs::statvfs(memory)
        .is_ok_and(|found| found.f_bavail.saturating_mul(found.f_frsize) > ROOM_BYTES);
    let direct = (OFlags::TMPFILE | OFlags::DIRECT | OFlags::RDWR, Mode::RUSR);
    match has_room && rustix::fs::open(memory, direct.0, direct.1).is_ok() {
        true => memory.to_owned(),
        false => env::temp_dir(),
    }
}

/// Addresses that nobody listens on.
fn free_addresses(count: usize) -> Result<Vec<SocketAddr>, String> {
    let mut held: Vec<TcpListener> = Vec::new();
    let mut tries = 1000;
    while held.len() < count {
        match TcpListener::bind((Ipv4Addr::LOCALHOST, fastrand::u16(PORTS))) {
            Ok(listener) => held.push(listener),
            Err(error) if tries == 0 => return Err(told(error)),
            Err(_) => tries -= 1,
        }
    }
    let addresses = held.iter().map(TcpListener::local_addr);
    addresses.collect::<Result<_, _>>().map_err(told)
}

fn uuid() -> Result<String, String> {
    let uuid = fs::read_to_string("/proc/sys/kernel/random/uuid").map_err(told)?;
    Ok(uuid.trim().to_owned())
}

fn answer_of(program: &str, command: &mut Command) -> Result<(), String> {
    let output = command.stdin(Stdio::null()).output().map_err(told)?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!(
            "{program}: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        )),
    }
}

/// All of it is for this machine and this test alone, so nobody has to show a key to the
/// monitor. What is deleted gives its room back soon, and the monitor decides at once, where
/// Ceph waits for hours and for a second. The disk's lease to answer reads lasts for hours: one
/// that is alone, and was late to prolong a short one, answered nobody any more.
fn config(dir: &Path, id: &str, monitor: SocketAddr, entries: &[SocketAddr]) -> String {
    let dir = dir.display();
    let mut text = format!(
        "[global]\n\
         fsid = {id}\n\
         mon host = v2:{monitor}\n\
         mon data = {dir}/mon\n\
         osd data = {dir}/osd\n\
         run dir = {dir}\n\
         crash dir = {dir}\n\
         chdir =\n\
         {SETTINGS}"
    );
    for (number, entry) in entries.iter().enumerate() {
        let _ = write!(
            text,
            "[client.rgw.{number}]\n\
             rgw frontends = beast endpoint={entry}\n"
        );
    }
    text
}

const SETTINGS: &str = "\
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
ms mon client mode = crc
ms bind msgr1 = false
ms max backoff = 1
keyring = /dev/null
admin socket =
log to file = false
log to stderr = true
mon cluster log to file = false
mon cluster log to stderr = false
debug rgw = 0
debug mon = 0
debug osd = 0
debug paxos = 0
debug rocksdb = 0
debug bluestore = 0
debug bluefs = 0
debug bdev = 0
mon allow pool size one = true
mon data avail crit = 0
mon data avail warn = 0
mon tick interval = 1
paxos propose interval = 0.05
paxos min wait = 0.01
osd objectstore = bluestore
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd pool default read lease ratio = 1000
bluestore block size = 17179869184
bluestore cache autotune = false
bluestore cache size = 67108864
bluestore rocksdb options = compression=kNoCompression,max_write_buffer_number=2,write_buffer_size=8388608
osd op num shards = 1
rgw enable apis = s3
rgw thread pool size = 32
rgw gc obj min wait = 20
rgw gc processor period = 20
rgw lc debug interval = 5
";
