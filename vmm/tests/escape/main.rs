//! A process that is confined as a machine's is, and tries to get out: each attempt in
//! a process of its own, under the filter of each role, and under none; as root, and as
//! a user.
//!
//! Without arguments this is the test. With a role (or `none`), an attempt's number and
//! what it needs to know it is one attempt.

mod attempts;

use std::fs;
use std::io;
use std::os::fd::IntoRawFd as _;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Command, ExitCode, ExitStatus};

use attempts::{ATTEMPTS, Attempt, Target, Without};
use snapstore_vmm::PANICKED_EXIT_CODE;
use snapstore_vmm::confine::{Limits, Preparation, Role, enter, forbid_for_server};

/// A user without rights.
const NOBODY: u32 = 65534;
/// What one attempt exits with.
const ESCAPED: u8 = 10;
const FAILED: u8 = 11;
const NOT_CONFINED: u8 = 12;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.as_slice() {
        [mark, role, number, rest @ ..] if mark == "attempt" => {
            ExitCode::from(one(role, number.parse().expect("a number"), rest))
        }
        _ => all(),
    }
}

/// Not an attempt but what a guest may do: connect to a program of the host that listens
/// in its machine's directory.
const CONNECT: usize = usize::MAX;

/// Neither: to make its log anew, which is its standard error.
const LOG_ANEW: usize = usize::MAX - 1;

/// Nor: to panic, which ends the process with a word whichever thread does.
const PANIC: usize = usize::MAX - 2;

/// Nor: to give memory back on a thread of its own, to let others go first, and to guard
/// a stack.
const MEMORY: usize = usize::MAX - 3;

/// Not confined at all, but in namespaces in which an attempt that succeeds harms nobody.
const BARE: &str = "bare";
/// What does not succeed even so, or would harm the host if it did.
const NOT_SHOWN: [(&str, &str); 9] = [
    ("gain privileges again", "the kernel has no such thing"),
    ("open by handle", "no handle is known"),
    ("pivot its root", "its root is no mount of its own"),
    ("bpf", "no program is given"),
    ("load a module", "no module is given"),
    ("reboot", "a magic number is missing"),
    ("set the time", "it would be set"),
    ("type into a terminal", "there may be one"),
    ("the calls of x32", "most kernels are built without them"),
];

/// What only some kernels have, or allow whoever runs the tests.
const ELSEWHERE: [&str; 3] = ["raise a limit", "performance counters", "ports of the host"];

/// Confined as the server of a root's mount is.
const SERVER: &str = "server";
/// As one that reads a remote over the network is.
const REMOTE_SERVER: &str = "server of a remote";
/// What only that one may do.
const REMOTE_SERVER_MAY: [&str; 2] = ["an internet socket", "a netlink socket"];
/// What ends such a server.
const SERVER_NEVER: [&str; 22] = [
    "execute",
    "make a device",
    "open by handle",
    "change its behaviour",
    "an internet socket",
    "a netlink socket",
    "a packet socket",
    "trace another process",
    "read another process's memory",
    "mount",
    "a mount namespace",
    "a user namespace",
    "change its root",
    "pivot its root",
    "keys",
    "bpf",
    "io_uring",
    "performance counters",
    "load a module",
    "name the host",
    "set the time",
    "reboot",
];

