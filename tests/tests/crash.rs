//! Whatever is killed, wherever it is killed, and even if the power fails with
//! it: what was acknowledged is there, and the rest is as if it had not begun.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::Output;

use anyhow::{Context as _, Result, bail, ensure};
use snapstore_store::{PageSize, Store, StoreFormat};
use snapstore_tests::crashing::{
    self, Check, Expected, PAGE, SmallDisk, assert_holds, assert_nothing_unfinished, changed,
    copy_tree, expect, image,
};
use snapstore_tests::harness::{Cli, noise, skipped};
use snapstore_tests::powercut::{self, Disk, Lost};
use tempfile::TempDir;

/// No operation has that many durable steps.
const MOST_STEPS: u32 = 60;
const SIGKILL: i32 = 9;

/// For [`Check::run_in_child`].
#[test]
fn child_check() -> Result<()> {
    crashing::child_check()
}

/// An operation on a prepared store, and what the store holds before and after.
struct Case {
    dir: TempDir,
    arguments: Vec<String>,
    check: Check,
}

impl Case {
    /// A case whose store exists and is empty.
    fn new() -> Result<Self> {
        let case = Self::without_store()?;
        case.cli().ok(&["init"])?;
        Ok(case)
    }

    fn without_store() -> Result<Self> {
        Ok(Self {
            dir: TempDir::new()?,
            arguments: Vec::new(),
            check: Check::default(),
        })
    }

    /// A case whose store has two snapshots of a chain and a third one.
    fn with_chain() -> Result<Self> {
        let mut case = Self::new()?;
        case.fill_chain()?;
        Ok(case)
    }

    fn fill_chain(&mut self) -> Result<()> {
        let case = self;
        let base = image(1, 600);
        case.commit("base", &base, &["--no-parent"])?;
        case.commit("base+1", &changed(&base, 2, 20), &["--parent", "base"])?;
        case.commit("other", &image(3, 80), &["--no-parent"])
    }

    fn cli(&self) -> Cli {
        Cli::new(&self.dir.path().join("store"))
    }

    fn file(&self, name: &str, bytes: &[u8]) -> Result<PathBuf> {
        let path = self.dir.path().join(name);
        fs::write(&path, bytes)?;
        Ok(path)
    }

    fn commit(&mut self, tag: &str, memory: &[u8], more: &[&str]) -> Result<()> {
        let path = self.file(tag, memory)?;
        let file = path.to_str().context("a path")?;
        self.cli()
            .ok(&[&["commit", tag, "--memory", file], more].concat())?;
        expect(&mut self.check.before, tag, &path);
        self.check.after = self.check.before.clone();
        Ok(())
    }

    /// The operation, which leaves what `after` makes of what was there.
    fn then(mut self, arguments: &[&str], after: impl FnOnce(&mut Expected)) -> Self {
        self.arguments = arguments.iter().map(|&it| it.to_owned()).collect();
        self.check.after = self.check.before.clone();
        after(&mut self.check.after);
        self
    }

    fn run(&self, cli: &Cli) -> Result<Output> {
        let arguments: Vec<_> = self.arguments.iter().map(String::as_str).collect();
        cli.run(&arguments)
    }

    /// Runs the operation in the store at `store`, to be killed before its step
    /// `step`. Returns whether it came to its end.
    fn run_until(&self, step: u32, store: &Path) -> Result<bool> {
        let cli = Cli::new(store).with_env("SNAPSTORE_KILL_AT_STEP", &step.to_string());
        let output = self.run(&cli)?;
        match (output.status.code(), output.status.signal()) {
            (Some(0), _) => Ok(true),
            (_, Some(SIGKILL)) => Ok(false),
            _ => bail!("{output:?}"),
        }
    }

    fn check_after(&self, done: bool, store: &Path) -> Result<()> {
        let mut check = self.check.clone();
        check.done = done;
        check.run_in_child(store)
    }
}

fn init() -> Result<Case> {
    let mut case = Case::without_store()?;
    case.check.may_be_missing = true;
    Ok(case.then(&["init"], |_| ()))
}

