//! `remote gc` of a bucket whose packs are needed in part: what it takes then, what is told, and
//! exit codes.

use std::fs;

use anyhow::{Context as _, ensure};
use serde_json::Value;
use snapstore_tests::harness::{Cli, noise};
use snapstore_tests::servers;

use crate::{Fixture, PAGE, list};

/// What is left after `remote rm` of most tags and `remote gc` takes at most so much of what a
/// fresh push of it takes.
const MOST_OF_FRESH: f64 = 1.1;
const PAGES: usize = 2400;

/// `base`, and above it `one` and `two`, which have other pages but for a few at the beginning.
fn commit(fixture: &Fixture) -> anyhow::Result<()> {
    let mut image = noise(1, PAGES * PAGE);
    fixture.commit("base", &image, &[])?;
    for (tag, seed, same) in [("one", 2, 150), ("two", 3, 60)] {
        image[same * PAGE..].copy_from_slice(&noise(seed, (PAGES - same) * PAGE));
        fixture.commit(tag, &image, &["--parent", "base"])?;
    }
    Ok(())
}

/// What packs and heads take there, if all is needed.
fn kept(cli: &Cli, remote: &str) -> anyhow::Result<f64> {
    let told = cli.json(&["remote", "gc", remote, "--dry-run"])?;
    ensure!(told["deleted"] == Value::Array(Vec::new()), "{told}");
    told["kept_bytes"].as_f64().context("a number")
}

/// A bucket, and another one: how each is added.
fn repacks(fixture: &Fixture, site: &[&str], fresh: &[&str]) -> anyhow::Result<()> {
    let cli = &fixture.cli;
    commit(fixture)?;
    for (name, place) in [("site", site), ("fresh", fresh)] {
        cli.ok(&[&["remote", "add", name], place].concat())?;
        cli.ok(&["remote", "init", name])?;
    }
    for tag in ["base", "one", "two"] {
        cli.ok(&["push", tag, "site"])?;
    }
    cli.ok(&["remote", "rm", "site", "base", "one"])?;
    let told = cli.json(&["remote", "gc", "site", "--repack", "0"])?;
    ensure!(told["repacked"]["packs"] == 0, "{told}");
    let told = cli.json(&["remote", "gc", "site", "--dry-run"])?;
    let would = &told["repacked"];
    ensure!(would["packs"] == 1 && would["snapshots"] == 1, "{told}");
    ensure!(would["written_bytes"] == 0, "{told}");
    let said = cli.ok(&["remote", "gc", "site", "--dry-run"])?;
    ensure!(said.contains("Would repack 1 packs"), "{said}");
    let told = cli.json(&["remote", "gc", "site", "--max-bytes", "1K"])?;
    ensure!(told["repacked"]["left"] == 1, "{told}");
    let told = cli.json(&["remote", "gc", "site"])?;
    let done = &told["repacked"];
    ensure!(done["packs"] == 1 && done["pages"] == 60, "{told}");
    ensure!(done["damaged"] == Value::Array(Vec::new()), "{told}");
    ensure!(
        told["deleted_bytes"].as_u64() > Some((PAGES * PAGE) as u64),
        "{told}"
    );
    cli.ok(&["remote", "verify", "site", "--read-data"])?;
    cli.ok(&["push", "two", "fresh"])?;
    let (there, least) = (kept(cli, "site")?, kept(cli, "fresh")?);
    println!("{there} bytes after rm and gc, {least} of a fresh push");
    ensure!(there <= least * MOST_OF_FRESH, "{there} of {least}");
    // Another host.
    let other = Cli::new(&fixture.dir.path().join("other"));
    other.ok(&["init"])?;
    other.ok(&[&["remote", "add", "site"], site].concat())?;
    other.ok(&["pull", "site/two"])?;
    let ids = [cli, &other].map(|cli| cli.json(&["show", "two"]));
    let [here, there] = ids;
    ensure!(here?["id"] == there?["id"], "another snapshot");
    other.ok(&["verify", "--read-data"]).map(drop)
}

#[test]
fn what_is_needed_of_packs_is_repacked_in_a_directory() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    let url = |name: &str| format!("file://{}", fixture.path(name));
    repacks(&fixture, &[&url("mnt/site")], &[&url("mnt/fresh")])
}

