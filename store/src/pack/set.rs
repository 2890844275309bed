//! The packs of a store: opening sealed ones, starting new ones, sweeping
//! what dead writers left.

use std::collections::HashSet;
use std::fs::{self, OpenOptions};
use std::io::ErrorKind::PermissionDenied;
use std::os::unix::fs::MetadataExt as _;
use std::sync::{Arc, PoisonError, RwLock};

use quick_cache::sync::Cache;

use crate::durable;
use crate::error::{Damage, Error, IoContext as _, Result, is_unreadable};
use crate::format::config::{Config, fill_random};
use crate::format::pack_v2::Description;
use crate::gc::state::CollectorState;
use crate::keys::Keys;
use crate::layout::Layout;
use crate::lock::{self, LockKind};
use crate::opening::missing_directory;
use crate::pack::reader::{FooterBlocks, PackReader, Stamp};
use crate::pack::writer::{PackWriter, Version};
use crate::pack::{PackIdentity, PackNumber};
use crate::page::PageSize;
use crate::regular::{self, Opened};
use crate::sim::{self, Fault, StepKind};

/// Packs kept open at most, in a process that may have many descriptors.
const MAX_OPEN: u64 = 512;
/// Blocks of footers kept, of 3 KiB each: 12 MiB, for half a million chunks.
const FOOTER_BLOCKS: usize = 4096;
/// Numbers remembered as those of packs that are gone.
const MAX_ABSENT: usize = 1 << 16;

/// The packs of one store. Sealed packs are opened when first needed, and some
/// of them kept open.
pub(crate) struct PackSet {
    layout: Layout,
    page_size: PageSize,
    keys: Keys,
    open: Cache<PackNumber, Arc<PackReader>>,
    blocks: Arc<FooterBlocks>,
    /// Packs that were not there when they were asked for. Numbers are never used
    /// again, so stale hints to them need not ask the disk each time.
    absent: RwLock<HashSet<PackNumber>>,
}

impl PackSet {
    pub fn new(layout: Layout, config: &Config) -> Self {
        // A quarter of the descriptors is for packs.
        let descriptors = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let most = descriptors.map_or(MAX_OPEN, |limit| (limit / 4).clamp(8, MAX_OPEN));
        Self {
            layout,
            page_size: config.page_size,
            keys: Keys::of_store(config),
            open: Cache::new(usize::try_from(most).expect("small")),
            blocks: Arc::new(Cache::new(FOOTER_BLOCKS)),
            absent: RwLock::default(),
        }
    }

    /// The sealed pack of this number; `None` if there is none.
    pub fn get(&self, number: PackNumber) -> Result<Option<Arc<PackReader>>> {
        if let Some(pack) = self.open.get(&number) {
            return Ok(Some(pack));
        }
        let absent = self.absent.read().unwrap_or_else(PoisonError::into_inner);
        if absent.contains(&number) {
            return Ok(None);
        }
        drop(absent);
        let Some(pack) = self.open_now(number)?.map(Arc::new) else {
            let mut absent = self.absent.write().unwrap_or_else(PoisonError::into_inner);
            if absent.len() < MAX_ABSENT {
                absent.insert(number);
            }
            return Ok(None);
        };
        self.open.insert(number, pack.clone());
        Ok(Some(pack))
    }

    /// Opens the pack that is in its place now, whatever is open.
    pub fn open_now(&self, number: PackNumber) -> Result<Option<PackReader>> {
        let path = self.layout.pack(number);
        self.with_descriptors(|| {
            let blocks = self.blocks.clone();
            PackReader::open(&path, number, self.page_size, &self.keys, blocks)
        })
    }

    /// Opens a pack that was cut off among its chunks: [`PackReader::open_unsealed`].
    pub fn open_unsealed(&self, number: PackNumber) -> Result<Option<PackReader>> {
        let path = self.layout.pack(number);
        self.with_descriptors(|| {
            let blocks = self.blocks.clone();
            PackReader::open_unsealed(&path, number, self.page_size, &self.keys, blocks)
        })
    }

