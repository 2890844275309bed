//! Three nodes of Garage that keep each object three times: a bucket on servers that may be
//! killed, stopped and started while hosts work on it.

use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::{BUCKET, Found, Place, Server, directory, program, secret};

/// How many nodes there are.
pub const NODES: usize = 3;
const REGION: &str = "garage";
/// Below those that the system gives to connections: a node that is started again has the
/// same one.
const PORTS: std::ops::Range<u16> = 20_000..32_000;
/// How long it may take until nodes know of each other.
const READY: Duration = Duration::from_secs(60);

/// Starts the node of each number that it reads, and prints its process. It ends all of them,
/// also those that are stopped, and removes their files, when nobody can ask it any more,
/// however that came to be.
const KEEPER: &str = r#"
trap '' INT TERM HUP
dir=$1 program=$2 nodes=
while read -r number; do
    "$program" -c "$dir/$number.toml" server >>"$dir/$number.log" 2>&1 </dev/null &
    nodes="$nodes $!"
    echo $!
done
for node in $nodes; do
    # A number may be another process's by now.
    [ "$(readlink "/proc/$node/exe")" != "$program" ] || kill -9 "$node"
done
wait
rm -rf "$dir"
"#;

/// To the shell, and from it.
type Pipes = (ChildStdin, BufReader<ChildStdout>);

/// Nodes that run, for as long as it lives.
#[derive(Debug)]
pub struct Cluster {
    dir: PathBuf,
    program: PathBuf,
    credentials: PathBuf,
    addresses: Vec<SocketAddr>,
    processes: Mutex<Vec<Pid>>,
    keeper: Mutex<Option<Pipes>>,
    process: Child,
}

