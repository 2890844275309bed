//! What it takes to bring an image into a bucket that is far away, a child of it, and the
//! image back: by the product, by restic, and by rclone, which copies the store's packs.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use snapstore_tests::harness::{Cli, noise};
use snapstore_tests::proxy::Proxy;

use crate::far::{Far, KEY, REGION, Way};
use crate::guest::{Guest, Images, PAGE};
use crate::stats::{Random, Run, Samples, alternate};
use crate::tools::{find, timed};
use crate::{Bench, new_store, utf8};

/// At 100 Mbit/s a round would take a minute.
const WAYS: [Way; 3] = [Way(1, 1000), Way(10, 1000), Way(50, 1000)];
/// Bytes and requests hardly depend on the line.
const COUNTED: Way = Way(10, 1000);
const MOST_ROUNDS: usize = 3;
/// Of the image that is made where there are none of guests.
const MADE_PAGES: usize = 32 << 10;
const MADE_CHANGES: usize = 2000;

/// What is measured, in this order.
const STEPS: [&str; 3] = [
    "push of an image",
    "pull into an empty store",
    "push of a child",
];
/// Seconds, bytes and requests.
const FIGURES: usize = 3;

/// Two others, if they are installed.
const OTHERS: [&str; 2] = ["restic", "rclone"];

struct Scene {
    dir: PathBuf,
    far: Far,
    /// An image, and what became of it.
    images: [PathBuf; 2],
    /// Packs of a store that has the first, and both.
    packs: [PathBuf; 2],
}

/// The product, restic and rclone on the same server and lines.
///
/// # Errors
/// If something fails.
pub fn copy(bench: &mut Bench) -> anyhow::Result<()> {
    let scene = Scene::new(&bench.path("remote-copy"))?;
    let others = OTHERS.map(find);
    for (name, found) in OTHERS.into_iter().zip(&others) {
        if found.is_none() {
            skip_without(bench, "remote-copy", name);
        }
    }
    let rounds = bench.rounds.min(MOST_ROUNDS);
    for way in WAYS {
        let proxy = scene.far.line(way.line())?;
        let (scene, proxy) = (&scene, &proxy);
        let mut subjects: Vec<Run<'_>> = vec![Box::new(move |round| {
            scene.product(proxy, &format!("{way}-{round}"))
        })];
        if let Some(restic) = &others[0] {
            subjects.push(Box::new(move |_| scene.restic(proxy, restic)));
        }
        if let Some(rclone) = &others[1] {
            subjects.push(Box::new(move |_| scene.rclone(proxy, rclone)));
        }
        let done = alternate(rounds, subjects)?;
        let there = OTHERS
            .iter()
            .zip(&others)
            .filter(|(_, found)| found.is_some());
        for ((name, _), other) in there.zip(&done[1..]) {
            rows(bench, way, &done[0], name, other);
        }
    }
    Ok(())
}

/// Says that a program is missing, and what installs it.
pub(crate) fn skip_without(bench: &mut Bench, what: &str, program: &str) {
    let reason = format!("there is no {program}; apt-get install {program} installs it");
    bench
        .report
        .skip(&format!("{what} against {program}"), &reason);
}

fn rows(bench: &mut Bench, way: Way, product: &[Samples], name: &str, other: &[Samples]) {
    for (number, step) in STEPS.into_iter().enumerate() {
        let at = number * FIGURES;
        let against = match (name, number) {
            ("restic", 1) => "restic restore",
            ("restic", _) => "restic backup",
            _ => "rclone copy of its packs",
        };
        let what = format!("{step}, {way}");
        bench.compare(&what, &product[at], against, &other[at], None);
        // Restic reads the image, as a commit does; rclone copies what was committed.
        if let ("restic", Some(committed)) = (name, product.get(committed_at(number))) {
            let what = format!("commit and {step}, {way}");
            bench.compare(&what, committed, against, &other[at], None);
        }
        if way == COUNTED {
            let what = format!("bytes over the line, {step}");
            let (bytes, theirs) = (&product[at + 1], &other[at + 1]);
            bench.compare_bytes((&what, bytes), (against, theirs), None);
            let what = format!("requests, {step}");
            bench.compare_counts((&what, &product[at + 2]), (against, &other[at + 2]), None);
        }
    }
}

/// Where the product's figures of a step with the commit before it are: none of a pull.
fn committed_at(step: usize) -> usize {
    let behind = STEPS.len() * FIGURES;
    match step {
        0 => behind,
        2 => behind + 1,
        _ => usize::MAX,
    }
}

impl Scene {
    fn new(dir: &Path) -> anyhow::Result<Self> {
        fs::create_dir_all(dir)?;
        let images = ["first", "then"].map(|name| dir.join(name).join("memory"));
        for image in &images {
            fs::create_dir_all(image.parent().expect("it is in a directory"))?;
        }
        if env::var_os("SNAPSTORE_IMAGES").is_some() {
            let guests = Images::from_env()?;
            fs::copy(guests.path("base"), &images[0])?;
            fs::copy(guests.path("base+1"), &images[1])?;
        } else {
            let mut guest = Guest::new(noise(3, MADE_PAGES * PAGE));
            guest.write(&images[0])?;
            guest.run(&mut Random::new(3), MADE_CHANGES, 0);
            guest.write(&images[1])?;
        }
        let scene = Self {
            far: Far::new(dir)?,
            dir: dir.to_owned(),
            packs: ["packs-first", "packs-both"].map(|name| dir.join(name)),
            images,
        };
        let store = new_store(&dir.join("store"))?;
        for (number, packs) in scene.packs.iter().enumerate() {
            scene.commit(&store, number)?;
            copy_files(&store.store().join("packs"), packs)?;
        }
        fs::remove_dir_all(store.store())?;
        Ok(scene)
    }

