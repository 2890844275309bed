//! A store and the model of it, and how each step changes both.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, ensure};
use snapstore_store::{
    CommitRequest, Error, Extent, GcOptions, ImageReader, ImageRole, Input, InputData, InputKind,
    PageSize, ParentChoice, Region, Silent, SnapshotId, Store,
};

use crate::image::{Model, fill};
use crate::{Content, Edit, ParentKind, Step};

/// The smallest part of a page that a diff can change.
const BLOCK_BYTES: usize = 4096;
/// The most blocks of a test's extent.
const EXTENT_BLOCKS: usize = 3;

/// Blocks by their number in the image.
type Blocks = BTreeMap<u64, Vec<u8>>;

pub struct World {
    dir: PathBuf,
    page_len: usize,
    pages: u64,
    store: Store,
    /// Opened when the store was empty, and never again.
    stale: Store,
    tags: BTreeMap<String, Model>,
    committed: BTreeMap<SnapshotId, Model>,
}

impl World {
    pub fn new(dir: &Path, page_size: PageSize, pages: u64) -> anyhow::Result<Self> {
        let path = dir.join("store");
        Ok(Self {
            dir: dir.to_owned(),
            page_len: page_size.bytes() as usize,
            pages,
            store: Store::create(&path, page_size)?,
            stale: Store::open(&path)?,
            tags: BTreeMap::new(),
            committed: BTreeMap::new(),
        })
    }

    pub fn step(&mut self, step: &Step) -> anyhow::Result<()> {
        match step {
            Step::Fresh(tag, grown, edits) => self.fresh(*tag, *grown, edits)?,
            Step::Full(tag, from, parent, edits) => self.full(*tag, *from, *parent, edits)?,
            Step::Diff(tag, from, edits) => self.diff(*tag, *from, edits)?,
            Step::FullExtents(tag, from, edits) => self.full_extents(*tag, *from, edits)?,
            Step::DiffExtents(tag, from, edits, same) => {
                self.diff_extents(*tag, *from, edits, same)?;
            }
            Step::Retag(from, to) => self.retag(*from, *to)?,
            Step::Remove(tag) => self.remove(*tag)?,
            Step::Collect(keep_percent) => {
                let options = GcOptions {
                    dry_run: false,
                    keep_percent: *keep_percent,
                };
                let report = self.store.gc(options, &Silent)?;
                ensure!(report.waiting_packs == 0, "nobody writes: {report:?}");
                self.check_all()?;
            }
            Step::Reopen => self.store = Store::open(&self.dir.join("store"))?,
            Step::Verify(read_data) => self.verify(*read_data)?,
            Step::Repair(lose_index) => self.repair(*lose_index)?,
            Step::Compare(old, new) => self.compare(*old, *new)?,
            Step::Read(tag, at, len) => self.read(*tag, *at, *len)?,
        }
        let found: Vec<String> = self.store.tags()?.into_keys().collect();
        ensure!(found.iter().eq(self.tags.keys()), "tags: {found:?}");
        Ok(())
    }

    fn fresh(&mut self, tag: u8, grown: u64, edits: &[Edit]) -> anyhow::Result<()> {
        let mut image = Model {
            pages: self.pages + grown,
            data: BTreeMap::new(),
        };
        for page in 0..self.pages.min(96) {
            image.set(
                page,
                fill(Content::Tweaked(page % 31, grown as usize), self.page_len),
            );
        }
        self.commit_full(tag, image, ParentChoice::Automatic, edits)
    }

    fn full(
        &mut self,
        tag: u8,
        from: u8,
        parent: ParentKind,
        edits: &[Edit],
    ) -> anyhow::Result<()> {
        let Some(image) = self.tags.get(&name(from)).cloned() else {
            return Ok(());
        };
        let parent = match parent {
            ParentKind::Automatic => ParentChoice::Automatic,
            ParentKind::Named => ParentChoice::Named(name(from)),
            ParentKind::Nothing => ParentChoice::Nothing,
        };
        self.commit_full(tag, image, parent, edits)
    }

    fn commit_full(
        &mut self,
        tag: u8,
        mut image: Model,
        parent: ParentChoice,
        edits: &[Edit],
    ) -> anyhow::Result<()> {
        let file = self.input(image.pages)?;
        for edit in edits {
            let page = edit.page % image.pages;
            let bytes = fill(edit.content, self.page_len);
            // Zeros that are written take up space, and still are zeros.
            file.write_all_at(&bytes, page * self.page_len as u64)?;
            image.set(page, bytes);
        }
        for (page, bytes) in &image.data {
            file.write_all_at(bytes, page * self.page_len as u64)?;
        }
        let data = InputData::File(self.dir.join("input"));
        self.commit(tag, image, parent, data, InputKind::Full)
    }

