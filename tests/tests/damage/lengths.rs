//! Packs that are shorter or longer than they were.

use std::fs::{self, OpenOptions};
use std::path::Path;

use anyhow::{Context as _, ensure};

use crate::{Fixture, SEAL, chunks, file_name};

fn set_len(file: &Path, len: usize) -> anyhow::Result<()> {
    let file = OpenOptions::new().write(true).open(file)?;
    Ok(file.set_len(len as u64)?)
}

/// A filesystem may cut a file off when it is repaired, and copies of disks are padded.
#[test]
fn a_pack_without_its_end_or_with_bytes_after_it_loses_no_chunk() -> anyhow::Result<()> {
    for which in 0..3 {
        for more in [-1, -95, -96, -97, -150, 1, 96, 100, 4096, 1 << 20] {
            let fixture = Fixture::new()?;
            let pack = fixture.packs()?.swap_remove(which);
            let len = fs::metadata(&pack)?.len() as i64 + more;
            set_len(&pack, usize::try_from(len)?)?;
            let at = || format!("{more} bytes more of {}", pack.display());
            fixture.command_names(&file_name(&pack)).with_context(at)?;
            // Without entries, their chunks are found by `repair` only.
            let entries_are_whole = more >= -(SEAL as i64);
            let whole = fixture.nothing_wrong_is_read().with_context(at)?;
            ensure!(whole == 3 || !entries_are_whole, "{}: {whole}", at());
            fixture.cli.ok(&["repair"]).with_context(at)?;
            fixture.all_is_well().with_context(at)?;
        }
    }
    Ok(())
}

/// What stands before the place where it was cut is found by its content.
#[test]
fn a_pack_that_is_cut_off_among_its_chunks_loses_those_behind_only() -> anyhow::Result<()> {
    let entered = |fixture: &Fixture| -> anyhow::Result<u64> {
        let output = fixture.cli.run(&["repair", "--json"])?;
        let report: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        report["indexed_chunks"].as_u64().context("a number")
    };
    let fixture = Fixture::new()?;
    let pack = fixture.packs()?.swap_remove(0);
    let (all, _) = chunks(&fs::read(&pack)?)?;
    for cut in [all[7].end, all[20].end + 100, all[all.len() - 1].start + 1] {
        let fixture = Fixture::new()?;
        let pack = fixture.packs()?.swap_remove(0);
        set_len(&pack, cut)?;
        let there = all.iter().filter(|chunk| chunk.end <= cut).count() as u64;
        let with = entered(&fixture)?;
        fixture.nothing_wrong_is_read()?;
        let without = Fixture::new()?;
        fs::remove_file(without.packs()?.swap_remove(0))?;
        let without = entered(&without)?;
        // More is possible: deltas whose bases are there.
        ensure!(
            with >= without + there,
            "cut at {cut}: {with} chunks, {without} in the others, {there} before it"
        );
    }
    Ok(())
}
