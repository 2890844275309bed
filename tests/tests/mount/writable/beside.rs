//! Writers beside commits: what had been acknowledged when a commit began is in it, of all
//! files at one instant.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use anyhow::{Context as _, ensure};
use snapstore_store::{Manifest, Store};
use snapstore_tests::harness::noise;
use snapstore_tests::shared_map::SharedMap;
use snapstore_tests::stopping::Running;

use super::{open_both, with_machine};
use crate::lifecycle::kill;
use crate::{Fixture, PAGE};

const COMMITS: usize = 12;
/// Disks between the memory and the last one: it takes a while to freeze all of them.
const DISKS: usize = 60;
/// Pages that each writer has for itself.
const SHARE: usize = 16;

/// A page that says everywhere how often it was written.
fn page(round: u64) -> Vec<u8> {
    round.to_le_bytes().repeat(PAGE / 8)
}

/// The round that a page is of, if it is one.
fn round_of(page: &[u8]) -> anyhow::Result<u64> {
    let mut words = page
        .chunks(8)
        .map(|word| word.try_into().map(u64::from_le_bytes));
    let first = words.next().context("an empty page")??;
    for word in words {
        ensure!(word? == first, "a page is torn");
    }
    Ok(first)
}

fn image(store: &Store, manifest: &Manifest, name: &str) -> anyhow::Result<Vec<u8>> {
    let reader = store.image_reader(manifest.image(name).context("no such image")?);
    let mut bytes = vec![0; usize::try_from(reader.size_bytes())?];
    reader.read_at(&mut bytes, 0)?;
    Ok(bytes)
}

#[test]
fn a_commit_has_what_was_written_before_it_began() -> anyhow::Result<()> {
    let test = "a_commit_has_what_was_written_before_it_began";
    let Some(mut fixture) = with_machine(test)? else {
        return Ok(());
    };
    let dir = view_of_many(&mut fixture)?;
    let open = |name: &str| open_both(&dir.join(name));
    let (memory, disk) = (open("memory.bin")?, open("root.img")?);
    let disks = (0..DISKS).map(|number| open(&format!("n{number:02}.img")));
    let disks = disks.collect::<Result<Vec<_>, _>>()?;
    // Nothing has it open but the mapping: the kernel writes out a file that is closed, also
    // by a process that begins as a copy of this one.
    let map = SharedMap::new(&open("mapped.img")?, SHARE * PAGE)?;
    let ended = AtomicBool::new(false);
    // Rounds whose pages are all written, of those who write and those who store.
    let (written, stored, pairs) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let commits = std::thread::scope(|scope| -> anyhow::Result<_> {
        let ends = Ends(&ended);
        scope.spawn(|| {
            for round in 1.. {
                for number in 0..SHARE {
                    let written = memory.write_all_at(&page(round), (number * PAGE) as u64);
                    written.expect("a write");
                }
                written.store(round, Ordering::SeqCst);
                if ended.load(Ordering::SeqCst) {
                    break;
                }
            }
        });
        scope.spawn(|| {
            for round in 1.. {
                for number in 0..SHARE {
                    map.store(number * PAGE, &page(round));
                }
                stored.store(round, Ordering::SeqCst);
                if ended.load(Ordering::SeqCst) {
                    break;
                }
                std::thread::yield_now();
            }
        });
        scope.spawn(|| {
            // First in the memory, then on the disk.
            for round in 1.. {
                let at = (2 * SHARE * PAGE) as u64;
                memory.write_all_at(&page(round), at).expect("a write");
                disk.write_all_at(&page(round), 0).expect("a write");
                pairs.store(round, Ordering::SeqCst);
                if ended.load(Ordering::SeqCst) {
                    break;
                }
            }
        });
        let mut commits = BTreeMap::new();
        for number in 0..COMMITS {
            for disk in &disks {
                disk.write_all_at(&page(number as u64), 0)?;
            }
            let before = [&written, &stored, &pairs].map(|it| it.load(Ordering::SeqCst));
            let tag = format!("beside{number}");
            fixture.commit_view(&tag, &dir)?;
            let after = stored.load(Ordering::SeqCst);
            commits.insert(tag, (before, after));
        }
        drop(ends);
        Ok(commits)
    })?;
    let store = Store::open(fixture.cli.store())?;
    for (tag, ([written, stored, pairs], after)) in commits {
        let manifest = store.manifest(store.tag(&tag)?.context("no tag")?)?;
        let memory = image(&store, &manifest, "memory")?;
        let disk = image(&store, &manifest, "root")?;
        let mapped = image(&store, &manifest, "mapped")?;
        let page = |number: usize| &memory[number * PAGE..(number + 1) * PAGE];
        // Before, there is what the base has.
        for number in (0..SHARE).filter(|_| written > 0) {
            let round = round_of(page(number)).with_context(|| format!("{tag}, page {number}"))?;
            ensure!(
                round >= written,
                "{tag}: page {number} is of {round}, {written} was written"
            );
        }
        for number in (0..SHARE).filter(|_| stored > 0) {
            // The kernel may take a page while somebody stores to it.
            let end = (number + 1) * PAGE;
            let round = u64::from_le_bytes(mapped[end - 8..end].try_into()?);
            let fits = (stored..=after + 1).contains(&round);
            ensure!(
                fits,
                "{tag}: mapped page {number} is of {round}, {stored} to {after} were stored"
            );
        }
        if pairs == 0 {
            continue;
        }
        let (first, second) = (round_of(page(2 * SHARE))?, round_of(&disk[..PAGE])?);
        ensure!(
            first >= pairs && second >= pairs,
            "{tag}: {first} {second} {pairs}"
        );
        let together = first == second || first == second + 1;
        ensure!(
            together,
            "{tag}: memory of {first} beside a disk of {second}"
        );
    }
    drop((map, memory, disk, disks));
    fixture.umount(&dir)
}

