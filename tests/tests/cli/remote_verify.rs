//! `remote verify`: what was changed in a bucket is named, whoever needs it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::ensure;
use snapstore_tests::harness::noise;

use crate::{Fixture, PAGE};

/// A store with `base` in a bucket, in clear or with a key.
fn pushed(key: bool) -> anyhow::Result<(Fixture, PathBuf)> {
    let fixture = Fixture::new()?;
    // Of 800 pages some are hooks.
    fixture.commit("base", &noise(1, 800 * PAGE), &[])?;
    let bucket = fixture.dir.path().join("mnt/bucket");
    let url = format!("file://{}", bucket.display());
    let file = fixture.path("key");
    let cli = &fixture.cli;
    if key {
        cli.ok(&["remote", "key", &file])?;
        cli.ok(&["remote", "add", "site", &url, "--key", &file])?;
    } else {
        cli.ok(&["remote", "add", "site", &url])?;
    }
    cli.ok(&["remote", "init", "site"])?;
    cli.ok(&["push", "base", "site"])?;
    Ok((fixture, bucket))
}

/// All files below a directory.
fn files(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        match path.is_dir() {
            true => found.extend(files(&path)?),
            false => found.push(path),
        }
    }
    Ok(found)
}

const READ: [&str; 4] = ["remote", "verify", "site", "--read-data"];

#[test]
fn an_object_of_any_kind_that_was_changed_is_named() -> anyhow::Result<()> {
    type Change = fn(&mut Vec<u8>);
    let changes: [Change; 4] = [
        |bytes| bytes.truncate(bytes.len() - 1),
        |bytes| bytes.truncate(20),
        |bytes| bytes.push(0),
        |bytes| {
            let half = bytes.len() / 2;
            bytes[half] ^= 1;
        },
    ];
    for key in [false, true] {
        let (fixture, bucket) = pushed(key)?;
        fixture.cli.ok(&READ)?;
        for kind in ["refs", "heads", "packs", "hooks"] {
            let objects = files(&bucket.join(kind))?;
            ensure!(!objects.is_empty(), "there are no {kind}");
            for object in objects {
                let good = fs::read(&object)?;
                for change in changes {
                    let mut bytes = good.clone();
                    change(&mut bytes);
                    fs::write(&object, bytes)?;
                    let output = fixture.cli.run(&READ)?;
                    let said = String::from_utf8(output.stdout)?;
                    ensure!(output.status.code() == Some(4), "{object:?}: {said}");
                    ensure!(said.contains(&format!("{kind}/")), "{object:?}: {said}");
                }
                fs::write(&object, good)?;
            }
        }
        fixture.cli.ok(&READ)?;
    }
    Ok(())
}

/// A collection deletes nothing then, and says that this tells why.
#[test]
fn what_stands_in_the_way_of_a_collection_is_named() -> anyhow::Result<()> {
    let (fixture, bucket) = pushed(false)?;
    let cli = &fixture.cli;
    for kind in ["packs", "heads", "hooks"] {
        let link = bucket
            .join(kind)
            .join("11111111111111111111111111111111-00000001");
        std::os::unix::fs::symlink("/etc/passwd", &link)?;
        for arguments in [&READ[..3], &READ] {
            let output = cli.run(arguments)?;
            let said = String::from_utf8(output.stdout)?;
            ensure!(output.status.code() == Some(4), "{kind}: {said}");
            ensure!(said.contains("symbolic link"), "{kind}: {said}");
        }
        fs::remove_file(&link)?;
    }
    cli.ok(&READ)?;
    cli.ok(&["remote", "gc", "site", "--no-wait"]).map(drop)
}
