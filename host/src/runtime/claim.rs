//! Taking a machine's name: for as long as it lives, or while it is started.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::files::{is_same, make_private, remove_if_there};
use super::vm_dir::{MONITOR_DIR, VmDir, began};
use crate::error::Busy;

/// How often a lock is tried that somebody else may only look at, and how long after.
const LOCK_ATTEMPTS: u32 = 20;
const LOCK_RETRY: Duration = Duration::from_millis(2);
/// The same of a name that another command may be about to start a machine with: then the
/// next name is tried.
const STARTER_ATTEMPTS: u32 = 5;
/// How long those may take that hold a lock and will not keep it: who looks at it, clears
/// away after a machine, or is about to say who they are. A busy machine may not let them
/// run for long.
const PASSING_PATIENCE: Duration = Duration::from_secs(2);

/// A machine's name, taken for as long as this or a duplicate of it is open.
pub struct NameLock {
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

/// What a command writes into the lock of its reservation: those who only look at it, or
/// clear it away, write nothing.
const RESERVED: &[u8] = b"reserved\n";

fn is_written(lock: &File) -> bool {
    lock.metadata().is_ok_and(|metadata| metadata.len() > 0)
}

/// Waiting for a lock that somebody else has.
struct Wait {
    attempts: u32,
    deadline: Instant,
}

impl Wait {
    /// So many attempts are left where whoever has it means to keep it.
    fn new(attempts: u32) -> Self {
        Self {
            attempts,
            deadline: Instant::now() + PASSING_PATIENCE,
        }
    }

    /// Waits a moment, unless that has been done for long enough.
    fn once_more(&mut self, is_kept: bool) -> bool {
        if is_kept {
            let Some(left) = self.attempts.checked_sub(1) else {
                return false;
            };
            self.attempts = left;
        } else if Instant::now() > self.deadline {
            return false;
        }
        std::thread::sleep(LOCK_RETRY);
        true
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // While it is still locked: who opens it now finds it gone once it is not.
        let _ = fs::remove_file(self.vm.starter_path());
        // Of a machine that never was nothing stays; one that is has a lock in there.
        let _ = fs::remove_dir(&self.vm.dir);
    }
}

impl VmDir {
    /// A claim that was handed to this process, as the lock that it holds.
    pub fn adopt(&self, lock: OwnedFd) -> NameLock {
        NameLock {
            vm: self.clone(),
            lock: lock.into(),
        }
    }

    /// Takes the name, and clears away what an earlier machine left there.
    ///
    /// The lock decides, not the directory: it is looked for again by its path
    /// once locked, since its holder may have removed it meanwhile.
    pub fn claim(&self) -> anyhow::Result<NameLock> {
        let mut wait = Wait::new(LOCK_ATTEMPTS);
        loop {
            let lock = self.open_own(&self.lock_path())?;
            match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Err(Errno::WOULDBLOCK) if wait.once_more(self.process().is_some()) => continue,
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
                    .and_then(|()| self.remove_group())
                    .and_then(|()| remove_if_there(&self.log()))
                    .and_then(|()| remove_if_there(&self.dir.join("ending")))
                    .with_context(|| format!("cannot clear {}", self.dir.display()))?;
                return Ok(NameLock {
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
        let mut wait = Wait::new(STARTER_ATTEMPTS);
        loop {
            let mut lock = self.open_own(&self.starter_path())?;
            match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Err(Errno::WOULDBLOCK) if wait.once_more(is_written(&lock)) => continue,
                Err(Errno::WOULDBLOCK) => return Ok(None),
                other => other.context("cannot lock a machine's name")?,
            }
            if !is_same(&lock, &self.starter_path()) {
                continue;
            }
            lock.write_all(RESERVED)
                .with_context(|| format!("cannot write {}", self.starter_path().display()))?;
            let reservation = Reservation {
                vm: self.clone(),
                _lock: lock,
            };
            // A machine that has just ended is perhaps being cleared away.
            let mut wait = Wait::new(0);
            while self.is_running() {
                if !wait.once_more(self.process().is_some()) {
                    return Ok(None);
                }
            }
            return Ok(Some(reservation));
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
    pub(super) fn was_abandoned(&self) -> anyhow::Result<bool> {
        self.remove_abandoned_reservation()
            .with_context(|| format!("cannot clear {}", self.dir.display()))?;
        // Not if somebody is about to start it.
        Ok(match fs::remove_dir(&self.dir) {
            Ok(()) => true,
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        })
    }

    pub(super) fn starter_path(&self) -> PathBuf {
        self.dir.join("starter")
    }

    /// The name of a machine that has ended, if nobody has taken it since.
    pub fn reclaim(&self) -> anyhow::Result<Option<NameLock>> {
        let lock = match File::open(self.lock_path()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => {
                other.with_context(|| format!("cannot open {}", self.lock_path().display()))?
            }
        };
        let mut wait = Wait::new(LOCK_ATTEMPTS);
        loop {
            match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Err(Errno::WOULDBLOCK) if wait.once_more(self.process().is_some()) => {}
                Err(Errno::WOULDBLOCK) => return Ok(None),
                other => {
                    other?;
                    let vm = self.clone();
                    let is_same = is_same(&lock, &self.lock_path());
                    return Ok(is_same.then_some(NameLock { vm, lock }));
                }
            }
        }
    }

    /// The control socket, what another monitor made, that of the vsock device, and those that programs of the
    /// host have put beside it for its guest, `vsock.sock_PORT`.
    fn remove_sockets(&self) -> io::Result<()> {
        remove_if_there(&self.socket())?;
        let entries = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other?,
        };
        for entry in entries {
            let entry = entry?;
            if entry.file_name() == MONITOR_DIR {
                fs::remove_dir_all(entry.path())?;
            }
            if entry.file_name().as_bytes().starts_with(b"vsock.sock") {
                remove_if_there(&entry.path())?;
            }
        }
        Ok(())
    }
}

impl NameLock {
    /// Writes down that this process is the machine's: whoever ends a machine that does
    /// not answer has to know which process it is.
    pub fn name_holder(&self) -> anyhow::Result<()> {
        self.name_process(rustix::process::getpid().as_raw_nonzero().get())
    }

    /// The same of another process, which has inherited the lock.
    pub fn name_process(&self, pid: i32) -> anyhow::Result<()> {
        let since = began(pid).context("cannot find a machine's process in /proc")?;
        let said = format!("{pid} {since}\n");
        // It says so at every moment if it has said so before, as the machine and its supervisor both do: the
        // process may be stopped here, and is found by it. What an earlier machine said beyond that is not read.
        let length = u64::try_from(said.len()).expect("two numbers");
        self.lock
            .write_all_at(said.as_bytes(), 0)
            .and_then(|()| self.lock.set_len(length))
            .with_context(|| format!("cannot write {}", self.vm.lock_path().display()))
    }

    /// What holds it.
    pub fn lock(&self) -> BorrowedFd<'_> {
        self.lock.as_fd()
    }

    /// Leaves the machine's log to say why it ended.
    pub fn release_with_log(self) -> io::Result<()> {
        self.vm.remove_group()?;
        self.vm.remove_sockets()
    }

    /// Says why the machine ended; without a reason there is nothing to keep.
    /// The lock goes last: whoever has it finds the rest as it will stay.
    pub fn release(self, ending: Option<&str>) -> io::Result<()> {
        let dir = &self.vm.dir;
        self.vm.remove_group()?;
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
