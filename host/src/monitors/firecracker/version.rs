//! Firecracker's version: what it may be asked for depends on it.

use anyhow::Context as _;

use crate::monitors::http::Http;

/// What Firecracker calls itself in messages.
pub const NAME: &str = "Firecracker";

/// What a process says of its version.
pub fn said_version(http: &Http) -> anyhow::Result<String> {
    let said = http.first("/version")?;
    let version = said["firecracker_version"].as_str();
    let version = version.context("it does not say which version it is")?;
    Ok(version.trim_start_matches('v').to_owned())
}

/// The first two numbers of a version; zeros for what is none.
pub fn numbers(version: &str) -> (u32, u32) {
    let mut numbers = version.split(|it: char| !it.is_ascii_digit());
    let mut next = || numbers.next().and_then(|it| it.parse().ok()).unwrap_or(0);
    (next(), next())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_by_their_numbers() {
        assert_eq!(numbers("1.17.0-dev"), (1, 17));
        assert!(numbers("1.9.1") < (1, 13) && numbers("2.0.0") > (1, 13));
        assert_eq!(numbers("unknown"), (0, 0));
    }
}
