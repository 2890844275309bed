//! The runtime directory: one directory a machine, `vms/NAME/` with
//!
//! - `lock`, which the machine's process keeps locked (flock(2)) until it ends;
//! - `starter`, which a command that starts the machine keeps locked until it has
//!   started: no two commands choose one name;
//! - `control.sock`, its socket;
//! - `vsock.sock`, the host's end of its guest's sockets, if it has such a device;
//! - `log`, its process's standard error;
//! - `ending`, why it ended, if that was not as wanted.
//!
//! A directory whose lock is free is of a machine that has ended. An orderly end
//! leaves none.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use snapstore_vmm::Error;
use snapstore_vmm::control::Client;

use crate::error::{Busy, NotFound, Usage};
use crate::mounts;

/// The environment's variable that names the runtime directory.
pub const RUNTIME_DIR: &str = "SNAPSTORE_RUNTIME_DIR";

/// The socket of a machine's vsock device, in the machine's directory.
pub const VSOCK: &str = "vsock.sock";

/// The longest path of a UNIX socket, in bytes (unix(7), with its final zero).
const SOCKET_PATH_BYTES: usize = 107;

/// How often a lock is tried that somebody else may only look at, and how long after.
const LOCK_ATTEMPTS: u32 = 20;
const LOCK_RETRY: Duration = Duration::from_millis(2);

/// Why a machine ended that could not say so itself.
pub const KILLED: &str = "its process was killed";

/// How the line begins that a machine's process logs last, when it ends as wanted.
pub const IN_ORDER: &str = "ended in order: ";

/// The directory for what lives no longer than the machine is up.
pub struct Runtime {
    dir: PathBuf,
}

/// The directory of one machine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VmDir {
    /// The machine's name.
    pub name: String,
    dir: PathBuf,
}

/// A machine's name, taken for as long as this or a duplicate of it is open.
pub struct Claim {
    /// The machine's directory.
    pub vm: VmDir,
    lock: File,
}

/// A name that this command will start a machine with, and that no other command
/// chooses meanwhile.
pub struct Reservation {
    vm: VmDir,
    _lock: File,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // While it is still locked: who opens it now finds it gone once it is not.
        let _ = fs::remove_file(self.vm.starter_path());
        // Of a machine that never was nothing stays; one that is has a lock in there.
        let _ = fs::remove_dir(&self.vm.dir);
    }
}

impl Runtime {
    /// The runtime directory of this user, made if it is not there.
    pub fn open() -> anyhow::Result<Self> {
        let dir = std::path::absolute(runtime_dir()).context(
            "cannot find the directory for machines; name one with SNAPSTORE_RUNTIME_DIR",
        )?;
        for part in [&dir, &dir.join("vms"), &dir.join("mounts")] {
            make_private(part)?;
        }
        Ok(Self { dir })
    }

    /// Where mounts that machines share are.
    pub fn mounts(&self) -> PathBuf {
        self.dir.join("mounts")
    }

    /// The directory of a machine of this name, there or not.
    pub fn vm(&self, name: &str) -> anyhow::Result<VmDir> {
        snapstore_store::check_tag(name).map_err(|_| {
            Usage(format!(
                "{name:?} cannot name a machine; use 1 to 128 of the characters \
                 A-Z a-z 0-9 . _ + - @ : =, beginning with a letter or digit"
            ))
        })?;
        let vm = VmDir {
            name: name.to_owned(),
            dir: self.dir.join("vms").join(name),
        };
        if vm.socket().as_os_str().len() > SOCKET_PATH_BYTES {
            bail!(Usage(format!(
                "{} is too long for a socket's path; choose a shorter name, or a shorter \
                 directory with SNAPSTORE_RUNTIME_DIR",
                vm.socket().display()
            )));
        }
        Ok(vm)
    }

    /// Every machine that left a directory, by name. One that ended in order is cleared
    /// away, if its supervisor could not; so are names of machines that never were, and
    /// mounts of which neither the server nor a machine is left.
    pub fn vms(&self) -> anyhow::Result<Vec<VmDir>> {
        let dir = self.dir.join("vms");
        let mut vms = Vec::new();
        for entry in fs::read_dir(&dir).with_context(|| format!("cannot list {}", dir.display()))? {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else {
                continue;
            };
            let vm = VmDir {
                name,
                dir: entry.path(),
            };
            if vm.has_ended_in_order() {
                forget(&vm)?;
            } else if vm.exists() || !vm.was_abandoned()? {
                vms.push(vm);
            }
        }
        if let Err(error) = mounts::clear_abandoned(&self.mounts()) {
            tracing::warn!(%error, "a mount that no machine uses is left");
        }
        vms.sort_by(|a, b| natural(&a.name).cmp(&natural(&b.name)));
        Ok(vms)
    }

