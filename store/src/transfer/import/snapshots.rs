//! The snapshots of a stream: their manifests as this store has them, and their tags.

use super::{Import, ImportedSnapshot, Refused};
use crate::error::{Error, Result};
use crate::format::config::StoreFormat;
use crate::format::manifest::Malformed;
use crate::id::{ChunkId, SnapshotId};
use crate::manifest::{MAX_LEN, Manifest};
use crate::name::check_tag;
use crate::tree::read::node_id;

/// Tags that a stream may have; snapshots are fewer.
const MAX_TAGS: usize = 1 << 16;
/// With so much of it a pack is finished when a snapshot is complete: what comes next
/// can be stored as deltas against it.
const PACK_WORTH_FINISHING_BYTES: u64 = 1 << 20;

impl Import<'_> {
    /// Stores a manifest, whose trees are there.
    pub(super) fn snapshot(&mut self, names: &[&str], payload: &[u8]) -> Result<(), Refused> {
        self.records = self.records.saturating_add(1);
        let Some(first) = names.first() else {
            return Err(Refused::Stream("it holds a snapshot without a tag"));
        };
        if names.iter().any(|tag| check_tag(tag).is_err()) {
            return Err(Refused::Stream("it holds a tag with a name that none has"));
        }
        if self.tags.len() + names.len() > MAX_TAGS {
            return Err(Refused::Stream("it has more than 65536 tags"));
        }
        let mut manifest = self.decode_manifest(first, payload)?;
        let exported_as = SnapshotId::of_manifest(payload);
        let roots: Vec<ChunkId> = manifest
            .images
            .iter()
            .filter_map(|image| image.root)
            .map(node_id)
            .collect();
        let mut places = self.places(&roots)?.into_iter();
        for root in manifest.images.iter_mut().filter_map(|it| it.root.as_mut()) {
            root.hint = places.next().flatten();
        }
        let encoded = self.encode_manifest(first, &mut manifest, payload)?;
        let id = SnapshotId::of_manifest(&encoded);
        self.sink.put(id.chunk(), &encoded, None)?;
        let position = match self.positions.get(&exported_as) {
            Some(position) => *position,
            None => {
                self.snapshots.push(ImportedSnapshot {
                    tags: Vec::new(),
                    id,
                    exported_as,
                });
                self.snapshots.len() - 1
            }
        };
        self.positions.insert(exported_as, position);
        for tag in names {
            if self.tags.insert((*tag).to_owned(), position).is_some() {
                return Err(Refused::Stream("it holds a tag twice"));
            }
            self.check_tag_free(tag, id)?;
            self.snapshots[position].tags.push((*tag).to_owned());
        }
        if self.sink.open_pack_bytes() >= PACK_WORTH_FINISHING_BYTES {
            self.sink.finish_pack()?;
        }
        Ok(())
    }

    fn decode_manifest(&self, tag: &str, payload: &[u8]) -> Result<Manifest, Refused> {
        let label = &self.request.label;
        let newer = |what: &str, number| {
            let what = format!("the manifest of {tag:?} {what}");
            Refused::Other(Error::newer(label, what, number))
        };
        let manifest = match Manifest::decode(payload, self.store.page_size()) {
            Ok(manifest) => manifest,
            Err(Malformed::Newer { version }) => return Err(newer("in version", version)),
            Err(Malformed::NewerField { number }) => {
                return Err(newer("with field", number.into()));
            }
            Err(Malformed::Wrong(_)) => {
                return Err(Refused::Stream("it holds a manifest that none writes"));
            }
        };
        match manifest.problem_in_a_mount() {
            None => Ok(manifest),
            Some(problem) => Err(self.not_importable(tag, problem)),
        }
    }

    /// The manifest's bytes in this store. Its id stays what it is, wherever that is
    /// possible.
    fn encode_manifest(
        &self,
        tag: &str,
        manifest: &mut Manifest,
        payload: &[u8],
    ) -> Result<Vec<u8>, Refused> {
        let is_first_version = payload.starts_with(&1_u32.to_le_bytes());
        let (format, keeps_id) = match self.store.format() {
            // All its bytes are what the id is the hash of, and each store can read them.
            _ if is_first_version => return Ok(payload.to_vec()),
            StoreFormat::Two => (StoreFormat::Two, true),
            StoreFormat::One => (StoreFormat::One, false),
        };
        if !keeps_id {
            // Of the same bytes at each import.
            for root in manifest.images.iter_mut().filter_map(|it| it.root.as_mut()) {
                root.hint = None;
            }
            let position = manifest.parent.and_then(|id| self.positions.get(&id));
            if let Some(position) = position {
                manifest.parent = Some(self.snapshots[*position].id);
            }
        }
        let encoded = manifest.encode(format);
        if keeps_id {
            if SnapshotId::of_manifest(&encoded) != SnapshotId::of_manifest(payload) {
                return Err(Refused::Stream("it holds a manifest that none writes"));
            }
        } else if !self.is_same(manifest, &encoded) {
            let problem = "it has a field that a store of format 1 cannot hold";
            return Err(self.not_importable(tag, problem));
        }
        if encoded.len() > MAX_LEN {
            return Err(self.not_importable(tag, "its manifest is too long here"));
        }
        Ok(encoded)
    }

    /// Whether nothing of a manifest is lost in these bytes, but for hints.
    fn is_same(&self, manifest: &Manifest, encoded: &[u8]) -> bool {
        let again = Manifest::decode(encoded, self.store.page_size());
        again.is_ok_and(|mut again| {
            for root in again.images.iter_mut().filter_map(|it| it.root.as_mut()) {
                root.hint = None;
            }
            again == *manifest
        })
    }

    fn not_importable(&self, tag: &str, problem: &'static str) -> Refused {
        Refused::Other(Error::NotImportable {
            path: self.request.label.clone(),
            tag: tag.to_owned(),
            problem,
        })
    }

    /// A tag that names the snapshot already is in nobody's way, protected or not.
    pub(super) fn check_tag_free(&self, tag: &str, id: SnapshotId) -> Result<()> {
        match self.store.tag(tag) {
            Ok(Some(present)) if present == id => Ok(()),
            _ => self.store.check_tag_free(tag, self.request.replace),
        }
    }
}
