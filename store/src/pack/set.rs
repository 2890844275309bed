//! The packs of a store: opening sealed ones, starting new ones, sweeping
//! what dead writers left.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::sync::{Arc, PoisonError, RwLock};

use crate::durable;
use crate::error::{Damage, IoContext as _, Result};
use crate::gc::state::CollectorState;
use crate::layout::Layout;
use crate::lock::{self, LockKind};
use crate::pack::PackNumber;
use crate::pack::reader::PackReader;
use crate::pack::writer::PackWriter;
use crate::page::PageSize;
use crate::sim::{self, StepKind};

/// The packs of one store. Sealed packs are mapped when first needed.
#[derive(Debug)]
pub(crate) struct PackSet {
    layout: Layout,
    page_size: PageSize,
    open: RwLock<HashMap<PackNumber, Arc<PackReader>>>,
}

impl PackSet {
    pub fn new(layout: Layout, page_size: PageSize) -> Self {
        Self {
            layout,
            page_size,
            open: RwLock::default(),
        }
    }

    /// The sealed pack of this number; `None` if there is none.
    pub fn get(&self, number: PackNumber) -> Result<Option<Arc<PackReader>>> {
        {
            let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
            if let Some(pack) = open.get(&number) {
                return Ok(Some(pack.clone()));
            }
        }
        let Some(pack) =
            PackReader::open(self.layout.pack(number), number, self.page_size)?.map(Arc::new)
        else {
            return Ok(None);
        };
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        Ok(Some(open.entry(number).or_insert(pack).clone()))
    }

    /// Lets go of a pack that was deleted.
    pub fn forget(&self, number: PackNumber) {
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        open.remove(&number);
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
            let file = match File::open(&path) {
                // Its writer has failed and removed it.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                other => other.context("open", &path)?,
            };
            if lock::try_exclusive(&file, &path)? {
                numbers.push(number);
            }
        }
        Ok(numbers)
    }

    /// Starts a new pack under a number never used before.
    pub fn create(&self) -> Result<PackWriter> {
        let allocate = lock::acquire(&self.layout, LockKind::Allocate, lock::DEFAULT_TIMEOUT)?;
        let number = self.next_number()?;
        let path = self.layout.open_pack(number);
        let mut options = OpenOptions::new();
        options.write(true).create_new(true);
        let file = durable::create(&path, &options).context("create", &path)?;
        // Locked before the allocate lock is released, so that a sweep never
        // sees a live writer's file unlocked.
        lock::try_exclusive(&file, &path)?;
        drop(allocate);
        PackWriter::new(&self.layout, number, self.page_size, file)
    }

    /// Removes unsealed packs whose writers are gone. Returns how many.
    pub fn sweep(&self) -> Result<usize> {
        let _allocate = lock::acquire(&self.layout, LockKind::Allocate, lock::DEFAULT_TIMEOUT)?;
        let mut swept = 0;
        for number in self.numbers_with_extension("open")? {
            let path = self.layout.open_pack(number);
            let Ok(file) = File::open(&path) else {
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
    fn next_number(&self) -> Result<PackNumber> {
        let counter_path = self.layout.locks().join("next-pack");
        let counted: u32 = fs::read_to_string(&counter_path)
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(1);
        let mut next = counted;
        for extension in ["pack", "open"] {
            for number in self.numbers_with_extension(extension)? {
                next = next.max(number.0.saturating_add(1));
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
        if let Some(last) = condemned.keys().next_back() {
            next = next.max(last.0 + 1);
        }
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false);
        let file = durable::create(&counter_path, &options).context("write", &counter_path)?;
        let line = format!("{:010}\n", next + 1);
        durable::write_at(&file, &counter_path, line.as_bytes(), 0)?;
        Ok(PackNumber(next))
    }

    fn numbers_with_extension(&self, extension: &str) -> Result<Vec<PackNumber>> {
        let dir = self.layout.packs();
        sim::before(StepKind::List, &dir).context("list", &dir)?;
        let mut numbers = Vec::new();
        for entry in fs::read_dir(&dir).context("list", &dir)? {
            let name = entry.context("list", &dir)?.file_name();
            let number = name
                .to_str()
                .and_then(|name| name.strip_suffix(extension)?.strip_suffix('.'))
                .and_then(|digits| {
                    let number = PackNumber(u32::from_str_radix(digits, 16).ok()?);
                    // Not `1` nor `+0000001`, which would be 00000001 once more.
                    (number.to_string() == digits).then_some(number)
                });
            numbers.extend(number);
        }
        Ok(numbers)
    }
}
