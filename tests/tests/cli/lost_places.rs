//! Stores of which something is missing: what was empty comes back by itself, what
//! was not is damage, and what is no store is said to be none.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, ensure};
use snapstore_tests::harness::noise;

use crate::{Fixture, PAGE, list};

fn with_base() -> anyhow::Result<Fixture> {
    let fixture = Fixture::new()?;
    fixture.commit("base", &noise(1, 8 * PAGE), &[])?;
    Ok(fixture)
}

fn remove(fixture: &Fixture, name: &str) -> anyhow::Result<()> {
    let path = fixture.cli.store().join(name);
    let removed = match path.is_dir() {
        true => fs::remove_dir_all(&path),
        false => fs::remove_file(&path),
    };
    removed.context(name.to_owned())
}

/// As git and some archives do.
fn remove_empty_directories(dir: &Path) -> anyhow::Result<()> {
    for path in list(dir)? {
        if path.is_dir() {
            remove_empty_directories(&path)?;
        }
    }
    if list(dir)?.is_empty() {
        fs::remove_dir(dir)?;
    }
    Ok(())
}

fn everything_works(fixture: &Fixture) -> anyhow::Result<()> {
    let next = fixture.file("next", &noise(2, 8 * PAGE))?;
    fixture.cli.ok(&["tags"])?;
    fixture.cli.ok(&["verify"])?;
    fixture.cli.ok(&["commit", "next", "--memory", &next])?;
    fixture.cli.ok(&["gc"])?;
    fixture.cli.ok(&["verify", "--read-data"])?;
    ensure!(fixture.memory("next")? == noise(2, 8 * PAGE), "next");
    Ok(())
}

#[test]
fn leases_and_locks() -> anyhow::Result<()> {
    for names in [&["leases"][..], &["locks"], &["leases", "locks"]] {
        let fixture = with_base()?;
        for name in names {
            remove(&fixture, name)?;
        }
        everything_works(&fixture).with_context(|| format!("{names:?}"))?;
        ensure!(fixture.memory("base")? == noise(1, 8 * PAGE), "base");
    }
    Ok(())
}

#[test]
fn whatever_was_empty() -> anyhow::Result<()> {
    for first in ["tags", "commit", "gc", "verify", "stats"] {
        let fixture = Fixture::new()?;
        fs::remove_dir_all(fixture.cli.store().join("locks"))?;
        for name in ["tags", "packs", "leases"] {
            fs::remove_dir(fixture.cli.store().join(name))?;
        }
        let image = fixture.file("image", &noise(3, PAGE))?;
        match first {
            "commit" => fixture.cli.ok(&["commit", "first", "--memory", &image]),
            other => fixture.cli.ok(&[other]),
        }?;
        everything_works(&fixture).context(first)?;
    }
    let fixture = with_base()?;
    remove_empty_directories(fixture.cli.store())?;
    everything_works(&fixture)
}

#[test]
fn all_but_the_configuration() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    for name in ["tags", "packs", "leases", "locks", "index"] {
        remove(&fixture, name)?;
    }
    everything_works(&fixture)
}

/// `repair` opens the store while it holds the locks.
#[test]
fn all_but_the_configuration_of_what_is_repaired() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    for name in ["tags", "packs", "leases", "locks", "index"] {
        remove(&fixture, name)?;
    }
    fixture.cli.ok(&["repair"])?;
    everything_works(&fixture)
}

/// A store without its tags must not be taken for one that never had any: a collection
/// would delete everything.
#[test]
fn tags_beside_packs() -> anyhow::Result<()> {
    let fixture = with_base()?;
    let image = fixture.file("image", &noise(3, PAGE))?;
    remove(&fixture, "tags")?;
    let packs = fixture.packs()?;
    for arguments in [
        &["tags"][..],
        &["verify"],
        &["gc"],
        &["stats"],
        &["commit", "new", "--memory", &image],
    ] {
        let output = fixture.cli.run(arguments)?;
        let said = String::from_utf8([output.stdout, output.stderr].concat())?;
        ensure!(output.status.code() == Some(4), "{arguments:?}: {said}");
        ensure!(said.contains("the directory is missing"), "{said}");
        ensure!(said.contains("snapstore repair"), "{said}");
        ensure!(fixture.packs()? == packs, "{arguments:?} left a trace");
    }
    let report = fixture.cli.json(&["repair"])?;
    ensure!(report["recovered_tags"]["base"].is_string(), "{report}");
    ensure!(fixture.memory("base")? == noise(1, 8 * PAGE), "base");
    everything_works(&fixture)
}

#[test]
fn packs_beside_tags() -> anyhow::Result<()> {
    let fixture = with_base()?;
    remove(&fixture, "packs")?;
    let output = fixture.cli.run(&["verify"])?;
    let said = String::from_utf8([output.stdout, output.stderr].concat())?;
    ensure!(output.status.code() == Some(4), "{said}");
    ensure!(said.contains("needed by base"), "{said}");
    let image = fixture.file("image", &noise(1, 8 * PAGE))?;
    let error = fixture
        .cli
        .fails(4, &["commit", "new", "--memory", &image])?;
    ensure!(error.contains("packs is damaged"), "{error}");
    let output = fixture.cli.run(&["repair"])?;
    let said = String::from_utf8([output.stdout, output.stderr].concat())?;
    ensure!(output.status.code() == Some(4), "{said}");
    ensure!(said.contains("BROKEN: snapshot base"), "{said}");
    fixture.cli.ok(&["rm", "base"])?;
    everything_works(&fixture)
}

