//! `snapstore init`

use std::process::ExitCode;

use serde_json::json;
use snapstore_store::{PageSize, Store};

use crate::args::InitArgs;
use crate::context::Context;

pub fn run(context: &Context, args: &InitArgs) -> anyhow::Result<ExitCode> {
    let page_size = PageSize::from_bytes(args.page_size)?;
    let path = context.store_path()?;
    let store = Store::create(&path, page_size)?;
    let path = store.path().display().to_string();
    let page_size_bytes = page_size.bytes();
    context.answer(
        &json!({"store": path, "page_size_bytes": page_size_bytes}),
        || format!("Created a store with pages of {page_size_bytes} bytes in {path}."),
    )?;
    Ok(ExitCode::SUCCESS)
}
