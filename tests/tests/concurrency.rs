//! Processes that use one store at the same time, also with one of them stopped
//! at the worst moment: nothing that a commit relies on is collected.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::fs::{FlockOperation, flock};
use rustix::process::Signal;
use snapstore_store::{
    CommitRequest, ImageRole, Input, InputData, InputKind, ParentChoice, Silent, Store,
};
use snapstore_tests::crashing::{
    PAGE, assert_holds, assert_nothing_unfinished, changed, copy_tree, expect, image,
};
use snapstore_tests::harness::{Cli, skipped};
use snapstore_tests::stopping::{Running, Scene};
use tempfile::TempDir;

/// No commit of these tests has that many durable steps.
const MOST_STEPS: u32 = 40;
/// The step at which a commit of one pack has written all its chunks.
const WRITTEN: u32 = 1;
/// The step at which its pack has its final name, but is in no index.
const SEALED: u32 = 3;
/// The step at which it holds the publish lock and has not changed the index.
const PUBLISHING: u32 = 4;

/// For each step of a commit: starts it in a scene of its own, stops it there,
/// runs `meanwhile`, lets it go on, and checks that it has succeeded.
fn at_every_step(
    prepare: impl Fn() -> Result<Scene>,
    begin: impl Fn(&mut Scene, u32) -> Result<Running>,
    meanwhile: impl Fn(&mut Scene) -> Result<()>,
) -> Result<()> {
    for step in 1..MOST_STEPS {
        let mut scene = prepare()?;
        let running = begin(&mut scene, step)?;
        let stopped = running.is_stopped()?;
        let check = || {
            meanwhile(&mut scene)?;
            running.succeed()?;
            scene.finish()
        };
        check().with_context(|| format!("stopped before step {step}"))?;
        if !stopped {
            ensure!(step > PUBLISHING, "it ended before step {step}");
            return Ok(());
        }
    }
    bail!("it has no end")
}

#[test]
fn a_stopped_commit_keeps_the_pages_it_found() -> Result<()> {
    let memory = image(1, 600);
    at_every_step(
        || {
            let mut scene = Scene::new()?;
            scene.commit("old", &memory, &["--no-parent"])?;
            Ok(scene)
        },
        |scene, step| scene.begin("new", &memory, &["--no-parent"], step),
        |scene| {
            scene.remove(&["old"])?;
            for _ in 0..2 {
                scene.unless_busy(&["gc"])?;
            }
            Ok(())
        },
    )
}

#[test]
fn a_stopped_commit_keeps_its_parent() -> Result<()> {
    let memory = image(1, 600);
    let next = changed(&memory, 2, 15);
    at_every_step(
        || {
            let mut scene = Scene::new()?;
            scene.commit("base", &memory, &["--no-parent"])?;
            Ok(scene)
        },
        |scene, step| scene.begin("next", &next, &["--parent", "base"], step),
        |scene| {
            scene.remove(&["base"])?;
            for _ in 0..2 {
                scene.unless_busy(&["gc"])?;
            }
            Ok(())
        },
    )
}

/// The parent relies on packs that were condemned before its child began.
#[test]
fn a_commit_on_a_parent_in_condemned_packs_keeps_them() -> Result<()> {
    let memory = image(1, 600);
    let next = changed(&memory, 2, 15);
    at_every_step(
        || {
            let mut scene = Scene::new()?;
            scene.commit("old", &memory, &["--no-parent"])?;
            let first = scene.begin("first", &memory, &["--no-parent"], WRITTEN)?;
            ensure!(scene.remove(&["old"])?);
            let report = scene.cli.json(&["gc"])?;
            ensure!(report["waiting_packs"] == 1, "{report}");
            first.succeed()?;
            Ok(scene)
        },
        |scene, step| scene.begin("second", &next, &["--parent", "first"], step),
        |scene| {
            scene.remove(&["first"])?;
            for _ in 0..2 {
                scene.unless_busy(&["gc"])?;
            }
            Ok(())
        },
    )
}

