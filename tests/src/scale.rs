//! Large stores, made directly: of very many chunks that are nearly empty pages, or
//! of very many packs.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context as _, ensure};
use snapstore_store::{
    CommitRequest, ImageRole, Input, InputData, InputKind, ParentChoice, Silent, SnapshotId, Store,
};

/// The length of a page in bytes.
pub const PAGE: usize = 4096;
/// Pages of one commit at most.
const COMMIT_PAGES: u64 = 1 << 16;
/// Where the numbers of pages begin that no store has yet.
const FRESH: u64 = 1 << 40;

/// What is in a store that was made.
#[derive(Clone, Copy, Debug)]
pub struct Made {
    /// A snapshot, tagged `base`.
    pub whole: SnapshotId,
    /// How many pages there are.
    pub chunks: u64,
}

/// How many chunks the largest store has: 10^7, or what `SCALE_CHUNKS` says.
#[must_use]
pub fn largest() -> u64 {
    number_from("SCALE_CHUNKS", 10_000_000)
}

/// How many packs the store of many packs has: 100 000, or what `SCALE_PACKS` says.
#[must_use]
pub fn packs() -> u64 {
    number_from("SCALE_PACKS", 100_000)
}

fn number_from(variable: &str, default: u64) -> u64 {
    let given = std::env::var(variable).ok();
    given.and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// A number that no page has been made of in this process.
#[must_use]
pub fn fresh_number() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(FRESH);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Pages that have their numbers in them, and else zeros.
#[must_use]
pub fn pages(first: u64, count: u64) -> Vec<u8> {
    let len = usize::try_from(count).expect("pages that fit into memory") * PAGE;
    let mut bytes = vec![0; len];
    for (number, page) in (first..).zip(bytes.chunks_exact_mut(PAGE)) {
        page[..8].copy_from_slice(&number.to_le_bytes());
        page[8] = 1;
    }
    bytes
}

/// Commits pages under a tag, without a parent.
///
/// # Errors
/// The commit's.
pub fn commit(store: &Store, tag: &str, bytes: Vec<u8>) -> anyhow::Result<SnapshotId> {
    let request = CommitRequest {
        tag: tag.to_owned(),
        replace: true,
        parent: ParentChoice::Nothing,
        inputs: vec![Input {
            name: "memory".to_owned(),
            role: ImageRole::Memory,
            data: InputData::Bytes(Arc::from(bytes)),
            kind: InputKind::Full,
        }],
        ..CommitRequest::default()
    };
    let id = store.commit(&request, &Silent)?.id;
    // As the program does.
    store.tidy_index();
    Ok(id)
}

/// Fills an empty store with so many distinct pages: 512 tagged `base`, a hundredth
/// of all tagged `doomed`, and the others.
///
/// # Errors
/// A commit's.
pub fn fill(path: &Path, chunks: u64) -> anyhow::Result<Made> {
    let store = Store::open(path)?;
    let whole = commit(&store, "base", pages(0, 512))?;
    let mut next = 512;
    let doomed = chunks / 100;
    for part in parts(doomed) {
        commit(&store, "doomed", pages(next, part))?;
        next += part;
    }
    for (number, part) in (0..).zip(parts(chunks - next)) {
        commit(&store, &format!("part-{number}"), pages(next, part))?;
        next += part;
    }
    Ok(Made { whole, chunks })
}

/// Fills a store with so many pages of which two in five stay alive in each pack,
/// and the others do not.
///
/// # Errors
/// A commit's.
pub fn fill_half_dead(path: &Path, chunks: u64) -> anyhow::Result<()> {
    let store = Store::open(path)?;
    let mut next = 0;
    let mut dead = Vec::new();
    for (number, part) in (0..).zip(parts(chunks)) {
        let tag = format!("dead-{number}");
        commit(&store, &tag, pages(next, part))?;
        commit(&store, &format!("live-{number}"), pages(next, part * 2 / 5))?;
        dead.push(tag);
        next += part;
    }
    store.remove_tags(&dead)?;
    Ok(())
}

/// Adds so many packs of one page each, which snapshots of 64 tags need: each commit
/// adds a page to those of the tag's commit before.
///
/// # Errors
/// A commit's.
pub fn add_packs(path: &Path, count: u64, first: u64) -> anyhow::Result<()> {
    const GROWING: u64 = 4096;
    let store = Store::open(path)?;
    for group in (0..count).step_by(usize::try_from(GROWING)?) {
        let first = FRESH * 2 + first + group;
        let tag = format!("packs-{}", first);
        for step in 0..GROWING.min(count - group) {
            commit_next(&store, &tag, first, step)?;
        }
    }
    Ok(())
}

/// Commits the pages up to this step, of which the tag's snapshot has all but one.
fn commit_next(store: &Store, tag: &str, first: u64, step: u64) -> anyhow::Result<()> {
    let number = first + step;
    // Each its own image: a commit takes the others along unread.
    let request = CommitRequest {
        tag: format!("{tag}-{}", step % 64),
        replace: true,
        parent: match step >= 64 {
            true => ParentChoice::Named(format!("{tag}-{}", step % 64)),
            false => ParentChoice::Nothing,
        },
        inherit: step >= 64,
        inputs: vec![Input {
            name: format!("page-{}", step / 64),
            role: ImageRole::Disk,
            data: InputData::Bytes(Arc::from(pages(number, 1))),
            kind: InputKind::Full,
        }],
        ..CommitRequest::default()
    };
    store.commit(&request, &Silent)?;
    // As the program does.
    store.tidy_index();
    Ok(())
}

/// At most so many pages at a time.
fn parts(count: u64) -> impl Iterator<Item = u64> {
    (0..count.div_ceil(COMMIT_PAGES)).map(move |part| COMMIT_PAGES.min(count - part * COMMIT_PAGES))
}

/// What a program took.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    /// Of all processors, in user and kernel mode, in seconds.
    pub cpu_seconds: f64,
    /// The most memory that it had in use.
    pub peak_bytes: u64,
}

/// Runs a program, which must succeed.
///
/// # Errors
/// If it fails.
pub fn usage(command: &Command) -> anyhow::Result<Usage> {
    // The largest child so far is what a process can be asked for, so each command
    // is the only child of a process of its own.
    let time = "import resource, subprocess, sys\n\
                code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)\n\
                used = resource.getrusage(resource.RUSAGE_CHILDREN)\n\
                print(used.ru_utime + used.ru_stime, used.ru_maxrss)\n\
                sys.exit(code)";
    let output = Command::new("python3")
        .args(["-c", time])
        .arg(command.get_program())
        .args(command.get_args())
        .output()
        .context("python3, which measures what a program takes")?;
    ensure!(
        output.status.success(),
        "{command:?} ended with {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    let said = String::from_utf8(output.stdout)?;
    let (cpu_seconds, kib) = said.trim().split_once(' ').context("two numbers")?;
    Ok(Usage {
        cpu_seconds: cpu_seconds.parse()?,
        peak_bytes: kib.parse::<u64>()? * 1024,
    })
}
