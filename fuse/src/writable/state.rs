//! What a clone is made from, and whether its view ended in order: what decides how much of
//! what was written is found again.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};
use snapstore_overlay::step;

use super::record::{CHECKED, Record, first, parse, replace, sync_dir};
use crate::error::{Error, Result, cannot};

const STATE: &str = "state.json";
pub(super) const ENDED: &str = "ended.json";

/// What a clone is made from.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct State {
    #[serde(default = "first")]
    pub version: u32,
    pub base: String,
    /// Of the boot in which everything that the journals say is known to be there.
    pub boot: String,
    /// The first segment of each image's journal; those of which nothing was written have
    /// none.
    pub first_segments: BTreeMap<String, u64>,
    /// How many entries each image's journal had at least when its server ended in order.
    #[serde(default)]
    pub entries: BTreeMap<String, u64>,
    /// The files of its own that were there then, and how long each was.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub files: BTreeMap<String, u64>,
}

/// That a view's server ended in order, and all that was written is on the disk. It goes
/// before anything more is written.
#[derive(Serialize, Deserialize)]
pub(super) struct Ended {
    version: u32,
    /// The clones that have a state.
    states: BTreeSet<u32>,
}

impl Record for State {
    fn version(&self) -> u32 {
        self.version
    }
}

impl Record for Ended {
    fn version(&self) -> u32 {
        self.version
    }
}

impl Default for State {
    fn default() -> Self {
        Self {
            version: CHECKED,
            base: String::new(),
            boot: boot(),
            first_segments: BTreeMap::new(),
            entries: BTreeMap::new(),
            files: BTreeMap::new(),
        }
    }
}

impl State {
    /// Of a clone; `None` if nothing was ever written to it.
    pub fn read(clone: &Path) -> Result<Option<Self>> {
        let damaged = |reason: String| Error::StateDamaged {
            path: clone.join(STATE),
            reason,
            clone: clone.to_owned(),
        };
        match read(clone, STATE)? {
            Some(bytes) => parse(&bytes).map(Some).map_err(damaged),
            // It was on the disk before the first segment of any journal was removed.
            None if begins_later(clone)? => Err(damaged("it is gone".to_owned())),
            None => Ok(None),
        }
    }

    /// Whether a clone has one.
    pub fn is_there(clone: &Path) -> bool {
        clone.join(STATE).exists()
    }

    /// When this returns, it is on the disk.
    pub fn write(&mut self, clone: &Path) -> Result<()> {
        self.version = CHECKED;
        replace(clone, STATE, self)
    }
}

impl Ended {
    /// Of a view, whose clones `states` have a state. All is on the disk already: what this
    /// says must not get there before that.
    pub fn write(place: &Path, states: BTreeSet<u32>) -> Result<()> {
        let ended = Self {
            version: CHECKED,
            states,
        };
        replace(place, ENDED, &ended)
    }

    /// Whether the view in `place` ended so.
    pub fn is_of(place: &Path) -> Result<bool> {
        let damaged = |reason: String| Error::EndDamaged {
            path: place.join(ENDED),
            reason,
        };
        let Some(bytes) = read(place, ENDED)? else {
            return Ok(false);
        };
        let ended: Self = parse(&bytes).map_err(damaged)?;
        for number in ended.states {
            let clone = place.join(number.to_string());
            // Who removed all of a clone gave up what was written to it.
            if clone.exists() && !State::is_there(&clone) {
                return Err(Error::StateDamaged {
                    path: clone.join(STATE),
                    reason: "it is gone".to_owned(),
                    clone,
                });
            }
        }
        Ok(true)
    }

    /// The view goes on. On the disk when this returns: else a power cut would look like that
    /// end, and what was written since and is not on the disk would be left out without a word.
    pub fn forget(place: &Path) -> Result<()> {
        step("forget that a view has ended");
        let path = place.join(ENDED);
        match fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other.map_err(|error| cannot("remove", &path, error))?,
        }
        sync_dir(place)
    }
}

/// Which boot of this machine this is.
pub(crate) fn boot() -> String {
    // Tests have no other way to another boot.
    #[cfg(debug_assertions)]
    if let Ok(boot) = std::env::var("SNAPSTORE_BOOT_ID") {
        return boot;
    }
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id");
    id.map_or_else(|_| String::new(), |id| id.trim().to_owned())
}

fn read(dir: &Path, name: &str) -> Result<Option<Vec<u8>>> {
    let path = dir.join(name);
    match fs::read(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other
            .map(Some)
            .map_err(|error| cannot("read", &path, error)),
    }
}

/// Whether a journal there has segments, and not the first.
fn begins_later(clone: &Path) -> Result<bool> {
    let failed = |error| cannot("list", clone, error);
    let mut first_of: BTreeMap<String, u64> = BTreeMap::new();
    for entry in fs::read_dir(clone).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        let segment = name.to_str().and_then(|name| {
            let (image, digits) = name.strip_suffix(".journal")?.rsplit_once('.')?;
            Some((image, u64::from_str_radix(digits, 16).ok()?))
        });
        if let Some((image, segment)) = segment {
            let first = first_of.entry(image.to_owned()).or_insert(segment);
            *first = segment.min(*first);
        }
    }
    Ok(first_of.values().any(|first| *first > 0))
}
