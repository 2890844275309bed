//! What belongs to shells and manuals.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

#[derive(Args)]
#[command(after_help = "\
Examples:
  source <(snapstore completions bash)
  snapstore completions fish > ~/.config/fish/completions/snapstore.fish")]
pub struct CompletionsArgs {
    /// The shell
    pub shell: Shell,
}

/// Shells that can complete.
#[derive(Clone, Copy, ValueEnum)]
pub enum Shell {
    Bash,
    Zsh,
    Fish,
}

#[derive(Args)]
pub struct GenerateArgs {
    /// The directory for them
    pub dir: PathBuf,
}
