//! What the kernel may do to a private page while a machine runs never makes a
//! commit miss a change: KSM (with and without its pages of zeros), swap, migration,
//! huge pages that are collapsed and split again.
//!
//! Each test plays a chain of commits: what the tracker lists is copied to a model of
//! the snapshot, which then has to be what the memory holds.

#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use snapstore_vmm::memory::{
    GuestMemory, HostSlot, MemoryLayout, PAGE_BYTES, ScanMethod, Tracker, private_ranges, ranges,
};
use vm_memory::{Bytes as _, GuestAddress};

const SIZE_BYTES: u64 = 8 << 20;
const PAGES: u64 = SIZE_BYTES / PAGE_BYTES;

/// The kernel's settings are the host's: one test at a time changes them.
static HOST: Mutex<()> = Mutex::new(());

fn host() -> MutexGuard<'static, ()> {
    HOST.lock().unwrap_or_else(PoisonError::into_inner)
}

fn skipped(reason: &str) {
    // A test's thread has its name.
    let test = std::thread::current();
    println!("SKIPPED {}: {reason}", test.name().unwrap_or("replaced"));
}

/// A machine's memory, and the chain of its commits.
struct Chain {
    memory: GuestMemory,
    slot: HostSlot,
    tracker: Option<Tracker>,
    snapshot: Vec<u8>,
}

impl Chain {
    /// Over an image whose pages all differ, of which the second half are holes.
    fn new() -> Self {
        let image = tempfile::tempfile().unwrap();
        image.set_len(SIZE_BYTES).unwrap();
        let mut snapshot = vec![0; usize::try_from(SIZE_BYTES).unwrap()];
        let half = snapshot.len() / 2;
        for (number, page) in snapshot[..half].chunks_mut(4096).enumerate() {
            page.fill(u8::try_from(number % 251).unwrap() + 1);
        }
        image.write_all_at(&snapshot[..half], 0).unwrap();
        let layout = MemoryLayout::new(SIZE_BYTES).unwrap();
        let memory = GuestMemory::from_image(layout, &image).unwrap();
        let slot = memory.host_slots()[0];
        Self {
            tracker: Tracker::new(&[slot]).unwrap(),
            memory,
            slot,
            snapshot,
        }
    }

    fn fill(&self, pages: Range<u64>, byte: u8) {
        for page in pages {
            let at = GuestAddress(page * PAGE_BYTES);
            self.memory.ram().write_slice(&[byte; 4096], at).unwrap();
        }
    }

    /// Takes what is listed into the snapshot, as a commit does.
    fn commit(&mut self, after: &str) {
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        for method in [ScanMethod::Automatic, ScanMethod::Pagemap] {
            let mut listed = private_ranges(&pagemap, &[self.slot], method).unwrap();
            if let (Some(tracker), ScanMethod::Automatic) = (&mut self.tracker, method) {
                listed = ranges::intersect(&tracker.take().unwrap(), &listed);
            }
            for range in listed {
                let bytes =
                    usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
                let at = GuestAddress(range.start);
                let out = &mut self.snapshot[bytes];
                self.memory.ram().read_slice(out, at).unwrap();
            }
            let mut now = vec![0; self.snapshot.len()];
            self.memory
                .ram()
                .read_slice(&mut now, GuestAddress(0))
                .unwrap();
            let missed: Vec<u64> = (0..PAGES)
                .filter(|page| {
                    let at = usize::try_from(page * PAGE_BYTES).unwrap();
                    now[at..at + 4096] != self.snapshot[at..at + 4096]
                })
                .collect();
            assert!(
                missed.is_empty(),
                "{method:?} after {after}: missed {missed:?}"
            );
        }
    }

    fn advise(&self, pages: Range<u64>, advice: libc::c_int) -> std::io::Result<()> {
        let start = self.slot.host_address + pages.start * PAGE_BYTES;
        let length = (pages.end - pages.start) * PAGE_BYTES;
        // SAFETY: the range is mapped, and no advice that is given here changes what
        // it holds.
        let done = unsafe {
            libc::madvise(
                std::ptr::with_exposed_provenance_mut(usize::try_from(start).unwrap()),
                usize::try_from(length).unwrap(),
                advice,
            )
        };
        if done == 0 {
            Ok(())
        } else {
            Err(std::io::Error::last_os_error())
        }
    }