#[test]
fn the_configuration_beside_packs() -> anyhow::Result<()> {
    for page_size in ["4K", "16K", "64K"] {
        let fixture = Fixture::without_store()?;
        fixture.cli.ok(&["init", "--page-size", page_size])?;
        fixture.commit("base", &noise(1, 32 * PAGE), &[])?;
        let config = fs::read(fixture.cli.store().join("config"))?;
        remove(&fixture, "config")?;
        let image = fixture.path("memory");
        for arguments in [
            &["tags"][..],
            &["verify"],
            &["gc"],
            &["commit", "new", "--memory", &image],
            &["init"],
        ] {
            let error = fixture.cli.fails(4, arguments)?;
            ensure!(
                error.contains("config is damaged (it is missing)"),
                "{error}"
            );
            ensure!(error.contains("`snapstore repair`"), "{error}");
        }
        let report = fixture.cli.json(&["repair"])?;
        ensure!(report["rebuilt_files"][0] == "config", "{report}");
        ensure!(fs::read(fixture.cli.store().join("config"))? == config);
        ensure!(fixture.memory("base")? == noise(1, 32 * PAGE), "base");
        fixture.cli.ok(&["verify", "--read-data"])?;
    }
    Ok(())
}

/// Nothing else has the secret. What is there is left as it is: a copy brings all back.
#[test]
fn both_copies_of_the_configuration() -> anyhow::Result<()> {
    let fixture = with_base()?;
    let store = fixture.cli.store();
    let names = ["config", "config-copy"];
    let copies = names.map(|name| fs::read(store.join(name)));
    let pack = fs::read(store.join("packs/00000001.pack"))?;
    for lost in [None, Some("junk")] {
        for (name, copy) in names.iter().zip(&copies) {
            for name in names {
                match lost {
                    Some(junk) => fs::write(store.join(name), junk)?,
                    None => remove(&fixture, name)?,
                }
            }
            for command in ["tags", "verify", "gc", "init"] {
                let error = fixture.cli.fails(4, &[command])?;
                ensure!(error.contains("`snapstore repair`"), "{command}: {error}");
            }
            let error = fixture.cli.fails(4, &["repair"])?;
            ensure!(error.contains("under its own name"), "{error}");
            ensure!(!error.contains("`snapstore repair`"), "{error}");
            ensure!(fs::read(store.join("packs/00000001.pack"))? == pack);
            ensure!(!store.join("damaged").exists(), "something was moved");
            let copy = copy.as_ref().map_err(|error| anyhow::anyhow!("{error}"))?;
            fs::write(store.join(name), copy)?;
            fixture.cli.ok(&["repair"])?;
            fixture.cli.ok(&["verify", "--read-data"])?;
            ensure!(fixture.memory("base")? == noise(1, 8 * PAGE), "base");
        }
    }
    Ok(())
}

#[test]
fn a_lost_configuration_of_an_empty_store_is_made_by_init() -> anyhow::Result<()> {
    let fixture = with_base()?;
    fixture.cli.ok(&["rm", "base"])?;
    fixture.cli.ok(&["gc"])?;
    remove(&fixture, "config")?;
    let error = fixture.cli.fails(3, &["tags"])?;
    ensure!(error.contains("holds no store"), "{error}");
    fixture.cli.ok(&["init"])?;
    everything_works(&fixture)
}

/// Directories of other programs that look a little like a store.
#[test]
fn what_is_no_store_is_said_to_be_none_and_left_alone() -> anyhow::Result<()> {
    for contents in [
        &[][..],
        &["tags/", "packs/"],
        &["packs/readme", "tags/v1"],
        &["packs/1.pack", "packs/pack-00000001.pack"],
        &["index/", "file"],
    ] {
        let fixture = Fixture::without_store()?;
        let root = fixture.cli.store().to_owned();
        fs::create_dir(&root)?;
        for name in contents {
            let path = root.join(name);
            match name.ends_with('/') {
                true => fs::create_dir_all(&path)?,
                false => {
                    fs::create_dir_all(path.parent().context("a root")?)?;
                    fs::write(&path, "mine")?;
                }
            }
        }
        let before = list(&root)?;
        for command in ["tags", "verify", "gc", "repair", "stats", "log"] {
            let error = fixture.cli.fails(3, &[command])?;
            ensure!(error.contains("holds no store"), "{command}: {error}");
            ensure!(list(&root)? == before, "{command} left a trace");
        }
    }
    let fixture = Fixture::without_store()?;
    fs::write(fixture.cli.store(), "a file")?;
    for command in ["tags", "repair"] {
        fixture.cli.fails(3, &[command])?;
    }
    Ok(())
}

/// What was left by processes that were killed goes with the next collection.
#[test]
fn what_was_left_behind_is_cleaned_up() -> anyhow::Result<()> {
    let fixture = with_base()?;
    let store = fixture.cli.store();
    for name in ["tags/.base.new", ".collector.new", ".config.new"] {
        fs::write(store.join(name), "half")?;
    }
    for name in ["index.new", "index.old"] {
        fs::create_dir(store.join(name))?;
        fs::write(store.join(name).join("CURRENT"), "half")?;
    }
    fs::write(store.join("packs/00000077.open"), "half")?;
    fs::write(store.join("leases/77-0"), "half")?;
    fixture.cli.ok(&["gc"])?;
    for name in [
        "tags/.base.new",
        ".collector.new",
        ".config.new",
        "index.new",
        "index.old",
        "packs/00000077.open",
        "leases/77-0",
    ] {
        ensure!(!store.join(name).exists(), "{name} is still there");
    }
    everything_works(&fixture)
}
