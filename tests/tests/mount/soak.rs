//! Mounts that are made, undone in every way, and made again at the same place.
//!
//! `SNAPSTORE_SOAK_ROUNDS` says how often; a few times in `make test`.

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, ensure};
use rustix::mount::UnmountFlags;
use rustix::process::{Signal, kill_process};
use snapstore_store::mount_table;
use snapstore_tests::harness::{Cli, noise};

use crate::lifecycle::{kill, process, wait_for_end};
use crate::{Fixture, PAGE, unmount};

/// Directories that are mounted on side by side.
const PLACES: usize = 3;
const DEFAULT_ROUNDS: usize = 8;

fn rounds() -> usize {
    let said = std::env::var("SNAPSTORE_SOAK_ROUNDS").ok();
    said.and_then(|rounds| rounds.parse().ok())
        .unwrap_or(DEFAULT_ROUNDS)
}

fn image(number: usize) -> Vec<u8> {
    noise(number as u64, 64 * PAGE)
}

struct Place {
    cli: Cli,
    dir: PathBuf,
    /// Servers of mounts that were undone, and may not have noticed.
    ending: Vec<u32>,
}

impl Place {
    fn mount(&self, number: usize) -> anyhow::Result<u32> {
        let (tag, dir) = (format!("tag{number}"), self.dir.display().to_string());
        let answer = self.cli.json(&["mount", &tag, &dir])?;
        let pid = answer["server_pid"].as_u64().context("no server_pid")?;
        self.shows(number)?;
        Ok(u32::try_from(pid)?)
    }

    fn shows(&self, number: usize) -> anyhow::Result<()> {
        let read = fs::read(self.dir.join("memory.bin"));
        let read = read.with_context(|| format!("what is mounted on {}", self.dir.display()))?;
        ensure!(read == image(number), "another image");
        let mounts = mount_table()?.into_iter();
        let mounts = mounts.filter(|entry| entry.dir == self.dir).count();
        ensure!(mounts == 1, "{mounts} mounts");
        Ok(())
    }

    /// The mount is there, and stays when all servers before it have ended.
    fn stays(&mut self, number: usize) -> anyhow::Result<()> {
        self.shows(number)?;
        for pid in self.ending.drain(..) {
            wait_for_end(pid)?;
        }
        self.shows(number)
    }

    fn round(&mut self, round: usize) -> anyhow::Result<()> {
        let number = round % 2;
        let server = self.mount(number)?;
        self.stays(number)?;
        match round % 6 {
            0 => drop(self.cli.ok(&["umount", &self.dir.display().to_string()])?),
            1 => unmount(&self.dir, UnmountFlags::empty())?,
            2 => unmount(&self.dir, UnmountFlags::DETACH)?,
            3 => kill(server)?,
            4 => {
                kill_process(process(server)?, Signal::TERM)?;
                wait_for_end(server)?;
            }
            _ => {
                // It wakes up beside the next one, and is told to end besides.
                kill_process(process(server)?, Signal::STOP)?;
                unmount(&self.dir, UnmountFlags::DETACH)?;
                let next = self.mount(1 - number);
                kill_process(process(server)?, Signal::TERM)?;
                kill_process(process(server)?, Signal::CONT)?;
                let next = next?;
                wait_for_end(server)?;
                self.stays(1 - number)?;
                unmount(&self.dir, UnmountFlags::DETACH)?;
                self.ending.push(next);
            }
        }
        self.ending.push(server);
        Ok(())
    }
}

#[test]
fn mounts_stay_until_they_are_undone() -> anyhow::Result<()> {
    let test = "mounts_stay_until_they_are_undone";
    let Some(mut fixture) = Fixture::new(test)? else {
        return Ok(());
    };
    if !rustix::process::geteuid().is_root() {
        snapstore_tests::harness::skipped(test, "umount(2) needs root");
        return Ok(());
    }
    for number in 0..2 {
        fixture.commit(&format!("tag{number}"), &image(number), &[])?;
    }
    let places: Vec<_> = (0..PLACES)
        .map(|place| {
            Ok(Place {
                cli: fixture.cli.clone(),
                dir: fixture.mountpoint(&format!("mnt{place}"))?,
                ending: Vec::new(),
            })
        })
        .collect::<anyhow::Result<_>>()?;
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // The machine has other things to do.
        let load = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        });
        let workers: Vec<_> = places
            .into_iter()
            .zip(0..)
            .map(|(mut place, offset)| {
                scope.spawn(move || {
                    let rounds = (offset..).take(rounds());
                    for round in rounds {
                        place
                            .round(round)
                            .with_context(|| format!("round {round}"))?;
                    }
                    place.ending.drain(..).try_for_each(wait_for_end)
                })
            })
            .collect();
        let ended: Vec<_> = workers.into_iter().map(|worker| worker.join()).collect();
        done.store(true, Ordering::Relaxed);
        load.join().expect("it only spins");
        ended
            .into_iter()
            .try_for_each(|ended| ended.expect("no worker panics"))
    })?;
    // Nobody holds anything any more.
    fixture.cli.ok(&["gc"])?;
    let leases = crate::names(&fixture.path("store/leases"))?;
    ensure!(leases.is_empty(), "{leases:?}");
    Ok(())
}