    /// Opens a file; packs that are open give up theirs if there are no more descriptors.
    fn with_descriptors<T>(&self, open: impl Fn() -> Result<T>) -> Result<T> {
        match open() {
            Err(error) if error.lacks_descriptors() => {
                self.open.clear();
                open()
            }
            other => other,
        }
    }

    /// Whether the pack that was read is in its place now: the same file, or one of
    /// the same identity.
    pub fn is_in_place(&self, number: PackNumber, read: Stamp) -> Result<bool> {
        let path = self.layout.pack(number);
        let found = match fs::symlink_metadata(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            other => other.context("inspect", &path)?,
        };
        if !found.is_file() {
            return Ok(false);
        }
        if read.is_of(&found) {
            return Ok(true);
        }
        match self.open_now(number) {
            Ok(pack) => Ok(pack.is_some_and(|pack| pack.identity() == read.identity)),
            Err(Error::Damaged(_)) => Ok(false),
            Err(other) => Err(other),
        }
    }

    /// Whether the sealed pack is in its place now, whatever is open.
    pub fn is_there(&self, number: PackNumber) -> Result<bool> {
        let path = self.layout.pack(number);
        match fs::symlink_metadata(&path) {
            Ok(found) => Ok(found.is_file()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error).context("inspect", &path),
        }
    }

    /// Lets go of a pack that was deleted.
    pub fn forget(&self, number: PackNumber) {
        self.open.remove(&number);
    }

    /// Lets go of all packs whose files are deleted, so that their space is free.
    pub fn forget_deleted(&self) {
        self.open.retain(|_, pack| !pack.is_deleted());
    }

    /// Lets go of all packs: what has been moved away is not found any more.
    pub fn reopen_all(&self) {
        self.open.clear();
        self.look_again();
    }

    /// Looks at the disk again for packs that were not there, and for those that are
    /// not there any more. A number may lead to another file now: after a copy, a
    /// repair or an upgrade.
    pub fn look_again(&self) {
        self.open.retain(|number, pack| {
            if sim::on(Fault::DeletedPackTrusted) {
                return true;
            }
            let found = fs::symlink_metadata(self.layout.pack(*number));
            found.is_ok_and(|found| pack.stamp().is_of(&found))
        });
        self.absent
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }

