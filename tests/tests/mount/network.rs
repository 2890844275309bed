//! Mounts of snapshots that stay in a bucket over the network: moto's S3, Azurite, and Garage.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use rustix::fs::SeekFrom;
use serde_json::Value;
use snapstore_tests::harness::{Cli, noise, skipped};
use snapstore_tests::proxy::{Line, Proxy};
use snapstore_tests::requests::{Chances, RequestProxy};
use snapstore_tests::servers::garage::GARAGE;
use snapstore_tests::servers::{AZURE, Found, Place, S3};

use crate::lifecycle::{kill, wait_for_end};
use crate::remote::{PAGES, commit_base, expect_page, longest, read_page};
use crate::{Fixture, PAGE};

/// A bucket with `base`; the way there of the fixture's own store, which has nothing, leads
/// through a proxy.
struct Scene {
    fixture: Fixture,
    there: Cli,
    proxy: Proxy,
    /// The way there, without a key.
    place: Place,
}

fn add(cli: &Cli, place: &Place, key: Option<&Path>) -> anyhow::Result<()> {
    let mut arguments = place.arguments();
    if let Some(key) = key {
        arguments.extend(["--key".to_owned(), key.display().to_string()]);
    }
    let arguments = arguments.iter().map(String::as_str);
    let begin = ["remote", "add", "--retry-seconds", "2", "site"];
    cli.ok(&begin.into_iter().chain(arguments).collect::<Vec<_>>())?;
    Ok(())
}

fn scene(test: &str, server: &Found, is_encrypted: bool) -> anyhow::Result<Option<Scene>> {
    let server = match server {
        Ok(server) => server,
        Err(why) => {
            skipped(test, why);
            return Ok(None);
        }
    };
    let Some(fixture) = Fixture::new(test)? else {
        return Ok(None);
    };
    let (there, place) = (commit_base(&fixture)?, server.place());
    let key = is_encrypted.then(|| fixture.path("key"));
    if let Some(key) = &key {
        there.ok(&["remote", "key", &key.display().to_string()])?;
    }
    add(&there, &place, key.as_deref())?;
    there.ok(&["remote", "init", "site"])?;
    there.ok(&["push", "base", "site"])?;
    let proxy = Proxy::start(server.address(), Line::default())?;
    let place = place.through(proxy.address());
    add(&fixture.cli, &place, key.as_deref())?;
    Ok(Some(Scene {
        fixture,
        there,
        proxy,
        place,
    }))
}

impl Scene {
    /// What the server of a mount has asked for, by why.
    fn asked(&self, dir: &Path) -> anyhow::Result<BTreeMap<String, Value>> {
        let shown = dir.display().to_string();
        let answer = self.fixture.cli.json(&["show", "--mount", &shown])?;
        let all = answer["counters"]["elsewhere"].as_array();
        let named = all.context("counters")?.iter().map(|one| {
            let cause = one["cause"].as_str().unwrap_or_default();
            (cause.to_owned(), one.clone())
        });
        Ok(named.collect())
    }

    fn leases(&self) -> anyhow::Result<usize> {
        let answer = self.there.json(&["remote", "leases", "site"])?;
        Ok(answer["leases"].as_array().context("leases")?.len())
    }
}

fn expect_eio(file: &File, number: usize) -> anyhow::Result<()> {
    let error = read_page(file, number).expect_err("nobody answers");
    ensure!(error.raw_os_error() == Some(libc::EIO), "{error}");
    Ok(())
}

fn is_filtered(pid: u32) -> anyhow::Result<bool> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    Ok(status.lines().any(|line| line == "Seccomp:\t2"))
}