fn first_commit() -> Result<Case> {
    let case = Case::new()?;
    let memory = case.file("memory", &image(1, 600))?;
    let disk = case.file("disk", &image(2, 40))?;
    let state = case.file("state", &noise(3, 5000))?;
    let shown = |path: &Path| path.display().to_string();
    let disk_argument = format!("root={}", shown(&disk));
    let (memory_argument, state_argument) = (shown(&memory), shown(&state));
    let arguments = [
        &["commit", "base", "--memory", &memory_argument][..],
        &["--disk", &disk_argument, "--vmstate", &state_argument],
    ];
    Ok(case.then(&arguments.concat(), |after| {
        expect(after, "base", &memory);
        let images = after.entry("base".to_owned()).or_default();
        images.insert("root".to_owned(), disk);
        images.insert("vmstate".to_owned(), state);
    }))
}

fn diff_commit() -> Result<Case> {
    let case = Case::with_chain()?;
    let mut memory = fs::read(case.dir.path().join("base+1"))?;
    let diff = case.dir.path().join("diff");
    let file = File::create(&diff)?;
    file.set_len(memory.len() as u64)?;
    for page in [3, 5, 170, 555] {
        let bytes = noise(page as u64, PAGE);
        file.write_all_at(&bytes, (page * PAGE) as u64)?;
        memory[page * PAGE..][..PAGE].copy_from_slice(&bytes);
    }
    let whole = case.file("base+2", &memory)?;
    let diff = diff.display().to_string();
    let arguments = [
        "commit", "base+2", "--diff", "--parent", "base+1", "--memory", &diff,
    ];
    Ok(case.then(&arguments, |after| expect(after, "base+2", &whole)))
}

fn replacing_commit() -> Result<Case> {
    let case = Case::with_chain()?;
    let base = fs::read(case.dir.path().join("base"))?;
    let new = case.file("new", &changed(&base, 5, 9))?;
    let shown = new.display().to_string();
    let arguments = ["commit", "base+1", "--replace", "--memory", &shown];
    Ok(case.then(&arguments, |after| expect(after, "base+1", &new)))
}

fn tag() -> Result<Case> {
    let case = Case::with_chain()?;
    let base = case.dir.path().join("base");
    Ok(case.then(&["tag", "base", "release"], |after| {
        expect(after, "release", &base);
    }))
}

fn replacing_tag() -> Result<Case> {
    let case = Case::with_chain()?;
    let base = case.dir.path().join("base");
    let arguments = ["tag", "base", "other", "--replace"];
    Ok(case.then(&arguments, |after| expect(after, "other", &base)))
}

fn rm() -> Result<Case> {
    Ok(Case::with_chain()?.then(&["rm", "other", "base"], |after| {
        after.remove("other");
        after.remove("base");
    }))
}

/// All of what `other` needed goes.
fn deleting_gc() -> Result<Case> {
    let mut case = Case::with_chain()?;
    case.cli().ok(&["rm", "other"])?;
    case.check.before.remove("other");
    let plan = case.cli().ok(&["gc", "--dry-run"])?;
    ensure!(plan.contains("delete") && !plan.contains("repack"), plan);
    Ok(case.then(&["gc"], |_| ()))
}

/// Of what `large` needed, a few pages stay, some of them as bases of deltas.
fn repacking_gc() -> Result<Case> {
    let mut case = Case::new()?;
    let large = image(1, 600);
    case.commit("large", &large, &["--no-parent"])?;
    case.commit(
        "part",
        &changed(&large[..60 * PAGE], 4, 3),
        &["--parent", "large"],
    )?;
    case.cli().ok(&["rm", "large"])?;
    case.check.before.remove("large");
    let plan = case.cli().ok(&["gc", "--dry-run"])?;
    ensure!(plan.contains("repack"), plan);
    Ok(case.then(&["gc"], |_| ()))
}

fn repair() -> Result<Case> {
    let mut case = Case::with_chain()?;
    fs::remove_dir_all(case.cli().store().join("index"))?;
    case.check.may_need_repair = true;
    Ok(case.then(&["repair"], |_| ()))
}

/// From a store of format 1, with deltas of nodes as the first programs made them.
fn upgrade() -> Result<Case> {
    let mut case = Case::without_store()?;
    Store::create_in_format(case.cli().store(), PageSize::KIB_4, StoreFormat::One)?;
    case.fill_chain()?;
    Ok(case.then(&["upgrade"], |_| ()))
}