    fn diff(&mut self, tag: u8, from: u8, edits: &[Edit]) -> anyhow::Result<()> {
        let Some(mut image) = self.tags.get(&name(from)).cloned() else {
            return Ok(());
        };
        let file = self.input(image.pages)?;
        for edit in edits {
            let page = edit.page % image.pages;
            let start = page * self.page_len as u64;
            let (at, len) = match edit.block {
                Some(block) => (block * BLOCK_BYTES % self.page_len, BLOCK_BYTES),
                None => (0, self.page_len),
            };
            let bytes = fill(edit.content, len);
            file.write_all_at(&bytes, start + at as u64)?;
            let mut whole = image.read(self.page_len, start, self.page_len);
            whole[at..at + len].copy_from_slice(&bytes);
            image.set(page, whole);
        }
        let parent = ParentChoice::Named(name(from));
        let data = InputData::File(self.dir.join("input"));
        // Edits may leave no hole.
        self.commit(tag, image, parent, data, InputKind::DenseDiff)
    }

    fn full_extents(&mut self, tag: u8, from: u8, edits: &[Edit]) -> anyhow::Result<()> {
        let Some(mut image) = self.tags.get(&name(from)).cloned() else {
            return Ok(());
        };
        let mut blocks = Blocks::new();
        let per_page = (self.page_len / BLOCK_BYTES) as u64;
        for (page, bytes) in &image.data {
            for (block, bytes) in (page * per_page..).zip(bytes.chunks(BLOCK_BYTES)) {
                if bytes.iter().any(|byte| *byte != 0) {
                    blocks.insert(block, bytes.to_vec());
                }
            }
        }
        self.edit_blocks(&mut image, &mut blocks, edits);
        let data = self.extents(image.pages, &blocks)?;
        let parent = match from % 3 {
            0 => ParentChoice::Automatic,
            1 => ParentChoice::Named(name(from)),
            _ => ParentChoice::Nothing,
        };
        self.commit(tag, image, parent, data, InputKind::Full)
    }

    fn diff_extents(
        &mut self,
        tag: u8,
        from: u8,
        edits: &[Edit],
        same: &[Edit],
    ) -> anyhow::Result<()> {
        let Some(mut image) = self.tags.get(&name(from)).cloned() else {
            return Ok(());
        };
        let mut blocks = Blocks::new();
        for edit in same {
            let (offset, len) = self.place(&image, edit);
            let bytes = image.read(self.page_len, offset, len);
            insert_blocks(&mut blocks, offset, &bytes);
        }
        self.edit_blocks(&mut image, &mut blocks, edits);
        let data = self.extents(image.pages, &blocks)?;
        // Pinned by nobody, but tagged.
        let parent = ParentChoice::Pinned(self.store.resolve(&name(from))?);
        self.commit(tag, image, parent, data, InputKind::Diff)
    }

    /// Where an edit is in the image, in bytes, and how long.
    fn place(&self, image: &Model, edit: &Edit) -> (u64, usize) {
        let start = edit.page % image.pages * self.page_len as u64;
        match edit.block {
            Some(block) => (
                start + (block * BLOCK_BYTES % self.page_len) as u64,
                BLOCK_BYTES,
            ),
            None => (start, self.page_len),
        }
    }

    fn edit_blocks(&self, image: &mut Model, blocks: &mut Blocks, edits: &[Edit]) {
        for edit in edits {
            let (offset, len) = self.place(image, edit);
            let bytes = fill(edit.content, len);
            insert_blocks(blocks, offset, &bytes);
            let page = edit.page % image.pages;
            let start = page * self.page_len as u64;
            let mut whole = image.read(self.page_len, start, self.page_len);
            whole[(offset - start) as usize..][..len].copy_from_slice(&bytes);
            image.set(page, whole);
        }
    }