/// A view of a snapshot with many disks.
fn view_of_many(fixture: &mut Fixture) -> anyhow::Result<PathBuf> {
    let small = fixture.file("small", &noise(3, PAGE))?;
    let root = fixture.file("root", &noise(4, 4 * PAGE))?;
    let mut disks: Vec<_> = (0..DISKS).map(|n| format!("n{n:02}={small}")).collect();
    let mapped = fixture.file("mapped", &noise(5, SHARE * PAGE))?;
    disks.push(format!("mapped={mapped}"));
    disks.push(format!("root={root}"));
    let arguments: Vec<&str> = disks.iter().flat_map(|disk| ["--disk", disk]).collect();
    fixture.commit("many", &super::base_memory(), &arguments)?;
    let dir = fixture.mountpoint("view")?;
    fixture.writable_on(&["many", &dir.display().to_string()])?;
    Ok(dir)
}

/// However it goes on, the writers end.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Whoever goes on with a view writes to what a commit of it still reads.
#[test]
fn a_view_is_not_gone_on_with_before_a_commit_of_it_has_ended() -> anyhow::Result<()> {
    let test = "a_view_is_not_gone_on_with_before_a_commit_of_it_has_ended";
    let Some(mut fixture) = with_machine(test)? else {
        return Ok(());
    };
    let (dir, server) = fixture.mount_rw("view", &[])?;
    let shown = dir.display().to_string();
    let write = |round: u64| -> anyhow::Result<()> {
        let memory = open_both(&dir.join("memory.bin"))?;
        Ok(memory.write_all_at(&page(round), 0)?)
    };
    write(1)?;
    // It has the overlay open, and has read nothing.
    let commit = ["commit", "first", "--mount", &shown];
    let commit = Running::start(&fixture.cli, &commit, 1)?;
    ensure!(commit.is_stopped()?, "the commit takes no step");
    kill(server)?;
    let error = fixture.resume(&dir).expect_err("it is read");
    ensure!(
        error.to_string().contains("a commit still reads"),
        "{error}"
    );
    commit.succeed()?;
    fixture.resume(&dir)?;
    write(2)?;
    let store = Store::open(fixture.cli.store())?;
    let manifest = store.manifest(store.resolve("first")?)?;
    ensure!(
        image(&store, &manifest, "memory")?[..PAGE] == page(1),
        "another page"
    );
    let told = fixture.cli.ok(&["umount", &shown])?;
    ensure!(told.contains("given up"), "{told}");
    Ok(())
}
