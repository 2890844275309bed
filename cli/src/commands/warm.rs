//! `snapstore warm`

use std::process::ExitCode;

use serde_json::json;
use snapstore_host::runtime::Runtime;
use snapstore_host::warm::warm;

use crate::args::WarmArgs;
use crate::context::Context;
use crate::format::{count, size};

pub fn run(context: &Context, args: &WarmArgs) -> anyhow::Result<ExitCode> {
    let store = context.open()?;
    let warmed = warm(&Runtime::open()?, &store, &args.snapshot)?;
    let dir = warmed.dir.display().to_string();
    let value = json!({"dir": dir, "pages": warmed.pages, "bytes": warmed.bytes});
    context.answer(&value, || {
        format!(
            "The working set of {} is in memory: {} in {} pages, mounted on {dir}.",
            args.snapshot,
            size(warmed.bytes),
            count(warmed.pages as u64),
        )
    })?;
    Ok(ExitCode::SUCCESS)
}
