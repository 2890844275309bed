//! A commit of a whole image needs nothing of its parent, and goes on without what
//! cannot be read of it. A diff does need it.

use std::fs;

use anyhow::{Context as _, ensure};

use crate::{Fixture, NODE, PAGE, chunks, flip, list};

const WARNING: &str = "the parent cannot be read whole";

/// Commits on top of `next`, whole and as a diff.
fn goes_on(fixture: &Fixture, is_told: bool) -> anyhow::Result<()> {
    let mut image = fixture.images["last"].clone();
    image[5 * PAGE + 9] ^= 0x77;
    let path = fixture.dir.path().join("whole");
    fs::write(&path, &image)?;
    let path = path.display().to_string();
    let commit = ["commit", "new", "--memory", &path, "--parent", "next"];
    let output = fixture.cli.run(&commit)?;
    let said = String::from_utf8([output.stdout, output.stderr].concat())?;
    ensure!(output.status.success(), "{said}");
    ensure!(said.contains(WARNING) == is_told, "{said}");
    ensure!(fixture.read("new", &image)?, "new is not whole");
    // And without naming it, over a tag that is there.
    let again = ["commit", "new", "--replace", "--memory", &path];
    fixture.cli.ok(&again)?;
    ensure!(fixture.read("new", &image)?, "new is not whole");
    Ok(())
}

fn diff(fixture: &Fixture) -> anyhow::Result<std::process::Output> {
    let path = fixture.dir.path().join("diff");
    let file = fs::File::create(&path)?;
    file.set_len((crate::PAGES * PAGE) as u64)?;
    std::os::unix::fs::FileExt::write_all_at(&file, &[7; PAGE], 0)?;
    let path = path.display().to_string();
    let commit = ["commit", "diff", "--memory-diff", &path, "--parent", "next"];
    fixture.cli.run(&commit)
}

fn pack_of(fixture: &Fixture, number: usize) -> anyhow::Result<std::path::PathBuf> {
    fixture.packs()?.into_iter().nth(number).context("a pack")
}

#[test]
fn whose_pack_is_gone() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    fs::remove_file(pack_of(&fixture, 1)?)?;
    goes_on(&fixture, true)?;
    ensure!(diff(&fixture)?.status.code() == Some(4), "a diff needs it");
    Ok(())
}

#[test]
fn whose_tag_is_damaged() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    flip(&fixture.path("tags/next"), 30)?;
    goes_on(&fixture, true)?;
    ensure!(diff(&fixture)?.status.code() == Some(4), "a diff needs it");
    // What is damaged can be replaced.
    let path = fixture.dir.path().join("whole").display().to_string();
    fixture
        .cli
        .fails(4, &["commit", "next", "--memory", &path])?;
    fixture
        .cli
        .ok(&["commit", "next", "--replace", "--memory", &path])?;
    fixture.cli.ok(&["verify"])?;
    Ok(())
}

#[test]
fn of_which_any_node_or_manifest_is_damaged() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    let pack = pack_of(&fixture, 1)?;
    let (chunks, _) = chunks(&fs::read(&pack)?)?;
    let mut seen = 0;
    for chunk in chunks.iter().filter(|chunk| chunk.kind >= NODE) {
        let tags = list(&fixture.path("tags"))?;
        fixture.with_flip(&pack, usize::midpoint(chunk.start, chunk.end), || {
            goes_on(&fixture, true)?;
            ensure!(diff(&fixture)?.status.code() == Some(4), "a diff needs it");
            Ok(())
        })?;
        fixture.cli.ok(&["rm", "new"])?;
        ensure!(list(&fixture.path("tags"))? == tags, "a diff left a trace");
        seen += 1;
    }
    ensure!(seen >= 2, "a leaf and a manifest: {seen}");
    Ok(())
}

/// What a header says the seals say, too: all goes on, and it is told.
#[test]
fn of_which_a_header_is_damaged() -> anyhow::Result<()> {
    let mut fixture = Fixture::new()?;
    let pack = pack_of(&fixture, 0)?;
    flip(&pack, 3)?;
    let output = fixture.cli.run(&["verify"])?;
    let text = String::from_utf8(output.stdout)?;
    ensure!(output.status.code() == Some(4), "{text}");
    ensure!(
        text.contains("parts of base, last, next are there"),
        "{text}"
    );
    ensure!(text.contains("snapstore repair"), "{text}");
    let json = fixture.cli.run(&["verify", "--json"])?;
    let json: serde_json::Value = serde_json::from_slice(&json.stdout)?;
    let finding = &json["findings"][0];
    ensure!(finding["snapshots"] == serde_json::json!(["base", "last", "next"]));
    let advice = finding["what_to_do"].as_str().context("what_to_do")?;
    ensure!(advice.contains("snapstore repair"), "{advice}");

    let image = fixture.images["base"].clone();
    fixture.commit("new", image)?;
    fixture.cli.ok(&["gc"])?;
    fixture.cli.ok(&["repair"])?;
    fixture.cli.ok(&["gc"])?;
    fixture.all_is_well()
}

/// The chunks are there, but it is not known where: they are stored anew.
#[test]
fn of_which_a_block_of_a_footer_is_damaged() -> anyhow::Result<()> {
    let mut fixture = Fixture::new()?;
    let pack = pack_of(&fixture, 0)?;
    let (_, footer) = chunks(&fs::read(&pack)?)?;
    flip(&pack, footer + 3)?;
    let path = fixture.dir.path().join("whole");
    fs::write(&path, &fixture.images["base"])?;
    let path = path.display().to_string();
    let arguments = ["commit", "new", "--no-parent", "--memory", &path];
    let output = fixture.cli.run(&arguments)?;
    let told = String::from_utf8(output.stderr)?;
    ensure!(output.status.success(), "{told}");
    ensure!(told.contains("wrong checksum"), "{told}");
    let error = fixture.cli.fails(4, &["gc"])?;
    ensure!(error.contains("snapstore repair"), "{error}");
    fixture.cli.ok(&["repair"])?;
    fixture.cli.ok(&["gc"])?;
    let image = fixture.images["base"].clone();
    fixture.images.insert("new".to_owned(), image);
    fixture.all_is_well()
}