/// A repair of a store that needs none must not harm it either.
fn needless_repair() -> Result<Case> {
    let mut case = Case::with_chain()?;
    case.check.may_need_repair = true;
    Ok(case.then(&["repair"], |_| ()))
}

/// Kills the operation before each of its steps, on a copy of the store each
/// time.
fn kill_everywhere(case: &Case) -> Result<()> {
    for step in 1..MOST_STEPS {
        let dir = TempDir::new()?;
        let store = dir.path().join("store");
        if case.cli().store().exists() {
            copy_tree(case.cli().store(), &store)?;
        }
        let done = case.run_until(step, &store)?;
        case.check_after(done, &store)
            .with_context(|| format!("killed before step {step}"))?;
        if done {
            ensure!(step > 1, "it has no steps to be killed at");
            return Ok(());
        }
    }
    bail!("it has no end")
}

/// Wherever an upgrade was killed, another one goes on, and is killed in its turn.
#[test]
fn killed_upgrades_are_resumed() -> Result<()> {
    let case = upgrade()?;
    for step in 1..MOST_STEPS {
        let dir = TempDir::new()?;
        let store = dir.path().join("store");
        copy_tree(case.cli().store(), &store)?;
        let mut kills = 0;
        // A little further each time: what is done is not done again.
        while !case.run_until(step + kills, &store)? {
            kills += 1;
            ensure!(kills < MOST_STEPS, "it has no end");
            assert_holds(&Cli::new(&store), &case.check.before)
                .with_context(|| format!("killed {kills} times, from step {step} on"))?;
        }
        let upgraded = Store::open(&store)?;
        ensure!(upgraded.format() == StoreFormat::Two && !upgraded.is_upgrading());
        case.check_after(true, &store)?;
        if kills == 0 {
            ensure!(step > 10, "it has but {step} steps to be killed at");
            return Ok(());
        }
    }
    bail!("it has no end")
}

/// The same, and with the process the power fails.
fn cut_everywhere(name: &str, case: &Case) -> Result<()> {
    if let Some(reason) = powercut::unavailable() {
        skipped(name, &reason);
        return Ok(());
    }
    let dir = TempDir::new()?;
    let prepared = Disk::new();
    if case.cli().store().exists() {
        let mounted = prepared.mount(dir.path())?;
        copy_tree(case.cli().store(), &mounted.path().join("store"))?;
        File::open(mounted.path())?.sync_all()?;
    }
    for step in 1..MOST_STEPS {
        let disk = prepared.after_power_cut(Lost::All);
        let mounted = disk.mount(dir.path())?;
        let done = case.run_until(step, &mounted.path().join("store"))?;
        drop(mounted);
        let check = |left: Disk, how: &str| {
            let mounted = left.mount(dir.path())?;
            case.check_after(done, &mounted.path().join("store"))
                .with_context(|| format!("{name}: ended before step {step}, {how}"))
        };
        check(disk.after_power_cut(Lost::All), "all lost")?;
        check(disk.after_power_cut(Lost::DataOnly), "data lost")?;
        // The power may also fail later, when others have built on what the
        // killed process left without syncing it.
        let mounted = disk.mount(dir.path())?;
        let others = Cli::new(&mounted.path().join("store"));
        if case.check.may_need_repair {
            others.ok(&["repair"])?;
        }
        let collected = others.run(&["gc"])?;
        ensure!(collected.status.success() || case.check.may_be_missing);
        drop(mounted);
        check(disk.after_power_cut(Lost::All), "all lost after a gc")?;
        if done {
            return Ok(());
        }
    }
    bail!("it has no end")
}

/// What the program acknowledges is there, however soon the power fails, and
/// however new the directories around the store are.
#[test]
fn an_acknowledged_commit_survives_a_power_cut_at_once() -> Result<()> {
    if let Some(reason) = powercut::unavailable() {
        skipped("an_acknowledged_commit_survives", &reason);
        return Ok(());
    }
    let mut case = Case::without_store()?;
    let memory = case.file("memory", &image(1, 600))?;
    expect(&mut case.check.after, "base", &memory);
    let dir = TempDir::new()?;
    let store = dir.path().join("new/directories/store");
    let disk = Disk::new();
    let mounted = disk.mount(dir.path())?;
    let cli = Cli::new(&store);
    cli.ok(&["init"])?;
    let memory = memory.to_str().context("a path")?;
    cli.ok(&["commit", "base", "--memory", memory])?;
    drop(mounted);
    for lost in [Lost::All, Lost::DataOnly] {
        let _mounted = disk.after_power_cut(lost).mount(dir.path())?;
        case.check_after(true, &store)
            .with_context(|| format!("{lost:?}"))?;
    }
    Ok(())
}

