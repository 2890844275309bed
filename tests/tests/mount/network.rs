//! Mounts of snapshots that stay in a bucket over the network: moto's S3, and Azurite.

use std::fs::{self, File};

use anyhow::{Context as _, ensure};
use snapstore_tests::harness::{Cli, noise, skipped};
use snapstore_tests::proxy::{Line, Proxy};
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
}

fn add(cli: &Cli, place: &Place) -> anyhow::Result<()> {
    let arguments = place.arguments();
    let arguments = arguments.iter().map(String::as_str);
    let begin = ["remote", "add", "--retry-seconds", "2", "site"];
    cli.ok(&begin.into_iter().chain(arguments).collect::<Vec<_>>())?;
    Ok(())
}

fn scene(test: &str, server: &Found) -> anyhow::Result<Option<Scene>> {
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
    add(&there, &place)?;
    there.ok(&["remote", "init", "site"])?;
    there.ok(&["push", "base", "site"])?;
    let proxy = Proxy::start(server.address(), Line::default())?;
    add(&fixture.cli, &place.through(proxy.address()))?;
    Ok(Some(Scene {
        fixture,
        there,
        proxy,
    }))
}

impl Scene {
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

/// Runs over both servers.
macro_rules! over_each_server {
    ($($name:ident)*) => {$(
        mod $name {
            use super::*;

            #[test]
            fn over_s3() -> anyhow::Result<()> {
                let test = concat!(stringify!($name), " over S3");
                scene(test, &S3)?.map_or(Ok(()), super::bodies::$name)
            }

            #[test]
            fn over_azure() -> anyhow::Result<()> {
                let test = concat!(stringify!($name), " over Azure");
                scene(test, &AZURE)?.map_or(Ok(()), super::bodies::$name)
            }
        }
    )*};
}

over_each_server! {
    a_snapshot_is_read_whole_and_its_lease_goes
    what_was_read_needs_no_server
    a_server_that_is_cut_off_or_hangs_is_waited_for_and_then_an_error_that_passes
}

mod bodies {
    use super::*;

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