    fn commit(&self, store: &Cli, number: usize) -> anyhow::Result<()> {
        let memory = utf8(&self.images[number])?;
        match number {
            0 => store.ok(&["commit", "first", "--memory", memory])?,
            _ => store.ok(&["commit", "then", "--memory", memory, "--parent", "first"])?,
        };
        Ok(())
    }

    /// Three figures of each step, and the seconds of both pushes with their commits.
    fn product(&self, proxy: &Proxy, name: &str) -> anyhow::Result<Vec<f64>> {
        let prefix = format!("/product-{}", name.replace([' ', ',', '/'], "-"));
        let store = new_store(&self.dir.join("there"))?;
        self.far.reach(&store, &prefix, proxy)?;
        store.ok(&["remote", "init", "site"])?;
        let mut figures = Vec::new();
        let mut with_commit = Vec::new();
        for (number, tag) in ["first", "then"].into_iter().enumerate() {
            let began = Instant::now();
            self.commit(&store, number)?;
            let committed = began.elapsed().as_secs_f64();
            let push = || store.ok(&["push", tag, "site"]).map(drop);
            let cost = self.far.cost(proxy, push)?;
            with_commit.push(committed + cost.seconds);
            figures.extend(cost.figures());
            if number == 0 {
                let here = new_store(&self.dir.join("here"))?;
                self.far.reach(&here, &prefix, proxy)?;
                let pull = || here.ok(&["pull", "site/first"]).map(drop);
                figures.extend(self.far.cost(proxy, pull)?.figures());
                fs::remove_dir_all(here.store())?;
            }
        }
        fs::remove_dir_all(store.store())?;
        fs::remove_dir_all(self.far.bucket().join(&prefix[1..]))?;
        figures.extend(with_commit);
        Ok(figures)
    }

    fn restic(&self, proxy: &Proxy, program: &Path) -> anyhow::Result<Vec<f64>> {
        let (caches, target) = (self.dir.join("restic-caches"), self.dir.join("restored"));
        let repository = format!("s3:http://{}/snaps/restic", proxy.address());
        let run = |cache: &str, arguments: &[&str], dir: &Path| {
            let mut command = Command::new(program);
            command
                .args(["--quiet", "-r", &repository, "-o"])
                .arg(format!("s3.region={REGION}"))
                .args(["-o", "s3.bucket-lookup=path", "--cache-dir"])
                .arg(caches.join(cache))
                .args(arguments)
                .current_dir(dir)
                .env("AWS_ACCESS_KEY_ID", KEY.0)
                .env("AWS_SECRET_ACCESS_KEY", KEY.1)
                .env("RESTIC_PASSWORD", "secret");
            timed(&mut command).map(drop)
        };
        let [first, then] = self.images.each_ref();
        let dir = |image: &Path| image.parent().map_or_else(PathBuf::new, Path::to_owned);
        run("there", &["init"], &self.dir)?;
        let backup = ["backup", "memory"];
        let restore = ["restore", "latest", "--target", utf8(&target)?];
        let costs = [
            self.far
                .cost(proxy, || run("there", &backup, &dir(first)))?,
            self.far.cost(proxy, || run("here", &restore, &self.dir))?,
            self.far.cost(proxy, || run("there", &backup, &dir(then)))?,
        ];
        for path in [&caches, &target, &self.far.bucket().join("restic")] {
            fs::remove_dir_all(path)?;
        }
        Ok(costs.iter().flat_map(|cost| cost.figures()).collect())
    }

    fn rclone(&self, proxy: &Proxy, program: &Path) -> anyhow::Result<Vec<f64>> {
        let (config, target) = (self.dir.join("rclone.conf"), self.dir.join("copied"));
        fs::write(&config, "")?;
        let run = |from: &str, to: &str| {
            let mut command = Command::new(program);
            command
                // The server keeps no times; a pack that is there is never another one.
                .args(["copy", "--size-only", "--s3-no-check-bucket", "--quiet"])
                .args([from, to])
                // There is no TLS, and this version refuses to know certificates of one's own.
                .env_remove("AWS_CA_BUNDLE")
                .env("RCLONE_CONFIG", &config)
                .env("RCLONE_CONFIG_SITE_TYPE", "s3")
                .env("RCLONE_CONFIG_SITE_PROVIDER", "Other")
                .env("RCLONE_CONFIG_SITE_REGION", REGION)
                .env("RCLONE_CONFIG_SITE_ACCESS_KEY_ID", KEY.0)
                .env("RCLONE_CONFIG_SITE_SECRET_ACCESS_KEY", KEY.1)
                .env(
                    "RCLONE_CONFIG_SITE_ENDPOINT",
                    format!("http://{}", proxy.address()),
                );
            timed(&mut command).map(drop)
        };
        let there = "site:snaps/rclone";
        let [first, both] = [utf8(&self.packs[0])?, utf8(&self.packs[1])?];
        let costs = [
            self.far.cost(proxy, || run(first, there))?,
            self.far.cost(proxy, || run(there, utf8(&target)?))?,
            self.far.cost(proxy, || run(both, there))?,
        ];
        for path in [&target, &self.far.bucket().join("rclone")] {
            fs::remove_dir_all(path)?;
        }
        Ok(costs.iter().flat_map(|cost| cost.figures()).collect())
    }
}

fn copy_files(from: &Path, to: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        fs::copy(entry.path(), to.join(entry.file_name()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pushes_have_a_commit_before_them_and_pulls_have_none() {
        let figures = STEPS.len() * FIGURES + 2;
        let commits: Vec<_> = (0..STEPS.len()).map(committed_at).collect();
        assert_eq!(commits, [figures - 2, usize::MAX, figures - 1]);
    }
}
