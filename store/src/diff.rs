//! What differs between two snapshots.

use std::ops::ControlFlow;

use crate::error::Result;
use crate::manifest::{Image, Manifest};
use crate::store::Store;
use crate::tree::diff::changed_pages;
use crate::tree::read::Tree;

/// A run of changed bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
pub struct ChangedRange {
    /// Where it begins.
    pub offset_bytes: u64,
    /// How long it is, a multiple of the page size.
    pub length_bytes: u64,
}

/// How one image differs.
#[derive(Clone, Debug, serde::Serialize)]
pub struct ImageDiff {
    /// The image's name.
    pub name: String,
    /// Its length in the first snapshot, if it is there.
    pub old_size_bytes: Option<u64>,
    /// Its length in the second snapshot, if it is there.
    pub new_size_bytes: Option<u64>,
    /// Pages that differ, place by place.
    pub changed_pages: u64,
    /// The runs of such pages.
    pub ranges: Vec<ChangedRange>,
}

impl Store {
    /// Compares two snapshots image by image. Takes time in proportion to what
    /// differs.
    ///
    /// ```
    /// # use snapstore_store::{CommitRequest, ImageRole, Input, InputData, InputKind};
    /// use snapstore_store::{PageSize, Silent, Store};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let store = Store::create(&dir.path().join("store"), PageSize::default())?;
    /// # for (tag, fill) in [("one", 1), ("two", 2)] {
    /// #     let mut bytes = vec![7; 3 * 4096];
    /// #     bytes[4096] = fill;
    /// #     let input = Input {
    /// #         name: "memory".to_owned(),
    /// #         role: ImageRole::Memory,
    /// #         data: InputData::Bytes(bytes.into()),
    /// #         kind: InputKind::Full,
    /// #     };
    /// #     let (tag, inputs) = (tag.to_owned(), vec![input]);
    /// #     store.commit(&CommitRequest { tag, inputs, ..Default::default() }, &Silent)?;
    /// # }
    /// let (one, two) = (store.snapshot("one")?, store.snapshot("two")?);
    /// let images = store.diff(one.manifest(), two.manifest())?;
    /// assert_eq!(images[0].ranges[0].offset_bytes, 4096);
    /// assert_eq!(images[0].ranges[0].length_bytes, 4096);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// Damage of tree nodes that differ.
    pub fn diff(&self, old: &Manifest, new: &Manifest) -> Result<Vec<ImageDiff>> {
        let mut names: Vec<&str> = old
            .images
            .iter()
            .chain(&new.images)
            .map(|image| image.name.as_str())
            .collect();
        names.sort_unstable();
        names.dedup();
        names
            .into_iter()
            .map(|name| {
                let diff = self.diff_image(name, old.image(name), new.image(name), u64::MAX)?;
                Ok(diff.expect("there is no limit"))
            })
            .collect()
    }

    /// As [`Store::diff`] of one image that both snapshots have; `None` if more than
    /// `most_pages` differ, or one of them has none of that name. Takes no longer than that
    /// many pages need.
    ///
    /// # Errors
    /// As [`Store::diff`].
    pub fn diff_up_to(
        &self,
        old: &Manifest,
        new: &Manifest,
        image: &str,
        most_pages: u64,
    ) -> Result<Option<ImageDiff>> {
        match (old.image(image), new.image(image)) {
            (Some(old), Some(new)) => self.diff_image(image, Some(old), Some(new), most_pages),
            _ => Ok(None),
        }
    }

    fn diff_image(
        &self,
        name: &str,
        old: Option<&Image>,
        new: Option<&Image>,
        most_pages: u64,
    ) -> Result<Option<ImageDiff>> {
        let either = old.or(new).expect("the name comes from one of them");
        let nothing = Tree::new(either.tree().shape(), None);
        let tree = |image: Option<&Image>| image.map_or(nothing, Image::tree);
        let page_bytes = self.page_size().bytes();
        let mut ranges: Vec<ChangedRange> = Vec::new();
        let mut pages = 0;
        let done = changed_pages(&self.chunks, &tree(old), &tree(new), &mut |page| {
            if pages == most_pages {
                return ControlFlow::Break(());
            }
            pages += 1;
            let offset_bytes = page * page_bytes;
            match ranges.last_mut() {
                Some(last) if last.offset_bytes + last.length_bytes == offset_bytes => {
                    last.length_bytes += page_bytes;
                }
                _ => ranges.push(ChangedRange {
                    offset_bytes,
                    length_bytes: page_bytes,
                }),
            }
            ControlFlow::Continue(())
        })?;
        Ok(done.is_continue().then(|| ImageDiff {
            name: name.to_owned(),
            old_size_bytes: old.map(|image| image.size_bytes),
            new_size_bytes: new.map(|image| image.size_bytes),
            changed_pages: pages,
            ranges,
        }))
    }
}