/// One attempt, in this process.
fn one(role: &str, number: usize, rest: &[String]) -> u8 {
    let [dir, secret, other, abstract_socket, victim] = rest else {
        return NOT_CONFINED;
    };
    let target = Target {
        parent: victim.parse().expect("a process's number"),
        secret: secret.into(),
        other: other.into(),
        abstract_socket: abstract_socket.clone(),
    };
    let limits = Limits {
        cpus: 1,
        memory_bytes: 1 << 20,
        disk_bytes: 0,
    };
    std::env::set_current_dir(dir).expect("the directory is there");
    FILE.get_or_init(|| {
        let log = fs::File::options().write(true).open("log");
        log.expect("the log is there").into_raw_fd()
    });
    if number == LOG_ANEW {
        let mut options = fs::File::options();
        let log = options.read(true).append(true).open("log");
        rustix::stdio::dup2_stderr(log.expect("a log")).expect("a descriptor");
    }
    if role == BARE {
        if be_harmless().is_err() {
            return NOT_CONFINED;
        }
        let proc = fs::File::open("/proc").expect("there is a /proc");
        remember_proc();
        let done = (ATTEMPTS[number].run)(&target);
        drop(proc);
        return match done {
            Ok(()) => ESCAPED,
            Err(error) => {
                eprintln!("{}: {error}", ATTEMPTS[number].name);
                FAILED
            }
        };
    }
    if [SERVER, REMOTE_SERVER].contains(&role) {
        let Ok(true) = forbid_for_server(role == REMOTE_SERVER) else {
            return NOT_CONFINED;
        };
        return match (ATTEMPTS[number].run)(&target) {
            Ok(()) => ESCAPED,
            Err(_) => FAILED,
        };
    }
    let confined = Preparation::new().and_then(|it| it.confine(Path::new(dir), &limits, None));
    if let Err(error) = confined {
        eprintln!("{error}");
        return NOT_CONFINED;
    }
    // Known to anybody who looks; looked for while it is allowed.
    remember_proc();
    let role = Role::ALL.into_iter().find(|it| format!("{it:?}") == role);
    if number == MEMORY {
        let thread = std::thread::spawn(move || {
            if let Some(role) = role {
                enter(role);
            }
            let pages: Vec<_> = (0..4096).map(|_| vec![1_u8; 4096]).collect();
            drop(std::hint::black_box(pages));
            std::thread::yield_now();
            guard_memory();
        });
        thread.join().expect("it does not panic");
        return ESCAPED;
    }
    if let Some(role) = role {
        enter(role);
    }
    if number == CONNECT {
        return match std::os::unix::net::UnixStream::connect("vsock.sock_52") {
            Ok(_) => ESCAPED,
            Err(_) => FAILED,
        };
    }
    if number == PANIC {
        snapstore_vmm::end_on_panic();
        panic!("a fault");
    }
    if number == LOG_ANEW {
        return match attempts::make_log_anew() {
            Ok(()) => ESCAPED,
            Err(_) => FAILED,
        };
    }
    match (ATTEMPTS[number].run)(&target) {
        Ok(()) => ESCAPED,
        Err(_) => FAILED,
    }
}

/// Mounts and names of its own: what is done to them is seen by nobody else.
fn be_harmless() -> io::Result<()> {
    // SAFETY: this process has one thread; the path is a constant.
    unsafe {
        let kinds = libc::CLONE_NEWNS | libc::CLONE_NEWUTS | libc::CLONE_NEWIPC;
        let (none, private) = (std::ptr::null(), libc::MS_REC | libc::MS_PRIVATE);
        let done = libc::unshare(kinds) == 0
            && libc::mount(none, c"/".as_ptr(), none, private, none.cast()) == 0;
        match done {
            true => Ok(()),
            false => Err(io::Error::last_os_error()),
        }
    }
}

/// As glibc guards threads' stacks from 2.42 on; older kernels refuse it.
fn guard_memory() {
    const GUARD_INSTALL: i32 = 102;
    const GUARD_REMOVE: i32 = 103;
    let (read_write, private) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE);
    // SAFETY: memory of this function alone.
    unsafe {
        let anonymous = private | libc::MAP_ANONYMOUS;
        let at = libc::mmap(std::ptr::null_mut(), 4096, read_write, anonymous, -1, 0);
        for advice in [GUARD_INSTALL, GUARD_REMOVE] {
            libc::madvise(at, 4096, advice);
        }
        libc::munmap(at, 4096);
    }
}

/// A file that this process has open, as a machine has its disks.
static FILE: std::sync::OnceLock<i32> = std::sync::OnceLock::new();

fn open_file() -> i32 {
    *FILE.get().expect("it was opened")
}

static PROC: std::sync::OnceLock<Vec<i32>> = std::sync::OnceLock::new();

/// The descriptors under which there is a `self`.
fn remember_proc() {
    let has_self = |fd: &i32| {
        // SAFETY: only looks.
        unsafe { libc::faccessat(*fd, c"self/stat".as_ptr(), libc::F_OK, 0) == 0 }
    };
    PROC.get_or_init(|| (3..64).filter(has_self).collect());
}

fn proc_descriptors() -> &'static [i32] {
    PROC.get().map_or(&[], Vec::as_slice)
}

/// How an attempt ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Outcome {
    Killed,
    Failed,
    Escaped,
    Panicked,
    Broken,
}

