//! Damage is found and named, and wrong bytes are never read.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::ensure;

use crate::{Fixture, HEADER, SEAL, TRAILER, chunks, file_name, files_of_the_index, replace};

/// Flips each of these bytes in turn.
fn sweep(
    fixture: &Fixture,
    file: &Path,
    positions: impl IntoIterator<Item = usize>,
) -> anyhow::Result<()> {
    let name = file_name(file);
    for at in positions {
        fixture.with_flip(file, at, || {
            fixture.is_found(&name)?;
            fixture.nothing_wrong_is_read().map(drop)
        })?;
    }
    fixture.all_is_well()
}

/// One flip, seen through the program.
fn command(fixture: &Fixture, file: &Path, at: usize) -> anyhow::Result<()> {
    fixture.with_flip(file, at, || fixture.command_names(&file_name(file)))
}

fn sweep_all(fixture: &Fixture, file: &Path) -> anyhow::Result<()> {
    sweep(fixture, file, 0..fs::read(file)?.len())?;
    command(fixture, file, 20)
}

#[test]
fn every_byte_of_the_configuration() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    sweep_all(&fixture, &fixture.path("config"))
}

#[test]
fn every_byte_of_the_collectors_state() -> anyhow::Result<()> {
    let mut fixture = Fixture::new()?;
    fixture.cli.ok(&["rm", "last"])?;
    fixture.images.remove("last");
    fixture.cli.ok(&["gc"])?;
    sweep_all(&fixture, &fixture.path("collector"))
}

#[test]
fn every_byte_of_a_tag() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    sweep_all(&fixture, &fixture.path("tags/next"))
}

#[test]
fn every_byte_of_the_copy_of_the_configuration() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    sweep_all(&fixture, &fixture.path("config-copy"))
}

/// One flipped byte of these is found, and costs nothing.
fn costs_nothing(
    fixture: &Fixture,
    pack: &Path,
    positions: impl IntoIterator<Item = usize>,
) -> anyhow::Result<()> {
    for at in positions {
        fixture.with_flip(pack, at, || {
            fixture.is_found(&file_name(pack))?;
            let whole = fixture.nothing_wrong_is_read()?;
            ensure!(whole == fixture.images.len(), "only {whole} are whole");
            Ok(())
        })?;
    }
    fixture.all_is_well()
}

#[test]
fn headers_of_packs() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    for pack in fixture.packs()? {
        costs_nothing(&fixture, &pack, (0..HEADER).step_by(5))?;
        command(&fixture, &pack, 0)?;
    }
    Ok(())
}

#[test]
fn seals_of_packs() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    for pack in fixture.packs()? {
        let bytes = fs::read(&pack)?;
        let (_, footer) = chunks(&bytes)?;
        for end in [footer, bytes.len()] {
            costs_nothing(&fixture, &pack, (end - SEAL..end).step_by(7))?;
        }
        command(&fixture, &pack, bytes.len() - 1)?;
    }
    Ok(())
}

#[test]
fn footers_of_packs() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    for pack in fixture.packs()? {
        let bytes = fs::read(&pack)?;
        let (chunks, footer) = chunks(&bytes)?;
        // Key, offset, kind and encoding, check: of the first and last entry. Then
        // where the last chunk ends, and the checksum.
        let last = footer + 24 * (chunks.len() - 1);
        let fields = [footer, last].map(|entry| [0, 15, 16, 19, 20, 21, 23].map(|at| entry + at));
        sweep(&fixture, &pack, fields.concat())?;
        let end = bytes.len() - SEAL;
        sweep(&fixture, &pack, (end - TRAILER..end).step_by(3))?;
        command(&fixture, &pack, footer)?;
    }
    Ok(())
}

/// Heads of deltas (id and hint) are among the first bytes.
#[test]
fn chunks_of_every_kind_and_encoding() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    let mut seen = BTreeMap::new();
    for pack in fixture.packs()? {
        let (chunks, _) = chunks(&fs::read(&pack)?)?;
        let mut of_class = BTreeMap::new();
        for chunk in chunks {
            of_class.insert((chunk.kind, chunk.encoding), chunk);
        }
        for (class, chunk) in of_class {
            let len = chunk.end - chunk.start;
            let offsets = [0, 1, 31, 32, 36, 39, 40, 44, len / 2, len - 1];
            let inside = offsets.into_iter().filter(|at| *at < len);
            let inside: Vec<usize> = inside.map(|at| chunk.start + at).collect();
            sweep(&fixture, &pack, inside.iter().copied())?;
            for at in inside {
                fixture.with_flip(&pack, at, || fixture.verify_agrees_with_readers())?;
            }
            command(&fixture, &pack, chunk.start + len / 2)?;
            seen.insert(class, ());
        }
    }
    let (page, node, manifest) = (0, 1, 2);
    for class in [(page, 0), (page, 1), (page, 2), (page, 4), (node, 3)] {
        ensure!(seen.contains_key(&class), "no chunk is {class:?}: {seen:?}");
    }
    ensure!(seen.keys().any(|class| class.0 == manifest), "no manifest");
    Ok(())
}

#[test]
fn packs_that_were_cut_or_are_gone() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    for pack in fixture.packs()? {
        let good = fs::read(&pack)?;
        for len in [0, 1, 31, 95, good.len() / 2, good.len() - 1] {
            replace(&pack, &good[..len])?;
            fixture.is_found(&file_name(&pack))?;
            fixture.nothing_wrong_is_read()?;
        }
        fs::remove_file(&pack)?;
        fixture.is_found("missing")?;
        ensure!(
            fixture.nothing_wrong_is_read()? < 3,
            "a pack was not needed"
        );
        replace(&pack, &good)?;
    }
    fixture.all_is_well()
}

#[test]
fn data_of_the_index() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    let mut seen = 0;
    for file in files_of_the_index(&fixture)? {
        let positions: &[usize] = match file_name(&file) {
            name if name.ends_with(".run") => &[0, 9, 14, 40, 60],
            name if name.starts_with("MANIFEST-") => &[0, 3, 8, 20, 60],
            _ => continue,
        };
        seen += 1;
        // Through the program: this process has blocks of the index cached.
        for at in positions {
            fixture.with_flip(&file, *at, || fixture.command_names("index"))?;
        }
    }
    ensure!(seen >= 2, "no run or no manifest");
    fixture.all_is_well()
}

#[test]
fn every_file_of_the_index_gone_or_spoilt() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    // One snapshot: an index that cannot be opened is tried again for a second.
    let last = &fixture.images["last"];
    for file in files_of_the_index(&fixture)? {
        let good = fs::read(&file)?;
        if !good.is_empty() {
            fixture.with_flip(&file, good.len() / 2, || {
                fixture.read("last", last).map(drop)
            })?;
        }
        fs::remove_file(&file)?;
        fixture.read("last", last)?;
        replace(&file, &good)?;
    }
    fixture.all_is_well()
}