    /// The numbers of all sealed packs, ascending.
    pub fn sealed(&self) -> Result<Vec<PackNumber>> {
        let mut numbers = self.numbers_with_extension("pack")?;
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// The numbers of the sealed packs whose chunks are in the index if they
    /// ever will be, ascending: not those that a live process is publishing.
    pub fn published(&self) -> Result<Vec<PackNumber>> {
        let mut numbers = Vec::new();
        for number in self.sealed()? {
            let path = self.layout.pack(number);
            let file = match regular::open(&path) {
                Ok(Opened::File(file)) => file,
                // Its writer has failed and removed it.
                Ok(Opened::Absent) => continue,
                // Nobody publishes it: whoever opens it says what it is.
                Ok(Opened::Odd(_)) => {
                    numbers.push(number);
                    continue;
                }
                // The same, but that somebody may: it is never judged, since it cannot be
                // opened.
                Err(error) if is_unreadable(&error) || error.kind() == PermissionDenied => {
                    numbers.push(number);
                    continue;
                }
                Err(other) => return Err(other).context("open", &path),
            };
            if sim::on(Fault::PublishingPackJudged) || lock::try_exclusive(&file, &path)? {
                numbers.push(number);
            }
        }
        Ok(numbers)
    }

    /// Whether a live process has sealed the pack and not entered all of it yet.
    pub fn is_being_published(&self, number: PackNumber) -> Result<bool> {
        let path = self.layout.pack(number);
        match regular::open(&path).context("open", &path)? {
            Opened::File(file) => Ok(!lock::try_exclusive(&file, &path)?),
            Opened::Absent | Opened::Odd(_) => Ok(false),
        }
    }

    /// Starts a new pack under a number never used before.
    pub fn create(&self) -> Result<PackWriter> {
        let allocate = lock::acquire(&self.layout, LockKind::Allocate, lock::DEFAULT_TIMEOUT)?;
        if !self.layout.packs().is_dir() {
            return Err(missing_directory(&self.layout.packs()));
        }
        self.settle_format()?;
        let number = self.next_number()?;
        let path = self.layout.open_pack(number);
        let mut options = OpenOptions::new();
        options.write(true).create_new(true);
        let file = durable::create(&path, &options).context("create", &path)?;
        // Locked before the allocate lock is released, so that a sweep never
        // sees a live writer's file unlocked.
        lock::try_exclusive(&file, &path)?;
        drop(allocate);
        let mut identity = [0; 16];
        fill_random(&mut identity)?;
        let version = self.version_of(number, PackIdentity(identity));
        PackWriter::new(&self.layout, number, version, file)
    }

    /// Starts a pack that is to take the place of this one, with the same chunks at the
    /// same positions: so it is of the same identity, and who relies on the one relies
    /// on the other. The caller holds the collect lock: nobody else writes it.
    pub fn create_instead(&self, pack: &PackReader) -> Result<PackWriter> {
        self.settle_format()?;
        let number = pack.number();
        let _allocate = lock::acquire(&self.layout, LockKind::Allocate, lock::DEFAULT_TIMEOUT)?;
        let path = self.layout.open_pack(number);
        durable::unlink(&path)?;
        let mut options = OpenOptions::new();
        options.write(true).create_new(true);
        let file = durable::create(&path, &options).context("create", &path)?;
        lock::try_exclusive(&file, &path)?;
        let version = self.version_of(number, pack.identity());
        PackWriter::new(&self.layout, number, version, file)
    }

    /// Makes a configuration durable that says since a moment ago that there are packs
    /// of version 2. Who began the upgrade may have been killed before it was; were the
    /// packs durable first, a power cut could leave them in a store of format 1.
    fn settle_format(&self) -> Result<()> {
        if !self.keys.is_upgrading() || sim::on(Fault::UpgradeNotSettled) {
            return Ok(());
        }
        durable::sync_dir(self.layout.root())
    }

    fn version_of(&self, number: PackNumber, identity: PackIdentity) -> Version {
        match self.keys.check_of(identity.0) {
            None => Version::one(number, self.page_size),
            Some(key_check) => Version::Two(Description {
                identity,
                page_size: self.page_size,
                key_check,
            }),
        }
    }

    /// Removes unsealed packs whose writers are gone. Returns how many.
    pub fn sweep(&self) -> Result<usize> {
        let _allocate = lock::acquire(&self.layout, LockKind::Allocate, lock::DEFAULT_TIMEOUT)?;
        let mut swept = 0;
        for number in self.numbers_with_extension("open")? {
            let path = self.layout.open_pack(number);
            // What is not a file is no pack of anybody's.
            let Ok(Opened::File(file)) = regular::open(&path) else {
                continue;
            };
            if lock::try_exclusive(&file, &path)? {
                durable::unlink(&path)?;
                swept += 1;
            }
        }
        Ok(swept)
    }

    /// One more than the highest number in use, condemned or handed out. A pack
    /// under a condemned number could be deleted at once. The counter file needs
    /// no flush: it only matters to processes that a power cut ends too. It is
    /// overwritten in place, so that a full disk does not empty it.
    ///
    /// The directory is listed only if the counter may be older than it: written
    /// before the last start of the machine, or copied along with the store.
    fn next_number(&self) -> Result<PackNumber> {
        let counter_path = self.layout.locks().join("next-pack");
        if let Some(reason) = regular::oddity(&counter_path) {
            let path = counter_path;
            return Err(Damage::File { path, reason }.into());
        }
        let text = regular::read_to_string(&counter_path).unwrap_or_default();
        let (counted, written) = text.trim().split_once(' ').unwrap_or((text.trim(), ""));
        let mut next: u32 = counted.parse().unwrap_or(1);
        let origin = self.origin();
        if origin.as_deref() != Some(written) || self.is_taken(PackNumber(next)) {
            for extension in ["pack", "open"] {
                for number in self.numbers_with_extension(extension)? {
                    next = next.max(number.0.saturating_add(1));
                }
            }
        }
        if next == u32::MAX {
            // Only a foreign file can have brought this about.
            return Err(Damage::Pack {
                path: self.layout.pack(PackNumber(next)),
                reason: "its number leaves none for new packs",
            }
            .into());
        }
        let condemned = CollectorState::read(&self.layout)?.condemned;
        if let Some(last) = condemned.keys().next_back()
            && !sim::on(Fault::NumberUsedAgain)
        {
            next = next.max(last.0 + 1);
        }
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false);
        let file = durable::create(&counter_path, &regular::never_waiting(&options))
            .context("write", &counter_path)?;
        let line = format!("{:010} {}\n", next + 1, origin.unwrap_or_default());
        durable::write_at(&file, &counter_path, line.as_bytes(), 0)?;
        Ok(PackNumber(next))
    }

