//! A copy of guest memory that stands still while the guest goes on.
//!
//! The copy is a child process that shares every page with this one until one
//! of them is written here, and runs nothing. What it costs while the guest
//! stands still is one `fork`, in proportion to the private pages; afterwards a
//! page's first write costs a copy of that page.
//!
//! The child ends when its [`Frozen`] is dropped, and when this process ends in
//! any way, since it waits on a pipe whose other end only this process has. The
//! kernel may end it too, when memory is short: then its files read as if they
//! were empty, and [`super::private_ranges`] says that the memory is gone.

use std::fs::File;
use std::os::fd::{AsFd as _, OwnedFd};

use rustix::pipe::{PipeFlags, pipe_with};

use super::fork::{end, fork_frozen};
use super::host_slot::HostSlot;
use crate::error::OsContext as _;
use crate::{Result, proc};

/// A frozen copy of guest memory. Dropping it ends the copy, and takes as long
/// as the kernel takes to free it.
#[derive(Debug)]
pub struct Frozen {
    pid: i32,
    pidfd: OwnedFd,
    slots: Vec<HostSlot>,
    /// The child lives while this is open.
    _pipe: OwnedFd,
}

/// What a frozen copy is read by: pass these to whoever commits it. Reading
/// needs no privilege beyond having them. They do not keep the copy alive.
#[derive(Debug)]
pub struct FrozenFiles {
    /// `/proc/PID/pagemap`, read-only, for [`super::private_ranges`].
    pub pagemap: File,
    /// `/proc/PID/mem`, read-only: its positions are host addresses, those of
    /// [`HostSlot`]. A read of 0 bytes says that the copy has ended.
    pub memory: File,
}

impl Frozen {
    /// Freezes this process's memory. The vCPUs and whatever else writes guest
    /// memory stand still during this call, which does little but `fork`, and
    /// may go on after it.
    ///
    /// The child holds a copy of every mapping that is not marked
    /// `MADV_DONTFORK`; of the shared ones, such as those of `kvm_run`, it would
    /// keep the object behind it alive. It closes its copies of the descriptors
    /// soon after this call, not before it returns.
    ///
    /// # Errors
    /// [`crate::Error::Os`] if the kernel has no room for a process.
    pub fn fork(slots: Vec<HostSlot>) -> Result<Self> {
        let (read_end, write_end) =
            pipe_with(PipeFlags::CLOEXEC).os("make a pipe for the frozen memory")?;
        let (pid, pidfd) = fork_frozen(read_end.as_fd()).os("fork the guest's memory")?;
        Ok(Self {
            pid,
            pidfd,
            slots,
            _pipe: write_end,
        })
    }

    /// Opens the files to read the copy by. The guest can run meanwhile.
    ///
    /// # Errors
    /// [`crate::Error::Os`] if the copy has ended or the system forbids it.
    pub fn open(&self) -> Result<FrozenFiles> {
        let open = |name| proc::open(&format!("{}/{name}", self.pid));
        Ok(FrozenFiles {
            pagemap: open("pagemap").os("open the frozen memory's pagemap")?,
            memory: open("mem").os("open the frozen memory")?,
        })
    }

