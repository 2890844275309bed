//! Finding the parent of a full image that names none: the recent snapshot it
//! is most like, if it is like any.

use crate::commit::source::Source;
use crate::error::{Result, readable};
use crate::id::{ChunkKind, SnapshotId};
use crate::manifest::Image;
use crate::page::is_zero;
use crate::recent;
use crate::store::Store;
use crate::tags;

/// How many snapshots with such an image are compared.
const CANDIDATES: usize = 8;
/// How many evenly spaced pages are compared.
const SAMPLES: u64 = 1024;
/// A parent has at least this share of the image's non-zero pages in place. Two
/// boots of the same system, whose kernels lie at different addresses, stay
/// well below it; steps of one guest stay well above.
const KIN_PERCENT: usize = 50;

/// A snapshot, and a tag that it has.
pub(crate) type Tagged = (SnapshotId, String);

/// The recent snapshot whose image `name` has most pages in common with the
/// input, place by place. It is a guess: one that cannot be read, since it is damaged
/// or a newer version made it, is no candidate.
pub(crate) fn find(store: &Store, name: &str, source: &Source<'_>) -> Result<Option<Tagged>> {
    let mut candidates: Vec<(Tagged, Image)> = Vec::new();
    for tag in recent::tags(&store.layout)? {
        let Some(Some(id)) = readable(tags::get(&store.layout, &tag))? else {
            continue;
        };
        let Some(manifest) = readable(store.manifest(id))? else {
            continue;
        };
        let image = manifest.image(name);
        if let Some(image) = image.filter(|image| image.size_bytes == source.size_bytes()) {
            candidates.push(((id, tag), image.clone()));
        }
        if candidates.len() == CANDIDATES {
            break;
        }
    }
    if candidates.is_empty() {
        return Ok(None);
    }
    let samples = sample(source, store.page_size().bytes())?;
    let mut best = None;
    for (tagged, image) in candidates {
        let Some(in_place) = readable(in_place(store, &image, &samples))? else {
            continue;
        };
        let kin = in_place * 100 >= samples.len() * KIN_PERCENT;
        if kin && best.as_ref().is_none_or(|(most, _)| in_place > *most) {
            best = Some((in_place, tagged));
        }
    }
    Ok(best.map(|(_, tagged)| tagged))
}

/// How many of the sampled pages an image has in the same place.
fn in_place(store: &Store, image: &Image, samples: &[(u64, [u8; 32])]) -> Result<usize> {
    let mut in_place = 0;
    for (page, hash) in samples {
        let stored = image.tree().page(&store.chunks, *page)?;
        in_place += usize::from(stored.is_some_and(|child| child.hash == *hash));
    }
    Ok(in_place)
}

/// Numbers and hashes of sampled pages that are not zero.
fn sample(source: &Source<'_>, page_bytes: u64) -> Result<Vec<(u64, [u8; 32])>> {
    let pages = source.size_bytes().div_ceil(page_bytes);
    let step = (pages / SAMPLES).max(1);
    let mut samples = Vec::new();
    let mut bytes = vec![0; usize::try_from(page_bytes).expect("a page fits in memory")];
    let mut page = 0;
    while page < pages {
        match source.next_data(page * page_bytes)? {
            None => break,
            Some(data) if data.start >= (page + 1) * page_bytes => {
                page = (data.start / page_bytes).next_multiple_of(step);
                continue;
            }
            Some(_) => {}
        }
        source.read_exact_at(&mut bytes, page * page_bytes)?;
        if !is_zero(&bytes) {
            samples.push((page, *ChunkKind::Page.hash(&bytes).as_bytes()));
        }
        page += step;
    }
    Ok(samples)
}