    /// Where and since when a counter counts: this start of this machine, and this
    /// directory. Always equally long; `None` if it cannot be told.
    fn origin(&self) -> Option<String> {
        if sim::is_simulated() {
            return None;
        }
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        let dir = fs::metadata(self.layout.packs()).ok()?;
        Some(format!(
            "{:.36} {:016x}:{:016x}",
            boot,
            dir.dev(),
            dir.ino()
        ))
    }

    fn is_taken(&self, number: PackNumber) -> bool {
        [self.layout.pack(number), self.layout.open_pack(number)]
            .iter()
            .any(|path| path.exists())
    }

    fn numbers_with_extension(&self, extension: &str) -> Result<Vec<PackNumber>> {
        let dir = self.layout.packs();
        sim::before(StepKind::List, &dir).context("list", &dir)?;
        let mut numbers = Vec::new();
        let entries = match fs::read_dir(&dir) {
            // Then none of them is there.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(numbers),
            other => other.context("list", &dir)?,
        };
        for entry in entries {
            let name = entry.context("list", &dir)?.file_name();
            let number = name
                .to_str()
                .and_then(|name| name.strip_suffix(extension)?.strip_suffix('.'))
                .and_then(PackNumber::parse);
            numbers.extend(number);
        }
        Ok(numbers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::config::StoreFormat;

    #[test]
    fn numbers_go_on_whatever_became_of_counter_and_packs() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path().to_owned());
        for sub in layout.directories() {
            fs::create_dir(sub).unwrap();
        }
        let config = Config::new(PageSize::KIB_4, StoreFormat::Two).unwrap();
        let set = PackSet::new(layout.clone(), &config);
        let next = || set.next_number().unwrap().0;
        assert_eq!([next(), next()], [1, 2]);
        // Deleted packs' numbers are not used again.
        assert_eq!(next(), 3);
        let touch = |number| fs::write(layout.pack(PackNumber(number)), b"").unwrap();
        let counter = layout.locks().join("next-pack");
        // A counter that is gone, of another start, of another directory, too low.
        touch(9);
        assert_eq!(next(), 4, "the counter says enough");
        fs::remove_file(&counter).unwrap();
        assert_eq!(next(), 10);
        touch(20);
        let text = fs::read_to_string(&counter).unwrap();
        let other = text.replacen(|it: char| it.is_ascii_hexdigit() && it != '0', "0", 1);
        for old in ["0000000002\n", "", "what", &other.replace('-', "0")] {
            fs::write(&counter, old).unwrap();
            assert!(next() >= 21, "{old:?}");
        }
        let highest = next();
        touch(highest + 1);
        assert_eq!(next(), highest + 2, "the next number is taken");
    }
}
