//! What a mount's server has done, in numbers.
//!
//! A thread counts in a shard of its own: counting a read is two looks at the clock and a few
//! additions to a cache line that no other thread writes. Nothing waits for a lock.
//!
//! The numbers are told through the mount itself, as an extended attribute of its root
//! directory, to the server's user and root alone. So there is no socket to be found, guarded
//! or left over. Whoever asks waits for the server, and has to have a deadline of its own
//! (as for all that goes through a mount).

use std::cell::Cell;
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use fuser::{Errno, ReplyXattr, Request};
use serde::{Deserialize, Serialize};
use snapstore_store::{ErrorClass, ForeignSnapshot, Traffic};

use crate::error::{Result, cannot};

/// The attribute of the root directory.
pub(crate) const ATTRIBUTE: &str = "user.snapstore.counters";
/// The longest value of an attribute (xattr(7)).
const LONGEST_BYTES: usize = 64 << 10;
/// More threads than this share shards.
const SHARDS: usize = 16;
/// Upper bounds of the classes of latency. Slower answers are in one more class.
const BOUNDS_MICROS: [u64; 14] = [
    5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 50_000, 250_000, 1_000_000,
];
const CLASSES: usize = BOUNDS_MICROS.len() + 1;
/// An overlay that is fuller than this is told as a warning.
const NEARLY_FULL: f64 = 0.9;

/// What a mount's server has done since it began.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct MountCounters {
    /// Its process.
    pub pid: u32,
    /// How long it has served, in seconds.
    pub uptime_seconds: f64,
    /// Read requests of the kernel that were answered, with data or an error: a page fault
    /// in a mapping is one, with what the kernel reads around it.
    pub reads: u64,
    /// How long all of them took, in seconds.
    pub read_seconds: f64,
    /// How many took at most so many seconds; ascending, each with those before it.
    pub reads_within: Vec<(f64, u64)>,
    /// Bytes that were given as answers.
    pub read_bytes: u64,
    /// Reads that were answered with an error.
    pub read_errors: u64,
    /// Of those, reads that met damaged data.
    pub damaged_reads: u64,
    /// How much the kernel reads around a fault, in bytes.
    pub read_ahead_bytes: u64,
    /// Reads of more than that. The kernel makes them for who advises it to (huge pages for a
    /// mapping, `MADV_WILLNEED`, `readahead`), and for who reads that much at once.
    pub large_reads: u64,
    /// Bytes that were given as answers to those.
    pub large_read_bytes: u64,
    /// Write requests, of a mount that can be written.
    pub writes: u64,
    /// Bytes of those that were done.
    pub written_bytes: u64,
    /// Those that were answered with an error.
    pub write_errors: u64,
    /// Pages of working sets that the kernel was given before anybody asked.
    pub pushed_pages: u64,
    /// Pages of working sets that were left out, to see whether they are asked for.
    pub sampled_pages: u64,
    /// Of those, pages that were asked for.
    pub sampled_hit_pages: u64,
    /// Pages that were asked for and are in no working set.
    pub missed_pages: u64,
    /// What was asked for where the snapshot is, if it is elsewhere, by why.
    pub elsewhere: Vec<Traffic>,
    /// What was written lies here, of a mount that can be written.
    pub overlays: Option<OverlayUse>,
}

/// How much room the overlays of a writable mount's clones take.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct OverlayUse {
    /// All of them, in bytes.
    pub used_bytes: u64,
    /// That of the clone that has written most, in bytes.
    pub fullest_bytes: u64,
    /// How much each of them may take, in bytes, if there is a limit.
    pub limit_bytes: Option<u64>,
}

impl OverlayUse {
    /// How full the fullest of them is: 1 if nothing more can be written there. Unknown
    /// without a limit.
    #[must_use]
    pub fn fill(&self) -> Option<f64> {
        let limit = self.limit_bytes?;
        Some(match limit {
            0 => 1.0,
            limit => self.fullest_bytes as f64 / limit as f64,
        })
    }

    /// Whether a clone is about to be out of room.
    #[must_use]
    pub fn is_nearly_full(&self) -> bool {
        self.fill().is_some_and(|fill| fill > NEARLY_FULL)
    }
}

impl MountCounters {
    /// What the server of the mount at `dir` has counted. Waits for that server.
    ///
    /// # Errors
    /// It does not tell this user, is of an older version, or gone.
    pub fn of(dir: &Path) -> Result<Self> {
        let failed = |source| cannot("read the counters of", dir, source);
        let mut value = vec![0; LONGEST_BYTES];
        let len = rustix::fs::getxattr(dir, ATTRIBUTE, &mut value[..])
            .map_err(|errno| failed(errno.into()))?;
        let value = value.get(..len).unwrap_or_default();
        serde_json::from_slice(value).map_err(|error| failed(error.into()))
    }
}