    /// A running machine of this name.
    pub fn running(&self, name: &str) -> anyhow::Result<VmDir> {
        let vm = self.vm(name)?;
        if vm.is_running() {
            return Ok(vm);
        }
        Err(vm.not_running())
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.dir
    }
}

impl VmDir {
    /// The directory itself.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A claim that was handed to this process, as the lock that it holds.
    pub fn adopt(&self, lock: OwnedFd) -> Claim {
        Claim {
            vm: self.clone(),
            lock: lock.into(),
        }
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("control.sock")
    }

    /// The socket of its vsock device, if it has one.
    pub fn vsock(&self) -> PathBuf {
        self.dir.join(VSOCK)
    }

    /// Its process's standard error.
    pub fn log(&self) -> PathBuf {
        self.dir.join("log")
    }

    /// A connection to the machine.
    pub fn connect(&self) -> anyhow::Result<Client> {
        match Client::connect(&self.socket()) {
            // It has its name before its socket, and loses it after.
            Err(Error::NoMachine { .. }) if self.is_running() => Err(self.is_starting()),
            Err(Error::NoMachine { .. }) => Err(self.not_running()),
            other => Ok(other?),
        }
    }

    /// What to say of a machine that has its name, and no socket.
    pub fn is_starting(&self) -> anyhow::Error {
        Busy(format!(
            "{} is still starting, or just ending; try again",
            self.name
        ))
        .into()
    }

    /// What to say of a machine that does not run.
    fn not_running(&self) -> anyhow::Error {
        let name = &self.name;
        NotFound(match self.ending() {
            Some(ending) => format!("the machine {name} has ended: {ending}"),
            None => format!("no machine is named {name}; `snapstore ps` lists those that run"),
        })
        .into()
    }

    /// Whether its process lives.
    pub fn is_running(&self) -> bool {
        File::open(self.lock_path()).is_ok_and(|lock| {
            let locked = rustix::fs::flock(&lock, FlockOperation::NonBlockingLockShared);
            locked == Err(Errno::WOULDBLOCK)
        })
    }

    /// Whether anything of it is left.
    pub fn exists(&self) -> bool {
        self.lock_path().exists()
    }

    /// Whether it has ended as wanted, and only has to be cleared away.
    pub fn has_ended_in_order(&self) -> bool {
        !self.is_running() && fs::read_to_string(self.log()).is_ok_and(|log| said_in_order(&log))
    }

    /// Why it ended badly, if it has ended so.
    pub fn ending(&self) -> Option<String> {
        if self.has_ended_in_order() {
            return None;
        }
        let said = fs::read_to_string(self.dir.join("ending"));
        let said = said.or_else(|_| fs::read_to_string(self.log()).map(|log| last_words(&log)));
        let said = said.ok()?;
        Some(match said.trim() {
            "" => KILLED.to_owned(),
            said => said.strip_prefix("error: ").unwrap_or(said).to_owned(),
        })
    }

