//! Machines from snapshots that stay on a server whose nodes are killed, and which hangs.

use std::process::Stdio;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use serde_json::Value;
use snapstore_guests::TABLE;
use snapstore_tests::harness::{Cli, skipped};
use snapstore_tests::proxy::{Line, Proxy};
use snapstore_tests::servers::Place;
use snapstore_tests::servers::garage::Cluster;
use snapstore_tests::vm::{Lab, eventually};

/// Less than anybody waits.
const AWAY: Duration = Duration::from_secs(2);
/// So that there is time for something to happen during a command.
const ROUND_TRIP: Duration = Duration::from_millis(10);

struct Scene {
    lab: Lab,
    cluster: Cluster,
    /// Before the node that the lab asks.
    proxy: Proxy,
}

fn add(cli: &Cli, place: &Place) -> Result<()> {
    let arguments = place.arguments();
    let arguments = arguments.iter().map(String::as_str);
    // A request may be silent for 60 seconds: a node that has just begun may take it and say nothing.
    let begin = ["remote", "add", "--retry-seconds", "150", "site"];
    cli.ok(&begin.into_iter().chain(arguments).collect::<Vec<_>>())
        .map(drop)
}

/// A lab whose store is empty, and a bucket with `base` of a `table` guest.
fn scene(test: &str) -> Result<Option<Scene>> {
    let Some(mut lab) = Lab::with_mounts(test)? else {
        return Ok(None);
    };
    let cluster = match Cluster::start() {
        Ok(cluster) => cluster,
        Err(why) => {
            skipped(test, &why);
            return Ok(None);
        }
    };
    lab.run("web", TABLE, &[])?;
    lab.wait_for_steps("web", 2)?;
    lab.commit("base", "web")?;
    lab.stop("web")?;
    let place = cluster.place(0);
    add(&lab.cli, &place)?;
    lab.cli.ok(&["remote", "init", "site"])?;
    lab.cli.ok(&["push", "base", "site"])?;
    let line = Line {
        round_trip: ROUND_TRIP,
        bytes_per_second: None,
    };
    let proxy = Proxy::start(cluster.address(0), line)?;
    lab.use_store(&lab.path("empty"))?;
    add(&lab.cli, &place.through(proxy.address()))?;
    Ok(Some(Scene {
        lab,
        cluster,
        proxy,
    }))
}

impl Scene {
    /// What the program answers, with something that happens once it has an answer of the server.
    fn disturbed(&self, arguments: &[&str], disturb: impl FnOnce() -> Result<()>) -> Result<Value> {
        let before = self.proxy.received_bytes();
        let mut command = self.lab.cli.command(&[arguments, &["--json"]].concat())?;
        let child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        eventually("the server answers", || {
            Ok((self.proxy.received_bytes() > before).then_some(()))
        })?;
        let disturbed = disturb();
        let output = child.wait_with_output()?;
        disturbed?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{arguments:?}: {said}");
        serde_json::from_slice(&output.stdout).context("its answer")
    }

    /// Nothing comes through for a while.
    fn hang(&self) -> Result<()> {
        self.proxy.hold();
        sleep(AWAY);
        self.proxy.mend();
        Ok(())
    }

    /// A node is killed, and is there again after a while.
    fn kill(&self, node: usize) -> Result<()> {
        self.cluster.kill(node).map_err(|why| anyhow!(why))?;
        sleep(AWAY);
        self.cluster.restart(node).map_err(|why| anyhow!(why))
    }

    fn goes_on(&self, vm: &str) -> Result<()> {
        let steps = self.lab.steps(vm)?.len();
        self.lab.wait_for_steps(vm, steps + 2).map(drop)
    }
}

#[test]
fn a_machine_goes_on_while_nodes_are_killed_and_the_server_hangs() -> Result<()> {
    let test = "a_machine_goes_on_while_nodes_are_killed_and_the_server_hangs";
    let Some(scene) = scene(test)? else {
        return Ok(());
    };
    let lab = &scene.lab;
    let base = lab.cli.json(&["remote", "tags", "site"])?["tags"][0]["id"].clone();
    // What is not touched is not here.
    let restore = ["restore", "site/base", "--name", "vm", "--detach"];
    let restore = [&restore[..], &["--no-fill", "--no-prefetch"]].concat();
    scene.disturbed(&restore, || scene.hang())?;
    scene.hang()?;
    scene.goes_on("vm")?;
    scene.kill(1)?;
    scene.goes_on("vm")?;
    // The one that is asked.
    let one = scene.disturbed(&["commit", "one", "--vm", "vm"], || scene.kill(0))?;
    ensure!(one["parent"] == base && one["pulled_as"] == "base", "{one}");
    scene.goes_on("vm")?;
    let pushed = scene.disturbed(&["push", "one", "site"], || scene.hang())?;
    let pages = pushed["pages"].as_u64();
    ensure!(pages.is_some_and(|pages| pages < 100), "{pushed}");
    let two = lab.commit("two", "vm")?;
    ensure!(two["parent"] == one["id"], "{two}");
    let pushed = scene.disturbed(&["push", "two", "site"], || scene.kill(2))?;
    let pages = pushed["pages"].as_u64();
    ensure!(pages.is_some_and(|pages| pages < 100), "{pushed}");
    lab.cli.ok(&["remote", "verify", "site", "--read-data"])?;
    lab.stop("vm")?;
    lab.restore("site/two", &["--name", "again"])?;
    lab.assert_goes_on("again", "two")?;
    lab.finish()
}
