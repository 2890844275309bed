//! Hosts that share a bucket of a server, with a proxy between each of them and it: requests are
//! lost, and answers, done twice and overtaken, and answers end early. What the hosts do and
//! what is held against it is that of [`super::garage`].
//!
//! `SNAPSTORE_FAULTS_SECONDS` says for how long, `SNAPSTORE_FAULTS_SEED` what is drawn: the bucket
//! of an odd one is encrypted.

use std::sync::atomic::Ordering::Relaxed;
use std::thread;
use std::time::Duration;

use snapstore_tests::requests::{Chances, RequestProxy};
use snapstore_tests::servers::S3;

use super::garage::{NODES, hosts_at_work, number};
use super::{Outcome, place_of};
use crate::Place;

const DEFAULT_SECONDS: u64 = 6;
/// Of each kind.
const FEWEST_FAULTS: usize = 3;
const CHANCES: Chances = Chances {
    dropped: 15,
    doubled: 60,
    cut_short: 15,
    overtaken: 15,
};
/// How long each host tries a request again. The last one tells of each that fails.
const RETRY_SECONDS: [u64; NODES] = [30, 2, 0];

#[test]
fn requests_that_are_lost_doubled_cut_short_and_overtaken_lose_nothing() -> Outcome {
    let name = "requests_that_are_lost_doubled_cut_short_and_overtaken_lose_nothing";
    let server = match &*S3 {
        Ok(server) => server,
        Err(why) => {
            println!("SKIPPED {name}: {why}");
            return Ok(());
        }
    };
    let seed = number("SNAPSTORE_FAULTS_SEED", 2);
    let seconds = number("SNAPSTORE_FAULTS_SECONDS", DEFAULT_SECONDS);
    let place = server.place();
    let (mut proxies, mut places) = (Vec::new(), Vec::new());
    for (host, retry) in RETRY_SECONDS.into_iter().enumerate() {
        let drawn = seed.wrapping_mul(1000) + host as u64;
        let proxy = RequestProxy::start(server.address(), CHANCES, drawn)?;
        places.push(Place {
            retry_seconds: Some(retry),
            ..place_of(place.through(proxy.address()))
        });
        proxies.push(proxy);
    }
    let pushes = hosts_at_work(places, seed, (seconds, FEWEST_FAULTS), |world| {
        while !world.is_over() {
            thread::sleep(Duration::from_millis(100));
            let done = || proxies.iter().map(RequestProxy::done);
            let kinds = [
                done().map(|done| done.dropped).sum::<u64>(),
                done().map(|done| done.doubled).sum(),
                done().map(|done| done.cut_short).sum(),
                done().map(|done| done.overtaken).sum(),
            ];
            let fewest = kinds.into_iter().min().unwrap_or_default();
            let fewest = usize::try_from(fewest).map_err(|error| error.to_string())?;
            world.faults.store(fewest, Relaxed);
        }
        proxies.iter().for_each(RequestProxy::calm);
        Ok(())
    })?;
    for proxy in &proxies {
        println!("{:?}", proxy.done());
    }
    println!(
        "{pushes} pushes were acknowledged while requests were lost, doubled, cut and overtaken"
    );
    Ok(())
}