    /// The copy's process id; it stays the copy's until this is dropped.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// The slots that were frozen; their host addresses are valid in the copy.
    #[must_use]
    pub fn slots(&self) -> &[HostSlot] {
        &self.slots
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        if let Err(error) = end(&self.pidfd) {
            tracing::warn!(pid = self.pid, %error, "cannot end a frozen copy of guest memory");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader};
    use std::os::unix::fs::FileExt as _;
    use std::path::Path;
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    use super::super::testing::{self, MIB};
    use super::super::{ScanMethod, private_ranges};
    use super::*;
    use crate::Error;

    fn frozen_byte(frozen: &Frozen, files: &FrozenFiles, offset: u64) -> u8 {
        let mut byte = [0];
        let position = frozen.slots()[0].host_address + offset;
        files.memory.read_exact_at(&mut byte, position).unwrap();
        byte[0]
    }

    fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
        let begin = Instant::now();
        while !is_so() {
            assert!(begin.elapsed() < Duration::from_secs(20), "never: {what}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Whether a process runs; one that only waits to be noted does not.
    fn runs(pid: i32) -> bool {
        std::fs::read_to_string(format!("/proc/{pid}/stat"))
            .is_ok_and(|stat| !stat.rsplit(')').next().unwrap().starts_with(" Z"))
    }

    #[test]
    fn the_copy_keeps_what_was() {
        let memory = testing::memory(8 * MIB, &[0..MIB]);
        testing::write(&memory, 4096, 1);
        testing::write(&memory, 4 * MIB, 1);
        let first = Frozen::fork(memory.host_slots()).unwrap();
        testing::write(&memory, 4096, 2);
        testing::write(&memory, 5 * MIB, 2);
        let second = Frozen::fork(memory.host_slots()).unwrap();
        testing::write(&memory, 4096, 3);

        let files = first.open().unwrap();
        // Before anything is read: reading maps the page of zeros.
        for method in [ScanMethod::Automatic, ScanMethod::Pagemap] {
            assert_eq!(
                private_ranges(&files.pagemap, first.slots(), method).unwrap(),
                [4096..8192, 4 * MIB..4 * MIB + 4096]
            );
        }
        assert_eq!(frozen_byte(&first, &files, 4096), 1);
        assert_eq!(frozen_byte(&first, &files, 5 * MIB), 0);
        assert_eq!(frozen_byte(&first, &files, 0), testing::DATA);
        let files = second.open().unwrap();
        assert_eq!(frozen_byte(&second, &files, 4096), 2);
        assert_eq!(frozen_byte(&second, &files, 5 * MIB), 2);
        assert_eq!(testing::read(&memory, 4096), 3);
    }

    #[test]
    fn the_copy_ends_with_its_owner_and_says_so() {
        let memory = testing::memory(MIB, &[]);
        testing::write(&memory, 0, 1);
        let frozen = Frozen::fork(memory.host_slots()).unwrap();
        let pid = frozen.pid();
        let files = frozen.open().unwrap();
        assert!(runs(pid));
        drop(frozen);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
        for method in [
            ScanMethod::Automatic,
            ScanMethod::PagemapScan,
            ScanMethod::Pagemap,
        ] {
            let found = private_ranges(&files.pagemap, &memory.host_slots(), method);
            assert!(
                matches!(found, Err(Error::MemoryGone)),
                "{method:?}: {found:?}"
            );
        }
        let position = memory.host_slots()[0].host_address;
        assert_eq!(files.memory.read_at(&mut [0; 8], position).unwrap(), 0);
    }

    #[test]
    fn a_copy_that_the_kernel_ended_is_noticed() {
        let memory = testing::memory(MIB, &[]);
        testing::write(&memory, 0, 1);
        let frozen = Frozen::fork(memory.host_slots()).unwrap();
        let files = frozen.open().unwrap();
        let pid = rustix::process::Pid::from_raw(frozen.pid()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        eventually("the copy's end", || !runs(frozen.pid()));
        let found = private_ranges(&files.pagemap, frozen.slots(), ScanMethod::Automatic);
        assert!(matches!(found, Err(Error::MemoryGone)), "{found:?}");
        drop(frozen);
        assert!(!Path::new(&format!("/proc/{}", pid.as_raw_nonzero())).exists());
    }

    #[test]
    fn the_copy_has_one_descriptor_and_blocks_signals() {
        let memory = testing::memory(MIB, &[]);
        let earlier = Frozen::fork(memory.host_slots()).unwrap();
        let frozen = Frozen::fork(memory.host_slots()).unwrap();
        let directory = format!("/proc/{}/fd", frozen.pid());
        eventually("one descriptor", || {
            std::fs::read_dir(&directory).unwrap().count() == 1
        });
        let target = std::fs::read_link(format!("{directory}/0")).unwrap();
        assert!(target.to_string_lossy().starts_with("pipe:"), "{target:?}");
        let status = std::fs::read_to_string(format!("/proc/{}/status", frozen.pid())).unwrap();
        assert!(status.contains("Name:\tsnapstore-froze\n"), "{status}");
        assert!(
            status.contains("SigBlk:\tfffffffe7ffbfeff\n")
                || status.contains("SigBlk:\tfffffffffffbfeff\n"),
            "{status}"
        );
        drop(earlier);
        assert!(runs(frozen.pid()));
    }

    #[test]
    fn the_mask_of_signals_is_as_before() {
        let mask = || {
            let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            let line = status.lines().find(|line| line.starts_with("SigBlk"));
            line.unwrap().to_owned()
        };
        let before = mask();
        let memory = testing::memory(MIB, &[]);
        let _frozen = Frozen::fork(memory.host_slots()).unwrap();
        assert_eq!(mask(), before);
    }

    const HELPER: &str = "SNAPSTORE_TEST_FREEZES";

    /// Not a test but the process that the next test kills.
    #[test]
    fn helper_freezes_and_waits() {
        if std::env::var_os(HELPER).is_none() {
            return;
        }
        let memory = testing::memory(MIB, &[]);
        let first = Frozen::fork(memory.host_slots()).unwrap();
        let second = Frozen::fork(memory.host_slots()).unwrap();
        println!("\nfrozen {} {}", first.pid(), second.pid());
        std::thread::sleep(Duration::from_secs(60));
    }

    #[test]
    fn the_copy_ends_when_its_process_is_killed() {
        let name = "memory::freeze::tests::helper_freezes_and_waits";
        let mut helper = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture"])
            .env(HELPER, "1")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let pids: Vec<i32> = BufReader::new(helper.stdout.take().unwrap())
            .lines()
            .map(Result::unwrap)
            .find_map(|line| {
                let pids = line.strip_prefix("frozen ")?.to_owned();
                Some(pids.split(' ').map(|pid| pid.parse().unwrap()).collect())
            })
            .unwrap();
        assert!(pids.len() == 2 && pids.iter().all(|pid| runs(*pid)));
        helper.kill().unwrap();
        helper.wait().unwrap();
        eventually("the copies' end", || !pids.iter().any(|pid| runs(*pid)));
    }
}
