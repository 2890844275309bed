//! `snapstore umount`

use std::process::ExitCode;

use serde_json::json;

use crate::args::UmountArgs;
use crate::context::Context;
use crate::look;

pub fn run(context: &Context, args: &UmountArgs) -> anyhow::Result<ExitCode> {
    snapstore_fuse::unmount(&args.dir, args.lazy, &look::is_dead)?;
    let dir = args.dir.display().to_string();
    context.answer(&json!({"dir": dir, "unmounted": true}), || {
        format!("Unmounted {dir}.")
    })?;
    Ok(ExitCode::SUCCESS)
}