/// A pack whose name is not durable yet must not get into a new index: after a
/// power cut commits would rely on what is not there.
#[test]
fn repair_relies_on_nothing_that_a_power_cut_takes_away() -> Result<()> {
    if let Some(reason) = powercut::unavailable() {
        skipped("repair_relies_on_nothing", &reason);
        return Ok(());
    }
    let case = Case::without_store()?;
    let memory = case.file("memory", &image(1, 100))?;
    let memory = memory.to_str().context("a path")?;
    for step in 1..MOST_STEPS {
        let dir = TempDir::new()?;
        let store = dir.path().join("store");
        let disk = Disk::new();
        let mounted = disk.mount(dir.path())?;
        let cli = Cli::new(&store);
        cli.ok(&["init"])?;
        let killed = cli
            .clone()
            .with_env("SNAPSTORE_KILL_AT_STEP", &step.to_string())
            .run(&["commit", "base", "--memory", memory])?;
        cli.ok(&["repair"])?;
        drop(mounted);
        let _mounted = disk.after_power_cut(Lost::All).mount(dir.path())?;
        cli.ok(&["commit", "again", "--no-parent", "--memory", memory])?;
        cli.ok(&["verify", "--read-data"])
            .with_context(|| format!("killed before step {step}"))?;
        if killed.status.success() {
            return Ok(());
        }
    }
    bail!("a commit has no end")
}

/// Wherever a commit runs out of space, it says so, and leaves the space and
/// the store as they were.
#[test]
fn a_full_disk_fails_the_commit_and_nothing_else() -> Result<()> {
    let disk = match SmallDisk::mount(8 << 20) {
        Ok(disk) => disk,
        Err(error) => {
            skipped("a_full_disk", &format!("cannot mount a tmpfs: {error}"));
            return Ok(());
        }
    };
    let cli = Cli::new(&disk.path().join("store"));
    cli.ok(&["init"])?;
    let case = Case::without_store()?;
    let mut expected = Expected::new();
    let base = case.file("base", &image(1, 200))?;
    let next = case.file("next", &image(2, 60))?;
    expect(&mut expected, "base", &base);
    let next_argument = next.display().to_string();
    cli.ok(&["commit", "base", "--memory", &base.display().to_string()])?;
    let mut failures = 0;
    for free in (0..4 << 20).step_by(4 << 10) {
        disk.leave_free(free)?;
        let output = cli.run(&["commit", "next", "--memory", &next_argument])?;
        if output.status.success() {
            break;
        }
        failures += 1;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(1), "{said}");
        ensure!(said.contains("No space left on device"), "{said}");
        assert_holds(&cli, &expected).with_context(|| format!("{free} bytes were free"))?;
        assert_nothing_unfinished(cli.store())?;
        // Once the index leads to a pack, it is a collection that removes it.
        if said.contains("/tags/") {
            cli.ok(&["gc"])?;
        }
        let packs = fs::read_dir(cli.store().join("packs"))?.count();
        ensure!(packs == 1, "{packs} packs with {free} bytes free: {said}");
    }
    ensure!(failures > 20, "only {failures} commits failed");
    expect(&mut expected, "next", &next);
    assert_holds(&cli, &expected)?;
    fs::remove_file(disk.path().join("ballast"))?;
    Check::holds(&expected).run(cli.store())
}

macro_rules! crashes {
    ($($operation:ident)*) => {
        mod killed {
            $(#[test]
            fn $operation() -> anyhow::Result<()> {
                super::kill_everywhere(&super::$operation()?)
            })*
        }
        mod power_cut {
            $(#[test]
            fn $operation() -> anyhow::Result<()> {
                let name = concat!("power_cut::", stringify!($operation));
                super::cut_everywhere(name, &super::$operation()?)
            })*
        }
    };
}

crashes! {
    init first_commit diff_commit replacing_commit tag replacing_tag rm deleting_gc
    repacking_gc repair needless_repair upgrade
}
