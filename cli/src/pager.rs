//! Shows what is longer than the terminal through a pager, as git does.
//!
//! Only a listing for people is shown so, and only where a terminal shows it: never what a
//! program or a file gets. The text is whole by then, so that nothing waits for a reader
//! who has not turned the page yet, be it a lock or a pin.

use std::env;
use std::io::{self, IsTerminal as _, Write as _};
use std::process::{Command, Stdio};

use rustix::termios::Winsize;

use crate::interrupt;

/// What a shell ends with that cannot run a command.
const NO_COMMAND: [i32; 2] = [126, 127];

/// What names the pager, the first that is set. An empty one, or cat(1), is none.
const VARIABLES: [&str; 2] = ["SNAPSTORE_PAGER", "PAGER"];

/// Whether a pager has shown the text.
pub fn show(text: &str) -> bool {
    let stdout = io::stdout();
    let is_dumb = env::var_os("TERM").is_none_or(|term| term.is_empty() || term == "dumb");
    if is_dumb || !stdout.is_terminal() {
        return false;
    }
    let size = rustix::termios::tcgetwinsize(&stdout);
    if size.is_ok_and(|size| fits(text, &size)) {
        return false;
    }
    pager().is_some_and(|pager| run(pager, text))
}

/// With a line to spare for the prompt.
fn fits(text: &str, size: &Winsize) -> bool {
    let (columns, rows) = (usize::from(size.ws_col), usize::from(size.ws_row));
    if columns == 0 || rows == 0 {
        return true;
    }
    let lines = text.lines();
    let needed = lines.map(|line| line.chars().count().div_ceil(columns).max(1));
    needed.sum::<usize>() < rows
}

fn pager() -> Option<Command> {
    let Some(chosen) = VARIABLES.into_iter().find_map(env::var_os) else {
        return Some(Command::new("less"));
    };
    if chosen.is_empty() || chosen == "cat" {
        return None;
    }
    let mut shell = Command::new("sh");
    shell.arg("-c").arg(chosen);
    Some(shell)
}

fn run(mut pager: Command, text: &str) -> bool {
    // Ends by itself if one page is enough, shows colours, leaves what it showed.
    if env::var_os("LESS").is_none() {
        pager.env("LESS", "FRX");
    }
    // Ctrl-C is the pager's: without this it would be left behind with the terminal.
    if interrupt::leave_to_others().is_err() {
        return false;
    }
    let Ok(mut pager) = pager.stdin(Stdio::piped()).spawn() else {
        return false;
    };
    if let Some(mut stdin) = pager.stdin.take() {
        // Who has seen enough closes it.
        let _ = stdin.write_all(text.as_bytes());
    }
    let ended = pager.wait();
    let code = ended.ok().and_then(|status| status.code());
    code.is_none_or(|code| !NO_COMMAND.contains(&code))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fits_is_less_than_the_terminal_has() {
        let size = |rows, columns| Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        assert!(fits("a\nb\n", &size(3, 80)));
        assert!(!fits("a\nb\nc\n", &size(3, 80)));
        assert!(!fits("a long line", &size(3, 4)), "it is wrapped");
        assert!(fits("a\n\nb\n", &size(0, 0)), "nobody knows");
    }
}