/// The parent's pages are in the index at new places, and at the old ones, in
/// condemned packs, as deltas: those must not become bases of new deltas.
#[test]
fn no_delta_is_made_against_a_condemned_base() -> Result<()> {
    let mut scene = Scene::new()?;
    let first = image(1, 600);
    let second = changed(&first, 2, 3);
    let third = changed(&second, 3, 3);
    scene.commit("a", &first, &["--no-parent"])?;
    scene.commit("b", &second, &["--parent", "a"])?;
    let relying = scene.begin("relying", &second, &["--no-parent"], WRITTEN)?;
    ensure!(scene.remove(&["a", "b"])?);
    let report = scene.cli.json(&["gc"])?;
    ensure!(report["waiting_packs"] == 2, "{report}");
    scene.commit("copy", &second, &["--no-parent"])?;
    relying.succeed()?;
    let child = scene.begin("child", &third, &["--parent", "relying"], WRITTEN)?;
    scene.cli.ok(&["gc"])?;
    child.succeed()?;
    scene.finish()
}

/// A collection finds pages where they are, and before it condemns packs a
/// commit moves them to a pack that this collection has looked at already.
#[test]
fn a_pack_that_is_just_being_published_is_not_judged() -> Result<()> {
    let mut scene = Scene::new()?;
    let large = image(1, 600);
    let part = &large[..60 * PAGE];
    let disk = scene.file("disk", &image(2, 300))?;
    let disk = format!("root={}", disk.display());
    scene.commit("large", &large, &["--no-parent"])?;
    scene.commit("part", part, &["--no-parent", "--disk", &disk])?;
    // Keeps the pack with the leaf of `part`, but not that leaf.
    scene
        .cli
        .ok(&["commit", "disk", "--no-parent", "--disk", &disk])?;
    ensure!(scene.remove(&["large"])?);
    scene.cli.ok(&["gc"])?;
    let relying = scene.begin("relying", part, &["--no-parent"], WRITTEN)?;
    ensure!(scene.remove(&["part"])?);
    scene.cli.ok(&["gc"])?;
    relying.succeed()?;
    let moving = scene.begin("moving", part, &["--no-parent"], PUBLISHING)?;
    let collecting = Running::start(&scene.cli, &["gc"], 0)?;
    sleep(Duration::from_millis(500));
    moving.succeed()?;
    collecting.succeed()?;
    scene.cli.ok(&["verify", "--read-data"])?;
    scene.cli.ok(&["rm", "disk"])?;
    scene.finish()
}

/// After a crash in a collection a new pack must not get the number of one that
/// is still written down as condemned.
#[test]
fn a_condemned_number_is_not_used_again() -> Result<()> {
    for step in 1..MOST_STEPS {
        let mut scene = Scene::new()?;
        scene.commit("old", &image(1, 60), &[])?;
        ensure!(scene.remove(&["old"])?);
        let collected = scene
            .cli
            .clone()
            .with_env("SNAPSTORE_KILL_AT_STEP", &step.to_string())
            .run(&["gc"])?;
        // A power cut takes this file away.
        fs::remove_file(scene.cli.store().join("locks/next-pack"))?;
        let new = scene.begin("new", &image(2, 60), &[], SEALED)?;
        scene.cli.ok(&["gc"])?;
        new.succeed()?;
        scene
            .finish()
            .with_context(|| format!("the first gc was killed before step {step}"))?;
        if collected.status.success() {
            return Ok(());
        }
    }
    bail!("a collection has no end")
}

/// A store that stays open does not believe in packs that are gone.
#[test]
fn a_process_that_lives_on_sees_what_was_collected() -> Result<()> {
    let mut scene = Scene::new()?;
    let large = image(1, 600);
    let part = &large[..60 * PAGE];
    let disk = scene.file("disk", &image(2, 300))?;
    let disk = format!("root={}", disk.display());
    scene.commit("large", &large, &["--no-parent"])?;
    scene.commit("part", part, &["--no-parent", "--disk", &disk])?;
    scene
        .cli
        .ok(&["commit", "disk", "--no-parent", "--disk", &disk])?;
    let store = Store::open(scene.cli.store())?;
    for snapshot in store.snapshots()? {
        for image in &snapshot.manifest.images {
            store.image_reader(image).read_at(&mut [0; 3 * PAGE], 0)?;
        }
    }
    ensure!(scene.remove(&["large", "part"])?);
    scene.cli.ok(&["gc"])?;
    let path = scene.file("again", part)?;
    expect(&mut scene.expected, "again", &path);
    let request = CommitRequest {
        tag: "again".to_owned(),
        parent: ParentChoice::Nothing,
        inputs: vec![Input {
            name: "memory".to_owned(),
            role: ImageRole::Memory,
            data: InputData::File(path),
            kind: InputKind::Full,
        }],
        ..CommitRequest::default()
    };
    store.commit(&request, &Silent)?;
    scene.cli.ok(&["verify", "--read-data"])?;
    scene.cli.ok(&["rm", "disk"])?;
    scene.finish()
}

