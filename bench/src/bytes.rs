//! How many bytes are stored.

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, ensure};
use serde_json::Value;
use snapstore_store::Store;
use zstd::bulk::Compressor;

use crate::deep::commit_file;
use crate::guest::{Guest, NAMES, PAGE};
use crate::stats::{Random, Samples};
use crate::tools::{bytes_under, figure, find, settle, timed};
use crate::{Bench, utf8};

/// What is aimed at right after the commits, as a share of the distinct pages.
const AIM: f64 = 0.43;
/// The same once it was optimised.
const AIM_OPTIMIZED: f64 = 0.35;
/// What a small step may take once it was optimised.
const STEP_BYTES: f64 = 1e6;

/// The five images in one store.
///
/// # Errors
/// If something fails.
pub fn five(bench: &mut Bench) -> anyhow::Result<()> {
    let cli = bench.new_store("five")?;
    let mut distinct = HashSet::new();
    for name in NAMES {
        let path = bench.images.path(name);
        cli.ok(&["commit", name, "--memory", utf8(&path)?])?;
        let memory = bench.images.read(name)?;
        distinct.extend(
            memory
                .chunks(PAGE)
                .filter(|page| !snapstore_store::is_zero(page))
                .map(|page| *blake3::hash(page).as_bytes()),
        );
    }
    let stats = cli.json(&["stats"])?;
    let count = |name: &str| {
        stats[name]
            .as_u64()
            .with_context(|| format!("stats lack {name}"))
    };
    let distinct_bytes = (distinct.len() * PAGE) as u64;
    ensure!(
        count("distinct_bytes")? == distinct_bytes,
        "stats count other distinct pages: {} bytes, not {distinct_bytes}",
        count("distinct_bytes")?
    );
    let one = |bytes: u64| Samples::one(figure(bytes));
    let all = ("all files of the store", one(count("total_bytes")?));
    let distinct = ("distinct pages", one(distinct_bytes));
    let parts = [
        ("of these, pages", "page_stored_bytes"),
        ("of these, trees and manifests", "metadata_stored_bytes"),
        ("of these, packs without use", "unreferenced_bytes"),
        ("of these, index", "index_bytes"),
    ];
    bench.compare_bytes((all.0, &all.1), (distinct.0, &distinct.1), Some(AIM));
    for (what, name) in parts {
        bench.compare_bytes((what, &one(count(name)?)), (all.0, &all.1), None);
    }
    cli.ok(&["gc", "--optimize"])?;
    let stats = cli.json(&["stats"])?;
    let optimized = stats["total_bytes"]
        .as_u64()
        .context("stats lack a total")?;
    bench.compare_bytes(
        ("the same after `gc --optimize`", &one(optimized)),
        (distinct.0, &distinct.1),
        Some(AIM_OPTIMIZED),
    );
    let zstd = zstd_bytes(bench)?;
    match zstd {
        Some(bytes) => {
            bench.compare_bytes((all.0, &all.1), ("zstd -1 of each file", &one(bytes)), None)
        }
        None => bench
            .report
            .skip("bytes-five against zstd", "zstd is not installed"),
    }
    match borg_bytes(bench)? {
        Some(bytes) => bench.compare_bytes(
            (all.0, &all.1),
            ("borg, 4 KiB chunks, zstd,1", &one(bytes)),
            None,
        ),
        None => bench
            .report
            .skip("bytes-five against borg", "borg is not installed"),
    }
    fs::remove_dir_all(cli.store())?;
    Ok(())
}

fn zstd_bytes(bench: &Bench) -> anyhow::Result<Option<u64>> {
    let Some(zstd) = find("zstd") else {
        return Ok(None);
    };
    let out = bench.path("image.zst");
    let mut total = 0;
    for name in NAMES {
        let mut command = Command::new(&zstd);
        command
            .args(["-1", "-T2", "-q", "-f"])
            .arg(bench.images.path(name));
        timed(command.arg("-o").arg(&out))?;
        total += fs::metadata(&out)?.len();
    }
    fs::remove_file(&out)?;
    Ok(Some(total))
}

fn borg_bytes(bench: &Bench) -> anyhow::Result<Option<u64>> {
    let Some(borg) = find("borg") else {
        return Ok(None);
    };
    let (home, repository) = (bench.path("borg-home"), bench.path("borg"));
    fs::create_dir(&home)?;
    let command = |arguments: &[&str]| {
        let mut command = Command::new(&borg);
        command.args(arguments).env("BORG_BASE_DIR", &home);
        command
    };
    timed(&mut command(&[
        "init",
        "--encryption=none",
        utf8(&repository)?,
    ]))?;
    for name in NAMES {
        let archive = format!("{}::{name}", utf8(&repository)?);
        let options = ["--chunker-params", "fixed,4096", "--compression", "zstd,1"];
        let mut create = command(&[&["create"], &options[..]].concat());
        timed(create.arg(archive).arg(bench.images.path(name)))?;
    }
    let total = bytes_under(&repository)?;
    fs::remove_dir_all(&repository)?;
    Ok(Some(total))
}