    /// Extents of a file that holds the blocks in another order: some run on in
    /// the image, and none that touch do so in the file.
    fn extents(&self, pages: u64, blocks: &Blocks) -> anyhow::Result<InputData> {
        let mut runs: Vec<(u64, Vec<u8>)> = Vec::new();
        for (block, bytes) in blocks {
            let start = block * BLOCK_BYTES as u64;
            match runs.last_mut() {
                Some((at, run))
                    if *at + run.len() as u64 == start
                        && run.len() < EXTENT_BLOCKS * BLOCK_BYTES =>
                {
                    run.extend_from_slice(bytes);
                }
                _ => runs.push((start, bytes.clone())),
            }
        }
        let file = tempfile::tempfile_in(&self.dir)?;
        let mut extents = Vec::new();
        let mut end = 0;
        for (image_offset, bytes) in runs.iter().rev() {
            file.write_all_at(bytes, end)?;
            extents.push(Extent {
                image_offset: *image_offset,
                file: 0,
                file_offset: end,
                length: bytes.len() as u64,
            });
            end += bytes.len() as u64;
        }
        extents.reverse();
        Ok(InputData::Extents {
            files: vec![Arc::new(file)],
            label: "the model's extents".to_owned(),
            size_bytes: pages * self.page_len as u64,
            extents,
        })
    }

    fn input(&self, pages: u64) -> anyhow::Result<File> {
        let file = File::create(self.dir.join("input"))?;
        file.set_len(pages * self.page_len as u64)?;
        Ok(file)
    }

    fn commit(
        &mut self,
        tag: u8,
        image: Model,
        parent: ParentChoice,
        data: InputData,
        kind: InputKind,
    ) -> anyhow::Result<()> {
        let request = CommitRequest {
            tag: name(tag),
            replace: true,
            parent,
            inputs: vec![Input {
                name: "memory".to_owned(),
                role: ImageRole::Memory,
                data,
                kind,
            }],
            ..CommitRequest::default()
        };
        let committed = self.store.commit(&request, &Silent)?;
        let entry = &committed.manifest.images[0];
        let old = match committed.manifest.parent {
            Some(id) => self
                .committed
                .get(&id)
                .cloned()
                .context("an unknown parent")?,
            None => Model::default(),
        };
        ensure!(
            entry.nonzero_pages == image.data.len() as u64,
            "pages in use"
        );
        let changed = image.differences(&old).len() as u64;
        ensure!(
            entry.changed_pages == changed,
            "{} pages changed, the commit says {}",
            changed,
            entry.changed_pages
        );
        self.committed.insert(committed.id, image.clone());
        self.tags.insert(name(tag), image);
        self.check(&self.store, &name(tag))
    }

    fn retag(&mut self, from: u8, to: u8) -> anyhow::Result<()> {
        let Some(image) = self.tags.get(&name(from)).cloned() else {
            return Ok(());
        };
        let id = self.store.resolve(&name(from))?;
        let known = self.tags.contains_key(&name(to));
        match self.store.set_tag(&name(to), id, false) {
            Err(Error::TagExists { .. }) if known => self.store.set_tag(&name(to), id, true)?,
            other => {
                other?;
                ensure!(!known, "a tag was moved without leave");
            }
        }
        self.tags.insert(name(to), image);
        Ok(())
    }

    fn remove(&mut self, tag: u8) -> anyhow::Result<()> {
        let known = self.tags.remove(&name(tag)).is_some();
        let stats = self.store.stats()?;
        let needed = self.needed_bytes()?;
        match self.store.remove_tags(&[name(tag)]) {
            Err(Error::NotFound { .. }) if !known => return Ok(()),
            other => other?,
        }
        let of_tag = stats.per_snapshot.iter().find(|s| s.tag == name(tag));
        let foretold = of_tag
            .context("no line in the statistics")?
            .exclusive_stored_bytes;
        let freed = needed - self.needed_bytes()?;
        ensure!(
            freed == foretold,
            "{freed} bytes are free, foretold were {foretold}"
        );
        Ok(())
    }

    fn needed_bytes(&self) -> anyhow::Result<u64> {
        let options = GcOptions {
            dry_run: true,
            ..GcOptions::default()
        };
        let plan = self.store.gc(options, &Silent)?.plan;
        Ok(plan.packs.iter().map(|pack| pack.live_bytes).sum())
    }

    fn verify(&self, read_data: bool) -> anyhow::Result<()> {
        let report = self.store.verify(read_data, &Silent)?;
        ensure!(report.findings.is_empty(), "{:?}", report.findings);
        ensure!(report.snapshots == self.tags.len() as u64, "snapshots");
        Ok(())
    }

