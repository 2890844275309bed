//! The crates depend on each other in one direction, and each foreign crate that shapes
//! the code has one home.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, ensure};
use serde_json::Value;

/// What each crate may use of the others, in what is shipped.
const MAY_USE: [(&str, &[&str]); 10] = [
    ("snapstore-store", &[]),
    ("snapstore-overlay", &[]),
    ("snapstore-remote", &["snapstore-store"]),
    ("snapstore-fuse", &["snapstore-overlay", "snapstore-store"]),
    ("snapstore-agent-protocol", &[]),
    ("snapstore-agent", &["snapstore-agent-protocol"]),
    ("snapstore-guests", &[]),
    (
        "snapstore-vmm",
        &["snapstore-agent-protocol", "snapstore-overlay"],
    ),
    (
        "snapstore-host",
        &["snapstore-fuse", "snapstore-store", "snapstore-vmm"],
    ),
    (
        "snapstore",
        &[
            "snapstore-fuse",
            "snapstore-host",
            "snapstore-remote",
            "snapstore-store",
            "snapstore-vmm",
        ],
    ),
];

/// Crates of others, and the only ones of ours that may use them.
const HOMES: [(&str, &str); 15] = [
    ("rocksdb", "snapstore-store"),
    ("zstd", "snapstore-store"),
    ("object_store", "snapstore-remote"),
    ("ring", "snapstore-remote"),
    ("tokio", "snapstore-remote"),
    ("fuser", "snapstore-fuse"),
    ("kvm-bindings", "snapstore-vmm"),
    ("kvm-ioctls", "snapstore-vmm"),
    ("vm-memory", "snapstore-vmm"),
    ("virtio-queue", "snapstore-vmm"),
    ("linux-loader", "snapstore-vmm"),
    ("landlock", "snapstore-vmm"),
    ("seccompiler", "snapstore-vmm"),
    ("clap", "snapstore"),
    ("indicatif", "snapstore"),
];

/// Crates that are not shipped: they may use anything.
const NOT_SHIPPED: [&str; 2] = ["snapstore-tests", "snapstore-bench"];

/// The dependencies of each crate of the workspace, but for those of its tests.
fn dependencies() -> anyhow::Result<BTreeMap<String, BTreeSet<String>>> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--no-deps", "--offline"])
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."))
        .output()?;
    ensure!(
        output.status.success(),
        "cargo metadata: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: Value = serde_json::from_slice(&output.stdout)?;
    let packages = metadata["packages"].as_array().context("no packages")?;
    let mut found = BTreeMap::new();
    for package in packages {
        let name = package["name"].as_str().context("a crate has a name")?;
        let dependencies = package["dependencies"].as_array().context("no list")?;
        let dependencies = dependencies
            .iter()
            .filter(|one| one["kind"] != "dev")
            .filter_map(|one| Some(one["name"].as_str()?.to_owned()))
            .collect();
        found.insert(name.to_owned(), dependencies);
    }
    Ok(found)
}

#[test]
fn crates_use_each_other_in_one_direction() -> anyhow::Result<()> {
    let mut found = dependencies()?;
    found.retain(|name, _| !NOT_SHIPPED.contains(&name.as_str()));
    let known: BTreeSet<_> = MAY_USE.iter().map(|(name, _)| (*name).to_owned()).collect();
    let there: BTreeSet<_> = found.keys().cloned().collect();
    assert_eq!(there, known, "the crates are those of this test");
    for (name, allowed) in MAY_USE {
        let ours = found[name]
            .iter()
            .filter(|one| one.starts_with("snapstore"));
        for used in ours {
            assert!(
                allowed.contains(&used.as_str()),
                "{name} may not use {used}"
            );
        }
    }
    Ok(())
}

#[test]
fn what_others_made_has_one_home() -> anyhow::Result<()> {
    for (name, used) in dependencies()? {
        if NOT_SHIPPED.contains(&name.as_str()) {
            continue;
        }
        for (foreign, home) in HOMES {
            let misused = used.contains(foreign) && name != home;
            assert!(!misused, "{foreign} is for {home}, and {name} uses it");
        }
    }
    Ok(())
}