/// Runs over each server.
macro_rules! over_each_server {
    ($is_encrypted:literal: $($name:ident)*) => {$(
        mod $name {
            use super::*;

            fn over(name: &str, server: &Found) -> anyhow::Result<()> {
                let test = format!("{} over {name}", stringify!($name));
                scene(&test, server, $is_encrypted)?.map_or(Ok(()), super::bodies::$name)
            }

            #[test]
            fn over_s3() -> anyhow::Result<()> {
                over("S3", &S3)
            }

            #[test]
            fn over_azure() -> anyhow::Result<()> {
                over("Azure", &AZURE)
            }

            #[test]
            fn over_garage() -> anyhow::Result<()> {
                over("Garage", &GARAGE)
            }
        }
    )*};
}

/// Every fourth meets with something.
#[test]
fn what_is_read_is_right_whatever_happens_to_requests() -> anyhow::Result<()> {
    let test = "what_is_read_is_right_whatever_happens_to_requests";
    let Some(mut scene) = scene(test, &S3, false)? else {
        return Ok(());
    };
    let chances = Chances {
        dropped: 40,
        doubled: 100,
        cut_short: 60,
        overtaken: 50,
    };
    let proxy = RequestProxy::start(scene.proxy.address(), chances, 1)?;
    let place = scene.place.through(proxy.address());
    add(&scene.fixture.cli, &place, None)?;
    let memory = noise(1, PAGES * PAGE);
    // A command that has no answer within its time is run again, and does no harm until then.
    let until_done = |cli: &Cli, arguments: &[&str]| -> anyhow::Result<usize> {
        for tries in 0..100 {
            let output = cli.run(arguments)?;
            match output.status.code() {
                Some(0) => return Ok(tries),
                Some(6) => cli.ok(&["verify", "--read-data"])?,
                // A lease whose end was lost stays until a collection gives it up.
                Some(5) if arguments.contains(&"gc") => return Ok(tries),
                _ => anyhow::bail!("{arguments:?}: {output:?}"),
            };
        }
        anyhow::bail!("{arguments:?} is never done")
    };
    let mut unanswered = 0;
    for (round, name) in ["one", "two"].into_iter().enumerate() {
        let dir = scene.fixture.mountpoint(&format!("mount-{name}"))?;
        let shown = dir.display().to_string();
        let mount = ["mount", "--cache-limit", "0", "site/base", &shown];
        unanswered += until_done(&scene.fixture.cli, &mount)?;
        let read = fs::read(dir.join("memory.bin"))?;
        ensure!(read == memory, "other bytes are shown");
        scene.fixture.umount(&dir)?;

        let cli = Cli::new(&scene.fixture.path(&format!("store-{name}")));
        cli.ok(&["init"])?;
        let begin = ["remote", "add", "--retry-seconds", "0", "site"];
        let arguments = place.arguments();
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        cli.ok(&[&begin[..], &arguments].concat())?;
        unanswered += until_done(&cli, &["pull", "site/base"])?;
        let shown = scene.fixture.mountpoint(&format!("local{round}"))?;
        cli.ok(&["mount", "base", &shown.display().to_string()])?;
        ensure!(fs::read(shown.join("memory.bin"))? == memory);
        cli.ok(&["umount", &shown.display().to_string()])?;
        let child = scene
            .fixture
            .file(name, &noise(5 + round as u64, 20 * PAGE))?;
        cli.ok(&["commit", name, "--memory", &child])?;
        unanswered += until_done(&cli, &["push", name, "site", "--replace"])?;
        // Of so many requests one is always harmed: it is sent again here.
        unanswered += until_done(&scene.fixture.cli, &["remote", "gc", "site", "--no-wait"])?;
    }
    let done = proxy.done();
    println!("{done:?}, {unanswered} commands without an answer");
    ensure!(
        done.dropped > 0 && done.cut_short > 0 && done.doubled > 0,
        "{done:?}"
    );
    ensure!(unanswered > 0, "each had an answer");
    scene
        .there
        .ok(&["remote", "verify", "site", "--read-data"])?;
    Ok(())
}

over_each_server! { false:
    a_snapshot_is_read_whole_and_its_lease_goes
    a_mount_reads_what_is_asked_for
    what_is_touched_first_comes_first_and_the_rest_in_the_end
    what_was_read_needs_no_server
    a_server_that_is_cut_off_or_hangs_is_waited_for_and_then_an_error_that_passes
}

