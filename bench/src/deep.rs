//! A chain of a hundred snapshots, and the same bytes without one.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::ensure;
use snapstore_store::{
    CommitRequest, Committed, ImageRole, Input, InputData, InputKind, ParentChoice, Silent, Store,
};

use crate::guest::{Guest, Step};
use crate::new_store;
use crate::stats::Random;
use crate::tools::hash;
use snapstore_tests::harness::Cli;

/// How long the chain is.
pub const DEPTH: usize = 100;
/// Pages that change from one snapshot of the chain to the next.
pub const EDITS: usize = 1000;

/// Three stores.
#[derive(Debug)]
pub struct Deep {
    /// The base under `d0`, and each step of the chain up to `d100`.
    pub long: Cli,
    /// Only the base and the first step, `d0` and `d1`.
    pub short: Cli,
    /// Only the memory at the chain's end, `head`.
    pub flat: Cli,
    /// That memory as a plain file.
    pub head: PathBuf,
    /// The guest at `d1`.
    pub guest_at_1: Guest,
    /// The guest at `d100`.
    pub guest_at_end: Guest,
}

impl Deep {
    /// Builds them under `dir`.
    ///
    /// # Errors
    /// If that fails.
    pub fn build(memory: Vec<u8>, dir: &Path) -> anyhow::Result<Self> {
        fs::create_dir_all(dir)?;
        let (long, short) = (
            new_store(&dir.join("long"))?,
            new_store(&dir.join("short"))?,
        );
        let diff = dir.join("diff");
        let head = dir.join("head.ram");
        let mut guest = Guest::new(memory);
        let mut random = Random::new(1);
        guest.write(&head)?;
        for cli in [&long, &short] {
            commit_file(&Store::open(cli.store())?, "d0", &head, None)?;
        }
        let mut guest_at_1 = None;
        for depth in 1..=DEPTH {
            let step = guest.run(&mut random, EDITS, 0);
            guest.write_diff(&step, &diff)?;
            let (tag, parent) = (format!("d{depth}"), format!("d{}", depth - 1));
            commit_file(&Store::open(long.store())?, &tag, &diff, Some(&parent))?;
            if depth == 1 {
                commit_file(&Store::open(short.store())?, &tag, &diff, Some(&parent))?;
                guest_at_1 = Some(guest.clone());
            }
        }
        guest.write(&head)?;
        let flat = new_store(&dir.join("flat"))?;
        let store = Store::open(flat.store())?;
        let flat_head = commit_file(&store, "head", &head, None)?;
        let store = Store::open(long.store())?;
        let long_head = store.manifest(store.resolve(&format!("d{DEPTH}"))?)?;
        ensure!(
            store.image_reader(&long_head.images[0]).size_bytes()
                == flat_head.manifest.images[0].size_bytes
                && hash_of(&store, &long_head.images[0])? == hash(&head)?,
            "the chain's end is not what was committed"
        );
        Ok(Self {
            long,
            short,
            flat,
            head,
            guest_at_1: guest_at_1.expect("the chain has a first step"),
            guest_at_end: guest,
        })
    }
}

fn hash_of(store: &Store, image: &snapstore_store::Image) -> anyhow::Result<blake3::Hash> {
    let reader = store.image_reader(image);
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    loop {
        match reader.read_at(&mut buffer, at)? {
            0 => return Ok(hasher.finalize()),
            len => hasher.update(&buffer[..len]),
        };
        at += buffer.len() as u64;
    }
}

/// Commits a file as memory: all of it, or changes to a parent.
///
/// # Errors
/// As [`Store::commit`].
pub fn commit_file(
    store: &Store,
    tag: &str,
    path: &Path,
    parent: Option<&str>,
) -> anyhow::Result<Committed> {
    let request = CommitRequest {
        tag: tag.to_owned(),
        parent: parent.map_or(ParentChoice::Nothing, |tag| {
            ParentChoice::Named(tag.to_owned())
        }),
        inputs: vec![Input {
            name: "memory".to_owned(),
            role: ImageRole::Memory,
            data: InputData::File(path.to_owned()),
            kind: if parent.is_some() {
                InputKind::Diff
            } else {
                InputKind::Full
            },
        }],
        ..CommitRequest::default()
    };
    Ok(store.commit(&request, &Silent)?)
}

/// Commits a step with the program; returns the seconds it took.
///
/// # Errors
/// If that fails.
pub fn timed_commit(
    cli: &Cli,
    (guest, step): (&Guest, &Step),
    parent: &str,
    tag: &str,
    diff: &Path,
) -> anyhow::Result<f64> {
    guest.write_diff(step, diff)?;
    crate::tools::settle(&[diff, cli.store()])?;
    let diff = crate::utf8(diff)?;
    crate::tools::timed(&mut cli.command(&[
        "commit", tag, "--diff", "--memory", diff, "--parent", parent,
    ])?)
}