/// A mount, if it can be made here; unmounted when the test ends.
struct Mount {
    cli: Cli,
    dir: PathBuf,
}

impl Mount {
    fn of(cli: &Cli, tag: &str, dir: &Path) -> Result<Option<Self>> {
        if let Err(error) = fs::File::open("/dev/fuse") {
            skipped(
                "the mount beside commits and collections",
                &format!("/dev/fuse: {error}"),
            );
            return Ok(None);
        }
        fs::create_dir(dir)?;
        let shown = dir.display().to_string();
        cli.ok(&["mount", tag, &shown])?;
        Ok(Some(Self {
            cli: cli.clone(),
            dir: dir.to_owned(),
        }))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let dir = self.dir.display().to_string();
        let _ = self.cli.run(&["umount", &dir]);
    }
}

#[test]
fn commits_collections_and_a_mount_do_not_disturb_each_other() -> Result<()> {
    let mut scene = Scene::new()?;
    let base = image(1, 600);
    scene.commit("base", &base, &["--no-parent"])?;
    let dir = scene.file("unused", &[])?.with_file_name("mounted");
    let mount = Mount::of(&scene.cli, "base", &dir)?;
    // Only the mount keeps it from here on.
    ensure!(mount.is_none() || scene.remove(&["base"])?);
    for round in 0..8 {
        let names = ["a", "b"].map(|name| format!("{name}{round}"));
        let first = scene.begin(&names[0], &changed(&base, round + 10, 7), &[], 0)?;
        let second = scene.begin(&names[1], &changed(&base, round + 20, 9), &[], 0)?;
        // In turns; its time may end anywhere.
        let collect =
            [&["gc"][..], &["gc", "--optimize", "--max-seconds", "1"]][round as usize % 2];
        let collecting = Running::start(&scene.cli, collect, 0)?;
        if let (0, Some(round)) = (round % 3, round.checked_sub(1)) {
            scene.cli.ok(&["rm", &format!("a{round}")])?;
            scene.expected.remove(&format!("a{round}"));
        }
        if let Some(mount) = &mount {
            let shown = fs::read(mount.dir.join("memory.bin"))?;
            ensure!(shown == base, "the mount shows something else");
        }
        collecting.succeed()?;
        first.succeed()?;
        second.succeed()?;
        scene.holds().with_context(|| format!("round {round}"))?;
    }
    drop(mount);
    scene.finish()
}

#[test]
fn parallel_commits_share_pages() -> Result<()> {
    let mut scene = Scene::new()?;
    let base = image(1, 300);
    let mut running = Vec::new();
    for number in 0..6 {
        let memory = changed(&base, number, 50);
        running.push(scene.begin(&format!("tag{number}"), &memory, &["--no-parent"], 0)?);
    }
    running.into_iter().try_for_each(Running::succeed)?;
    scene.holds()?;
    scene.cli.ok(&["gc", "--keep-percent", "100"])?;
    let used: u64 = fs::read_dir(scene.cli.store().join("packs"))?
        .map(|entry| Ok(entry?.metadata()?.len()))
        .sum::<Result<u64>>()?;
    ensure!(used < base.len() as u64, "{used} bytes: nothing is shared");
    scene.finish()
}

#[test]
fn a_commit_may_be_stopped_at_any_moment() -> Result<()> {
    let memory = image(1, 4000);
    for round in 0..10 {
        let mut scene = Scene::new()?;
        scene.commit("old", &memory, &["--no-parent"])?;
        let new = changed(&memory, 2, 5);
        let running = scene.begin("new", &new, &["--no-parent"], 0)?;
        sleep(Duration::from_millis(round * 9));
        running.send(Signal::STOP)?;
        scene.remove(&["old"])?;
        scene.unless_busy(&["gc"])?;
        scene.unless_busy(&["gc"])?;
        running.succeed()?;
        scene.finish()?;
    }
    Ok(())
}

