//! `snapstore demo`

use std::process::ExitCode;

use crate::args::DemoArgs;

pub fn run(_args: &DemoArgs) -> anyhow::Result<ExitCode> {
    anyhow::bail!("to be written")
}