#[test]
fn what_is_needed_of_packs_is_repacked_by_a_server() -> anyhow::Result<()> {
    let server = match &*servers::S3 {
        Ok(server) => server,
        Err(why) => {
            println!("SKIPPED what_is_needed_of_packs_is_repacked_by_a_server: {why}");
            return Ok(());
        }
    };
    let fixture = Fixture::new()?;
    let (site, fresh) = (server.place().arguments(), server.place().arguments());
    let site: Vec<&str> = site.iter().map(String::as_str).collect();
    let fresh: Vec<&str> = fresh.iter().map(String::as_str).collect();
    repacks(&fixture, &site, &fresh)
}

#[test]
fn a_damaged_pack_is_named_and_the_exit_code_says_so() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    let cli = &fixture.cli;
    commit(&fixture)?;
    let bucket = fixture.dir.path().join("mnt/bucket");
    cli.ok(&[
        "remote",
        "add",
        "site",
        &format!("file://{}", bucket.display()),
    ])?;
    cli.ok(&["remote", "init", "site"])?;
    cli.ok(&["push", "base", "site"])?;
    let pack = list(&bucket.join("packs"))?.pop().context("a pack")?;
    cli.ok(&["push", "two", "site"])?;
    cli.ok(&["remote", "rm", "site", "base"])?;
    let mut bytes = fs::read(&pack)?;
    bytes[40 << 10] ^= 1;
    fs::write(&pack, bytes)?;
    let output = cli.run(&["--json", "remote", "gc", "site"])?;
    ensure!(output.status.code() == Some(4), "{output:?}");
    let told: Value = serde_json::from_slice(&output.stdout)?;
    let found = &told["repacked"]["damaged"];
    let name = pack.file_name().context("a name")?.to_string_lossy();
    ensure!(found[0]["object"] == format!("packs/{name}"), "{told}");
    ensure!(found[0]["tags"][0] == "two", "{told}");
    ensure!(pack.exists() && told["repacked"]["packs"] == 0, "{told}");
    let said = cli.run(&["remote", "gc", "site"])?;
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    ensure!(said.contains("not repacked: packs/"), "{said}");
    // What is advised about damage mends it, and then it is repacked.
    cli.ok(&["push", "two", "site", "--replace"])?;
    cli.ok(&["remote", "gc", "site"])?;
    ensure!(!pack.exists(), "the damaged pack is there");
    cli.ok(&["remote", "verify", "site", "--read-data"])?;
    cli.fails(2, &["remote", "gc", "site", "--repack", "101"])?;
    Ok(())
}

/// What was deleted is told, and then what is wrong with that which is in the way of the rest.
#[test]
fn a_collection_that_cannot_tidy_hooks_tells_what_it_did() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    let cli = &fixture.cli;
    commit(&fixture)?;
    let bucket = fixture.dir.path().join("mnt/bucket");
    let url = format!("file://{}", bucket.display());
    cli.ok(&["remote", "add", "site", &url])?;
    cli.ok(&["remote", "init", "site"])?;
    cli.ok(&["push", "base", "site"])?;
    cli.ok(&["push", "two", "site"])?;
    fs::rename(bucket.join("hooks"), bucket.join("moved"))?;
    std::os::unix::fs::symlink("moved", bucket.join("hooks"))?;
    cli.ok(&["remote", "rm", "site", "base"])?;
    let output = cli.run(&["--json", "remote", "gc", "site"])?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(4), "{output:?}");
    let told: Value = serde_json::from_slice(&output.stdout)?;
    ensure!(told["repacked"]["packs"] == 1, "{told}");
    let deleted = told["deleted"].as_array().context("a list")?;
    ensure!(deleted.len() >= 3, "{told}");
    let why = told["hooks_not_tidied_because"].as_str();
    ensure!(why.is_some_and(|why| why.contains("hooks")), "{told}");
    ensure!(
        said.contains("hooks") && said.contains("symbolic link"),
        "{said}"
    );
    fs::remove_file(bucket.join("hooks"))?;
    fs::rename(bucket.join("moved"), bucket.join("hooks"))?;
    let told = cli.json(&["remote", "gc", "site"])?;
    ensure!(told["hooks_not_tidied_because"].is_null(), "{told}");
    ensure!(told["deleted"] == Value::Array(Vec::new()), "{told}");
    cli.ok(&["remote", "verify", "site", "--read-data"])?;
    Ok(())
}
