//! How many requests a snapshot costs, and a collection for each pack, as the server counts
//! them: these are paid for.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use snapstore_tests::harness::{Cli, noise};
use snapstore_tests::object_server::Requests;
use snapstore_tests::proxy::{Line, Proxy};

use crate::far::{Far, in_words, remove};
use crate::guest::PAGE;
use crate::mounts::Mount;
use crate::stats::Samples;
use crate::tools::figure;
use crate::{Bench, new_store, utf8};

/// 64 MiB.
const PAGES: usize = 16 << 10;
/// Snapshots with a page of their own each, and so a pack.
const CHILDREN: usize = 300;

/// Of a push, a pull, a lazy mount, and collections.
///
/// # Errors
/// If something fails.
pub fn requests(bench: &mut Bench) -> anyhow::Result<()> {
    let scene = Scene::new(&bench.path("remote-requests"))?;
    let (first, child) = (scene.push("base")?, scene.commit_and_push(0)?);
    let (pulled, mounted) = (scene.pull()?, scene.mount()?);
    let one = |bench: &mut Bench, what: &str, requests: &Requests, against: (&str, u64)| {
        let what = format!("{what}: {}", in_words(requests));
        let count = |count| Samples::one(figure(count));
        let (asked, other) = (count(requests.all()), count(against.1));
        bench.compare_counts((&what, &asked), (against.0, &other), None);
    };
    let mib = ((PAGES * PAGE) >> 20) as u64;
    let written = ("MiB", mib);
    one(bench, "first push of 64 MiB", &first, written);
    one(
        bench,
        "push of a child with a new page",
        &child,
        ("pages", 1),
    );
    one(bench, "pull of all, into an empty store", &pulled, written);
    one(
        bench,
        "a mount until its first page",
        &mounted,
        ("pages", 1),
    );
    for number in 1..CHILDREN {
        scene.commit_and_push(number)?;
    }
    let packs = scene.packs()?;
    let idle = scene.collect()?;
    let what = "remote gc with nothing to delete";
    one(bench, what, &idle, ("stored packs", packs));
    let gone: Vec<String> = (0..CHILDREN).step_by(2).map(tag).collect();
    let gone: Vec<&str> = gone.iter().map(String::as_str).collect();
    scene
        .there
        .ok(&[&["remote", "rm", "site"][..], &gone].concat())?;
    let deleting = scene.collect()?;
    let left = scene.packs()?;
    ensure!(left < packs, "{left} packs of {packs} are left");
    let what = "remote gc of half the tags";
    one(bench, what, &deleting, ("stored packs", packs));
    one(bench, what, &deleting, ("deleted packs", packs - left));
    Ok(())
}

fn tag(number: usize) -> String {
    format!("child-{number}")
}

struct Scene {
    dir: PathBuf,
    far: Far,
    line: Proxy,
    there: Cli,
}

impl Scene {
    fn new(dir: &Path) -> anyhow::Result<Self> {
        fs::create_dir_all(dir)?;
        let memory = dir.join("image");
        fs::write(&memory, noise(7, PAGES * PAGE))?;
        let there = new_store(&dir.join("there"))?;
        there.ok(&["commit", "base", "--memory", utf8(&memory)?])?;
        let far = Far::new(dir)?;
        let line = far.line(Line::default())?;
        far.reach(&there, "", &line)?;
        there.ok(&["remote", "init", "site"])?;
        Ok(Self {
            dir: dir.to_owned(),
            far,
            line,
            there,
        })
    }

    fn count(&self, work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<Requests> {
        Ok(self.far.cost(&self.line, work)?.requests)
    }

    fn push(&self, tag: &str) -> anyhow::Result<Requests> {
        self.count(|| self.there.ok(&["push", tag, "site"]).map(drop))
    }

    /// A snapshot that has one page more than the first one.
    fn commit_and_push(&self, number: usize) -> anyhow::Result<Requests> {
        let diff = self.dir.join("diff");
        let file = File::create(&diff)?;
        file.set_len((PAGES * PAGE) as u64)?;
        let page = noise(1000 + number as u64, PAGE);
        file.write_all_at(&page, (number * 16 * PAGE) as u64)?;
        let tag = tag(number);
        let commit = ["commit", &tag, "--memory-diff", utf8(&diff)?];
        self.there
            .ok(&[&commit[..], &["--parent", "base"]].concat())?;
        self.push(&tag)
    }

    fn pull(&self) -> anyhow::Result<Requests> {
        let here = self.empty_store()?;
        let asked = self.count(|| here.ok(&["pull", "site/base"]).map(drop))?;
        remove(here.store())?;
        Ok(asked)
    }

    /// Without any working set: none was recorded. Its end is counted, too.
    fn mount(&self) -> anyhow::Result<Requests> {
        let here = self.empty_store()?;
        let asked = self.count(|| {
            let mount = Mount::product(&here, "site/base", &self.dir.join("mnt"), &[])?;
            let mut page = vec![0; PAGE];
            File::open(mount.memory())?.read_exact_at(&mut page, 0)?;
            ensure!(page == noise(7, PAGE), "another page");
            mount.unmount().map(drop)
        })?;
        remove(here.store())?;
        Ok(asked)
    }

    fn empty_store(&self) -> anyhow::Result<Cli> {
        let here = new_store(&self.dir.join("here"))?;
        self.far.reach(&here, "", &self.line)?;
        Ok(here)
    }

    fn collect(&self) -> anyhow::Result<Requests> {
        self.count(|| self.there.ok(&["remote", "gc", "site"]).map(drop))
    }

    fn packs(&self) -> anyhow::Result<u64> {
        let packs = fs::read_dir(self.far.bucket().join("packs")).context("packs")?;
        Ok(packs.count() as u64)
    }
}
