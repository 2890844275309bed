//! `snapstore umount`

use std::process::ExitCode;

use serde_json::json;
use snapstore_host::look;

use crate::args::UmountArgs;
use crate::context::Context;

pub fn run(context: &Context, args: &UmountArgs) -> anyhow::Result<ExitCode> {
    snapstore_fuse::unmount(&args.dir, args.lazy, &look::is_dead)?;
    let dir = args.dir.display().to_string();
    context.answer(&json!({"dir": dir, "unmounted": true}), || {
        format!("Unmounted {dir}.")
    })?;
    Ok(ExitCode::SUCCESS)
}
