//! Parents, chains, and images that are mostly holes.

use std::collections::BTreeSet;
use std::fs;

use anyhow::Context as _;
use snapstore_store::{
    CommitRequest, Error, ImageRole, Input, InputData, InputKind, Silent, Store,
};
use snapstore_tests::harness::{noise, skipped};

use crate::{Fixture, PAGE};

/// The same bytes with `changed` pages replaced.
fn altered(bytes: &[u8], changed: usize) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for page in 0..changed {
        let at = page * 3 * PAGE;
        bytes[at..at + PAGE].copy_from_slice(&noise(1000 + page as u64, PAGE));
    }
    bytes
}

#[test]
fn the_parent_is_the_snapshot_that_is_alike() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    let (one, two) = (noise(1, 64 * PAGE), noise(2, 64 * PAGE));
    fixture.commit("one", &one, &[])?;
    let unlike = fixture.commit("two", &two, &[])?;
    assert!(unlike["parent"].is_null(), "{unlike}");
    let alike = fixture.commit("one+1", &altered(&one, 10), &[])?;
    assert_eq!(alike["parent_tag"], "one");
    let alike = fixture.commit("two+1", &altered(&two, 10), &[])?;
    assert_eq!(alike["parent_tag"], "two");
    assert_eq!(alike["images"][0]["changed_pages"], 10);
    let none = fixture.commit("two+2", &altered(&two, 5), &["--no-parent"])?;
    assert!(none["parent"].is_null(), "{none}");
    Ok(())
}

#[test]
fn a_moved_tag_is_the_parent_of_what_replaces_it() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    let first = fixture.commit("now", &noise(1, 8 * PAGE), &[])?;
    let second = fixture.commit("now", &noise(2, 8 * PAGE), &["--replace"])?;
    assert_eq!(second["parent"], first["id"]);
    Ok(())
}

#[test]
fn a_child_stays_whole_without_its_parent() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    let base = noise(1, 700 * PAGE);
    let middle = altered(&base, 200);
    let mut last = middle.clone();
    last[100] ^= 1;
    fixture.commit("base", &base, &[])?;
    fixture.commit("middle", &middle, &["--parent", "base"])?;
    fixture.commit("last", &last, &["--parent", "middle"])?;
    fixture.cli.ok(&["rm", "middle"])?;
    fixture.cli.ok(&["gc", "--keep-percent", "100"])?;
    fixture.cli.ok(&["verify", "--read-data"])?;
    assert!(fixture.memory("last")? == last, "last has changed");
    fixture.cli.ok(&["rm", "base"])?;
    fixture.cli.ok(&["gc", "--keep-percent", "100"])?;
    fixture.cli.ok(&["verify", "--read-data"])?;
    assert!(fixture.memory("last")? == last, "last has changed");
    Ok(())
}

#[test]
fn each_of_a_hundred_diffs_reads_back() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    let mut bytes = noise(1, 40 * PAGE);
    fixture.commit("step0", &bytes, &[])?;
    let mut expected = vec![bytes.clone()];
    for step in 1..=100_u64 {
        let page = step % 40;
        let at = page as usize * PAGE;
        // Every third change is a small one, every seventh makes a page zero.
        let changed = match step {
            step if step % 7 == 0 => vec![0; PAGE],
            step if step % 3 == 0 => altered_page(&bytes[at..at + PAGE], step),
            step => noise(step, PAGE),
        };
        bytes[at..at + PAGE].copy_from_slice(&changed);
        let path = fixture.sparse("diff", bytes.len() as u64, &[(page, &changed)])?;
        let (tag, parent) = (format!("step{step}"), format!("step{}", step - 1));
        fixture.cli.ok(&[
            "commit", &tag, "--memory", &path, "--diff", "--parent", &parent,
        ])?;
        expected.push(bytes.clone());
    }
    for (step, bytes) in expected.iter().enumerate() {
        let found = fixture.memory(&format!("step{step}"))?;
        anyhow::ensure!(found == *bytes, "step{step} is not what was committed");
    }
    Ok(())
}