over_each_server! { true:
    an_encrypted_snapshot_is_shown_to_who_has_the_key
    of_an_encrypted_snapshot_nobody_waits_for_ever
}

mod bodies {
    use super::*;

    pub fn an_encrypted_snapshot_is_shown_to_who_has_the_key(
        mut scene: Scene,
    ) -> anyhow::Result<()> {
        let wrong = scene.fixture.path("wrong");
        scene
            .there
            .ok(&["remote", "key", &wrong.display().to_string()])?;
        let mnt = scene.fixture.mountpoint("none")?.display().to_string();
        for (key, says) in [
            (None, "no key was given"),
            (Some(&*wrong), "another key than"),
        ] {
            let other = Cli::new(&scene.fixture.path(&format!("other{}", key.is_some())));
            other.ok(&["init"])?;
            add(&other, &scene.place, key)?;
            let commands: [&[&str]; 5] = [
                &["mount", "site/base", &mnt],
                &["pull", "site/base"],
                &["remote", "tags", "site"],
                &["remote", "verify", "site"],
                &["remote", "init", "site"],
            ];
            for command in commands {
                let error = other.fails(2, command)?;
                ensure!(error.contains(says), "{command:?}: {error}");
            }
        }
        a_snapshot_is_read_whole_and_its_lease_goes(scene)
    }

    pub fn of_an_encrypted_snapshot_nobody_waits_for_ever(scene: Scene) -> anyhow::Result<()> {
        a_server_that_is_cut_off_or_hangs_is_waited_for_and_then_an_error_that_passes(scene)
    }

    pub fn a_snapshot_is_read_whole_and_its_lease_goes(mut scene: Scene) -> anyhow::Result<()> {
        let (dir, pid) = scene.fixture.mount(Some("site/base"), "mnt")?;
        let local = scene.fixture.mountpoint("local")?;
        scene
            .there
            .ok(&["mount", "base", &local.display().to_string()])?;
        // All sockets for what is read are made after that.
        ensure!(is_filtered(pid)? == rustix::process::geteuid().is_root());
        scene.proxy.cut();
        scene.proxy.mend();
        for name in ["memory.bin", "disk0.img", "vmstate"] {
            ensure!(
                fs::read(dir.join(name))? == fs::read(local.join(name))?,
                "{name}"
            );
        }
        ensure!(scene.leases()? == 1);
        scene.fixture.umount(&dir)?;
        wait_for_end(pid)?;
        ensure!(scene.leases()? == 0);
        Ok(())
    }

    pub fn a_mount_reads_what_is_asked_for(mut scene: Scene) -> anyhow::Result<()> {
        let (dir, _) = scene.fixture.mount(Some("site/base"), "mnt")?;
        let memory = File::open(dir.join("memory.bin"))?;
        // Who maps it asks for its holes first.
        rustix::fs::seek(&memory, SeekFrom::Hole(0))?;
        let asked = scene.asked(&dir)?;
        ensure!(asked["demand"]["requests"] == 0, "{asked:?}");
        expect_page(&memory, 3)?;
        let asked = scene.asked(&dir)?;
        ensure!(asked["demand"]["requests"] == 1, "{asked:?}");
        let others = ["working_set", "ahead", "fill"];
        ensure!(
            others.iter().all(|cause| asked[*cause]["requests"] == 0),
            "{asked:?}"
        );
        let metrics = scene.fixture.cli.ok(&["metrics"])?;
        ensure!(
            metrics.contains("snapstore_mount_remote_requests_total{"),
            "{metrics}"
        );
        Ok(())
    }

