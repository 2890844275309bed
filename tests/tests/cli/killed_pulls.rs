//! Pulls that are killed at one of their requests, and go on where they were.

use std::net::SocketAddr;
use std::process::Stdio;
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use snapstore_store::Store;
use snapstore_tests::harness::{Cli, noise};
use snapstore_tests::object_server;
use snapstore_tests::requests::{Chances, RequestProxy};

use crate::{Fixture, PAGE};

/// More than the 32 MiB that one that is killed may lose.
const PAGES: usize = 11_000;
const LOST_AT_MOST: u64 = (32 << 20) / PAGE as u64;
/// Of a leaf.
const LEAF: u64 = 512;
const MOST_REQUESTS: u64 = 100;

/// The directory of a bucket, served as one of S3.
fn add(cli: &Cli, server: SocketAddr) -> anyhow::Result<()> {
    let endpoint = format!("http://{server}");
    let place = ["s3://snaps", "--endpoint", &endpoint, "--region", "here"];
    let begin = [
        "remote",
        "add",
        "--retry-seconds",
        "1",
        "--allow-http",
        "site",
    ];
    cli.ok(&[&begin[..], &place].concat()).map(drop)
}

/// A pull is killed at the request after so many. Whether it comes there; if not, it has ended.
fn is_killed_at(
    cli: &Cli,
    proxy: &RequestProxy,
    (at, is_done): (u64, bool),
) -> anyhow::Result<bool> {
    let told = proxy.stop_after(at, is_done);
    let mut command = cli.command(&["pull", "site/base"])?;
    let mut child = command
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let comes = loop {
        match told.recv_timeout(Duration::from_millis(10)) {
            Ok(()) => {
                child.kill()?;
                child.wait()?;
                break true;
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(error) => return Err(error.into()),
        }
        if let Some(status) = child.try_wait()? {
            ensure!(status.success(), "{status}");
            break false;
        }
    };
    proxy.go_on();
    cli.ok(&["verify", "--read-data"])
        .with_context(|| format!("killed after {at} requests"))?;
    Ok(comes)
}

#[test]
fn a_pull_that_is_killed_at_a_request_goes_on_where_it_was() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    let bytes = noise(1, PAGES * PAGE);
    fixture.commit("base", &bytes, &[])?;
    let bucket = fixture.dir.path().join("bucket");
    let url = format!("file://{}", bucket.display());
    fixture.cli.ok(&["remote", "add", "site", &url])?;
    fixture.cli.ok(&["remote", "init", "site"])?;
    fixture.cli.ok(&["push", "base", "site"])?;

    let server = object_server::serve(&bucket)?;
    let proxy = RequestProxy::start(server, Chances::default(), 0)?;
    let other = |name: &str| -> anyhow::Result<Cli> {
        let cli = Cli::new(&fixture.dir.path().join(name))
            .with_env("AWS_ACCESS_KEY_ID", "tests")
            .with_env("AWS_SECRET_ACCESS_KEY", "tests");
        cli.ok(&["init"])?;
        add(&cli, proxy.address())?;
        Ok(cli)
    };
    other("whole")?.ok(&["pull", "site/base"])?;
    let all = proxy.done().requests;
    let cli = other("killed")?;
    ensure!(all > 40, "{all} requests");

    // In the beginning, where it has brought too little to keep it, and where it has not.
    let mut rng = fastrand::Rng::with_seed(all);
    for (at, is_done) in [(0, false), (rng.u64(1..all / 2), true), (all - 4, false)] {
        ensure!(is_killed_at(&cli, &proxy, (at, is_done))?, "{at} of {all}");
        ensure!(cli.json(&["tags"])?["tags"] == serde_json::json!([]));
    }
    let pulled = cli.json(&["pull", "site/base"])?;
    let pages = pulled["pages"].as_u64().context("pages")?;
    ensure!(
        (1..=PAGES as u64 - LOST_AT_MOST + LEAF).contains(&pages),
        "{pulled}"
    );

    // All is there but the tag.
    let mut ended = 0;
    for at in 0..MOST_REQUESTS {
        let had_tag = cli.run(&["rm", "base"])?.status.success();
        ensure!(had_tag || at > 0);
        if !is_killed_at(&cli, &proxy, (at, at % 2 == 1))? {
            ended = at;
            break;
        }
    }
    ensure!(ended > 5, "a pull makes more requests than {ended}");
    let store = Store::open(cli.store())?;
    let image = store.snapshot("base")?;
    let image = image.image("memory").context("no memory")?;
    let mut read = vec![0; bytes.len()];
    image.read_at(&mut read, 0)?;
    ensure!(read == bytes, "other bytes were pulled");
    Ok(())
}
