//! The benchmarks: each compares the product with something else in the same
//! run, in turns, so that a machine's moods fall on both.

pub mod before;
pub mod bytes;
pub mod codec;
pub mod commit;
pub mod deep;
pub mod far;
pub mod fault;
pub mod guest;
pub mod monitor_qemu;
pub mod mounts;
pub mod near;
pub mod qemu_rig;
pub mod read;
pub mod remote;
pub mod remote_copy;
pub mod remote_fault;
pub mod remote_requests;
pub mod remote_restore;
pub mod report;
pub mod scale;
pub mod serve_ram;
pub mod start;
pub mod stats;
pub mod tools;
pub mod touch;
pub mod view;
pub mod vm_bare;
pub mod vm_changes;
pub mod vm_commit;
pub mod vm_confine;
pub mod vm_frozen;
pub mod vm_heads;
pub mod vm_many;
pub mod vm_pause;
pub mod vm_restore;
pub mod vm_rig;
pub mod vm_tracking;
pub mod vm_warm;

use std::cell::OnceCell;
use std::path::{Path, PathBuf};

use deep::Deep;
use guest::Images;
use report::{Comparison, Report, Unit};
use stats::{Random, Samples};

use snapstore_tests::harness::Cli;

/// What every benchmark needs.
pub struct Bench {
    /// Real guest memory; none if only benchmarks run that need none.
    pub images: Images,
    /// How many turns each subject takes.
    pub rounds: usize,
    /// The results.
    pub report: Report,
    dir: tempfile::TempDir,
    deep: OnceCell<Deep>,
    base: OnceCell<Cli>,
}

type Run = fn(&mut Bench) -> anyhow::Result<()>;

/// What a benchmark cannot do without.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Needs {
    /// The guest images.
    Images,
    /// KVM and FUSE.
    Machines,
    /// All of these.
    Both,
    /// Nothing that a machine may lack.
    Nothing,
}

impl Needs {
    /// Whether that includes guest images.
    #[must_use]
    pub fn images(self) -> bool {
        matches!(self, Self::Images | Self::Both)
    }

    /// Whether that includes KVM and FUSE.
    #[must_use]
    pub fn machines(self) -> bool {
        matches!(self, Self::Machines | Self::Both)
    }
}

/// Every benchmark: its name, what it needs, and what it does.
pub const ALL: [(&str, Needs, Run); 41] = [
    ("commit-known", Needs::Images, commit::known),
    ("commit-base", Needs::Images, commit::base),
    ("commit-one", Needs::Nothing, commit::one_page),
    ("commit-diff-depth", Needs::Images, commit::diff_depth),
    ("read-depth", Needs::Images, read::depth),
    ("read-optimized", Needs::Images, read::depth_optimized),
    ("read-near", Needs::Nothing, near::near),
    ("seq-read", Needs::Images, read::sequential),
    ("fault-random", Needs::Images, fault::random),
    ("fault-leaf", Needs::Images, fault::first_of_leaf),
    ("mount-readahead", Needs::Images, fault::read_ahead),
    ("mount-time", Needs::Images, fault::mount_time),
    ("bytes-five", Needs::Images, bytes::five),
    ("bytes-steps", Needs::Images, bytes::steps),
    ("bytes-rewritten", Needs::Images, bytes::rewritten),
    ("start", Needs::Nothing, start::start),
    ("before", Needs::Images, before::before),
    ("codec", Needs::Images, codec::codec),
    ("scale-chunks", Needs::Nothing, scale::chunks),
    ("scale-tags", Needs::Nothing, scale::tags),
    ("scale-packs", Needs::Nothing, scale::packs),
    ("scale-gc", Needs::Nothing, scale::beside_gc),
    ("view-write", Needs::Nothing, view::write),
    ("view-load", Needs::Nothing, view::load),
    ("view-commit", Needs::Nothing, view::commit),
    ("view-bytes", Needs::Nothing, view::bytes),
    ("remote", Needs::Nothing, remote::remote),
    ("remote-fault", Needs::Nothing, remote_fault::fault),
    ("remote-restore", Needs::Machines, remote_restore::restore),
    ("remote-copy", Needs::Nothing, remote_copy::copy),
    ("remote-requests", Needs::Nothing, remote_requests::requests),
    ("monitor-qemu", Needs::Nothing, monitor_qemu::qemu),
    ("vm-restore", Needs::Machines, vm_restore::restore),
    ("vm-warm", Needs::Both, vm_warm::warm),
    ("vm-many", Needs::Machines, vm_many::many),
    ("vm-heads", Needs::Both, vm_heads::heads),
    ("vm-pause", Needs::Machines, vm_pause::pause),
    ("vm-changes", Needs::Machines, vm_changes::changes),
    ("vm-commit", Needs::Machines, vm_commit::commit),
    ("vm-confine", Needs::Machines, vm_confine::confine),
    ("vm-tracking", Needs::Machines, vm_tracking::tracking),
];