/// The first node of a cluster that nobody disturbs, until this process ends.
pub static GARAGE: LazyLock<Found> = LazyLock::new(|| {
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
    /// Starts nodes with a bucket in them.
    ///
    /// # Errors
    /// Why there are none: Garage is not installed, or does not start.
    pub fn start() -> Result<Self, String> {
        let program = program("garage/bin/garage", "scripts/garage.sh")?;
        let program = program.canonicalize().map_err(told)?;
        let mut tries = 3;
        loop {
            match Self::try_start(&program) {
                Err(why) if tries > 1 => {
                    // Somebody else took a port.
                    println!("Garage is started once more: {why}");
                    tries -= 1;
                }
                done => return done,
            }
        }
    }

    fn try_start(program: &Path) -> Result<Self, String> {
        let dir = directory("garage")?;
        let ports = free_ports(2 * NODES).map_err(told)?;
        let addresses = |ports: &[u16]| -> Vec<SocketAddr> {
            let address = |port: &u16| (Ipv4Addr::LOCALHOST, *port).into();
            ports.iter().map(address).collect()
        };
        let (rpc, s3) = (addresses(&ports[..NODES]), addresses(&ports[NODES..]));
        let rpc_secret = format!("{:032x}{:032x}", fastrand::u128(..), fastrand::u128(..));
        let configure = |number: usize, peers: &[String]| {
            let addresses = (rpc[number], s3[number]);
            let config = config(&dir, number, &rpc_secret, addresses, peers);
            fs::write(dir.join(format!("{number}.toml")), config).map_err(told)
        };
        for number in 0..NODES {
            configure(number, &[])?;
            fs::create_dir(dir.join(number.to_string())).map_err(told)?;
        }
        let mut process = Command::new("sh")
            .args(["-c", KEEPER, "sh"])
            .args([&dir, program])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(told)?;
        let input = process.stdin.take().ok_or("it has no input")?;
        let output = BufReader::new(process.stdout.take().ok_or("it has no output")?);
        let mut cluster = Self {
            dir: dir.clone(),
            program: program.to_owned(),
            credentials: PathBuf::new(),
            addresses: s3.clone(),
            processes: Mutex::default(),
            keeper: Mutex::new(Some((input, output))),
            process,
        };
        for number in 0..NODES {
            let started = cluster.start_node(number)?;
            cluster.processes().push(started);
        }
        let ids = cluster.lay_out()?;
        // One that is started again asks these.
        (0..NODES).try_for_each(|number| configure(number, &ids))?;
        Ok(cluster)
    }

    /// Makes one cluster of the nodes, and a bucket with a key in it. Returns what the nodes are
    /// called.
    fn lay_out(&mut self) -> Result<Vec<String>, String> {
        let mut ids = Vec::new();
        for number in 0..NODES {
            let id = self.until_done(number, &["node", "id", "-q"])?;
            ids.push(id.trim().to_owned());
        }
        // They would tell each other of each other, within half a minute.
        for (number, id) in (0..NODES).flat_map(|number| ids.iter().map(move |id| (number, id))) {
            if *id != ids[number] {
                self.until_done(number, &["node", "connect", id])?;
            }
        }
        for id in &ids {
            let id = id.split('@').next().unwrap_or_default();
            self.until_done(0, &["layout", "assign", "-z", "here", "-c", "1G", id])?;
        }
        self.until_done(0, &["layout", "apply", "--version", "1"])?;
        let key = self.until_answered(0, "CreateKey", &json!({ "name": "tests" }))?;
        let name = json!({ "globalAlias": BUCKET });
        let bucket = self.until_answered(0, "CreateBucket", &name)?;
        let (id, key_id) = (&bucket["id"], &key["accessKeyId"]);
        let permissions = json!({ "read": true, "write": true, "owner": true });
        let allowed = json!({ "bucketId": id, "accessKeyId": key_id, "permissions": permissions });
        self.until_answered(0, "AllowBucketKey", &allowed)?;
        // The last node may learn of it later.
        for number in 0..NODES {
            let knows = |found: &Value| found["keys"][0]["permissions"]["write"] == true;
            self.until(number, "GetBucketInfo", &name, knows)?;
        }
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let (id, secret_key) = (text(key_id), text(&key["secretAccessKey"]));
        let lines = format!("AWS_ACCESS_KEY_ID={id}\nAWS_SECRET_ACCESS_KEY={secret_key}\n");
        self.credentials = secret(&self.dir, &lines)?;
        Ok(ids)
    }

    /// What Garage's own program answers, as it is.
    fn garage(&self, number: usize, arguments: &[&str]) -> Result<String, String> {
        let config = self.dir.join(format!("{number}.toml"));
        // It waits for its node for ever, and a test that is killed cannot end it.
        let mut command = Command::new("timeout");
        command.args(["-s", "KILL", "20"]).arg(&self.program);
        command.arg("-c").arg(config).args(arguments);
        let output = command.stdin(Stdio::null()).output().map_err(told)?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        match output.status.success() {
            true => Ok(said),
            false => Err(format!(
                "garage {}: {said}{}",
                arguments.join(" "),
                String::from_utf8_lossy(&output.stderr)
            )),
        }
    }

    /// Nodes that have just begun may refuse what they will do later.
    fn until_done(&self, number: usize, arguments: &[&str]) -> Result<String, String> {
        let end = Instant::now() + READY;
        loop {
            match self.garage(number, arguments) {
                Err(_) if Instant::now() < end => thread::sleep(Duration::from_millis(100)),
                done => return done,
            }
        }
    }

    fn until_answered(&self, number: usize, what: &str, of: &Value) -> Result<Value, String> {
        self.until(number, what, of, |_| true)
    }

    fn until(
        &self,
        number: usize,
        what: &str,
        of: &Value,
        is_it: impl Fn(&Value) -> bool,
    ) -> Result<Value, String> {
        let end = Instant::now() + READY;
        loop {
            let answer = self.until_done(number, &["json-api", what, &of.to_string()])?;
            let answer: Value = serde_json::from_str(&answer).map_err(told)?;
            if is_it(&answer) {
                return Ok(answer);
            }
            if Instant::now() > end {
                return Err(format!("{what} of node {number}: {answer}"));
            }
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// A bucket of one's own, by way of a node.
    #[must_use]
    pub fn place(&self, number: usize) -> Place {
        Place {
            url: format!("s3://{BUCKET}/{:032x}", fastrand::u128(..)),
            endpoint: self.endpoint(number),
            region: Some(REGION.to_owned()),
            credentials: self.credentials.clone(),
        }
    }

    /// How a node is reached.
    #[must_use]
    pub fn endpoint(&self, number: usize) -> String {
        format!("http://{}", self.addresses[number])
    }

    /// Where a node listens.
    #[must_use]
    pub fn address(&self, number: usize) -> SocketAddr {
        self.addresses[number]
    }

    /// Ends a node as a fault of its machine would.
    ///
    /// # Errors
    /// If it has ended by itself.
    pub fn kill(&self, number: usize) -> Result<(), String> {
        self.signal(number, Signal::KILL)
    }

    /// A node does nothing any more, and its connections stay.
    ///
    /// # Errors
    /// If it has ended by itself.
    pub fn stop(&self, number: usize) -> Result<(), String> {
        self.signal(number, Signal::STOP)
    }

    /// One that was stopped goes on.
    ///
    /// # Errors
    /// If it has ended by itself.
    pub fn go_on(&self, number: usize) -> Result<(), String> {
        self.signal(number, Signal::CONT)
    }

    /// One that was killed is started again.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn restart(&self, number: usize) -> Result<(), String> {
        let started = self.start_node(number)?;
        self.processes()[number] = started;
        Ok(())
    }

    /// The last lines of what a node has said.
    #[must_use]
    pub fn log(&self, number: usize) -> String {
        let said = fs::read_to_string(self.dir.join(format!("{number}.log")));
        let said = said.unwrap_or_default();
        let lines: Vec<&str> = said.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }

    fn processes(&self) -> std::sync::MutexGuard<'_, Vec<Pid>> {
        self.processes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// A number may be another process's once the node has ended.
    fn signal(&self, number: usize, signal: Signal) -> Result<(), String> {
        let pid = self.processes()[number];
        let exe = fs::read_link(format!("/proc/{pid}/exe"));
        if exe.is_ok_and(|exe| exe == self.program) {
            return kill_process(pid, signal).map_err(told);
        }
        Err(format!(
            "node {number} has ended by itself: {}",
            self.log(number)
        ))
    }

    fn start_node(&self, number: usize) -> Result<Pid, String> {
        let mut keeper = self.keeper.lock().unwrap_or_else(PoisonError::into_inner);
        let (input, output) = keeper.as_mut().ok_or("the nodes are ended")?;
        writeln!(input, "{number}").map_err(told)?;
        let mut line = String::new();
        output.read_line(&mut line).map_err(told)?;
        let pid = line.trim().parse().ok().and_then(Pid::from_raw);
        pid.ok_or_else(|| format!("node {number} is not started"))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let keeper = self.keeper.get_mut();
        drop(keeper.unwrap_or_else(PoisonError::into_inner).take());
        // It ends once it has ended the nodes.
        let _ = self.process.wait();
    }
}

fn told(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// Nodes that do not answer are given up within two seconds, where Garage's own waits are
/// minutes, so that a test sees much of what it does then. With a fault a node answers
/// without the others.
fn config(
    dir: &Path,
    number: usize,
    secret: &str,
    (rpc, s3): (SocketAddr, SocketAddr),
    peers: &[String],
) -> String {
    let mut text = String::new();
    let own = dir.join(number.to_string());
    let mode = match env::var_os("SNAPSTORE_GARAGE_FAULT") {
        None => "consistent",
        Some(_) => "dangerous",
    };
    for (name, value) in [
        ("metadata_dir", &*own.join("meta").display().to_string()),
        ("data_dir", &*own.join("data").display().to_string()),
        ("db_engine", "sqlite"),
        ("consistency_mode", mode),
        ("rpc_secret", secret),
        ("rpc_bind_addr", &rpc.to_string()),
        ("rpc_public_addr", &rpc.to_string()),
    ] {
        let _ = writeln!(text, "{name} = \"{value}\"");
    }
    let _ = write!(
        text,
        "bootstrap_peers = {peers:?}\n\
         replication_factor = {NODES}\n\
         rpc_timeout_msec = 2000\n\
         rpc_ping_timeout_msec = 2000\n\
         [s3_api]\n\
         s3_region = \"{REGION}\"\n\
         api_bind_addr = \"{s3}\"\n"
    );
    text
}

/// Ports that nobody listens on.
fn free_ports(count: usize) -> std::io::Result<Vec<u16>> {
    let mut held: Vec<TcpListener> = Vec::new();
    let mut tries = 1000;
    while held.len() < count {
        match TcpListener::bind((Ipv4Addr::LOCALHOST, fastrand::u16(PORTS))) {
            Ok(listener) => held.push(listener),
            Err(error) if tries == 0 => return Err(error),
            Err(_) => tries -= 1,
        }
    }
    let ports = held.iter().map(|one| Ok(one.local_addr()?.port()));
    ports.collect()
}
