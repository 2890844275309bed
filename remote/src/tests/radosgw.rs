//! Hosts that share a bucket of Ceph's S3, each by way of a gateway of its own. Gateways are
//! killed, stopped and started all the while, and now and then the disk is, without which
//! nobody is answered. What the hosts do and what is held against it is that of
//! [`super::garage`].
//!
//! It is only run with `SNAPSTORE_RADOSGW=1`. `SNAPSTORE_RADOSGW_SECONDS` says for how long,
//! `SNAPSTORE_RADOSGW_SEED` what is drawn: the bucket of an odd one is encrypted.
//! `SNAPSTORE_RADOSGW_FAULT=1` has Ceph delete what is a few seconds old, which has to be found.

use std::sync::atomic::Ordering::Relaxed;
use std::thread;
use std::time::{Duration, Instant};

use snapstore_tests::servers::radosgw::{Cluster, GATEWAYS, Part};

use super::garage::{NODES, World, hosts_at_work, number};
use super::{Outcome, place_of};
use crate::{Place, Remote};

const DEFAULT_SECONDS: u64 = 60;
const FEWEST_FAULTS: usize = 4;
/// Much longer than anybody is away, also on a busy machine.
const RETRY_SECONDS: u64 = 120;
/// Of so many faults one is of the disk.
const DISK: usize = 8;

#[test]
fn gateways_and_a_disk_that_are_killed_lose_nothing_that_was_acknowledged() -> Outcome {
    let name = "gateways_and_a_disk_that_are_killed_lose_nothing_that_was_acknowledged";
    let cluster = match Cluster::start() {
        Ok(cluster) => cluster,
        Err(why) => {
            println!("SKIPPED {name}: {why}");
            return Ok(());
        }
    };
    let seed = number("SNAPSTORE_RADOSGW_SEED", 1);
    let seconds = number("SNAPSTORE_RADOSGW_SECONDS", DEFAULT_SECONDS);
    let mut place = place_of(cluster.place(0));
    place.retry_seconds = Some(RETRY_SECONDS);
    let by_way_of = |host| Place {
        endpoint: Some(cluster.endpoint(host % GATEWAYS)),
        ..place.clone()
    };
    let places = (0..NODES).map(by_way_of).collect();
    let pushes = hosts_at_work(places, seed, (seconds, FEWEST_FAULTS), |world| {
        disturb(world, &cluster, &place, &mut fastrand::Rng::with_seed(seed))
    })?;
    println!("{pushes} pushes were acknowledged while gateways and a disk were killed or stopped");
    Ok(())
}

/// Kills a gateway, stops one, or one of each at once, again and again, and the disk. In the
/// end all are there.
fn disturb(
    world: &World,
    cluster: &Cluster,
    place: &Place,
    rng: &mut fastrand::Rng,
) -> Result<(), String> {
    let (mut gateways, mut disks, mut longest) = (0, 0, Duration::ZERO);
    while !world.is_over() {
        thread::sleep(Duration::from_millis(rng.u64(500..2500)));
        let away = Duration::from_millis(rng.u64(500..3000));
        // The first fault is of a gateway, and one of the disk is among the fewest.
        if (gateways + disks) % DISK == 3 {
            cluster.kill(Part::Disk)?;
            thread::sleep(away);
            cluster.restart(Part::Disk)?;
            let began = Instant::now();
            until_written(place)?;
            longest = longest.max(began.elapsed());
            disks += 1;
        } else {
            let (one, kind) = (rng.usize(..GATEWAYS), rng.usize(..3));
            let other = (one + rng.usize(1..GATEWAYS)) % GATEWAYS;
            let (one, other) = (Part::Gateway(one), Part::Gateway(other));
            if kind != 1 {
                cluster.kill(one)?;
            }
            if kind != 0 {
                cluster.stop(other)?;
            }
            thread::sleep(away);
            if kind != 0 {
                cluster.go_on(other)?;
            }
            if kind != 1 {
                cluster.restart(one)?;
            }
            gateways += 1;
        }
        world.faults.fetch_add(1, Relaxed);
    }
    println!("{gateways:6} times gateways were killed or stopped");
    println!("{disks:6} times the disk was killed; a write took up to {longest:.1?} after that");
    Ok(())
}

/// Until somebody was answered who writes and reads: the disk is there.
fn until_written(place: &Place) -> Result<(), String> {
    let mut tries = 0;
    loop {
        match Remote::at(place).and_then(|remote| remote.now()) {
            Err(_) if tries < 3 => tries += 1,
            done => return done.map(drop).map_err(|error| error.to_string()),
        }
    }
}
