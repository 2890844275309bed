//! How what comes of a remote is told.

use serde::Serialize;
use snapstore_remote::Remote;

/// Errors of the store stay such, with their hints and exit codes.
pub(super) fn told<T>(result: snapstore_remote::Result<T>) -> anyhow::Result<T> {
    result.map_err(|error| match error {
        snapstore_remote::Error::Store(error) => error.into(),
        other => other.into(),
    })
}

/// What is told for programs, with what went over the network.
pub(super) fn with_requests(
    report: &impl Serialize,
    remote: &Remote,
) -> anyhow::Result<serde_json::Value> {
    let mut value = serde_json::to_value(report)?;
    if let Some(requests) = remote.requests() {
        value["requests"] = serde_json::to_value(requests)?;
    }
    Ok(value)
}