    /// Takes the name, and clears away what an earlier machine left there.
    ///
    /// The lock decides, not the directory: it is looked for again by its path
    /// once locked, since its holder may have removed it meanwhile.
    pub fn claim(&self) -> anyhow::Result<Claim> {
        let mut attempts = LOCK_ATTEMPTS;
        loop {
            let lock = self.open_own(&self.lock_path())?;
            match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                // Perhaps somebody only looks whether it is locked.
                Err(Errno::WOULDBLOCK) if attempts > 0 => {
                    attempts -= 1;
                    std::thread::sleep(LOCK_RETRY);
                    continue;
                }
                Err(Errno::WOULDBLOCK) => {
                    let message = format!(
                        "a machine named {0} runs; choose another name, or `snapstore stop {0}`",
                        self.name
                    );
                    return Err(Busy(message).into());
                }
                other => other.context("cannot lock a machine's name")?,
            }
            if is_same(&lock, &self.lock_path()) {
                self.remove_sockets()
                    .and_then(|()| remove_if_there(&self.log()))
                    .and_then(|()| remove_if_there(&self.dir.join("ending")))
                    .with_context(|| format!("cannot clear {}", self.dir.display()))?;
                return Ok(Claim {
                    vm: self.clone(),
                    lock,
                });
            }
        }
    }

    /// Opens a file of the machine's directory, making both if they are not there.
    fn open_own(&self, path: &Path) -> anyhow::Result<File> {
        let mut options = OpenOptions::new();
        options.create(true).truncate(false).write(true).mode(0o600);
        loop {
            make_private(&self.dir)?;
            match options.open(path) {
                // The directory was cleared away meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                other => return other.with_context(|| format!("cannot open {}", path.display())),
            }
        }
    }

    /// Takes the name for a machine that is about to be started; none if a machine has
    /// it, or another command that is about to start one.
    pub fn reserve(&self) -> anyhow::Result<Option<Reservation>> {
        loop {
            let lock = self.open_own(&self.starter_path())?;
            match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Err(Errno::WOULDBLOCK) => return Ok(None),
                other => other.context("cannot lock a machine's name")?,
            }
            if !is_same(&lock, &self.starter_path()) {
                continue;
            }
            let reservation = Reservation {
                vm: self.clone(),
                _lock: lock,
            };
            return Ok((!self.is_running()).then_some(reservation));
        }
    }

    /// What a command that was killed has left of its reservation: nobody holds it.
    fn remove_abandoned_reservation(&self) -> io::Result<()> {
        let Ok(lock) = File::open(self.starter_path()) else {
            return Ok(());
        };
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) if is_same(&lock, &self.starter_path()) => remove_if_there(&self.starter_path()),
            Ok(()) | Err(Errno::WOULDBLOCK) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether it is what a command has left that was killed before there was a machine,
    /// and is gone now.
    fn was_abandoned(&self) -> anyhow::Result<bool> {
        self.remove_abandoned_reservation()
            .with_context(|| format!("cannot clear {}", self.dir.display()))?;
        // Not if somebody is about to start it.
        Ok(match fs::remove_dir(&self.dir) {
            Ok(()) => true,
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        })
    }

    fn starter_path(&self) -> PathBuf {
        self.dir.join("starter")
    }

    /// The name of a machine that has ended, if nobody has taken it since.
    pub fn reclaim(&self) -> anyhow::Result<Option<Claim>> {
        let lock = match File::open(self.lock_path()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => {
                other.with_context(|| format!("cannot open {}", self.lock_path().display()))?
            }
        };
        for _ in 0..LOCK_ATTEMPTS {
            match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                // Perhaps somebody only looks whether it is locked.
                Err(Errno::WOULDBLOCK) => std::thread::sleep(LOCK_RETRY),
                other => {
                    other?;
                    let vm = self.clone();
                    let is_same = is_same(&lock, &self.lock_path());
                    return Ok(is_same.then_some(Claim { vm, lock }));
                }
            }
        }
        Ok(None)
    }

    /// The control socket, that of the vsock device, and those that programs of the
    /// host have put beside it for its guest, `vsock.sock_PORT`.
    fn remove_sockets(&self) -> io::Result<()> {
        remove_if_there(&self.socket())?;
        let entries = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other?,
        };
        for entry in entries {
            let entry = entry?;
            if entry.file_name().as_bytes().starts_with(b"vsock.sock") {
                remove_if_there(&entry.path())?;
            }
        }
        Ok(())
    }

    fn lock_path(&self) -> PathBuf {
        self.dir.join("lock")
    }
}

/// A process, by its number and when it began (proc(5), `stat`, field 22): a number alone
/// may be another's by now.
fn began(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let after_name = stat.rsplit_once(')')?.1;
    after_name.split_ascii_whitespace().nth(19)?.parse().ok()
}

impl VmDir {
    /// The process that holds the name, if it has said so and lives.
    pub fn process(&self) -> Option<OwnedFd> {
        let said = fs::read_to_string(self.lock_path()).ok()?;
        let mut said = said.split_ascii_whitespace();
        let (pid, since) = (said.next()?.parse().ok()?, said.next()?.parse().ok()?);
        let process = pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()?;
        // Looked at once it is held: the number is its own as long as it lives.
        (began(pid) == Some(since) && self.is_running()).then_some(process)
    }
}

impl Claim {
    /// Writes down that this process is the machine's: whoever ends a machine that does
    /// not answer has to know which process it is.
    pub fn name_holder(&self) -> anyhow::Result<()> {
        let pid = rustix::process::getpid().as_raw_nonzero().get();
        let since = began(pid).context("cannot find this process in /proc")?;
        let said = format!("{pid} {since}\n");
        self.lock
            .set_len(0)
            .and_then(|()| self.lock.write_all_at(said.as_bytes(), 0))
            .with_context(|| format!("cannot write {}", self.vm.lock_path().display()))
    }

