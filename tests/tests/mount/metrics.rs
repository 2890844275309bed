//! What mounts tell of themselves.

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use rustix::fs::{Advice, fadvise};
use rustix::mount::{UnmountFlags, mount_bind, unmount};
use serde_json::Value;
use snapstore_tests::harness::{copy_program, noise, program, skipped};

use crate::hung::Standing;
use crate::{Fixture, PAGE};

/// So many that some of a working set are left out, whichever these are: one in 64 is.
const PAGES: usize = 1024;

/// A store of one snapshot, without machines of anybody else.
fn with_image(test: &str) -> anyhow::Result<Option<Fixture>> {
    let Some(mut fixture) = Fixture::new(test)? else {
        return Ok(None);
    };
    let runtime = fixture.path("run").display().to_string();
    fixture.cli = fixture
        .cli
        .clone()
        .with_env("SNAPSTORE_RUNTIME_DIR", &runtime);
    fixture.commit("base", &noise(1, PAGES * PAGE), &[])?;
    Ok(Some(fixture))
}

/// The numbers of this name whose labels include these.
fn numbers(page: &Value, name: &str, labels: &[(&str, &str)]) -> Vec<f64> {
    let families = page["metrics"].as_array().into_iter().flatten();
    let samples = families.flat_map(|family| family["samples"].as_array().into_iter().flatten());
    let wanted = samples.filter(|sample| {
        sample["name"] == name
            && labels
                .iter()
                .all(|(key, value)| sample["labels"][key] == *value)
    });
    wanted
        .filter_map(|sample| sample["value"].as_f64())
        .collect()
}

/// The number of this name that a mount has.
fn of(page: &Value, name: &str, dir: &Path) -> anyhow::Result<f64> {
    let dir = dir.display().to_string();
    match numbers(page, name, &[("mount", &dir)])[..] {
        [one] => Ok(one),
        ref other => bail!("{name} of {dir}: {other:?}"),
    }
}

fn metrics(fixture: &Fixture) -> anyhow::Result<Value> {
    fixture.cli.json(&["metrics"])
}

