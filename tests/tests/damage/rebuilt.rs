//! What `repair` brings back.

use std::fs;

use anyhow::{Context as _, ensure};

use crate::{
    Chunk, DELTA, Fixture, MANIFEST, PAGE_KIND, PATCH, RAW, chunks, files_of_the_index, flip, list,
};

#[test]
fn the_index() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    fs::remove_dir_all(fixture.path("index"))?;
    fixture.command_names("index")?;
    fixture.cli.ok(&["repair"])?;
    fixture.all_is_well()
}

#[test]
fn the_index_when_its_files_are_spoilt() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    for file in files_of_the_index(&fixture)? {
        fs::write(&file, b"spoilt")?;
    }
    fixture.command_names("index")?;
    fixture.cli.ok(&["repair"])?;
    fixture.all_is_well()
}

#[test]
fn a_tag_from_its_manifest() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    let id = fixture.cli.json(&["show", "next"])?["id"].clone();
    flip(&fixture.path("tags/next"), 30)?;
    let report = fixture.cli.json(&["repair"])?;
    assert_eq!(report["recovered_tags"]["next"], id);
    fixture.all_is_well()
}

#[test]
fn a_tag_that_no_snapshot_was_committed_under_is_lost() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    fixture.cli.ok(&["tag", "next", "renamed"])?;
    flip(&fixture.path("tags/renamed"), 30)?;
    let output = fixture.cli.run(&["repair"])?;
    let text = String::from_utf8(output.stdout)?;
    assert_eq!(output.status.code(), Some(4), "{text}");
    assert!(text.contains("snapstore rm renamed"), "{text}");
    fixture.cli.ok(&["rm", "renamed"])?;
    fixture.all_is_well()
}

#[test]
fn the_configuration() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    flip(&fixture.path("config"), 16)?;
    fixture.cli.fails(4, &["tags"])?;
    let report = fixture.cli.json(&["repair"])?;
    assert_eq!(report["rebuilt_files"][0], "config");
    fixture.all_is_well()
}

#[test]
fn the_collectors_state() -> anyhow::Result<()> {
    let mut fixture = Fixture::new()?;
    fixture.cli.ok(&["rm", "last"])?;
    fixture.images.remove("last");
    fixture.cli.ok(&["gc"])?;
    flip(&fixture.path("collector"), 16)?;
    fixture.cli.fails(4, &["gc"])?;
    let report = fixture.cli.json(&["repair"])?;
    assert_eq!(report["rebuilt_files"][0], "collector");
    fixture.all_is_well()
}

#[test]
fn all_tags_when_their_directory_is_gone() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    fs::remove_dir_all(fixture.path("tags"))?;
    let report = fixture.cli.json(&["repair"])?;
    let recovered = report["recovered_tags"]
        .as_object()
        .map(serde_json::Map::len);
    assert_eq!(recovered, Some(3));
    fixture.all_is_well()
}

/// Flips a byte of the first page of this encoding in the first pack that has
/// one.
fn damage_a_page(fixture: &Fixture, encoding: u8) -> anyhow::Result<()> {
    for pack in fixture.packs()? {
        let (chunks, _) = chunks(&fs::read(&pack)?)?;
        let found = chunks
            .iter()
            .find(|chunk| chunk.kind == PAGE_KIND && chunk.encoding == encoding);
        if let Some(chunk) = found {
            return flip(&pack, chunk.end - 1);
        }
    }
    anyhow::bail!("no page is stored so")
}

fn heals(encoding: u8) -> anyhow::Result<()> {
    let mut fixture = Fixture::new()?;
    damage_a_page(&fixture, encoding)?;
    fixture.cli.fails(4, &["verify", "--read-data"])?;
    let broken = fixture.images.len() - fixture.nothing_wrong_is_read()?;
    ensure!(broken > 0, "nobody needs the page");
    fixture.cli.fails(4, &["repair"])?;
    ensure!(
        !list(&fixture.path("damaged"))?.is_empty(),
        "nothing was set aside"
    );
    ensure!(
        fixture.images.len() - fixture.nothing_wrong_is_read()? == broken,
        "as broken as before"
    );
    // Every page of the same bytes is the same page: one commit heals all.
    for tag in ["base", "next", "last"] {
        let image = fixture.images.get(tag).context("an image")?.clone();
        fixture.commit(&format!("{tag}-again"), image)?;
    }
    fixture.all_is_well()
}

/// A wrong bit that no reader needs: in the hint of a delta, where its base was.
#[test]
fn a_delta_that_reads_all_the_same_is_kept() -> anyhow::Result<()> {
    is_kept_without_its_hint(DELTA)
}

#[test]
fn a_patch_that_reads_all_the_same_is_kept() -> anyhow::Result<()> {
    is_kept_without_its_hint(PATCH)
}

fn is_kept_without_its_hint(encoding: u8) -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    for pack in fixture.packs()? {
        let (chunks, _) = chunks(&fs::read(&pack)?)?;
        let delta = |chunk: &&Chunk| chunk.kind == PAGE_KIND && chunk.encoding == encoding;
        if let Some(chunk) = chunks.iter().find(delta) {
            flip(&pack, chunk.start + 32)?;
            ensure!(
                fixture.nothing_wrong_is_read()? == fixture.images.len(),
                "readers need the hint"
            );
            fixture.cli.run(&["repair"])?;
            ensure!(
                !list(&fixture.path("damaged"))?.is_empty(),
                "nothing was set aside"
            );
            return fixture.all_is_well();
        }
    }
    anyhow::bail!("no page is a delta")
}

#[test]
fn a_damaged_page_by_committing_it_again() -> anyhow::Result<()> {
    heals(RAW)
}

#[test]
fn a_damaged_delta_by_committing_it_again() -> anyhow::Result<()> {
    heals(DELTA)
}

#[test]
fn a_damaged_patch_by_committing_it_again() -> anyhow::Result<()> {
    heals(PATCH)
}

/// What a snapshot holds is said by its manifest alone: nothing brings that back.
#[test]
fn not_a_manifest_and_the_advice_says_so() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    let pack = &fixture.packs()?[1];
    let (chunks, _) = chunks(&fs::read(pack)?)?;
    let manifest = chunks.iter().find(|chunk| chunk.kind == MANIFEST);
    let manifest = manifest.context("no manifest")?;
    flip(pack, (manifest.start + manifest.end) / 2)?;
    let output = fixture.cli.run(&["verify", "--read-data"])?;
    let said = String::from_utf8(output.stdout)?;
    let findings: Vec<&str> = said.lines().filter(|it| it.contains("DAMAGED")).collect();
    ensure!(findings.len() == 1, "{said}");
    ensure!(findings[0].contains("needed by next"), "{said}");
    ensure!(findings[0].contains("under another tag"), "{said}");
    let output = fixture.cli.run(&["repair"])?;
    let said = String::from_utf8(output.stdout)?;
    ensure!(output.status.code() == Some(4), "{said}");
    ensure!(
        said.contains("snapshot next has lost its manifest"),
        "{said}"
    );
    fixture.cli.ok(&["rm", "next"])?;
    fixture.cli.ok(&["verify", "--read-data"])?;
    fixture.cli.ok(&["gc"])?;
    Ok(())
}
