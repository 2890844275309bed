//! Version 2. Numbers are little-endian; `s` is a length (4 bytes) and UTF-8 bytes.
//!
//! ```text
//! canonical part, which the snapshot's id is the hash of
//!  4  format version, 2
//!  4  length of the canonical part in bytes
//!  4  page size in bytes
//!  8  creation time, seconds since 1970 (UTC)
//!  1  1 if there is a parent, else 0; then 32 bytes parent snapshot id
//!  s  tag it was first committed under
//!  2  number of images; for each, sorted by name:
//!       s  name
//!       1  role: 0 memory, 1 disk, 2 file
//!       8  size in bytes
//!       8  pages that are not zero
//!       8  pages that differ from the parent's image
//!       1  1 if the root is not zero; then 32 bytes root node id
//!  2  number of labels; for each, sorted by key: s key, s value
//!  8  chunks the commit added to the store    8  bytes they take there
//!     fields of versions to come, with ascending numbers; for each:
//!       2  number (low 15 bits); the highest bit says that who does not know it
//!          cannot read the snapshot. Others are kept and ignored
//!       4  length    bytes
//! hints, not hashed
//!  8  for each image with a root, in order: where the root was stored (pack, entry)
//! ```

use super::parts::{CUT, Input, Malformed, put_count, put_text};
use crate::format::node::Child;
use crate::manifest::{Field, Image, Manifest};
use crate::pack::Location;
use crate::page::PageSize;

/// Of the number of a field: it must be understood.
const MUST: u16 = 1 << 15;

pub(super) fn encode(manifest: &Manifest) -> Vec<u8> {
    let mut out = 2_u32.to_le_bytes().to_vec();
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&manifest.page_size.as_u32().to_le_bytes());
    out.extend_from_slice(&manifest.created_unix_seconds.to_le_bytes());
    out.push(u8::from(manifest.parent.is_some()));
    if let Some(parent) = manifest.parent {
        out.extend_from_slice(parent.as_bytes());
    }
    put_text(&mut out, &manifest.first_tag);
    put_count(&mut out, manifest.images.len());
    for image in &manifest.images {
        put_text(&mut out, &image.name);
        out.push(image.role as u8);
        for number in [image.size_bytes, image.nonzero_pages, image.changed_pages] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        out.push(u8::from(image.root.is_some()));
        if let Some(root) = image.root {
            out.extend_from_slice(&root.hash);
        }
    }
    put_count(&mut out, manifest.labels.len());
    for (key, value) in &manifest.labels {
        put_text(&mut out, key);
        put_text(&mut out, value);
    }
    out.extend_from_slice(&manifest.added_chunks.to_le_bytes());
    out.extend_from_slice(&manifest.added_bytes.to_le_bytes());
    for field in &manifest.other_fields {
        out.extend_from_slice(&field.number.to_le_bytes());
        let len = u32::try_from(field.bytes.len()).expect("a manifest is short");
        out.extend_from_slice(&len.to_le_bytes());
        out.extend_from_slice(&field.bytes);
    }
    let len = u32::try_from(out.len()).expect("a manifest is checked to be short");
    out[4..8].copy_from_slice(&len.to_le_bytes());
    for root in manifest.images.iter().filter_map(|image| image.root) {
        let nowhere = Location::from_bytes([0; Location::LEN]);
        out.extend_from_slice(&root.hint.unwrap_or(nowhere).to_bytes());
    }
    out
}

pub(super) fn decode(bytes: &[u8], page_size: PageSize) -> Result<Manifest, Malformed> {
    let mut input = Input(bytes);
    let (_version, len) = (input.u32(), input.u32().ok_or(CUT)?);
    let len = usize::try_from(len).ok().filter(|len| *len >= 8);
    let (canonical, hints) = len.and_then(|len| bytes.split_at_checked(len)).ok_or(CUT)?;
    let mut input = Input(&canonical[8..]);
    input.page_size(page_size)?;
    let mut manifest = Manifest {
        page_size,
        created_unix_seconds: input.u64().ok_or(CUT)?,
        parent: input.parent()?,
        first_tag: input.text().ok_or(CUT)?,
        images: (0..input.image_count()?)
            .map(|_| decode_image(&mut input, page_size))
            .collect::<Result<_, _>>()?,
        labels: input.labels()?,
        added_chunks: input.u64().ok_or(CUT)?,
        added_bytes: input.u64().ok_or(CUT)?,
        ..Manifest::blank(page_size)
    };
    let mut last = None;
    while !input.0.is_empty() {
        let number = input.u16().ok_or(CUT)?;
        let len = usize::try_from(input.u32().ok_or(CUT)?).map_err(|_| CUT)?;
        let (field, rest) = input.0.split_at_checked(len).ok_or(CUT)?;
        input.0 = rest;
        // Also of those that are known: each is there once.
        if last.is_some_and(|last| last >= number & !MUST) {
            return Err(Malformed::Wrong("its fields are not in order"));
        }
        last = Some(number & !MUST);
        if number & MUST != 0 {
            let number = number & !MUST;
            return Err(Malformed::NewerField { number });
        }
        manifest.other_fields.push(Field {
            number,
            bytes: field.to_vec(),
        });
    }
    // They are only hints: without them the index is asked.
    let mut hints = Input(hints);
    for root in manifest.images.iter_mut().filter_map(|it| it.root.as_mut()) {
        root.hint = hints.array().map(Location::from_bytes);
    }
    Ok(manifest)
}

fn decode_image(input: &mut Input<'_>, page_size: PageSize) -> Result<Image, Malformed> {
    let name = input.text().ok_or(CUT)?;
    let role = input.role()?;
    let [size_bytes, nonzero_pages, changed_pages] = {
        let mut number = || input.u64().ok_or(CUT);
        [number()?, number()?, number()?]
    };
    let root = match input.has_root()? {
        false => None,
        true => Some(Child {
            hash: input.array().ok_or(CUT)?,
            hint: None,
        }),
    };
    Ok(Image {
        name,
        role,
        size_bytes,
        nonzero_pages,
        changed_pages,
        root,
        page_size,
    })
}