fn outcome(status: ExitStatus) -> Outcome {
    match (status.signal(), status.code()) {
        (Some(libc::SIGSYS), _) => Outcome::Killed,
        (None, Some(code)) if code == i32::from(FAILED) => Outcome::Failed,
        (None, Some(code)) if code == i32::from(ESCAPED) => Outcome::Escaped,
        // It has executed a program that succeeds.
        (None, Some(0)) => Outcome::Escaped,
        (None, Some(PANICKED_EXIT_CODE)) => Outcome::Panicked,
        _ => Outcome::Broken,
    }
}

/// What is there to be attacked.
struct Range {
    dir: tempfile::TempDir,
    _listeners: [UnixListener; 2],
    socket: String,
}

impl Range {
    fn new(user: u32) -> io::Result<Self> {
        let dir = tempfile::tempdir()?;
        let public = fs::Permissions::from_mode(0o755);
        fs::set_permissions(dir.path(), public)?;
        fs::write(dir.path().join("secret"), "secret")?;
        for name in ["machine", "other"] {
            let machine = dir.path().join(name);
            fs::create_dir(&machine)?;
            fs::write(machine.join("there"), "")?;
            fs::write(machine.join("log"), "")?;
            std::os::unix::fs::chown(machine.join("log"), Some(user), Some(user))?;
            fs::set_permissions(&machine, fs::Permissions::from_mode(0o700))?;
            std::os::unix::fs::chown(&machine, Some(user), Some(user))?;
        }
        // As a program makes it that knows nothing of a machine's user.
        let beside = UnixListener::bind(dir.path().join("machine/vsock.sock_52"))?;
        if user != effective_user() {
            let socket = dir.path().join("machine/vsock.sock_52");
            std::os::unix::fs::chown(socket, Some(user), Some(user))?;
        }
        let socket = format!("snapstore-escape-{}-{user}", std::process::id());
        let address = SocketAddr::from_abstract_name(&socket)?;
        Ok(Self {
            dir,
            _listeners: [UnixListener::bind_addr(&address)?, beside],
            socket,
        })
    }

    fn try_it(&self, role: &str, number: usize, user: u32) -> io::Result<Outcome> {
        self.try_on(role, number, user, std::process::id())
    }

    /// With this process to be attacked.
    fn try_on(&self, role: &str, number: usize, user: u32, victim: u32) -> io::Result<Outcome> {
        let path = |name: &str| self.dir.path().join(name);
        let mut command = Command::new(std::env::current_exe()?);
        command
            .args(["attempt", role, &number.to_string()])
            .arg(path("machine"))
            .arg(path("secret"))
            .arg(path("other"))
            .arg(&self.socket)
            .arg(victim.to_string());
        if user != effective_user() {
            command.uid(user).gid(user);
        }
        if number != PANIC {
            return Ok(outcome(command.status()?));
        }
        let output = command.output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        Ok(
            match said.contains("error: a fault of this program, in main: ") {
                true => outcome(output.status),
                false => Outcome::Broken,
            },
        )
    }
}

/// Whether it ended as it has to.
fn is_right(attempt: &Attempt, role: Option<Role>, as_root: bool, outcome: Outcome) -> bool {
    match role {
        // Nothing is killed without a filter.
        None => match attempt.without {
            Without::Fails => outcome == Outcome::Failed,
            Without::FailsAsRoot => !as_root || outcome == Outcome::Failed,
            Without::NeedsFilter => outcome != Outcome::Broken,
        },
        Some(_) if attempt.passes_control => {
            matches!(outcome, Outcome::Killed | Outcome::Failed)
        }
        Some(_) => outcome == Outcome::Killed,
    }
}

