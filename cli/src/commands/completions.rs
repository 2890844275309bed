//! `snapstore completions`

use std::io::Write as _;
use std::process::ExitCode;

use crate::args::{CompletionsArgs, Shell};
use crate::completions;
use crate::exit;

pub fn run(args: &CompletionsArgs) -> anyhow::Result<ExitCode> {
    let shell = match args.shell {
        Shell::Bash => "bash",
        Shell::Zsh => "zsh",
        Shell::Fish => "fish",
    };
    let script = completions::script(shell)?;
    exit::output(std::io::stdout().lock().write_all(&script))?;
    Ok(ExitCode::SUCCESS)
}