/// Numbers of one thread, or of a few.
#[derive(Default)]
#[repr(align(256))]
struct Shard {
    reads: [AtomicU64; CLASSES],
    read_nanos: AtomicU64,
    read_bytes: AtomicU64,
    large_reads: AtomicU64,
    large_read_bytes: AtomicU64,
    read_errors: AtomicU64,
    damaged_reads: AtomicU64,
    writes: AtomicU64,
    written_bytes: AtomicU64,
    write_errors: AtomicU64,
}

/// What is counted while a mount is served.
pub(crate) struct Counters {
    began: Instant,
    read_ahead_bytes: u32,
    shards: [Shard; SHARDS],
    pushed_pages: AtomicU64,
    sampled_pages: AtomicU64,
    sampled_hit_pages: AtomicU64,
    missed_pages: AtomicU64,
    elsewhere: Option<ForeignSnapshot>,
}

impl Counters {
    /// Of a mount of which the kernel reads so much around a fault.
    pub fn new(read_ahead_bytes: u32) -> Self {
        Self::of(read_ahead_bytes, None)
    }

    /// The same of one that shows this snapshot, which is elsewhere.
    pub fn of(read_ahead_bytes: u32, elsewhere: Option<ForeignSnapshot>) -> Self {
        Self {
            began: Instant::now(),
            read_ahead_bytes,
            shards: Default::default(),
            pushed_pages: AtomicU64::new(0),
            sampled_pages: AtomicU64::new(0),
            sampled_hit_pages: AtomicU64::new(0),
            missed_pages: AtomicU64::new(0),
            elsewhere,
        }
    }

    fn shard(&self) -> &Shard {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        thread_local! {
            static OWN: Cell<usize> = Cell::new(NEXT.fetch_add(1, Ordering::Relaxed) % SHARDS);
        }
        &self.shards[OWN.get()]
    }

    /// A read of so many bytes that took so long gave so many, or none.
    pub fn read(&self, asked: usize, took: Duration, bytes: Option<usize>) {
        let shard = self.shard();
        if asked > self.read_ahead_bytes as usize {
            add(&shard.large_reads, 1);
            add(&shard.large_read_bytes, bytes.unwrap_or(0) as u64);
        }
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        let class = BOUNDS_MICROS.partition_point(|bound| bound * 1000 < nanos);
        add(&shard.reads[class], 1);
        add(&shard.read_nanos, nanos);
        match bytes {
            Some(bytes) => add(&shard.read_bytes, bytes as u64),
            None => add(&shard.read_errors, 1),
        }
    }

    /// Why a read failed, before that is counted as one.
    pub fn read_failed(&self, error: &snapstore_store::Error) {
        if error.class() == ErrorClass::Damaged {
            add(&self.shard().damaged_reads, 1);
        }
    }

    /// A write of so many bytes was done, or none was.
    pub fn write(&self, bytes: Option<usize>) {
        let shard = self.shard();
        add(&shard.writes, 1);
        match bytes {
            Some(bytes) => add(&shard.written_bytes, bytes as u64),
            None => add(&shard.write_errors, 1),
        }
    }

    pub fn pushed_page(&self) {
        add(&self.pushed_pages, 1);
    }

    pub fn sampled_pages(&self, count: u32) {
        add(&self.sampled_pages, count.into());
    }

    pub fn sampled_hit_page(&self) {
        add(&self.sampled_hit_pages, 1);
    }

    pub fn missed_page(&self) {
        add(&self.missed_pages, 1);
    }

