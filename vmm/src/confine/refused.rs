//! What the kernel does not do.

use crate::error::Error;

/// An error of one step.
pub(super) fn refused<E: Into<std::io::Error>>(action: &'static str) -> impl Fn(E) -> Error {
    move |source| Error::Confine {
        action,
        source: source.into(),
    }
}
