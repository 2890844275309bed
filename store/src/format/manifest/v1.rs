//! Version 1. Numbers are little-endian; `s` is a length (4 bytes) and UTF-8 bytes.
//!
//! ```text
//!  4  format version, 1
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
//!       1  1 if the root is not zero; then 32 bytes root node id and 8 bytes
//!          hint (pack, entry)
//!  2  number of labels; for each, sorted by key: s key, s value
//!  8  chunks the commit added to the store    8  bytes they take there
//! ```

use super::parts::{CUT, Input, Malformed, put_count, put_text};
use crate::format::node::Child;
use crate::manifest::{Image, Manifest};
use crate::pack::Location;
use crate::page::PageSize;

pub(super) fn encode(manifest: &Manifest) -> Vec<u8> {
    let mut out = 1_u32.to_le_bytes().to_vec();
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
            let nowhere = Location::from_bytes([0; Location::LEN]);
            out.extend_from_slice(&root.hint.unwrap_or(nowhere).to_bytes());
        }
    }
    put_count(&mut out, manifest.labels.len());
    for (key, value) in &manifest.labels {
        put_text(&mut out, key);
        put_text(&mut out, value);
    }
    out.extend_from_slice(&manifest.added_chunks.to_le_bytes());
    out.extend_from_slice(&manifest.added_bytes.to_le_bytes());
    out
}

pub(super) fn decode(bytes: &[u8], page_size: PageSize) -> Result<Manifest, Malformed> {
    let (manifest, len) = decode_first(bytes, page_size)?;
    if len != bytes.len() {
        return Err(Malformed::Wrong("it has more bytes than it says"));
    }
    Ok(manifest)
}

/// Decodes the manifest that bytes begin with; returns its length, too.
pub(super) fn decode_first(
    bytes: &[u8],
    page_size: PageSize,
) -> Result<(Manifest, usize), Malformed> {
    let mut input = Input(bytes);
    let _version = input.u32();
    input.page_size(page_size)?;
    let manifest = Manifest {
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
    Ok((manifest, bytes.len() - input.0.len()))
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
            hint: Some(Location::from_bytes(input.array().ok_or(CUT)?)),
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
