//! Values as bytes, in postcard's wire format.

use crate::state::StateError;

/// The value of exactly these bytes, in postcard's wire format, which must get through
/// `check`. Postcard and the KVM bindings also read overlong numbers and structures of
/// another length; two byte strings would then be one value.
pub(super) fn exactly<T>(
    bytes: &[u8],
    check: impl Fn(&T) -> Result<(), StateError>,
) -> Result<T, StateError>
where
    T: serde::Serialize + serde::de::DeserializeOwned,
{
    let (value, rest) =
        postcard::take_from_bytes::<T>(bytes).map_err(|source| StateError::Malformed { source })?;
    // First: lists that are too long are not kept whole, and have other bytes.
    check(&value)?;
    if !rest.is_empty() {
        return Err(StateError::TrailingBytes {
            extra: rest.len() as u64,
        });
    }
    if wire(&value) != bytes {
        return Err(StateError::NotCanonical);
    }
    Ok(value)
}

/// A value in postcard's wire format.
pub(super) fn wire(value: &impl serde::Serialize) -> Vec<u8> {
    postcard::to_stdvec(value).expect("every list of a state knows its length")
}
