//! Footers of more than one block: what a damaged one costs, and how it comes back.

use std::fs;

use anyhow::{Context as _, ensure};
use snapstore_store::Store;
use snapstore_tests::harness::noise;

use crate::{Fixture, HEADER, PAGE, SEAL, TRAILER, chunks, file_name, flip};

const BLOCK: usize = 128 * 24 + TRAILER;

/// A store with a pack of many blocks: raw pages, compressed ones, and in a second
/// pack deltas of both and of their leaf.
fn fixture() -> anyhow::Result<Fixture> {
    let mut fixture = Fixture::empty()?;
    let mut image = noise(4, 450 * PAGE);
    for page in (0..450).step_by(3) {
        let text = format!("page {page} of text; ").repeat(PAGE);
        image[page * PAGE..(page + 1) * PAGE].copy_from_slice(&text.as_bytes()[..PAGE]);
    }
    fixture.commit("base", image.clone())?;
    for page in 100..380 {
        image[page * PAGE + 9] ^= 0x5a;
    }
    fixture.commit("next", image)?;
    Ok(fixture)
}

/// How many pages of a snapshot cannot be read.
fn lost_pages(fixture: &Fixture, tag: &str) -> anyhow::Result<usize> {
    let store = Store::open(fixture.cli.store())?;
    let manifest = store.manifest(store.resolve(tag)?)?;
    let reader = store.image_reader(manifest.image("memory").context("no memory")?);
    let mut page = vec![0; PAGE];
    let lost = (0..reader.size_bytes() / PAGE as u64)
        .filter(|number| reader.read_at(&mut page, number * PAGE as u64).is_err());
    Ok(lost.count())
}

#[test]
fn one_costs_its_chunks_and_repair_finds_them_again() -> anyhow::Result<()> {
    let fixture = fixture()?;
    for pack in fixture.packs()? {
        let good = fs::read(&pack)?;
        let (all, footer) = chunks(&good)?;
        let blocks = all.len().div_ceil(128);
        ensure!(blocks >= 3, "{} has {blocks} blocks", pack.display());
        for block in 0..blocks {
            let fixture = fixture_copy(&fixture)?;
            let pack = fixture.path("packs").join(file_name(&pack));
            flip(&pack, footer + block * BLOCK + 50)?;
            let verified = fixture.cli.run(&["verify", "--json"])?;
            let report: serde_json::Value = serde_json::from_slice(&verified.stdout)?;
            let finding = &report["findings"][0];
            ensure!(
                report["findings"]
                    .as_array()
                    .is_some_and(|it| it.len() == 1),
                "{report}"
            );
            ensure!(finding["damage"]["block"] == block, "{report}");
            let touched = finding["snapshots"].as_array().map_or(0, Vec::len);
            let named = finding["chunks"].as_array().map_or(0, Vec::len);
            ensure!(touched > 0 && (1..=128).contains(&named), "{report}");
            // The last block has the leaf: then all pages of the snapshot are lost.
            if block + 1 < blocks {
                let lost = lost_pages(&fixture, "next")?;
                ensure!(lost <= 128, "{lost} pages are lost");
            }
            fixture.cli.ok(&["repair"])?;
            fixture
                .all_is_well()
                .with_context(|| format!("block {block}"))?;
        }
    }
    Ok(())
}

#[test]
fn all_blocks_of_all_packs_come_back() -> anyhow::Result<()> {
    let fixture = fixture()?;
    for pack in fixture.packs()? {
        let good = fs::read(&pack)?;
        let (all, footer) = chunks(&good)?;
        for block in 0..all.len().div_ceil(128) {
            flip(&pack, footer + block * BLOCK + 50)?;
        }
    }
    fixture.cli.ok(&["repair"])?;
    fixture.all_is_well()
}

/// Header and one seal at once: the other seal serves, whichever it is.
#[test]
fn one_seal_is_enough() -> anyhow::Result<()> {
    let fixture = fixture()?;
    for pack in fixture.packs()? {
        let good = fs::read(&pack)?;
        let (_, footer) = chunks(&good)?;
        for seal in [footer - SEAL, good.len() - SEAL] {
            let copy = fixture_copy(&fixture)?;
            let pack = copy.path("packs").join(file_name(&pack));
            let mut bytes = good.clone();
            bytes[..HEADER].fill(0);
            bytes[seal..seal + SEAL].fill(0);
            crate::replace(&pack, &bytes)?;
            copy.is_found(&file_name(&pack))?;
            ensure!(copy.nothing_wrong_is_read()? == 2, "a snapshot is lost");
            copy.cli.ok(&["repair"])?;
            copy.all_is_well()?;
        }
    }
    Ok(())
}

fn fixture_copy(of: &Fixture) -> anyhow::Result<Fixture> {
    let mut copy = Fixture::empty()?;
    copy.images = of.images.clone();
    fs::remove_dir_all(copy.cli.store())?;
    let status = std::process::Command::new("cp")
        .arg("-a")
        .args([of.cli.store(), copy.cli.store()])
        .status()?;
    ensure!(status.success(), "cp(1) ended with {status}");
    Ok(copy)
}
