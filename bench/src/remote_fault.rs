//! How long a fault of one who reads a page waits that is not here: while the working set and
//! all the rest are brought, and while nothing else is.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::ensure;
use rustix::fs::{Advice, fadvise};
use snapstore_tests::harness::{Cli, noise};
use snapstore_tests::proxy::Proxy;

use crate::far::{Client, Far, WAYS, Way, remove};
use crate::guest;
use crate::mounts::Mount;
use crate::remote::wait_for_set;
use crate::stats::{Random, Run, alternate, percentile};
use crate::{Bench, new_store, utf8};

const PAGE: u64 = guest::PAGE as u64;
/// 256 MiB, of which the working set is in the lower half and the faults in the upper one.
const IMAGE_PAGES: u64 = 64 << 10;
/// 32 MiB.
const SET_PAGES: usize = 8 << 10;
/// What a fault brings at least: no two are in the same block.
const BLOCK: u64 = 128 << 10;
const FAULTS: usize = 100;
/// What a guest does before the next one.
const PAUSE: Duration = Duration::from_millis(5);
const MOST_ROUNDS: usize = 3;

struct Scene {
    dir: PathBuf,
    far: Far,
    image: Vec<u8>,
}

/// Faults of a lazy mount, busy and idle, against a bare client's requests.
///
/// # Errors
/// If something fails.
pub fn fault(bench: &mut Bench) -> anyhow::Result<()> {
    let scene = Scene::new(&bench.path("remote-fault"))?;
    let rounds = bench.rounds.min(MOST_ROUNDS);
    for way in WAYS {
        let proxy = scene.far.line(way.line())?;
        let (scene, proxy) = (&scene, &proxy);
        let subjects: Vec<Run<'_>> = vec![
            Box::new(move |round| scene.faults(proxy, way, round, &["--fill"])),
            Box::new(move |round| scene.faults(proxy, way, round, &["--no-prefetch"])),
            Box::new(move |round| scene.requests(proxy, round)),
        ];
        let done = alternate(rounds, subjects)?;
        let against = "a GET of 128 KiB";
        for (number, statistic) in ["mean", "p99"].into_iter().enumerate() {
            let whats = [
                "a fault beside working set and fill",
                "a fault beside nothing",
            ];
            for (what, taken) in whats.into_iter().zip(&done) {
                let what = format!("{what}, {statistic}, {way}");
                bench.compare(&what, &taken[number], against, &done[2][number], None);
            }
        }
    }
    Ok(())
}

impl Scene {
    fn new(dir: &Path) -> anyhow::Result<Self> {
        fs::create_dir_all(dir)?;
        let image = noise(5, usize::try_from(IMAGE_PAGES * PAGE)?);
        let memory = dir.join("image");
        fs::write(&memory, &image)?;
        let there = new_store(&dir.join("there"))?;
        there.ok(&["commit", "base", "--memory", utf8(&memory)?])?;
        let scene = Self {
            far: Far::new(dir)?,
            dir: dir.to_owned(),
            image,
        };
        let lower: Vec<u64> = (0..IMAGE_PAGES / 2).collect();
        let mount = Mount::product(&there, "base", &dir.join("recorded"), &[])?;
        let file = File::open(mount.memory())?;
        fadvise(&file, 0, None, Advice::Random)?;
        for page in Random::new(5).choose(&lower, SET_PAGES) {
            scene.read(&file, page * PAGE)?;
        }
        drop(file);
        mount.unmount()?;
        wait_for_set(&there);
        let url = format!("file://{}", utf8(scene.far.bucket())?);
        there.ok(&["remote", "add", "site", &url])?;
        there.ok(&["remote", "init", "site"])?;
        let pushed = there.json(&["push", "base", "site"])?;
        let of_set = pushed["working_set_pages"].as_u64();
        ensure!(of_set == Some(SET_PAGES as u64), "{pushed}");
        fs::rename(&memory, scene.far.bucket().join("image"))?;
        Ok(scene)
    }

    /// Reads the page at this offset, which must be what it was. Returns the seconds.
    fn read(&self, file: &File, at: u64) -> anyhow::Result<f64> {
        let mut bytes = vec![0; guest::PAGE];
        let began = Instant::now();
        file.read_exact_at(&mut bytes, at)?;
        let taken = began.elapsed().as_secs_f64();
        let start = usize::try_from(at)?;
        ensure!(
            bytes == self.image[start..start + bytes.len()],
            "{at} is another page"
        );
        Ok(taken)
    }

    /// Where faults are: scattered over the upper half.
    fn places(round: usize) -> Vec<u64> {
        let half = IMAGE_PAGES * PAGE / 2;
        let blocks: Vec<u64> = (half..2 * half).step_by(BLOCK as usize).collect();
        Random::new(round as u64).choose(&blocks, FAULTS)
    }

    /// Mean and 99th percentile of those that had to wait for the bucket.
    fn faults(
        &self,
        proxy: &Proxy,
        way: Way,
        round: usize,
        options: &[&str],
    ) -> anyhow::Result<Vec<f64>> {
        let store: Cli = new_store(&self.dir.join("here"))?;
        self.far.reach(&store, "", proxy)?;
        let mount = Mount::product(&store, "site/base", &self.dir.join("mnt"), options)?;
        let file = File::open(mount.memory())?;
        fadvise(&file, 0, None, Advice::Random)?;
        let mut taken = Vec::new();
        for at in Self::places(round) {
            taken.push(self.read(&file, at)?);
            sleep(PAUSE);
        }
        drop(file);
        let said = store.json(&["show", "--mount", utf8(&self.dir.join("mnt"))?])?;
        mount.unmount()?;
        remove(store.store())?;
        // What was here already, or was on its way, took less.
        taken.retain(|seconds| *seconds >= way.round_trip().as_secs_f64());
        ensure!(
            taken.len() >= FAULTS / 2,
            "only {} faults: {said}",
            taken.len()
        );
        Ok(mean_and_p99(&mut taken))
    }

    /// The same of a client that knows where everything is.
    fn requests(&self, proxy: &Proxy, round: usize) -> anyhow::Result<Vec<f64>> {
        let mut client = Client::new(proxy.address())?;
        let mut bytes = Vec::new();
        let mut taken = Vec::new();
        for at in Self::places(round) {
            let began = Instant::now();
            client.get("image", at, BLOCK, &mut bytes)?;
            taken.push(began.elapsed().as_secs_f64());
            sleep(PAUSE);
        }
        Ok(mean_and_p99(&mut taken))
    }
}

fn mean_and_p99(taken: &mut [f64]) -> Vec<f64> {
    taken.sort_by(f64::total_cmp);
    let mean = taken.iter().sum::<f64>() / taken.len() as f64;
    vec![mean, percentile(taken, 99)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slowest_of_a_hundred_are_told() {
        let mut taken: Vec<f64> = (1..=200).rev().map(f64::from).collect();
        assert_eq!(mean_and_p99(&mut taken), [100.5, 199.0]);
    }

    #[test]
    fn no_two_faults_are_in_one_block_or_in_the_lower_half() {
        let mut places = Scene::places(1);
        assert_eq!(places.len(), FAULTS);
        places.sort_unstable();
        assert!(places[0] >= IMAGE_PAGES * PAGE / 2);
        assert!(places.windows(2).all(|two| two[1] - two[0] >= BLOCK));
        assert_ne!(Scene::places(1), Scene::places(2));
    }
}