    /// How many pages have an entry with these bits in the pagemap.
    fn entries(&self, bits: u64) -> usize {
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let mut bytes = vec![0; usize::try_from(PAGES * 8).unwrap()];
        let at = self.slot.host_address / PAGE_BYTES * 8;
        pagemap.read_exact_at(&mut bytes, at).unwrap();
        let (entries, _) = bytes.as_chunks::<8>();
        let entries = entries.iter().map(|entry| u64::from_ne_bytes(*entry));
        entries.filter(|entry| entry & bits == bits).count()
    }

    /// Rounds of commits with a change of the kernel's in the midst of each.
    fn rounds(&mut self, what: &str, mut change: impl FnMut(&Self) -> bool) {
        self.fill(0..200, 7);
        self.fill(1100..1300, 8);
        self.commit("the first writes");
        let mut changed = false;
        for round in 0..3 {
            // Some become zeros, some equal, some differ; some are left alone.
            self.fill(0..60, 0);
            self.fill(100..140, 9 + round);
            self.fill(1100..1160, 0);
            self.fill(1400..1440, 9 + round);
            changed |= change(self);
            self.commit(what);
            changed |= change(self);
            self.commit("a commit of nothing");
            self.fill(30..90, 20 + round);
            self.fill(1130..1190, 20 + round);
            self.fill(1410..1420, 0);
            self.commit("writes to what was replaced");
        }
        if !changed {
            skipped(&format!("{what} did not happen here"));
        }
    }
}

/// Puts the content of files back as it was.
struct Restored(Vec<(String, String)>);

impl Restored {
    fn set(settings: &[(&str, &str)]) -> Option<Self> {
        let mut restored = Self(Vec::new());
        for (path, value) in settings {
            let before = fs::read_to_string(path).ok()?;
            restored.0.insert(0, ((*path).to_owned(), before));
            fs::write(path, value).ok()?;
        }
        Some(restored)
    }
}

impl Drop for Restored {
    fn drop(&mut self) {
        for (path, before) in &self.0 {
            let _ = fs::write(path, before.trim());
        }
    }
}

fn ksm_stat(name: &str) -> u64 {
    let stat = fs::read_to_string("/proc/self/ksm_stat").unwrap_or_default();
    let line = stat.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|value| value.trim().parse().ok())
        .unwrap_or(0)
}

fn merged_by_ksm(zero_pages: bool) {
    let _host = host();
    let dir = "/sys/kernel/mm/ksm";
    if fs::read_to_string(format!("{dir}/run")).is_ok_and(|run| run.trim() != "0") {
        return skipped("KSM is in use");
    }
    let zeros = if zero_pages { "1" } else { "0" };
    let settings = [
        (format!("{dir}/use_zero_pages"), zeros),
        (format!("{dir}/pages_to_scan"), "20000"),
        (format!("{dir}/sleep_millisecs"), "5"),
        (format!("{dir}/run"), "1"),
    ];
    let settings: Vec<_> = settings
        .iter()
        .map(|(path, to)| (path.as_str(), *to))
        .collect();
    let Some(_restored) = Restored::set(&settings) else {
        return skipped("KSM cannot be set up");
    };
    let mut chain = Chain::new();
    // What the monitor itself forbids.
    if chain.advise(0..PAGES, libc::MADV_MERGEABLE).is_err() {
        return skipped("KSM is not there");
    }
    let name = if zero_pages {
        "ksm_zero_pages"
    } else {
        "ksm_merging_pages"
    };
    chain.rounds("a merge", |_| {
        let scans = || -> u64 {
            let scans = fs::read_to_string(format!("{dir}/full_scans")).unwrap();
            scans.trim().parse().unwrap()
        };
        let (before, deadline) = (scans(), Instant::now() + Duration::from_secs(20));
        while scans() < before + 3 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        ksm_stat(name) > 0
    });
}

#[test]
fn pages_that_are_merged_are_not_missed() {
    merged_by_ksm(false);
}

#[test]
fn pages_that_become_the_page_of_zeros_are_not_missed() {
    merged_by_ksm(true);
}