impl Bench {
    /// Benchmarks of these images, in a temporary directory.
    ///
    /// # Errors
    /// If there is no place for it.
    pub fn new(images: Images, rounds: usize) -> anyhow::Result<Self> {
        Ok(Self {
            images,
            rounds,
            report: Report::default(),
            dir: tempfile::Builder::new()
                .prefix("snapstore-bench-")
                .tempdir()?,
            deep: OnceCell::new(),
            base: OnceCell::new(),
        })
    }

    /// A path for a benchmark's own use, where nothing is yet.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A new, empty store.
    ///
    /// # Errors
    /// If it cannot be created.
    pub fn new_store(&self, name: &str) -> anyhow::Result<Cli> {
        new_store(&self.path(name))
    }

    /// A store that holds the base image under `base`.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn base_store(&self) -> anyhow::Result<&Cli> {
        if self.base.get().is_none() {
            let cli = self.new_store("base-store")?;
            cli.ok(&[
                "commit",
                "base",
                "--memory",
                utf8(&self.images.path("base"))?,
            ])?;
            let _ = self.base.set(cli);
        }
        Ok(self.base.get().expect("it was set"))
    }

    /// Stores with a long chain and without.
    ///
    /// # Errors
    /// If they cannot be made.
    pub fn deep(&self) -> anyhow::Result<&Deep> {
        if self.deep.get().is_none() {
            let deep = Deep::build(self.images.read("base")?, &self.path("deep"))?;
            let _ = self.deep.set(deep);
        }
        Ok(self.deep.get().expect("it was set"))
    }

    /// Random non-zero pages of an image, others in each round.
    #[must_use]
    pub fn random_pages(&self, used: &[u64], round: usize) -> Vec<u64> {
        Random::new(round as u64).choose(used, 4096)
    }

    /// Adds a comparison of times to the report.
    pub fn compare(
        &mut self,
        what: &str,
        product: &Samples,
        against: &str,
        baseline: &Samples,
        aim: Option<f64>,
    ) {
        self.add(Unit::Seconds, (what, product), (against, baseline), aim);
    }

    /// Adds a comparison of bytes to the report.
    pub fn compare_bytes(
        &mut self,
        product: (&str, &Samples),
        baseline: (&str, &Samples),
        aim: Option<f64>,
    ) {
        self.add(Unit::Bytes, product, baseline, aim);
    }

    /// Adds a comparison of counts to the report.
    pub fn compare_counts(
        &mut self,
        product: (&str, &Samples),
        baseline: (&str, &Samples),
        aim: Option<f64>,
    ) {
        self.add(Unit::Count, product, baseline, aim);
    }

    fn add(
        &mut self,
        unit: Unit,
        (what, product): (&str, &Samples),
        (against, baseline): (&str, &Samples),
        aim: Option<f64>,
    ) {
        self.report.add(&Comparison {
            what: what.to_owned(),
            unit,
            product: product.clone(),
            against: against.to_owned(),
            baseline: baseline.clone(),
            aim,
        });
    }
}

/// A new, empty store at `path`.
///
/// # Errors
/// If it cannot be created.
pub fn new_store(path: &Path) -> anyhow::Result<Cli> {
    let cli = Cli::new(path);
    cli.ok(&["init"])?;
    Ok(cli)
}

/// A path as an argument.
///
/// # Errors
/// If it is not UTF-8.
pub fn utf8(path: &Path) -> anyhow::Result<&str> {
    path.to_str()
        .ok_or_else(|| anyhow::anyhow!("{} is not UTF-8", path.display()))
}
