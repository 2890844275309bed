//! How long until a machine runs whose snapshot is in a bucket that is far away: lazily, once
//! all of it was pulled, and as others do it, who download a compressed image.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use snapstore_guests::TOUCH;
use snapstore_tests::harness::{Cli, noise};
use snapstore_tests::proxy::Proxy;
use snapstore_tests::vm::Lab;

use crate::far::{Far, Way, download, remove};
use crate::guest::PAGE;
use crate::mounts::Mount;
use crate::remote_copy::skip_without;
use crate::stats::{Run, Samples, alternate};
use crate::tools::{find, timed};
use crate::vm_frozen::Helper;
use crate::vm_rig::{FIRST, Talk, boot, lab};
use crate::{Bench, utf8};

/// At 100 Mbit/s a download would take 20 s.
const WAYS: [Way; 3] = [Way(1, 1000), Way(10, 1000), Way(50, 1000)];
const MOST_ROUNDS: usize = 3;
const MEMORY: &str = "512M";
/// What the guest has in its memory, in pages: 256 MiB that cannot be compressed.
const FULL_PAGES: usize = 64 << 10;
/// What a first instruction may cost (docs/BENCHMARKS.md).
const ROUND_TRIPS: u32 = 5;
const OWN: Duration = Duration::from_millis(30);

struct Scene {
    lab: Lab,
    far: Far,
    zstd: Option<PathBuf>,
    kernel: String,
    compressed_len: u64,
}

/// A machine over a lazy mount against a full pull, and against one zstd object.
///
/// # Errors
/// If something fails.
pub fn restore(bench: &mut Bench) -> anyhow::Result<()> {
    let scene = Scene::new(&bench.path("remote-restore"))?;
    if scene.zstd.is_none() {
        skip_without(bench, "remote-restore", "zstd");
    }
    let rounds = bench.rounds.min(MOST_ROUNDS);
    for way in WAYS {
        let proxy = scene.far.line(way.line())?;
        let (scene, proxy) = (&scene, &proxy);
        let mut subjects: Vec<Run<'_>> = vec![
            Box::new(move |_| scene.product(proxy, "site/full", false)),
            Box::new(move |_| scene.product(proxy, "full", true)),
        ];
        if let Some(zstd) = &scene.zstd {
            subjects.push(Box::new(move |_| scene.unpacked(proxy, zstd)));
        }
        let done = alternate(rounds, subjects)?;
        let least = ROUND_TRIPS * way.round_trip() + OWN;
        let least = Samples::constant(least.as_secs_f64(), rounds);
        let whats = ["restore until it runs", "restore until the guest answers"];
        for (number, what) in whats.into_iter().enumerate() {
            let what = format!("{what}, {way}");
            let lazily = &done[0][number];
            // The answer needs pages of the guest.
            let aim = (number == 0).then_some(1.0);
            bench.compare(&what, lazily, "5 round trips and 30 ms", &least, aim);
            bench.compare(&what, lazily, "pull, then restore", &done[1][number], None);
            if let Some(unpacked) = done.get(2) {
                let against = "download zstd, unpack, bare KVM";
                bench.compare(&what, lazily, against, &unpacked[number], None);
            }
        }
    }
    Ok(())
}