    /// What was counted until now.
    pub fn sum(&self) -> MountCounters {
        let sum = |of: &dyn Fn(&Shard) -> &AtomicU64| -> u64 {
            let values = self.shards.iter().map(|shard| get(of(shard)));
            values.fold(0, u64::saturating_add)
        };
        let mut reads = 0;
        let mut within = |class: usize| {
            reads += sum(&|shard| &shard.reads[class]);
            reads
        };
        let classes = BOUNDS_MICROS.iter().enumerate();
        let reads_within = classes
            .map(|(class, bound)| (*bound as f64 / 1e6, within(class)))
            .collect();
        MountCounters {
            pid: std::process::id(),
            uptime_seconds: self.began.elapsed().as_secs_f64(),
            // The last class has no bound.
            reads: within(CLASSES - 1),
            read_seconds: sum(&|shard| &shard.read_nanos) as f64 / 1e9,
            reads_within,
            read_bytes: sum(&|shard| &shard.read_bytes),
            read_errors: sum(&|shard| &shard.read_errors),
            damaged_reads: sum(&|shard| &shard.damaged_reads),
            read_ahead_bytes: self.read_ahead_bytes.into(),
            large_reads: sum(&|shard| &shard.large_reads),
            large_read_bytes: sum(&|shard| &shard.large_read_bytes),
            writes: sum(&|shard| &shard.writes),
            written_bytes: sum(&|shard| &shard.written_bytes),
            write_errors: sum(&|shard| &shard.write_errors),
            pushed_pages: get(&self.pushed_pages),
            sampled_pages: get(&self.sampled_pages),
            sampled_hit_pages: get(&self.sampled_hit_pages),
            missed_pages: get(&self.missed_pages),
            elsewhere: self
                .elsewhere
                .iter()
                .flat_map(ForeignSnapshot::traffic)
                .collect(),
            overlays: None,
        }
    }

    /// Answers whoever asks for the attribute.
    pub fn tell(
        &self,
        overlays: Option<OverlayUse>,
        request: &Request,
        size: u32,
        reply: ReplyXattr,
    ) {
        let trusted = [0, rustix::process::geteuid().as_raw()];
        // Others may read a mount; how it is used is none of theirs.
        if !trusted.contains(&request.uid()) {
            return reply.error(Errno::EACCES);
        }
        let counted = MountCounters {
            overlays,
            ..self.sum()
        };
        let Ok(value) = serde_json::to_vec(&counted) else {
            return reply.error(Errno::EIO);
        };
        match u32::try_from(value.len()) {
            Ok(len) if size == 0 => reply.size(len),
            Ok(len) if len <= size => reply.data(&value),
            _ => reply.error(Errno::ERANGE),
        }
    }
}

fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}

fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_threads_count_is_added_up() {
        let counters = Counters::new(4096);
        std::thread::scope(|scope| {
            for _ in 0..2 * SHARDS {
                scope.spawn(|| {
                    counters.read(4096, Duration::from_micros(5), Some(4096));
                    counters.read(8192, Duration::from_nanos(5_001), Some(4096));
                    counters.read(4096, Duration::from_secs(3), None);
                    counters.write(Some(10));
                    counters.write(None);
                });
            }
        });
        let threads = 2 * SHARDS as u64;
        let sum = counters.sum();
        assert_eq!(sum.reads, 3 * threads);
        assert_eq!(sum.reads_within[0], (0.000_005, threads));
        assert_eq!(sum.reads_within[1], (0.000_01, 2 * threads));
        // Three seconds are in no class that has a bound.
        assert_eq!(sum.reads_within.last(), Some(&(1.0, 2 * threads)));
        assert_eq!(sum.read_bytes, 2 * 4096 * threads);
        assert_eq!(
            (sum.large_reads, sum.large_read_bytes),
            (threads, 4096 * threads)
        );
        assert_eq!((sum.read_errors, sum.damaged_reads), (threads, 0));
        assert_eq!(sum.writes, 2 * threads);
        assert_eq!(
            (sum.written_bytes, sum.write_errors),
            (10 * threads, threads)
        );
        assert!((sum.read_seconds - 3.000_010_001 * threads as f64).abs() < 1e-6);
    }

    #[test]
    fn an_overlay_is_nearly_full_above_nine_tenths() {
        let of = |fullest_bytes, limit_bytes| OverlayUse {
            used_bytes: fullest_bytes,
            fullest_bytes,
            limit_bytes,
        };
        assert_eq!(of(50, Some(100)).fill(), Some(0.5));
        assert!(!of(90, Some(100)).is_nearly_full());
        assert!(of(91, Some(100)).is_nearly_full());
        assert!(of(0, Some(0)).is_nearly_full());
        assert_eq!(of(u64::MAX, None).fill(), None);
        assert!(!of(u64::MAX, None).is_nearly_full());
    }

    #[test]
    fn what_another_version_tells_is_understood() {
        let told = br#"{"reads": 7, "reads_within": [[0.5, 6]], "of_the_future": [1]}"#;
        let counters: MountCounters = serde_json::from_slice(told).expect("it is JSON");
        assert_eq!(counters.reads, 7);
        assert_eq!(counters.reads_within, [(0.5, 6)]);
        assert_eq!(counters.pushed_pages, 0);
    }
}
