//! Parts of packs, from the cache or from the bucket, in blocks.
//!
//! A block is read by one thread at a time: whoever needs it meanwhile joins the **flight**
//! that brings it. A flight is entered before its request leaves, and leaves the table after
//! what it brought is in the cache; so what is in neither is truly not there.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::lazy::cache::{BLOCK_BYTES, Cache, blocks_of};
use crate::lazy::counts::{Cause, Counts};
use crate::lazy::failure::Failure;
use crate::lazy::flights::{Flight, Flights, Held, IN_VAIN};
use crate::lazy::hedge::Hedging;
use crate::objects::{Hedge, Objects};
use crate::protocol::{Name, Unanswered};

/// A request for what somebody waits for brings at least so many blocks.
const DEMANDED_BLOCKS: u64 = 2;
/// A request for what nobody waits for yet brings at most so many.
pub const AHEAD_BLOCKS: u64 = 16;
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// What an attempt gets at least, however little is left of the time.
const LEAST_ATTEMPT: Duration = Duration::from_millis(250);
/// How long a request ahead waits at once for those that somebody waits for.
const GIVE_WAY: Duration = Duration::from_millis(100);

/// A pack that is read.
#[derive(Debug)]
pub struct PackRef {
    /// Its name.
    pub name: Name,
    /// Its key.
    pub key: String,
}

/// Bytes that are at hand, or why not.
pub enum Read {
    /// The bytes; fewer if the pack ends before.
    Bytes {
        /// What was asked for.
        bytes: Vec<u8>,
        /// Whether it had to be waited for.
        waited: bool,
    },
    /// They are not at hand, and who asked does not wait.
    NotAtHand,
}

/// What became of blocks that nobody waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Brought {
    /// A part of them is there, and there may be more to do.
    Some,
    /// There is nothing more to do.
    All,
    /// The bucket did not answer.
    Nothing,
}

/// The packs of a bucket.
#[derive(Debug)]
pub struct Blocks {
    objects: Box<dyn Objects>,
    cache: Option<Cache>,
    timeout: Duration,
    flights: Mutex<Flights>,
    /// A request that somebody waited for is done.
    quiet: Condvar,
    ended: AtomicBool,
    hedging: Hedging,
    pub counts: Counts,
}

impl Blocks {
    pub fn new(objects: Box<dyn Objects>, cache: Option<Cache>, timeout: Duration) -> Self {
        Self {
            objects,
            cache,
            timeout,
            flights: Mutex::default(),
            quiet: Condvar::new(),
            ended: AtomicBool::new(false),
            hedging: Hedging::default(),
            counts: Counts::default(),
        }
    }

    /// Nobody needs anything any more.
    pub fn end(&self) {
        self.ended.store(true, Ordering::Relaxed);
        self.quiet.notify_all();
    }

    /// Whether what is brought stays here.
    pub fn keeps(&self) -> bool {
        self.cache.is_some()
    }