impl Scene {
    fn new(dir: &Path) -> anyhow::Result<Self> {
        fs::create_dir_all(dir)?;
        let lab = lab("remote-restore")?;
        boot(&lab, "guest", MEMORY)?;
        lab.commit("waiting", "guest")?;
        lab.stop("guest")?;
        let shown = dir.join("waiting");
        let mount = Mount::product(&lab.cli, "waiting", &shown, &[])?;
        let (state, image) = (dir.join("state"), dir.join("image"));
        fs::copy(shown.join("vmstate"), &state)?;
        fs::copy(mount.memory(), &image)?;
        mount.unmount()?;
        let file = File::options().write(true).open(&image)?;
        file.write_all_at(&noise(9, FULL_PAGES * PAGE), u64::from(FIRST) * PAGE as u64)?;
        let commit = ["commit", "full", "--memory", utf8(&image)?];
        lab.cli
            .ok(&[&commit[..], &["--vmstate", utf8(&state)?]].concat())?;
        let far = Far::new(dir)?;
        let url = format!("file://{}", utf8(far.bucket())?);
        // A restore records what the guest touches.
        lab.restore("full", &["--name", "guest"])?;
        answer(&lab)?;
        lab.stop("guest")?;
        crate::remote::wait_for_set(&lab.cli);
        lab.cli.ok(&["remote", "add", "site", &url])?;
        lab.cli.ok(&["remote", "init", "site"])?;
        lab.cli.ok(&["push", "full", "site"])?;
        let zstd = find("zstd");
        let mut compressed_len = 0;
        if let Some(zstd) = &zstd {
            let out = far.bucket().join("image.zst");
            let mut command = Command::new(zstd);
            timed(command.args(["-1", "-q"]).arg(&image).arg("-o").arg(&out))?;
            compressed_len = fs::metadata(&out)?.len();
        }
        let kernel = lab.file("touch.kernel", TOUCH)?;
        Ok(Self {
            lab,
            far,
            zstd,
            kernel,
            compressed_len,
        })
    }

    /// The seconds until the command has ended, which it does when the guest runs, and until
    /// the guest has answered, from a new store.
    fn product(&self, proxy: &Proxy, snapshot: &str, pulls: bool) -> anyhow::Result<Vec<f64>> {
        let store = self.lab.path("here");
        let runtime = self.lab.runtime();
        let cli = Cli::new(&store).with_env("SNAPSTORE_RUNTIME_DIR", utf8(&runtime)?);
        cli.ok(&["init"])?;
        self.far.reach(&cli, "", proxy)?;
        let began = Instant::now();
        if pulls {
            cli.ok(&["pull", "site/full"])?;
        }
        cli.ok(&["restore", snapshot, "--detach", "--name", "guest"])?;
        let runs = began.elapsed().as_secs_f64();
        answer(&self.lab)?;
        let answered = began.elapsed().as_secs_f64();
        cli.ok(&["stop", "guest"])?;
        self.lab.assert_nothing_left()?;
        remove(&store)?;
        Ok(vec![runs, answered])
    }

    /// Into a file, unpacked into another one, which a machine of nothing but KVM maps.
    fn unpacked(&self, proxy: &Proxy, zstd: &Path) -> anyhow::Result<Vec<f64>> {
        let paths = ["image.zst", "image"].map(|name| self.lab.path(name));
        let [packed, image] = &paths;
        let began = Instant::now();
        let file = File::create(packed)?;
        let len = self.compressed_len;
        download(proxy.address(), "image.zst", len, |start, bytes| {
            Ok(file.write_all_at(bytes, start)?)
        })?;
        let mut unpack = Command::new(zstd);
        timed(unpack.args(["-d", "-q"]).arg(packed).arg("-o").arg(image))?;
        let bytes = fs::metadata(image)?.len().to_string();
        let arguments = ["bare-vm", "1", &bytes, "1", &self.kernel, utf8(image)?];
        let mut machine = Helper::start(&arguments)?;
        ensure!(machine.line()?.starts_with("entered"), "it does not run");
        let runs = began.elapsed().as_secs_f64();
        while machine.line()? != "ready" {}
        let answered = began.elapsed().as_secs_f64();
        drop(machine);
        paths.iter().try_for_each(fs::remove_file)?;
        Ok(vec![runs, answered])
    }
}

/// Lets the guest read a page.
fn answer(lab: &Lab) -> anyhow::Result<()> {
    use crate::vm_rig::Touch as _;
    let first = noise(9, 4);
    let word = u32::from_le_bytes(first.as_slice().try_into().context("a word")?);
    let command = snapstore_guests::TouchCommand::Read {
        count: 1,
        first: FIRST,
    };
    Talk::to(lab, "guest")?.obey(command, &format!("r{word:08x}"))?;
    Ok(())
}
