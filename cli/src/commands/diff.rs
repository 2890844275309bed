//! `snapstore diff`

use std::process::ExitCode;

use serde_json::json;

use crate::args::DiffArgs;
use crate::context::Context;
use crate::form::Fields;
use crate::format::{count, size, table};

const FIELDS: Fields = Fields {
    rows: "images",
    of_row: &[
        "name",
        "old_size_bytes",
        "new_size_bytes",
        "changed_pages",
        "ranges.",
    ],
    of_answer: &["old", "new"],
};

pub fn run(context: &Context, args: &DiffArgs) -> anyhow::Result<ExitCode> {
    let context = &context.listing(&args.form, &FIELDS)?;
    let context = &context.stopped_by_signals()?;
    let store = context.open()?;
    let (old, _old_pin) = store.pin(&args.old)?;
    let (new, _new_pin) = store.pin(&args.new)?;
    let images = store.diff(&store.manifest(old)?, &store.manifest(new)?)?;
    let value = json!({"old": old, "new": new, "images": images});
    context.answer(&value, || {
        let page_bytes = store.page_size().bytes();
        let rows: Vec<_> = images
            .iter()
            .map(|image| {
                vec![
                    image.name.clone(),
                    image.old_size_bytes.map_or_else(|| "-".to_owned(), size),
                    image.new_size_bytes.map_or_else(|| "-".to_owned(), size),
                    count(image.changed_pages),
                    size(image.changed_pages * page_bytes),
                    count(image.ranges.len() as u64),
                ]
            })
            .collect();
        let header = [
            "IMAGE",
            "OLD SIZE",
            "NEW SIZE",
            "PAGES CHANGED",
            "BYTES",
            "RANGES",
        ];
        let mut out = table(&header, 1, &rows);
        if args.ranges {
            for image in &images {
                for range in &image.ranges {
                    out += &format!(
                        "{} {:#014x} +{}\n",
                        image.name,
                        range.offset_bytes,
                        size(range.length_bytes)
                    );
                }
            }
        }
        out
    })?;
    Ok(ExitCode::SUCCESS)
}
