//! Files in `packs/` that no commit has written.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, ensure};
use snapstore_tests::harness::noise;

use crate::{Fixture, PAGE};

/// A store with one snapshot, and one more file among its packs.
fn with_file(name: &str, make: impl Fn(&[u8]) -> Vec<u8>) -> anyhow::Result<Fixture> {
    let fixture = Fixture::new()?;
    fixture.commit("base", &noise(1, 8 * PAGE), &[])?;
    let good = fixture.packs()?.pop().context("no pack")?;
    let bytes = make(&fs::read(good)?);
    fs::write(fixture.cli.store().join("packs").join(name), bytes)?;
    Ok(fixture)
}

/// It is named by `verify`, is in nobody's way, and `repair` sets it aside.
fn is_reported(fixture: &Fixture, name: &str) -> anyhow::Result<()> {
    for arguments in [&["verify"][..], &["verify", "--read-data"]] {
        let output = fixture.cli.run(arguments)?;
        let text = String::from_utf8(output.stdout)?;
        ensure!(output.status.code() == Some(4), "{arguments:?}: {text}");
        ensure!(
            text.contains(name),
            "{arguments:?} does not name {name}: {text}"
        );
    }
    ensure!(fixture.memory("base")? == noise(1, 8 * PAGE), "base");
    fixture.commit("next", &noise(2, 8 * PAGE), &[])?;
    ensure!(fixture.memory("next")? == noise(2, 8 * PAGE), "next");
    // It goes on beside what cannot be opened, and refuses where something may be found.
    let collected = fixture.cli.run(&["gc"])?;
    let said = String::from_utf8([collected.stdout, collected.stderr].concat())?;
    ensure!(matches!(collected.status.code(), Some(0 | 4)), "{said}");
    ensure!(said.contains(name), "gc does not name {name}: {said}");
    fixture.cli.ok(&["repair"])?;
    ensure!(
        !fixture.cli.store().join("packs").join(name).exists(),
        "set aside"
    );
    fixture.cli.ok(&["verify", "--read-data"])?;
    ensure!(
        fixture.memory("base")? == noise(1, 8 * PAGE),
        "base, repaired"
    );
    ensure!(
        fixture.memory("next")? == noise(2, 8 * PAGE),
        "next, repaired"
    );
    Ok(())
}

#[test]
fn random_bytes() -> anyhow::Result<()> {
    let name = "0000ffff.pack";
    is_reported(&with_file(name, |_| noise(9, 100_000))?, name)
}

#[test]
fn nothing_at_all() -> anyhow::Result<()> {
    let name = "0000ffff.pack";
    is_reported(&with_file(name, |_| Vec::new())?, name)
}

#[test]
fn a_pack_that_was_cut() -> anyhow::Result<()> {
    let name = "00000009.pack";
    is_reported(&with_file(name, |good| good[..10_000].to_vec())?, name)
}

/// Its entries are there, and say that it is one more copy of each chunk.
#[test]
fn a_pack_without_its_last_byte() -> anyhow::Result<()> {
    let name = "00000009.pack";
    let fixture = with_file(name, |good| good[..good.len() - 1].to_vec())?;
    let output = fixture.cli.run(&["verify"])?;
    let text = String::from_utf8(output.stdout)?;
    ensure!(output.status.code() == Some(4), "{text}");
    ensure!(text.contains(name), "{name} is not named: {text}");
    fixture.cli.ok(&["gc"])?;
    ensure!(
        !fixture.cli.store().join("packs").join(name).exists(),
        "nothing needs the copy"
    );
    ensure!(fixture.memory("base")? == noise(1, 8 * PAGE), "base");
    fixture.cli.ok(&["verify", "--read-data"])?;
    Ok(())
}

/// The number says nothing of what is in a pack: it is one more copy of each chunk.
#[test]
fn a_copy_of_a_pack_under_another_number() -> anyhow::Result<()> {
    let name = "00000009.pack";
    let fixture = with_file(name, <[u8]>::to_vec)?;
    fixture.cli.ok(&["verify", "--read-data"])?;
    fixture.commit("next", &noise(2, 8 * PAGE), &[])?;
    fixture.cli.ok(&["gc"])?;
    ensure!(
        !fixture.cli.store().join("packs").join(name).exists(),
        "nothing needs the copy"
    );
    ensure!(fixture.memory("base")? == noise(1, 8 * PAGE), "base");
    ensure!(fixture.memory("next")? == noise(2, 8 * PAGE), "next");
    fixture.cli.ok(&["verify", "--read-data"])?;
    Ok(())
}

/// Its keys are made with another secret: nothing in it would ever be found.
#[test]
fn a_pack_of_another_store() -> anyhow::Result<()> {
    let other = Fixture::new()?;
    other.commit("base", &noise(1, 8 * PAGE), &[])?;
    let pack = other.packs()?.pop().context("no pack")?;
    let foreign = fs::read(pack)?;
    let name = "00000009.pack";
    is_reported(&with_file(name, |_| foreign.clone())?, name)
}

#[test]
fn a_seal_that_claims_everything() -> anyhow::Result<()> {
    let name = "00000009.pack";
    let make = |good: &[u8]| {
        let mut bytes = good.to_vec();
        // Either of the two would do: one ends the file, one is before the footer.
        let last = bytes.len() - 96;
        let footer = u64::from_le_bytes(bytes[last + 32..last + 40].try_into().expect("8 bytes"));
        for seal in [last, footer as usize - 96] {
            bytes[seal + 32..seal + 56].fill(0xff);
        }
        bytes
    };
    is_reported(&with_file(name, make)?, name)
}

#[test]
fn the_highest_number_leaves_none() -> anyhow::Result<()> {
    let fixture = with_file("ffffffff.pack", |_| noise(9, 1000))?;
    let path = fixture.file("image", &noise(2, PAGE))?;
    // Where the last number is known nobody asks the packs.
    fs::remove_file(fixture.cli.store().join("locks/next-pack"))?;
    fixture.refused(4, "ffffffff.pack", &["commit", "next", "--memory", &path])?;
    assert!(fixture.memory("base")? == noise(1, 8 * PAGE), "base");
    fixture.cli.ok(&["repair"])?;
    fixture.cli.ok(&["commit", "next", "--memory", &path])?;
    Ok(())
}

#[test]
fn names_that_only_look_like_numbers_are_left_alone() -> anyhow::Result<()> {
    for name in [
        "1.pack",
        "+0000001.pack",
        "0000000A.pack",
        "x.pack",
        "00000001.pack.bak",
    ] {
        let fixture = with_file(name, |_| noise(9, 1000))?;
        fixture.cli.ok(&["verify", "--read-data"]).context(name)?;
        fixture.cli.ok(&["gc"]).context(name)?;
        ensure!(
            fixture.cli.store().join("packs").join(name).exists(),
            "{name}"
        );
    }
    Ok(())
}

#[test]
fn a_tag_that_is_a_copy_of_another() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    fixture.commit("base", &noise(1, 8 * PAGE), &[])?;
    let tags: &Path = &fixture.cli.store().join("tags");
    fs::copy(tags.join("base"), tags.join("other"))?;
    let error = fixture.cli.fails(4, &["show", "other"])?;
    assert!(error.contains("tags/other"), "{error}");
    assert!(fixture.memory("base")? == noise(1, 8 * PAGE), "base");
    fixture
        .cli
        .ok(&["rm", "other"])
        .context("what is damaged can be removed")?;
    fixture.cli.ok(&["verify"])?;
    Ok(())
}