fn effective_user() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// The attempts under each role, as this user and, if it is root, as nobody.
fn all() -> ExitCode {
    let me = effective_user();
    let users = if me == 0 { vec![0, NOBODY] } else { vec![me] };
    let (mut passed, mut failed) = (0, 0);
    for user in users {
        let as_root = user == 0;
        let range = Range::new(user).expect("a place for attempts");
        let roles = Role::ALL.iter().copied().map(Some).chain([None]);
        for role in roles {
            let name = role.map_or_else(|| "none".to_owned(), |role| format!("{role:?}"));
            let mut wrong = Vec::new();
            for (number, attempt) in ATTEMPTS.iter().enumerate() {
                let outcome = range
                    .try_it(&name, number, user)
                    .expect("an attempt starts");
                if !is_right(attempt, role, as_root, outcome) {
                    wrong.push(format!("{}: {outcome:?}", attempt.name));
                }
            }
            if matches!(role, None | Some(Role::Vcpu | Role::Vsock | Role::Agent)) {
                let outcome = range.try_it(&name, CONNECT, user);
                let outcome = outcome.expect("an attempt starts");
                if outcome != Outcome::Escaped {
                    wrong.push(format!("cannot connect beside its own socket: {outcome:?}"));
                }
            }
            let outcome = range.try_it(&name, LOG_ANEW, user);
            let outcome = outcome.expect("an attempt starts");
            if outcome != Outcome::Escaped {
                wrong.push(format!("cannot make its log anew: {outcome:?}"));
            }
            let outcome = range.try_it(&name, MEMORY, user);
            let outcome = outcome.expect("an attempt starts");
            if outcome != Outcome::Escaped {
                wrong.push(format!("cannot give memory back: {outcome:?}"));
            }
            let outcome = range.try_it(&name, PANIC, user);
            let outcome = outcome.expect("an attempt starts");
            if outcome != Outcome::Panicked {
                wrong.push(format!("a panic does not end it with a word: {outcome:?}"));
            }
            let verdict = if wrong.is_empty() { "ok" } else { "FAILED" };
            println!("test nothing_escapes::user_{user}::filter_{name} ... {verdict}");
            for line in &wrong {
                println!("    {line}");
            }
            if wrong.is_empty() {
                passed += 1;
            } else {
                failed += 1;
            }
        }
    }
    if me == 0 {
        let range = Range::new(0).expect("a place for attempts");
        for (role, may) in [(SERVER, &[][..]), (REMOTE_SERVER, &REMOTE_SERVER_MAY[..])] {
            let numbered = ATTEMPTS.iter().enumerate();
            let never = numbered.filter(|(_, attempt)| SERVER_NEVER.contains(&attempt.name));
            let outcomes: Vec<_> = never
                .map(|(number, attempt)| {
                    let outcome = range.try_it(role, number, 0);
                    (attempt.name, outcome.expect("an attempt starts"))
                })
                .collect();
            let is_right = |(name, outcome): &(&str, Outcome)| match may.contains(name) {
                true => *outcome == Outcome::Escaped,
                false => *outcome == Outcome::Killed,
            };
            let right = outcomes.len() == SERVER_NEVER.len() && outcomes.iter().all(is_right);
            let verdict = if right { "ok" } else { "FAILED" };
            println!("test a_mounts_server_never_does_these::{role} ... {verdict}");
            if right {
                passed += 1;
            } else {
                println!("    {outcomes:?}");
                failed += 1;
            }
        }
        match what_nothing_forbids(&range) {
            Ok(()) => passed += 1,
            Err(error) => {
                println!("    {error}");
                failed += 1;
            }
        }
    } else {
        println!("SKIPPED nothing_escapes::user_0: only root can be confined as root is");
    }
    let verdict = if failed == 0 { "ok" } else { "FAILED" };
    println!(
        "\ntest result: {verdict}. {passed} passed; {failed} failed; 0 ignored; 0 measured; 0 filtered out"
    );
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Each attempt succeeds where nothing is forbidden: that it fails elsewhere says something.
fn what_nothing_forbids(range: &Range) -> io::Result<()> {
    let mut wrong = Vec::new();
    for (number, attempt) in ATTEMPTS.iter().enumerate() {
        let known = NOT_SHOWN.iter().find(|(name, _)| *name == attempt.name);
        if let Some((name, reason)) = known {
            println!("SKIPPED attempts_succeed_where_nothing_is_forbidden::{name}: {reason}");
            continue;
        }
        let mut victim = Command::new("sleep").arg("600").spawn()?;
        let outcome = range.try_on(BARE, number, 0, victim.id());
        victim.kill()?;
        victim.wait()?;
        match outcome? {
            Outcome::Escaped => {}
            Outcome::Failed if ELSEWHERE.contains(&attempt.name) => println!(
                "SKIPPED attempts_succeed_where_nothing_is_forbidden::{}: not on this host",
                attempt.name
            ),
            _ => wrong.push(attempt.name),
        }
    }
    let verdict = if wrong.is_empty() { "ok" } else { "FAILED" };
    println!("test attempts_succeed_where_nothing_is_forbidden ... {verdict}");
    match wrong.as_slice() {
        [] => Ok(()),
        _ => Err(io::Error::other(format!("these do not: {wrong:?}"))),
    }
}