/// Fifty small steps of a guest, each committed as a diff.
///
/// # Errors
/// If something fails.
pub fn steps(bench: &mut Bench) -> anyhow::Result<()> {
    const STEPS: usize = 50;
    const EDITS: usize = 2000;
    const FRESH: usize = 200;
    let cli = bench.new_store("steps")?;
    let store = Store::open(cli.store())?;
    let mut guest = Guest::new(bench.images.read("base")?);
    commit_file(&store, "s0", &bench.images.path("base"), None)?;
    let before = bytes_under(cli.store())?;
    let diff = bench.path("step-diff");
    let mut random = Random::new(7);
    let (mut stored, mut raw, mut plain) = (Vec::new(), Vec::new(), Vec::new());
    for number in 1..=STEPS {
        let step = guest.run(&mut random, EDITS, FRESH);
        guest.write_diff(&step, &diff)?;
        let (tag, parent) = (format!("s{number}"), format!("s{}", number - 1));
        let committed = commit_file(&store, &tag, &diff, Some(&parent))?;
        stored.push(figure(committed.manifest.added_bytes));
        raw.push(figure((step.len() * PAGE) as u64));
        plain.push(figure(compressed(step.values())?));
    }
    settle(&[])?;
    let grown = bytes_under(cli.store())? - before;
    check_end(
        &store,
        &guest,
        &format!("s{STEPS}"),
        &bench.path("steps-end"),
    )?;
    let what = format!("stored per step of {EDITS} edits and {FRESH} new pages");
    let stored = Samples::new(stored);
    bench.compare_bytes(
        (&what, &stored),
        ("changed pages", &Samples::new(raw.clone())),
        None,
    );
    bench.compare_bytes(
        (&what, &stored),
        ("zstd -1 of each page", &Samples::new(plain)),
        None,
    );
    let grown = Samples::one(figure(grown));
    let total = Samples::one(raw.iter().sum());
    let what = format!("growth of all files in {STEPS} steps");
    bench.compare_bytes((&what, &grown), ("changed pages", &total), None);
    // What the base alone takes is measured in a store of its own.
    let alone = bench.new_store("steps-base")?;
    commit_file(
        &Store::open(alone.store())?,
        "s0",
        &bench.images.path("base"),
        None,
    )?;
    for cli in [&alone, &cli] {
        cli.ok(&["gc", "--optimize"])?;
    }
    settle(&[])?;
    let grown = bytes_under(cli.store())?.saturating_sub(bytes_under(alone.store())?);
    check_end(
        &Store::open(cli.store())?,
        &guest,
        &format!("s{STEPS}"),
        &bench.path("steps-end"),
    )?;
    let grown = Samples::one(figure(grown) / STEPS as f64);
    bench.compare_bytes(
        ("a step's share once they are optimised", &grown),
        ("1 MB", &Samples::one(STEP_BYTES)),
        Some(1.0),
    );
    fs::remove_dir_all(alone.store())?;
    fs::remove_dir_all(cli.store())?;
    Ok(())
}

/// What collections write over a store's life, each of which optimises after some steps.
///
/// # Errors
/// If something fails.
pub fn rewritten(bench: &mut Bench) -> anyhow::Result<()> {
    const STEPS: usize = 50;
    const EDITS: usize = 2000;
    const COLLECTED_EACH: usize = 5;
    let cli = bench.new_store("rewritten")?;
    let mut guest = Guest::new(bench.images.read("base")?);
    commit_file(
        &Store::open(cli.store())?,
        "s0",
        &bench.images.path("base"),
        None,
    )?;
    let diff = bench.path("rewritten-diff");
    let mut random = Random::new(11);
    let mut account = Value::Null;
    for number in 1..=STEPS {
        let step = guest.run(&mut random, EDITS, 0);
        guest.write_diff(&step, &diff)?;
        let (tag, parent) = (format!("s{number}"), format!("s{}", number - 1));
        commit_file(&Store::open(cli.store())?, &tag, &diff, Some(&parent))?;
        if number.is_multiple_of(COLLECTED_EACH) {
            cli.ok(&["rm", &parent])?;
            account = cli.json(&["gc", "--optimize"])?["optimized"].take();
        }
    }
    let bytes = |name: &str| -> anyhow::Result<Samples> {
        let bytes = account[name].as_u64();
        Ok(Samples::one(figure(bytes.with_context(|| {
            format!("the collection does not tell {name}")
        })?)))
    };
    let what = format!("written by collections, one after {COLLECTED_EACH} of {STEPS} steps");
    bench.compare_bytes(
        (&what, &bytes("rewritten_bytes")?),
        ("written by commits", &bytes("committed_bytes")?),
        Some(2.0),
    );
    fs::remove_dir_all(cli.store())?;
    Ok(())
}

/// What the pages take if each is compressed by itself.
fn compressed<'a>(pages: impl Iterator<Item = &'a Vec<u8>>) -> anyhow::Result<u64> {
    let mut compressor = Compressor::new(1)?;
    let mut total = 0;
    for page in pages {
        total += compressor.compress(page)?.len().min(PAGE) as u64;
    }
    Ok(total)
}

fn check_end(store: &Store, guest: &Guest, tag: &str, truth: &Path) -> anyhow::Result<()> {
    guest.write(truth)?;
    let (truth, manifest) = (fs::read(truth)?, store.manifest(store.resolve(tag)?)?);
    let mut shown = vec![0; truth.len()];
    store
        .image_reader(&manifest.images[0])
        .read_at(&mut shown, 0)?;
    ensure!(shown == truth, "the last step reads back as other bytes");
    Ok(())
}