#[test]
fn guest_memory_is_not_merged_whatever_is_inherited() {
    let _host = host();
    const PR_SET_MEMORY_MERGE: libc::c_int = 67;
    let merge = |on: libc::c_ulong| {
        // SAFETY: a setting of this process; no pointers.
        unsafe { libc::prctl(PR_SET_MEMORY_MERGE, on, 0, 0, 0) }
    };
    if merge(1) != 0 {
        return skipped("this kernel cannot merge a whole process's memory");
    }
    let chain = Chain::new();
    let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
    assert_eq!(merge(0), 0);
    let (from, to) = (
        chain.slot.host_address,
        chain.slot.host_address + SIZE_BYTES,
    );
    let mut within = false;
    let mut seen = 0;
    for line in smaps.lines() {
        let start = line
            .split('-')
            .next()
            .and_then(|text| u64::from_str_radix(text, 16).ok());
        if line.contains('-')
            && let Some(start) = start
        {
            within = (from..to).contains(&start);
        }
        if within && let Some(flags) = line.strip_prefix("VmFlags:") {
            seen += 1;
            assert!(!flags.split(' ').any(|flag| flag == "mg"), "{flags}");
        }
    }
    assert!(seen >= 2, "the image's data and its hole");
}

#[test]
fn pages_in_swap_are_not_missed() {
    const IN_SWAP: u64 = 1 << 62;
    let _host = host();
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let Some(_swap) = Swap::on(&dir.path().join("swap")) else {
        return skipped("there can be no swap here");
    };
    Chain::new().rounds("a way to swap", |chain| {
        let _ = chain.advise(0..PAGES, libc::MADV_PAGEOUT);
        chain.entries(IN_SWAP) > 0
    });
}

struct Swap(std::path::PathBuf);

impl Swap {
    fn on(path: &Path) -> Option<Self> {
        fs::write(path, vec![0; 32 << 20]).ok()?;
        let run = |program: &str| {
            let done = Command::new(program).arg(path).output();
            done.is_ok_and(|done| done.status.success())
        };
        (run("mkswap") && run("swapon")).then(|| Self(path.to_owned()))
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        let _ = Command::new("swapoff").arg(&self.0).output();
    }
}

#[test]
fn pages_that_are_migrated_are_not_missed() {
    let _host = host();
    Chain::new().rounds("a migration", |chain| {
        let frames = |chain: &Chain| {
            let pagemap = File::open("/proc/self/pagemap").unwrap();
            let mut bytes = vec![0; usize::try_from(PAGES * 8).unwrap()];
            let at = chain.slot.host_address / PAGE_BYTES * 8;
            pagemap.read_exact_at(&mut bytes, at).unwrap();
            bytes
        };
        let before = frames(chain);
        // All at once, as memory that is too scattered for a huge page is moved.
        fs::write("/proc/sys/vm/compact_memory", "1").is_ok() && frames(chain) != before
    });
}

#[test]
fn pages_of_huge_pages_are_not_missed() {
    let _host = host();
    let mut chain = Chain::new();
    // What the monitor itself forbids.
    if chain.advise(0..PAGES, libc::MADV_HUGEPAGE).is_err() {
        return skipped("this kernel has no huge pages");
    }
    // Those of the hole: what is a file's is not collapsed.
    let (aligned, per_huge) = (SIZE_BYTES / 2 / PAGE_BYTES, 512);
    let skew = chain.slot.host_address / PAGE_BYTES % per_huge;
    let first = aligned + (per_huge - (skew + aligned) % per_huge) % per_huge;
    let part = first..first + per_huge;
    chain.rounds("a collapse", |chain| {
        let collapsed = chain.advise(part.clone(), libc::MADV_COLLAPSE).is_ok();
        // A split, as of a part that is cold.
        let _ = chain.advise(part.start + 3..part.start + 4, libc::MADV_COLD);
        // And the shrinker, which puts the page of zeros in the place of what is zeros.
        let _ = fs::write("/proc/sys/vm/drop_caches", "2");
        collapsed
    });
}

#[test]
fn huge_pages_from_before_the_first_commit_are_not_missed() {
    let _host = host();
    let mut chain = Chain::new();
    chain.tracker = None;
    if chain.advise(0..PAGES, libc::MADV_HUGEPAGE).is_err() {
        return skipped("this kernel has no huge pages");
    }
    chain.fill(1024..PAGES, 3);
    let collapsed = chain.advise(1024..PAGES, libc::MADV_COLLAPSE).is_ok();
    chain.tracker = Tracker::new(&[chain.slot]).unwrap();
    chain.commit("a collapse");
    chain.rounds("a collapse", |_| collapsed);
}
