//! What is told of a commit that is done: the same, whatever was committed.

use serde_json::{Value, json};
use snapstore_store::{CommitTimings, Committed, Damage, Error, ImageRole, Store};

use crate::context::Context;
use crate::format::{count, size};
use crate::hints;
use crate::logging::say;

/// What a kind of commit tells besides what the store says of it.
pub struct Told<'a> {
    pub tag: &'a str,
    /// The parent as the user named it.
    pub parent: Option<&'a str>,
    /// Warnings besides those of the store.
    pub remarks: &'a [String],
    pub timings: Value,
    /// An object: what only this kind of commit has, for programs.
    pub more: Value,
    /// The same for people: a line, or nothing.
    pub more_text: String,
}

impl Told<'_> {
    /// Says it, and warns.
    pub fn answer(
        self,
        context: &Context,
        store: &Store,
        committed: &Committed,
    ) -> anyhow::Result<()> {
        let warnings = [warnings(committed), self.remarks.to_vec()].concat();
        for warning in &warnings {
            say!("warning: {warning}");
        }
        let parent = parent_name(store, committed, self.parent);
        let mut value = json!({
            "tag": self.tag,
            "id": committed.id,
            "parent": committed.manifest.parent,
            "parent_tag": parent,
            "images": committed.manifest.images,
            "inherited": committed.inherited,
            "left_out": left_out(committed),
            "added_chunks": committed.manifest.added_chunks,
            "added_bytes": committed.manifest.added_bytes,
            "warnings": warnings,
            "timings": self.timings,
        });
        if let (Value::Object(value), Value::Object(more)) = (&mut value, self.more) {
            value.extend(more);
        }
        context.answer(&value, || {
            describe(self.tag, committed, parent.as_deref()) + &self.more_text
        })
    }
}

pub fn timings(timings: &CommitTimings) -> serde_json::Value {
    json!({
        "prepare_seconds": timings.prepare.as_secs_f64(),
        "pages_seconds": timings.pages.as_secs_f64(),
        "seal_seconds": timings.seal.as_secs_f64(),
        "publish_seconds": timings.publish.as_secs_f64(),
        "total_seconds": timings.total().as_secs_f64(),
    })
}

/// A tag of the parent, or the beginning of its id. Only looks at the tags that it
/// is likely to have: a store may have very many.
fn parent_name(store: &Store, committed: &Committed, named: Option<&str>) -> Option<String> {
    let parent = committed.manifest.parent?;
    let has_tag = |tag: &str| store.tag(tag).is_ok_and(|id| id == Some(parent));
    if let Some(named) = named.filter(|named| has_tag(named)) {
        return Some(named.to_owned());
    }
    let first = store.manifest(parent).ok().map(|old| old.first_tag);
    let first = first.filter(|tag| has_tag(tag));
    Some(first.unwrap_or_else(|| parent.short()))
}

fn describe(tag: &str, committed: &Committed, parent: Option<&str>) -> String {
    let manifest = &committed.manifest;
    let mut out = format!(
        "{tag} {}{}\n",
        committed.id.short(),
        parent.map_or_else(String::new, |parent| format!(", made from {parent}"))
    );
    for image in &manifest.images {
        out += &format!(
            "  {:<12} {:>9}, {} pages in use, {} changed\n",
            image.file_name(),
            size(image.size_bytes),
            count(image.nonzero_pages),
            count(image.changed_pages),
        );
    }
    let from = parent.unwrap_or("its parent");
    for name in &committed.inherited {
        let disk = manifest.image(name).map(|image| image.role) == Some(ImageRole::Disk);
        let what = if disk { "disk " } else { "" };
        out += &format!("  {what}{name} is inherited from {from}, unchanged\n");
    }
    if !committed.left_out.is_empty() {
        let names = left_out(committed).join(", ");
        // Attached files describe their own snapshot and are never carried over.
        let mut images = committed.left_out.iter();
        let how = match images.any(|image| image.role != ImageRole::File) {
            true => "; --inherit with --parent does that",
            false => "",
        };
        out += &format!("  not carried over from {from}: {names}{how}\n");
    }
    out + &format!(
        "  stored {} new chunks in {}\n",
        count(manifest.added_chunks),
        size(manifest.added_bytes)
    )
}

/// What could not be read and was not needed.
fn warnings(committed: &Committed) -> Vec<String> {
    let warnings = committed.warnings.iter().map(|error| {
        let what = match error {
            Error::Damaged(Damage::Pack { .. } | Damage::Footer { .. }) => {
                "what the snapshot could share with a pack was stored anew"
            }
            _ => "the parent cannot be read whole, which this snapshot does not need",
        };
        format!("{what}: {}", hints::told(error))
    });
    warnings.collect()
}

/// The names of the parent's images that the snapshot does not have.
fn left_out(committed: &Committed) -> Vec<&str> {
    let images = committed.left_out.iter();
    images.map(|image| image.name.as_str()).collect()
}
