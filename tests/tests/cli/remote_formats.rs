//! Buckets of every layout there was, byte for byte as the program of their time left them: their
//! snapshots are pulled, and they are verified, pushed to and collected.
//!
//! `tests/fixtures/LAYOUT/hashes.txt` says what is in them, a line a tag: tag, length and BLAKE3 of its
//! memory. `make.py` beside it made them.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, ensure};
use snapstore_tests::harness::noise;

use crate::{Fixture, PAGE};

/// A bucket, and whether it is encrypted.
const BUCKETS: [(&str, bool); 2] = [("clear", false), ("sealed", true)];

/// A store that knows the bucket as `old`.
fn unpack(name: &str, is_encrypted: bool) -> anyhow::Result<Fixture> {
    let fixture = Fixture::new()?;
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/remote-v1");
    let status = Command::new("tar")
        .arg("-xf")
        .arg(from.join(name).with_extension("tar"))
        .arg("-C")
        .arg(fixture.dir.path())
        .status()
        .context("tar(1)")?;
    ensure!(status.success(), "tar ended with {status}");
    let url = format!("file://{}", fixture.path(name));
    let key = fixture.path("key");
    fs::copy(from.join("key"), &key)?;
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600))?;
    let mut add = vec!["remote", "add", "old", &url];
    if is_encrypted {
        add.extend(["--key", &key]);
    }
    fixture.cli.ok(&add)?;
    Ok(fixture)
}

#[test]
fn buckets_of_old_layouts_are_pulled_from_pushed_to_and_collected() -> anyhow::Result<()> {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/remote-v1");
    let hashes = fs::read_to_string(from.join("hashes.txt"))?;
    for (name, is_encrypted) in BUCKETS {
        let fixture = unpack(name, is_encrypted)?;
        let cli = &fixture.cli;
        cli.ok(&["remote", "verify", "old", "--read-data"])?;
        let mut tags = Vec::new();
        for line in hashes.lines() {
            let mut fields = line.split(' ');
            let (tag, len, hash) = (fields.next(), fields.next(), fields.next());
            let tag = tag.context("a tag")?;
            cli.ok(&["pull", &format!("old/{tag}")])?;
            let memory = fixture.memory(tag)?;
            let len: usize = len.context("a length")?.parse()?;
            let is_it = blake3::hash(&memory).to_hex().as_str() == hash.context("a hash")?;
            ensure!(memory.len() == len && is_it, "{name}: {tag}");
            tags.push(tag);
        }
        ensure!(tags.len() == 3, "{tags:?}");
        fixture.commit("new", &noise(3, 20 * PAGE), &[])?;
        cli.ok(&["push", "new", "old"])?;
        cli.ok(&["remote", "rm", "old", tags[2]])?;
        let collected = cli.json(&["remote", "gc", "old"])?;
        let deleted = collected["deleted"].as_array().context("a list")?;
        ensure!(!deleted.is_empty(), "{collected}");
        cli.ok(&["remote", "verify", "old", "--read-data"])?;
        let left = cli.json(&["remote", "tags", "old"])?;
        let left = left["tags"].as_array().context("a list")?;
        let left: Vec<_> = left.iter().filter_map(|one| one["tag"].as_str()).collect();
        ensure!(left == [tags[0], tags[1], "new"], "{left:?}");
    }
    Ok(())
}