    /// What holds it.
    pub fn lock(&self) -> BorrowedFd<'_> {
        self.lock.as_fd()
    }

    /// Leaves the machine's log to say why it ended.
    pub fn release_with_log(self) -> io::Result<()> {
        self.vm.remove_sockets()
    }

    /// Says why the machine ended; without a reason there is nothing to keep.
    /// The lock goes last: whoever has it finds the rest as it will stay.
    pub fn release(self, ending: Option<&str>) -> io::Result<()> {
        let dir = &self.vm.dir;
        self.vm.remove_sockets()?;
        match ending {
            Some(reason) => fs::write(dir.join("ending"), reason),
            None => {
                for left in ["log", "ending", "lock"] {
                    remove_if_there(&dir.join(left))?;
                }
                self.vm.remove_abandoned_reservation()?;
                match fs::remove_dir(dir) {
                    // Somebody is about to use the name again, or has cleared away, too.
                    Err(error)
                        if matches!(
                            error.kind(),
                            io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::NotFound
                        ) =>
                    {
                        Ok(())
                    }
                    done => done,
                }
            }
        }
    }
}

/// Removes what a machine that has ended left; one that runs is left alone.
pub fn forget(vm: &VmDir) -> anyhow::Result<()> {
    vm.claim()?
        .release(None)
        .with_context(|| format!("cannot remove {}", vm.dir.display()))
}

/// Whether a machine's last word is that it ended as wanted.
fn said_in_order(log: &str) -> bool {
    let last = log.lines().next_back();
    last.is_some_and(|line| line.starts_with(IN_ORDER))
}

/// What a process said at its end: what it logged while it ran, lines that begin
/// with a time, is left out.
fn last_words(log: &str) -> String {
    let words = log.lines().filter(|line| !is_logged(line));
    words.collect::<Vec<_>>().join("\n")
}

/// Whether a line begins with a time such as 2026-01-31T09:26:53.589793Z.
fn is_logged(line: &str) -> bool {
    // Colours, if there are some.
    let line = line.strip_prefix("\x1b[2m").unwrap_or(line).as_bytes();
    let pattern = b"dddd-dd-ddTdd:dd:dd";
    line.len() > pattern.len()
        && line.iter().zip(pattern).all(|(byte, wanted)| match wanted {
            b'd' => byte.is_ascii_digit(),
            wanted => byte == wanted,
        })
}

/// Sorts `base.9` before `base.10`.
fn natural(name: &str) -> (&str, u64, &str) {
    let stem = name.trim_end_matches(|c: char| c.is_ascii_digit());
    let number = name[stem.len()..].parse().unwrap_or(u64::MAX);
    (stem, number, name)
}

/// Whether a path still leads to this file.
pub fn is_same(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::metadata(path)) {
        (Ok(ours), Ok(theirs)) => (ours.dev(), ours.ino()) == (theirs.dev(), theirs.ino()),
        _ => false,
    }
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Where machines and their mounts are to be found.
pub fn runtime_dir() -> PathBuf {
    let from = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    if let Some(dir) = from(RUNTIME_DIR) {
        return PathBuf::from(dir);
    }
    let user = rustix::process::geteuid();
    // Not that of a session: root's would go with its last login, under machines that run.
    if user.is_root() {
        return PathBuf::from("/run/snapstore");
    }
    match from("XDG_RUNTIME_DIR") {
        Some(dir) => PathBuf::from(dir).join("snapstore"),
        None => std::env::temp_dir().join(format!("snapstore-{}", user.as_raw())),
    }
}