#[test]
fn what_a_killed_commit_held_is_freed() -> Result<()> {
    let mut scene = Scene::new()?;
    let memory = image(1, 60);
    scene.commit("old", &memory, &["--no-parent"])?;
    let running = scene.begin("new", &changed(&memory, 2, 3), &["--no-parent"], WRITTEN)?;
    scene.expected.remove("new");
    ensure!(scene.remove(&["old"])?);
    let report = scene.cli.json(&["gc"])?;
    ensure!(report["waiting_packs"] == 1, "{report}");
    let holder = format!("process {}", running.id());
    ensure!(report["waiting_for"][0] == holder.as_str(), "{report}");
    ensure!(assert_nothing_unfinished(scene.cli.store()).is_err());
    drop(running);
    let report = scene.cli.json(&["gc"])?;
    ensure!(
        report["deleted_packs"] == 1 && report["swept_packs"] == 1,
        "{report}"
    );
    assert_nothing_unfinished(scene.cli.store())?;
    ensure!(fs::read_dir(scene.cli.store().join("packs"))?.count() == 0);
    scene.finish()
}

/// Wherever an optimisation was killed, the next one ends it, within the account of both. What
/// the first one has entered is not written again.
#[test]
fn killed_optimisations_are_ended_by_the_next_one() -> Result<()> {
    let mut scene = Scene::new()?;
    let base = image(1, 150);
    // Alike, and no commit knew another one: little is left of them, which may be written twice.
    for seed in 1..=4 {
        let memory = changed(&base, seed, 1);
        scene.commit(&format!("image{seed}"), &memory, &["--no-parent"])?;
    }
    let (mut again, mut entered) = (0, 0);
    for step in 1..MOST_STEPS {
        let dir = TempDir::new()?;
        let cli = Cli::new(&dir.path().join("store"));
        copy_tree(scene.cli.store(), cli.store())?;
        let killed = (cli.clone()).with_env("SNAPSTORE_KILL_AT_STEP", &step.to_string());
        let ended = killed.run(&["gc", "--optimize", "--max-seconds", "600"])?;
        let done = ended.status.success();
        ensure!(done || ended.status.signal() == Some(9), "{ended:?}");
        let report = &cli.json(&["gc", "--optimize"])?["optimized"];
        let told = || format!("killed before step {step}: {report}");
        let count = |what: &str| report[what].as_u64().with_context(told);
        ensure!(
            report["stopped_by"].is_null() && count("left_packs")? == 0,
            told()
        );
        ensure!(
            count("rewritten_bytes")? <= 2 * count("committed_bytes")?,
            told()
        );
        assert_holds(&cli, &scene.expected).with_context(told)?;
        match count("written_bytes")? {
            0 => entered += 1,
            _ => again += 1,
        }
        ensure!(entered == 0 || count("written_bytes")? == 0, told());
        if done {
            ensure!(again > 2 && entered > 2, "{again} and {entered}");
            return Ok(());
        }
    }
    bail!("it has no end")
}

#[test]
fn a_held_publish_lock_is_waited_for() -> Result<()> {
    let mut scene = Scene::new()?;
    scene.commit("base", &image(1, 60), &[])?;
    let lock = File::options()
        .write(true)
        .open(scene.cli.store().join("locks/publish"))?;
    flock(&lock, FlockOperation::LockExclusive)?;
    let holder = format!("process {}\n", std::process::id());
    lock.write_all_at(holder.as_bytes(), 0)?;
    lock.set_len(holder.len() as u64)?;
    let said = scene
        .cli
        .fails(5, &["tag", "base", "other", "--lock-timeout", "0.2"])?;
    ensure!(said.contains(holder.trim()), "{said}");
    let waiting = scene.begin("next", &image(2, 60), &[], 0)?;
    sleep(Duration::from_millis(400));
    ensure!(!waiting.has_ended()?, "it did not wait");
    drop(lock);
    waiting.succeed()?;
    scene.finish()
}

#[test]
fn one_collection_runs_at_a_time() -> Result<()> {
    let mut scene = Scene::new()?;
    scene.commit("old", &image(1, 60), &[])?;
    ensure!(scene.remove(&["old"])?);
    let first = Running::start(&scene.cli, &["gc"], 1)?;
    ensure!(first.is_stopped()?);
    let said = scene.cli.fails(5, &["gc", "--lock-timeout", "0.2"])?;
    ensure!(said.contains(&format!("process {}", first.id())), "{said}");
    let second = Running::start(&scene.cli, &["gc"], 0)?;
    sleep(Duration::from_millis(300));
    ensure!(!second.has_ended()?, "it did not wait");
    first.succeed()?;
    second.succeed()?;
    ensure!(fs::read_dir(scene.cli.store().join("packs"))?.count() == 0);
    scene.finish()
}