    pub fn what_is_touched_first_comes_first_and_the_rest_in_the_end(
        mut scene: Scene,
    ) -> anyhow::Result<()> {
        // A store that has restored it knows.
        let local = scene.fixture.mountpoint("local")?;
        let shown = local.display().to_string();
        let mounted = scene.there.json(&["mount", "base", &shown])?;
        let file = File::open(local.join("memory.bin"))?;
        for number in [700, 1100, 5] {
            expect_page(&file, number)?;
        }
        drop(file);
        scene.there.ok(&["umount", &shown])?;
        let pid = mounted["server_pid"].as_u64().context("a server")?;
        wait_for_end(u32::try_from(pid)?)?;
        let pushed = scene.there.json(&["push", "base", "site"])?;
        let pages = pushed["working_set_pages"].as_u64();
        ensure!(pushed["already"] == true && pages >= Some(3), "{pushed}");

        let dir = scene.fixture.mountpoint("mnt")?;
        let shown = dir.display().to_string();
        scene
            .fixture
            .cli
            .ok(&["mount", "--fill", "site/base", &shown])?;
        let deadline = Instant::now() + Duration::from_secs(60);
        let asked = loop {
            let asked = scene.asked(&dir)?;
            let bytes = asked.values().filter_map(|one| one["bytes"].as_u64());
            // None of its pages can be compressed.
            if bytes.sum::<u64>() >= ((PAGES + 40) * PAGE) as u64 {
                break asked;
            }
            ensure!(Instant::now() < deadline, "{asked:?}");
            std::thread::sleep(Duration::from_millis(50));
        };
        ensure!(asked["demand"]["requests"] == 0, "{asked:?}");
        ensure!(asked["working_set"]["requests"] != 0, "{asked:?}");
        scene.proxy.cut();
        let memory = fs::read(dir.join("memory.bin"))?;
        ensure!(memory == noise(1, PAGES * PAGE), "other bytes are shown");
        Ok(())
    }

    pub fn what_was_read_needs_no_server(mut scene: Scene) -> anyhow::Result<()> {
        let (dir, pid) = scene.fixture.mount(Some("site/base"), "mnt")?;
        let memory = fs::read(dir.join("memory.bin"))?;
        ensure!(memory == noise(1, PAGES * PAGE), "other bytes are shown");
        kill(pid)?;
        let shown = dir.display().to_string();
        // Over the dead one.
        scene.fixture.cli.ok(&["umount", "--lazy", &shown])?;
        scene.fixture.mount_on(Some("site/base"), &dir)?;
        scene.proxy.cut();
        let memory = fs::read(dir.join("memory.bin"))?;
        ensure!(memory == noise(1, PAGES * PAGE), "other bytes are shown");
        // A lease that nobody can end is no reason to stay.
        scene.fixture.umount(&dir)?;
        scene.proxy.mend();
        // Another one's bytes in the cache, as after a crash.
        let cached = longest(&scene.fixture.path("store/cache"))?;
        let len = usize::try_from(fs::metadata(&cached)?.len())?;
        fs::write(&cached, noise(9, len))?;
        scene.fixture.mount_on(Some("site/base"), &dir)?;
        let memory = fs::read(dir.join("memory.bin"))?;
        ensure!(memory == noise(1, PAGES * PAGE), "other bytes are shown");
        Ok(())
    }

    pub fn a_server_that_is_cut_off_or_hangs_is_waited_for_and_then_an_error_that_passes(
        mut scene: Scene,
    ) -> anyhow::Result<()> {
        let dir = scene.fixture.mountpoint("mnt")?;
        let shown = dir.display().to_string();
        let arguments = ["mount", "--remote-timeout", "1", "site/base", &shown];
        scene.fixture.cli.ok(&arguments)?;
        let file = File::open(dir.join("memory.bin"))?;
        expect_page(&file, 3)?;
        for (stop, far) in [(Proxy::cut as fn(&Proxy), 900), (Proxy::hold, 1400)] {
            stop(&scene.proxy);
            expect_eio(&file, far)?;
            expect_page(&file, 3)?;
            scene.proxy.mend();
            expect_page(&file, far)?;
        }
        let log = fs::read_to_string(scene.fixture.path("store/mounts.log"))?;
        ensure!(log.contains("cannot read packs/"), "{log}");
        drop(file);
        scene.fixture.umount(&dir)
    }
}