/// Makes a directory that only this user can enter; one of another user's, or
/// one that others may enter, is refused.
fn make_private(dir: &Path) -> anyhow::Result<()> {
    match DirBuilder::new().mode(0o700).recursive(false).create(dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if let Some(parent) = dir.parent() {
                fs::create_dir_all(parent)
                    .with_context(|| format!("cannot create {}", parent.display()))?;
            }
            return make_private(dir);
        }
        other => other.with_context(|| format!("cannot create {}", dir.display()))?,
    }
    let found = match fs::symlink_metadata(dir) {
        // Whoever cleared away what was left in it has removed it meanwhile.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return make_private(dir),
        other => other.with_context(|| format!("cannot inspect {}", dir.display()))?,
    };
    let ours = found.uid() == rustix::process::geteuid().as_raw();
    if !found.is_dir() || !ours || found.mode() & 0o077 != 0 {
        bail!(
            "{} is not a directory of this user alone; remove it, `chmod 700` it, or name another \
             with SNAPSTORE_RUNTIME_DIR",
            dir.display()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runtime() -> (tempfile::TempDir, Runtime) {
        let dir = tempfile::tempdir().unwrap();
        let runtime = Runtime {
            dir: dir.path().to_owned(),
        };
        make_private(&dir.path().join("vms")).unwrap();
        (dir, runtime)
    }

    #[test]
    fn a_name_is_taken_until_its_machine_ends() {
        let (_dir, runtime) = runtime();
        let vm = runtime.vm("a").unwrap();
        assert!(!vm.is_running());
        let claim = vm.claim().unwrap();
        assert!(vm.is_running());
        assert!(vm.claim().is_err());
        claim.release(None).unwrap();
        assert!(!vm.is_running());
        assert_eq!(runtime.vms().unwrap(), []);
        vm.claim().unwrap();
    }

    #[test]
    fn a_bad_end_is_kept_until_the_name_is_used_again() {
        let (_dir, runtime) = runtime();
        let vm = runtime.vm("a").unwrap();
        vm.claim().unwrap().release(Some("why")).unwrap();
        assert_eq!(vm.ending().as_deref(), Some("why"));
        let error = runtime.running("a").unwrap_err();
        assert!(error.to_string().ends_with("why"), "{error}");
        let claim = vm.claim().unwrap();
        assert_eq!(vm.ending(), None);
        claim.release(None).unwrap();
    }

    #[test]
    fn sockets_beside_that_of_the_guest_go_with_the_machine() {
        let (_dir, runtime) = runtime();
        let vm = runtime.vm("a").unwrap();
        let claim = vm.claim().unwrap();
        for name in ["vsock.sock", "vsock.sock_1234"] {
            fs::write(vm.dir.join(name), "").unwrap();
        }
        claim.release(None).unwrap();
        assert!(!vm.dir.exists());
    }

    #[test]
    fn a_reservation_of_a_command_that_was_killed_goes_with_the_machine() {
        let (_dir, runtime) = runtime();
        let vm = runtime.vm("a").unwrap();
        // As a killed command leaves it: there, and not locked.
        let claim = vm.claim().unwrap();
        fs::write(vm.starter_path(), "").unwrap();
        claim.release(None).unwrap();
        assert!(!vm.dir.exists());
        // One that is held stays, and with it the directory.
        let held = vm.reserve().unwrap().unwrap();
        vm.claim().unwrap().release(None).unwrap();
        assert!(vm.starter_path().exists());
        drop(held);
        assert!(!vm.dir.exists());
    }

    #[test]
    fn a_name_of_a_machine_that_never_was_goes_with_its_command() {
        let (_dir, runtime) = runtime();
        make_private(&runtime.mounts()).unwrap();
        let vm = runtime.vm("a").unwrap();
        let held = vm.reserve().unwrap().unwrap();
        assert_eq!(runtime.vms().unwrap(), [vm.clone()], "it is about to start");
        assert!(vm.starter_path().exists());
        // As if its command had been killed.
        std::mem::forget(held);
        fs::remove_file(vm.starter_path()).unwrap();
        fs::write(vm.starter_path(), "").unwrap();
        assert_eq!(runtime.vms().unwrap(), []);
        assert!(!vm.dir.exists());
    }

    #[test]
    fn what_was_logged_is_no_cause_of_an_end() {
        let (_dir, runtime) = runtime();
        let vm = runtime.vm("a").unwrap();
        let claim = vm.claim().unwrap();
        // As tracing-subscriber writes them, with colours and without.
        let plain = "2026-01-31T09:26:53.589793Z  WARN the guest's tap is gone error=x\n";
        let coloured = "\x1b[2m2026-01-31T09:26:53.589793Z\x1b[0m \x1b[33m WARN\x1b[0m gone\n";
        fs::write(vm.log(), [plain, coloured].concat()).unwrap();
        drop(claim);
        assert_eq!(vm.ending().as_deref(), Some(KILLED));
        let said = [plain, "error: memory\n", coloured, "2026 was a year\n"].concat();
        fs::write(vm.log(), said).unwrap();
        assert_eq!(vm.ending().as_deref(), Some("memory\n2026 was a year"));
    }

    #[test]
    fn names_cannot_leave_the_directory() {
        let (_dir, runtime) = runtime();
        for name in ["", ".", "..", "a/b", "/etc"] {
            assert!(runtime.vm(name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn a_directory_that_others_can_enter_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let open = dir.path().join("open");
        DirBuilder::new().mode(0o755).create(&open).unwrap();
        assert!(make_private(&open).is_err());
    }
}