    fn repair(&mut self, lose_index: bool) -> anyhow::Result<()> {
        let path = self.dir.join("store");
        if lose_index {
            fs::remove_dir_all(path.join("index"))?;
        }
        let report = Store::repair(&path, &Silent)?;
        ensure!(report.remaining.is_empty(), "{report:?}");
        ensure!(report.broken_snapshots.is_empty(), "{report:?}");
        self.store = Store::open(&path)?;
        self.check_all()
    }

    fn compare(&self, old: u8, new: u8) -> anyhow::Result<()> {
        let (old, new) = (name(old), name(new));
        let (Some(old_image), Some(new_image)) = (self.tags.get(&old), self.tags.get(&new)) else {
            return Ok(());
        };
        let manifest = |tag: &str| self.store.manifest(self.store.resolve(tag)?);
        let found = self.store.diff(&manifest(&old)?, &manifest(&new)?)?;
        let page_bytes = self.page_len as u64;
        let pages: Vec<u64> = found[0]
            .ranges
            .iter()
            .flat_map(|range| {
                let first = range.offset_bytes / page_bytes;
                first..first + range.length_bytes / page_bytes
            })
            .collect();
        ensure!(pages == old_image.differences(new_image), "diff {pages:?}");
        Ok(())
    }

    fn read(&self, tag: u8, at: u64, len: usize) -> anyhow::Result<()> {
        let Some(image) = self.tags.get(&name(tag)) else {
            return Ok(());
        };
        let page_bytes = self.page_len as u64;
        let reader = self.reader(&self.store, &name(tag))?;
        let at = at % (reader.size_bytes() + page_bytes);
        let mut out = vec![0xaa; len];
        let read = reader.read_at(&mut out, at)?;
        ensure!(
            out[..read] == image.read(self.page_len, at, len),
            "{len} at {at}"
        );
        for region in [Region::Data, Region::Hole] {
            let inside = Some(at).filter(|at| *at < reader.size_bytes());
            let expected = inside.and_then(|at| image.seek(page_bytes, at, region));
            ensure!(reader.seek(at, region)? == expected, "{region:?} from {at}");
        }
        Ok(())
    }

    fn reader(&self, store: &Store, tag: &str) -> anyhow::Result<ImageReader> {
        let manifest = store.manifest(store.resolve(tag)?)?;
        let image = manifest.image("memory").context("no memory")?;
        Ok(store.image_reader(image))
    }

    fn check_all(&self) -> anyhow::Result<()> {
        self.tags
            .keys()
            .try_for_each(|tag| self.check(&self.store, tag))
    }

    /// Data is where it should be, nowhere else, and of the right bytes.
    fn check(&self, store: &Store, tag: &str) -> anyhow::Result<()> {
        let image = &self.tags[tag];
        let page_bytes = self.page_len as u64;
        let reader = self.reader(store, tag)?;
        ensure!(
            reader.size_bytes() == image.pages * page_bytes,
            "the size of {tag}"
        );
        let mut pages = 0;
        let mut position = 0;
        while let Some(start) = reader.seek(position, Region::Data)? {
            let end = reader
                .seek(start, Region::Hole)?
                .context("no hole at the end")?;
            let mut out = vec![0xaa; (end - start) as usize];
            ensure!(
                reader.read_at(&mut out, start)? == out.len(),
                "a short read"
            );
            ensure!(
                out == image.read(self.page_len, start, out.len()),
                "{tag} at {start}"
            );
            pages += (end - start) / page_bytes;
            position = end;
        }
        ensure!(
            pages == image.data.len() as u64,
            "{pages} pages of {tag} are data"
        );
        Ok(())
    }

    /// With all tags gone, a collection leaves nothing.
    pub fn end(mut self) -> anyhow::Result<()> {
        self.check_all()?;
        for tag in self.tags.keys() {
            self.check(&self.stale, tag)
                .context("through an old handle")?;
        }
        self.verify(true)?;
        let tags: Vec<String> = self.tags.keys().cloned().collect();
        self.store.remove_tags(&tags)?;
        self.tags.clear();
        self.store.gc(GcOptions::default(), &Silent)?;
        let left = fs::read_dir(self.dir.join("store/packs"))?.count();
        ensure!(left == 0, "{left} packs are left");
        self.verify(true)
    }
}

fn name(tag: u8) -> String {
    format!("tag{tag}")
}

fn insert_blocks(blocks: &mut Blocks, offset: u64, bytes: &[u8]) {
    let first = offset / BLOCK_BYTES as u64;
    for (block, bytes) in (first..).zip(bytes.chunks(BLOCK_BYTES)) {
        blocks.insert(block, bytes.to_vec());
    }
}
