//! A mount being made, used and ended, as far as the store has to do with it: what was
//! recorded of its images is read before anybody asks, and what was touched is recorded.

use std::ops::ControlFlow;
use std::time::{Duration, SystemTime};

use snapstore_store::{Error, Image, ImageReader, Pushed, Seen, SnapshotId, Store, WorkingSet};

use super::work::Work;
use crate::sim::content::{ImageContent, PAGE};
use crate::sim::plan::Mounting;

/// One of so many pages of a set is left out.
const LEFT_OUT: usize = 4;

/// A snapshot that is mounted.
struct Mounted<'a> {
    store: &'a Store,
    tag: String,
    id: SnapshotId,
}

/// What a mount has seen of an image.
struct Used {
    image: String,
    before: Option<WorkingSet>,
    /// There was no file: a collection that removes it begins later, and knows the mount.
    was_absent: bool,
    seen: Seen,
}

impl Work<'_> {
    pub(super) fn mount(
        &mut self,
        store: &Store,
        tag: String,
        mounting: &Mounting,
    ) -> Result<(), Error> {
        let (id, pin) = store.pin(&tag)?;
        let mounted = Mounted { store, tag, id };
        let manifest = store.manifest(id)?;
        let content = self.content_of(store, id);
        let mut used = Vec::new();
        for image in &manifest.images {
            let content = content.as_ref().and_then(|it| it.get(&image.name));
            used.push(self.use_image(&mounted, image, content, mounting)?);
        }
        // Whoever records without it may write the set of what is gone.
        let pin = Some(pin).filter(|_| !mounting.late);
        for used in used {
            self.record(&mounted, used, pin.is_some())?;
        }
        Ok(())
    }

    fn use_image(
        &self,
        mounted: &Mounted<'_>,
        image: &Image,
        content: Option<&ImageContent>,
        mounting: &Mounting,
    ) -> Result<Used, Error> {
        let found = self.look_up(mounted, &image.name);
        let was_absent = matches!(found, ControlFlow::Continue(None));
        let before = found.continue_value().flatten();
        let reader = mounted.store.image_reader(image);
        let trusted = before.iter().filter(|set| set.is_trusted());
        let set: Vec<u32> = trusted.flat_map(WorkingSet::pages).collect();
        let (mut pushed, mut left_out) = (Vec::new(), Vec::new());
        for (place, page) in set.iter().enumerate() {
            match place % LEFT_OUT {
                0 => left_out.push(*page),
                _ => pushed.push(*page),
            }
        }
        reader.ask_for(pushed.iter().map(|page| u64::from(*page)));
        let touched = mounting.touched_of(image.pages(), content);
        for page in pushed.iter().chain(&touched) {
            self.check_page(&reader, *page, content, &image.name)?;
        }
        let is_touched = |page: &&u32| touched.contains(page);
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        let last = Pushed {
            pushed: count(pushed.len()),
            left_out: count(left_out.len()),
            left_out_touched: count(left_out.iter().filter(is_touched).count()),
            outside: count(touched.iter().filter(|page| !set.contains(page)).count()),
        };
        pushed.retain(|page| !touched.contains(page));
        let half = u32::try_from(image.pages() / 2).unwrap_or(u32::MAX);
        Ok(Used {
            image: image.name.clone(),
            before,
            was_absent,
            seen: Seen {
                touched,
                unknown: pushed,
                last,
                part: mounting.part.then(|| std::iter::once(0..half).collect()),
            },
        })
    }

    /// Reads a page, and compares it. (Who pushes reads some at once, as readers of all do.)
    fn check_page(
        &self,
        reader: &ImageReader,
        page: u32,
        content: Option<&ImageContent>,
        image: &str,
    ) -> Result<(), Error> {
        self.actor.pause("a page");
        let mut bytes = [0; PAGE];
        let read = reader.read_at(&mut bytes, u64::from(page) * PAGE as u64)?;
        let is_right = content.is_none_or(|it| match read {
            0 => u64::from(page) >= it.pages,
            _ => it.holds(page.into(), &bytes),
        });
        if !is_right {
            let what = format!("page {page} of {image}, which is pushed");
            self.world.fail("wrong bytes", what);
        }
        Ok(())
    }

    /// What is recorded. What cannot be used is as good as none; if the disk has not said
    /// what there is, it breaks off.
    fn look_up(&self, mounted: &Mounted<'_>, image: &str) -> ControlFlow<(), Option<WorkingSet>> {
        let found = mounted.store.working_set(mounted.id, image);
        let mut shared = self.world.lock();
        if matches!(found, Err(Error::Io { .. })) && shared.is_refused(self.number) {
            return ControlFlow::Break(());
        }
        let seen = shared.sets.see(mounted.id, image, &found);
        drop(shared);
        if let Err(what) = seen {
            self.world
                .fail("a working set is not what was recorded", what);
        }
        match found {
            Ok(found) => ControlFlow::Continue(found),
            Err(_) => ControlFlow::Break(()),
        }
    }

    fn record(&mut self, mounted: &Mounted<'_>, used: Used, is_pinned: bool) -> Result<(), Error> {
        let Mounted { store, tag, id } = mounted;
        // Each at a time of its own.
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(self.op.number.into());
        let set = WorkingSet::merged(used.before.as_ref(), &used.seen, now);
        let recording = (self.world.lock().sets).begin(self.op.number, *id, &used.image, &set);
        self.done.recording = Some(recording);
        store.keep_working_set(*id, &used.image, &set)?;
        let is_tagged = self.quietly(|| store.tag(tag)).ok().flatten() == Some(*id);
        let mut shared = self.world.lock();
        let is_kept = is_pinned && used.was_absent && is_tagged && shared.model.is_at_rest(tag);
        let kept_by = is_kept.then(|| tag.clone());
        if let Some(recording) = self.done.recording.take() {
            shared.sets.end(recording, true, kept_by);
        }
        drop(shared);
        self.actor.pause("what was recorded");
        let _ = self.look_up(mounted, &used.image);
        Ok(())
    }
}