fn altered_page(page: &[u8], step: u64) -> Vec<u8> {
    let mut page = page.to_vec();
    page[usize::try_from(step).expect("a small number")] ^= 0x55;
    page
}

#[test]
fn sixteen_gib_of_holes_cost_next_to_nothing() -> anyhow::Result<()> {
    const SIZE: u64 = 16 << 30;
    let fixture = Fixture::new()?;
    let pages: Vec<(u64, Vec<u8>)> = [0, 511, 512, 1 << 20, SIZE / PAGE as u64 - 1]
        .map(|page| (page, noise(page, PAGE)))
        .to_vec();
    let parts: Vec<(u64, &[u8])> = pages.iter().map(|(at, page)| (*at, &page[..])).collect();
    let path = fixture.sparse("huge", SIZE, &parts)?;
    let committed = fixture.cli.json(&["commit", "huge", "--memory", &path])?;
    assert_eq!(committed["images"][0]["nonzero_pages"], 5);
    let stats = fixture.cli.json(&["stats"])?;
    assert!(stats["pack_bytes"].as_u64() < Some(32 << 10), "{stats}");
    let store = Store::open(fixture.cli.store())?;
    let manifest = store.manifest(store.resolve("huge")?)?;
    let reader = store.image_reader(&manifest.images[0]);
    for (page, bytes) in &pages {
        let mut found = vec![0; PAGE];
        reader.read_at(&mut found, page * PAGE as u64)?;
        anyhow::ensure!(found == *bytes, "page {page}");
    }
    Ok(())
}

#[test]
fn a_commit_needs_little_memory_however_long_the_image() -> anyhow::Result<()> {
    const LIMIT_KIB: u64 = 256 << 10;
    let time = "/usr/bin/time";
    if !std::path::Path::new(time).exists() {
        skipped(
            "a_commit_needs_little_memory_however_long_the_image",
            "no /usr/bin/time",
        );
        return Ok(());
    }
    let fixture = Fixture::new()?;
    // 16 GiB of which 512 MiB are data, in runs far from each other.
    let run = noise(7, 32 << 20);
    let runs: Vec<(u64, &[u8])> = (0..16_u64).map(|n| (n << 18, &run[..])).collect();
    let path = fixture.sparse("huge", 16 << 30, &runs)?;
    let report = fixture.path("peak");
    let commit = fixture
        .cli
        .command(&["commit", "huge", "--memory", &path])?;
    let status = std::process::Command::new(time)
        .args(["--quiet", "--format", "%M", "--output", &report])
        .arg(commit.get_program())
        .args(commit.get_args())
        .stdout(std::process::Stdio::null())
        .status()?;
    assert!(status.success());
    let peak: u64 = fs::read_to_string(&report)?.trim().parse()?;
    assert!(peak < LIMIT_KIB, "the commit took {peak} KiB");
    Ok(())
}

#[test]
fn a_prefix_of_several_ids_is_ambiguous() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    let path = fixture.file("state", b"state")?;
    let store = Store::open(fixture.cli.store())?;
    let mut seen = BTreeSet::new();
    // Two of n ids begin with the same four digits soon: n is 300 on average.
    let shared = (0..4000).find_map(|number| {
        let request = CommitRequest {
            tag: "moving".to_owned(),
            replace: true,
            inputs: vec![Input {
                name: "vmstate".to_owned(),
                role: ImageRole::File,
                data: InputData::File(path.clone().into()),
                kind: InputKind::Full,
            }],
            labels: [("number".to_owned(), number.to_string())].into(),
            ..CommitRequest::default()
        };
        let id = store
            .commit(&request, &Silent)
            .map(|committed| committed.id.to_string());
        match id {
            Ok(id) if seen.insert(id[..4].to_owned()) => None,
            other => Some(other),
        }
    });
    let id = shared.context("no two ids begin alike")??;
    assert!(matches!(
        store.resolve(&id[..4]),
        Err(Error::Ambiguous { count: 2, .. })
    ));
    fixture.refused(1, "give more digits", &["show", &id[..4]])?;
    fixture.cli.ok(&["show", &id])?;
    Ok(())
}