    /// Whether something more can be kept without something else going.
    pub fn has_room(&self) -> bool {
        self.cache.as_ref().is_some_and(Cache::has_room)
    }

    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }

    /// Reads a part of a pack. If it has to be asked for, so is what is in `wanted` and
    /// follows it.
    pub fn read(
        &self,
        pack: &PackRef,
        range: &Range<u64>,
        wanted: &Range<u64>,
        waits: bool,
    ) -> Result<Read, Failure> {
        let cached = self.cache.as_ref();
        if let Some(bytes) = cached.and_then(|cache| cache.read(pack.name, range)) {
            return Ok(Read::Bytes {
                bytes,
                waited: false,
            });
        }
        let mut held: Vec<Held> = Vec::new();
        let (mut waited, mut again) = (false, false);
        let until = Instant::now() + self.timeout;
        loop {
            let mut flights = self.flights();
            flights.remembered(pack.name, range, &mut held);
            let is_there = |block: u64| {
                held.iter().any(|held| held.has(block))
                    || cached.is_some_and(|cache| cache.has(pack.name, block))
            };
            let mut missing = blocks_of(range).filter(|block| !is_there(*block));
            let Some(first) = missing.next() else {
                drop(flights);
                let bytes = self.as_far_as_there(pack.name, range, &held);
                if bytes.len() as u64 == range.end - range.start || !held.is_empty() || again {
                    return Ok(Read::Bytes { bytes, waited });
                }
                // The cache is another one by now, or shorter than its map says.
                self.forget(pack, range);
                again = true;
                continue;
            };
            if !waits {
                return Ok(Read::NotAtHand);
            }
            waited = true;
            let was_in_vain = flights.was_in_vain(pack.name, first);
            let (flight, is_own) = match flights.at.get(&(pack.name, first)) {
                Some(flight) => (flight.clone(), false),
                None => {
                    let end = blocks_of(wanted).end() + 1;
                    let end = end.max((first + 1).next_multiple_of(DEMANDED_BLOCKS));
                    let flight = self.enter(&mut flights, pack.name, first..end, true, &is_there);
                    (flight, true)
                }
            };
            drop(flights);
            let landed = match is_own {
                true if was_in_vain => self.fly(pack, &flight, || {
                    self.get_once(pack, &flight.blocks, IN_VAIN, Cause::Demand)
                }),
                true => self.fly(pack, &flight, || {
                    match self.get_patiently(pack, &flight.blocks, until) {
                        // What is wrong may be what follows, which is not needed.
                        Err(Failure::Damaged { .. }) if flight.blocks.end > first + 1 => {
                            self.get_patiently(pack, &(first..first + 1), until)
                        }
                        got => got,
                    }
                }),
                false => match flight.wait(until) {
                    Some(landed) => landed,
                    None => return Err(Failure::late(&pack.key)),
                },
            };
            match landed {
                Ok(bytes) => {
                    let got = Held {
                        first: flight.blocks.start,
                        bytes,
                    };
                    if !got.has(first) {
                        // The pack ends before.
                        held.push(got);
                        let bytes = self.as_far_as_there(pack.name, range, &held);
                        return Ok(Read::Bytes { bytes, waited });
                    }
                    held.push(got);
                }
                // It was not tried as hard as it is for who waits.
                Err(_) if !flight.is_demanded => {}
                Err(failure) => return Err(failure),
            }
        }
    }

    /// Brings what is missing of these blocks and nobody brings already, with one attempt,
    /// once nobody waits for anything else. What may as well never be needed has to wait for
    /// all others.
    pub fn bring(&self, pack: &PackRef, blocks: Range<u64>, cause: Cause) -> Brought {
        let cached = self.cache.as_ref();
        let is_there = |block| cached.is_some_and(|cache| cache.has(pack.name, block));
        let mut flights = self.flights();
        let has_others = |flights: &Flights| match cause {
            Cause::Fill => !flights.at.is_empty(),
            _ => flights.demanded > 0,
        };
        while has_others(&flights) && !self.has_ended() {
            let waited = self.quiet.wait_timeout(flights, GIVE_WAY);
            flights = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        let is_free = |block: &u64| {
            let is_flying = flights.at.contains_key(&(pack.name, *block));
            !is_flying && !flights.remembers(pack.name, *block) && !is_there(*block)
        };
        let first = blocks.clone().find(is_free);
        let Some(first) = first.filter(|_| !self.has_ended()) else {
            return Brought::All;
        };
        let end = blocks.end.min(first + AHEAD_BLOCKS);
        let flight = self.enter(&mut flights, pack.name, first..end, false, &is_there);
        drop(flights);
        let landed = self.fly(pack, &flight, || {
            self.get_once(pack, &flight.blocks, Duration::MAX, cause)
        });
        let whole = (flight.blocks.end - flight.blocks.start) * BLOCK_BYTES;
        match landed {
            Err(Failure::Unanswered(_)) => Brought::Nothing,
            Ok(bytes) if bytes.len() as u64 == whole && flight.blocks.end < blocks.end => {
                Brought::Some
            }
            // What is damaged or missing is told to whoever needs it.
            _ => Brought::All,
        }
    }

    /// What is there of a part of a pack does not fit: it is read anew.
    pub fn forget(&self, pack: &PackRef, range: &Range<u64>) {
        if let Some(cache) = &self.cache {
            cache.forget(pack.name, range);
        }
        self.flights().forget(pack.name, range);
    }

    /// A flight for as many of these blocks as are missing and nobody brings.
    fn enter(
        &self,
        flights: &mut Flights,
        name: Name,
        blocks: Range<u64>,
        is_demanded: bool,
        is_there: &dyn Fn(u64) -> bool,
    ) -> Arc<Flight> {
        let mut end = blocks.start + 1;
        while end < blocks.end && !flights.at.contains_key(&(name, end)) && !is_there(end) {
            end += 1;
        }
        let flight = Arc::new(Flight {
            blocks: blocks.start..end,
            is_demanded,
            outcome: Mutex::default(),
            landed: Condvar::new(),
        });
        for block in flight.blocks.clone() {
            flights.at.insert((name, block), flight.clone());
        }
        flights.demanded += usize::from(is_demanded);
        flight
    }

    /// Makes the request of a flight, and lets it land, however that ends.
    fn fly(
        &self,
        pack: &PackRef,
        flight: &Arc<Flight>,
        get: impl FnOnce() -> Result<Vec<u8>, Failure>,
    ) -> Result<Arc<Vec<u8>>, Failure> {
        let mut landing = Landing {
            blocks: self,
            name: pack.name,
            flight,
            kept: true,
            outcome: Err(Failure::ended(&pack.key)),
        };
        let got = get().map(Arc::new);
        if let Ok(bytes) = &got {
            let first = flight.blocks.start;
            let cache = self.cache.as_ref();
            landing.kept = cache.is_some_and(|cache| cache.write(pack.name, first, bytes));
        }
        landing.outcome.clone_from(&got);
        drop(landing);
        got
    }

    /// Asks until there is an answer, or the time is over.
    fn get_patiently(
        &self,
        pack: &PackRef,
        blocks: &Range<u64>,
        until: Instant,
    ) -> Result<Vec<u8>, Failure> {
        let mut pause = FIRST_PAUSE;
        let left = || until.saturating_duration_since(Instant::now());
        loop {
            let within = left().max(LEAST_ATTEMPT);
            match self.get_once(pack, blocks, within, Cause::Demand) {
                Err(Failure::Unanswered(error)) => {
                    let left = left();
                    if left.is_zero() || self.has_ended() {
                        self.flights().note_in_vain(pack.name, blocks.clone());
                        return Err(Failure::Unanswered(error));
                    }
                    // Not all hosts at once.
                    let part = crate::random().map_or(128, |bits| bits.to_le_bytes()[0]);
                    thread::sleep((pause / 2 + pause * u32::from(part) / 512).min(left));
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
                other => return other,
            }
        }
    }

    fn get_once(
        &self,
        pack: &PackRef,
        blocks: &Range<u64>,
        within: Duration,
        cause: Cause,
    ) -> Result<Vec<u8>, Failure> {
        self.counts.asked(cause);
        let got = match cause {
            Cause::Demand => self.get_hedged(pack, blocks, within),
            _ => self.get(pack, blocks, within, None),
        };
        self.counts.answered(cause, got.as_ref().ok().map(Vec::len));
        got
    }

    /// What somebody waits for, and is late, is asked for a second time.
    fn get_hedged(
        &self,
        pack: &PackRef,
        blocks: &Range<u64>,
        within: Duration,
    ) -> Result<Vec<u8>, Failure> {
        let may = || {
            let may = self.hedging.may();
            if may {
                self.counts.hedged();
            }
            may
        };
        let won = || self.counts.hedge_won();
        let hedge = self.hedging.late_after();
        let hedge = hedge.map(|after| Hedge {
            after,
            may: &may,
            won: &won,
        });
        let began = Instant::now();
        let got = self.get(pack, blocks, within, hedge);
        if got.is_ok() {
            self.hedging.answered(began.elapsed());
        }
        got
    }

    fn get(
        &self,
        pack: &PackRef,
        blocks: &Range<u64>,
        within: Duration,
        hedge: Option<Hedge<'_>>,
    ) -> Result<Vec<u8>, Failure> {
        let len = usize::try_from((blocks.end - blocks.start) * BLOCK_BYTES);
        let part = (blocks.start * BLOCK_BYTES, len.unwrap_or(usize::MAX));
        match self
            .objects
            .get_within(&pack.key, Some(part), within, hedge)?
        {
            Some(bytes) => Ok(bytes),
            // A filesystem that is not mounted has no objects at all.
            None => match self.objects.exists(crate::config::CONFIG_KEY)? {
                true => Err(Failure::Missing {
                    key: pack.key.clone(),
                }),
                false => Err(Failure::Unanswered(Unanswered {
                    what: "read",
                    key: pack.key.clone(),
                    reason: "the bucket is not there".to_owned(),
                    wrong: None,
                    refused: false,
                })),
            },
        }
    }

    /// The beginning of a range, from what is held and what is in the cache.
    fn as_far_as_there(&self, name: Name, range: &Range<u64>, held: &[Held]) -> Vec<u8> {
        let mut out = Vec::new();
        for block in blocks_of(range) {
            let start = range.start.max(block * BLOCK_BYTES);
            let part = start..range.end.min((block + 1) * BLOCK_BYTES);
            let before = out.len();
            match held.iter().rev().find(|held| held.has(block)) {
                Some(held) => out.extend_from_slice(held.part(&part)),
                None => {
                    let cached = self.cache.as_ref();
                    let cached = cached.and_then(|cache| cache.read(name, &part));
                    out.extend_from_slice(&cached.unwrap_or_default());
                }
            }
            if ((out.len() - before) as u64) < part.end - part.start {
                break;
            }
        }
        out
    }

    fn flights(&self) -> MutexGuard<'_, Flights> {
        self.flights.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Lets a flight land when it is dropped: nobody waits for ever.
struct Landing<'a> {
    blocks: &'a Blocks,
    name: Name,
    flight: &'a Arc<Flight>,
    kept: bool,
    outcome: Result<Arc<Vec<u8>>, Failure>,
}

impl Drop for Landing<'_> {
    fn drop(&mut self) {
        let mut flights = self.blocks.flights();
        if let (Ok(bytes), false) = (&self.outcome, self.kept) {
            let held = Held {
                first: self.flight.blocks.start,
                bytes: bytes.clone(),
            };
            flights.remember(self.name, held);
        }
        for block in self.flight.blocks.clone() {
            flights.at.remove(&(self.name, block));
        }
        flights.demanded -= usize::from(self.flight.is_demanded);
        drop(flights);
        let outcome = &self.flight.outcome;
        *outcome.lock().unwrap_or_else(PoisonError::into_inner) = Some(self.outcome.clone());
        self.flight.landed.notify_all();
        self.blocks.quiet.notify_all();
    }
}