/// Waits until it is so, for a minute at most.
fn until(what: &str, mut is_so: impl FnMut() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !is_so()? {
        ensure!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

#[test]
fn what_is_read_is_counted() -> anyhow::Result<()> {
    let Some(mut fixture) = with_image("what_is_read_is_counted")? else {
        return Ok(());
    };
    let (dir, _) = fixture.mount(Some("base"), "mnt \"one\"\\")?;
    let before = metrics(&fixture)?;
    ensure!(of(&before, "snapstore_mount_up", &dir)? == 1.0);
    ensure!(of(&before, "snapstore_mount_read_bytes_total", &dir)? == 0.0);
    let file = File::open(dir.join("memory.bin"))?;
    fadvise(&file, 0, None, Advice::Random)?;
    let mut page = vec![0; PAGE];
    for number in 0..100 {
        file.read_exact_at(&mut page, (2 * number * PAGE) as u64)?;
    }
    let after = metrics(&fixture)?;
    let told = |name: &str| of(&after, &format!("snapstore_mount_{name}"), &dir);
    let count = told("read_duration_seconds_count")?;
    ensure!(count >= 100.0, "{count}");
    ensure!(told("read_bytes_total")? >= (100 * PAGE) as f64);
    ensure!(told("read_errors_total")? == 0.0 && told("damaged_reads_total")? == 0.0);
    ensure!(told("read_duration_seconds_sum")? > 0.0);
    // Each class holds those below it, and the last one all.
    let dir_text = dir.display().to_string();
    let bucket = "snapstore_mount_read_duration_seconds_bucket";
    let classes = numbers(&after, bucket, &[("mount", &dir_text)]);
    ensure!(
        classes.is_sorted() && classes.last() == Some(&count),
        "{classes:?}"
    );
    // What is not written to tells nothing of writing.
    ensure!(numbers(&after, "snapstore_mount_overlay_bytes", &[]).is_empty());
    ensure!(numbers(&after, "snapstore_mount_writes_total", &[]).is_empty());
    ensure!(numbers(&after, "snapstore_mount_up", &[("mode", "ro")]) == [1.0]);
    ensure!(numbers(&after, "snapstore_store_leases", &[("kind", "viewer")]) == [1.0]);
    ensure!(numbers(&after, "snapstore_store_tags", &[]) == [1.0]);
    // As text, with the name as it has to be written there.
    let text = fixture.cli.ok(&["metrics"])?;
    let line = "mnt \\\"one\\\"\\\\\",mode=\"ro\"} 1\n";
    ensure!(text.contains(line), "{text}");

    // The same server, seen in two places, is told once.
    let other = fixture.mountpoint("bound")?;
    mount_bind(&dir, &other)?;
    let both = metrics(&fixture);
    unmount(&other, UnmountFlags::DETACH)?;
    ensure!(numbers(&both?, "snapstore_mount_up", &[]) == [1.0]);
    Ok(())
}

#[test]
fn a_server_that_hangs_is_told_as_down() -> anyhow::Result<()> {
    let Some(mut fixture) = with_image("a_server_that_hangs_is_told_as_down")? else {
        return Ok(());
    };
    let (hung, pid) = fixture.mount(Some("base"), "hung")?;
    let (dead, killed) = fixture.mount(Some("base"), "dead")?;
    let (lives, _) = fixture.mount(None, "lives")?;
    crate::lifecycle::kill(killed)?;
    let standing = Standing::new(pid)?;
    let command = fixture.cli.command(&["metrics", "--json"])?;
    let output = Command::new("timeout")
        .args(["-s", "KILL", "60"])
        .arg(command.get_program())
        .args(command.get_args())
        .envs(
            command
                .get_envs()
                .filter_map(|(name, value)| Some((name, value?))),
        )
        .output()?;
    ensure!(output.status.success(), "{output:?}");
    let page: Value = serde_json::from_slice(&output.stdout)?;
    ensure!(of(&page, "snapstore_mount_up", &hung)? == 0.0);
    ensure!(of(&page, "snapstore_mount_up", &dead)? == 0.0);
    ensure!(of(&page, "snapstore_mount_up", &lives)? == 1.0);
    ensure!(of(&page, "snapstore_mount_read_bytes_total", &hung).is_err());
    standing.go_on()?;
    until("it answers again", || {
        Ok(of(&metrics(&fixture)?, "snapstore_mount_up", &hung)? == 1.0)
    })
}

#[test]
fn reads_that_meet_damage_are_counted() -> anyhow::Result<()> {
    let Some(mut fixture) = with_image("reads_that_meet_damage_are_counted")? else {
        return Ok(());
    };
    let (dir, _) = fixture.mount(Some("base"), "mnt")?;
    for entry in fs::read_dir(fixture.cli.store().join("packs"))? {
        let file = OpenOptions::new().write(true).open(entry?.path())?;
        // Pages are from the beginning on; what leads to them comes after.
        for at in (PAGE..PAGES * PAGE / 2).step_by(PAGE / 2) {
            file.write_all_at(&[0x55; 64], at as u64)?;
        }
    }
    let read = fs::read(dir.join("memory.bin"));
    ensure!(read.is_err(), "damage was served");
    let page = metrics(&fixture)?;
    ensure!(of(&page, "snapstore_mount_damaged_reads_total", &dir)? >= 1.0);
    ensure!(of(&page, "snapstore_mount_read_errors_total", &dir)? >= 1.0);
    Ok(())
}

#[test]
fn what_is_written_is_counted() -> anyhow::Result<()> {
    let Some(mut fixture) = with_image("what_is_written_is_counted")? else {
        return Ok(());
    };
    let dir = fixture.mountpoint("mnt")?;
    let overlays = fixture.path("overlays").display().to_string();
    fs::create_dir(&overlays)?;
    let shown = dir.display().to_string();
    let arguments = ["mount", "--rw", "base", &shown, "--overlay-dir", &overlays];
    fixture.cli.ok(&arguments)?;
    let mut file = OpenOptions::new()
        .write(true)
        .open(dir.join("memory.bin"))?;
    file.write_all(&noise(2, 3 * PAGE))?;
    file.sync_all()?;
    let page = metrics(&fixture)?;
    ensure!(of(&page, "snapstore_mount_written_bytes_total", &dir)? == (3 * PAGE) as f64);
    ensure!(of(&page, "snapstore_mount_writes_total", &dir)? >= 1.0);
    ensure!(of(&page, "snapstore_mount_write_errors_total", &dir)? == 0.0);
    ensure!(numbers(&page, "snapstore_mount_up", &[("mode", "rw")]) == [1.0]);
    drop(file);
    fixture.umount(&dir)
}

/// The limit is each clone's: what counts is the one that has written most.
#[test]
fn an_overlay_that_is_nearly_full_is_told() -> anyhow::Result<()> {
    const LIMIT_PAGES: usize = 16;
    let Some(mut fixture) = with_image("an_overlay_that_is_nearly_full_is_told")? else {
        return Ok(());
    };
    let dir = fixture.mountpoint("mnt")?;
    let overlays = fixture.path("overlays").display().to_string();
    fs::create_dir(&overlays)?;
    let (shown, limit) = (dir.display().to_string(), LIMIT_PAGES * PAGE);
    let limit = limit.to_string();
    let options = [
        "-n",
        "2",
        "--overlay-dir",
        &overlays,
        "--overlay-limit",
        &limit,
    ];
    let mount = [&["mount", "--rw", "base", &shown][..], &options].concat();
    fixture.cli.ok(&mount)?;
    let write = |clone: &str, pages: usize| -> anyhow::Result<()> {
        let path = dir.join(clone).join("memory.bin");
        let mut file = OpenOptions::new().write(true).open(path)?;
        file.write_all(&noise(2, pages * PAGE))?;
        Ok(file.sync_all()?)
    };
    let top = || fixture.cli.ok(&["top", "--once", "--interval", "0.1"]);
    let show = || fixture.cli.ok(&["show", "--mount", &shown]);
    let told = |name: &str| {
        let page = metrics(&fixture)?;
        of(&page, &format!("snapstore_mount_overlay_{name}"), &dir)
    };
    ensure!(told("bytes")? == 0.0 && told("fill_ratio")? == 0.0);
    ensure!(told("limit_bytes")? == (LIMIT_PAGES * PAGE) as f64);
    write("0", 8)?;
    write("1", 12)?;
    ensure!(told("bytes")? == (20 * PAGE) as f64);
    ensure!(told("fill_ratio")? == 0.75);
    for said in [top()?, show()?] {
        ensure!(said.contains("75 %") && !said.contains("Warning"), "{said}");
    }
    write("1", 15)?;
    ensure!(told("fill_ratio")? == 15.0 / 16.0);
    for said in [top()?, show()?] {
        ensure!(said.contains("94 %") && said.contains("Warning"), "{said}");
    }
    // A mount to be read has none, and one without a limit is not full.
    fixture.umount(&dir)?;
    let mount = ["mount", "--rw", "base", &shown, "--overlay-dir", &overlays];
    fixture.cli.ok(&mount)?;
    ensure!(told("bytes")? == 0.0 && told("fill_ratio").is_err());
    fixture.umount(&dir)
}

#[test]
fn what_is_pushed_is_counted() -> anyhow::Result<()> {
    let Some(mut fixture) = with_image("what_is_pushed_is_counted")? else {
        return Ok(());
    };
    let touch = |dir: &Path| -> anyhow::Result<File> {
        let file = File::open(dir.join("memory.bin"))?;
        fadvise(&file, 0, None, Advice::Random)?;
        let mut page = vec![0; PAGE];
        for number in (0..PAGES).rev() {
            file.read_exact_at(&mut page, (number * PAGE) as u64)?;
        }
        Ok(file)
    };
    let (first, _) = fixture.mount(Some("base"), "first")?;
    drop(touch(&first)?);
    let page = metrics(&fixture)?;
    let missed = of(&page, "snapstore_mount_prefetch_missed_pages_total", &first)?;
    ensure!(missed == PAGES as f64, "{missed}: nothing was known before");
    ensure!(of(&page, "snapstore_mount_prefetch_pushed_pages_total", &first)? == 0.0);
    fixture.umount(&first)?;
    let sets = fixture.cli.store().join("working-sets");
    until("what was touched is written", || {
        Ok(sets.is_dir() && fs::read_dir(&sets)?.next().is_some())
    })?;

    let (second, _) = fixture.mount(Some("base"), "second")?;
    let file = File::open(second.join("memory.bin"))?;
    let told = |name: &str| {
        of(
            &metrics(&fixture)?,
            &format!("snapstore_mount_prefetch_{name}"),
            &second,
        )
    };
    until("all is pushed", || {
        let known = told("pushed_pages_total")? + told("sampled_pages_total")?;
        Ok(known == PAGES as f64)
    })?;
    ensure!(told("sampled_hits_total")? == 0.0);
    drop(file);
    drop(touch(&second)?);
    let (sampled, hits) = (told("sampled_pages_total")?, told("sampled_hits_total")?);
    ensure!(sampled > 0.0 && hits == sampled, "{hits} of {sampled}");
    ensure!(told("missed_pages_total")? == 0.0);
    Ok(())
}

/// Others may read the mount, and not what its server has counted.
#[test]
fn another_user_is_told_nothing() -> anyhow::Result<()> {
    let test = "another_user_is_told_nothing";
    let Some(mut fixture) = with_image(test)? else {
        return Ok(());
    };
    if !rustix::process::geteuid().is_root() {
        skipped(test, "only root can be another user");
        return Ok(());
    }
    let open = |path: &Path| fs::set_permissions(path, fs::Permissions::from_mode(0o755));
    open(fixture.dir.path())?;
    let copy = fixture.path("snapstore");
    copy_program(&program()?, copy.as_ref())?;
    open(&copy)?;
    let dir = fixture.mountpoint("mnt")?;
    let shown = dir.display().to_string();
    fixture
        .cli
        .ok(&["mount", "base", &shown, "--allow-other"])?;
    let ask = |user: &str| {
        let setpriv = ["--reuid", user, "--regid", user, "--clear-groups"];
        let mut command = Command::new("setpriv");
        command.args(setpriv).arg(&copy);
        command.args(["look-at-mount", "counters", &shown]);
        command.output().context("setpriv")
    };
    let own = ask("0")?;
    ensure!(
        own.status.success() && own.stdout.starts_with(b"{"),
        "{own:?}"
    );
    let others = ask("65534")?;
    let said = String::from_utf8_lossy(&others.stderr);
    ensure!(
        !others.status.success() && others.stdout.is_empty(),
        "{others:?}"
    );
    ensure!(said.contains("Permission denied"), "{said}");
    // Which is not for want of the mount.
    let mut cat = Command::new("setpriv");
    cat.args([
        "--reuid",
        "65534",
        "--regid",
        "65534",
        "--clear-groups",
        "cat",
    ]);
    let read = cat.arg(dir.join("memory.bin")).output()?;
    ensure!(read.stdout.len() == PAGES * PAGE, "{read:?}");
    Ok(())
}

#[test]
fn top_tells_what_happens_between_two_looks() -> anyhow::Result<()> {
    let test = "top_tells_what_happens_between_two_looks";
    let Some(mut fixture) = with_image(test)? else {
        return Ok(());
    };
    let (dir, _) = fixture.mount(Some("base"), "mnt")?;
    let file = File::open(dir.join("memory.bin"))?;
    fadvise(&file, 0, None, Advice::Random)?;
    let top = |options: &[&str]| -> anyhow::Result<String> {
        let arguments = [&["top", "--once", "--interval", "0.5"], options].concat();
        let mut command = fixture.cli.command(&arguments)?;
        let mut child = command.stdout(std::process::Stdio::piped()).spawn()?;
        let mut page = vec![0; PAGE];
        let mut number = 0;
        // Somebody reads all the time, what the kernel does not have.
        while child.try_wait()?.is_none() {
            number = (number + 1) % PAGES;
            file.read_exact_at(&mut page, (number * PAGE) as u64)?;
            fadvise(&file, 0, None, Advice::DontNeed)?;
        }
        let output = child.wait_with_output()?;
        ensure!(output.status.success(), "{output:?}");
        Ok(String::from_utf8(output.stdout)?)
    };
    let value: Value = serde_json::from_str(&top(&["--json"])?)?;
    let mount = &value["mounts"][0];
    ensure!(mount["mount"] == dir.display().to_string() && mount["up"] == true);
    let number = |name: &str| mount[name].as_f64().context("a number");
    let faults = number("faults_per_second")?;
    ensure!(faults > 0.0, "{value}");
    let bytes = number("read_bytes_per_second")?;
    ensure!((bytes / faults - PAGE as f64).abs() < 1.0, "{value}");
    ensure!(number("mean_latency_seconds")? > 0.0);
    ensure!(mount["written_bytes_per_second"] == 0.0 && mount["damaged_reads"] == 0);
    // The same for people, without a terminal once.
    let text = top(&[])?;
    ensure!(
        text.contains("FAULTS/S") && text.contains("No machine runs."),
        "{text}"
    );
    ensure!(!text.contains('\x1b'), "{text}");
    Ok(())
}
