//! The content of version 2: a list of payloads, one for each part of a machine.
//!
//! ```text
//! offset   size  what
//! 0          16  kind: letters a-z, digits and '-', padded with zeros
//! 16          4  version of what this kind holds, from 1
//! 20          4  number: which one of several of this kind, from 0
//! 24          4  flags: bit 0: whoever does not know the kind and version cannot
//!                make the machine
//! 28          4  L, the length of the rest in bytes
//! 32          L  what the kind and version say (`kinds.rs`, `virtio.rs`)
//! ```
//!
//! Payloads are in strictly ascending order of kind and number, at most
//! [`MAX_PAYLOADS`] of them. A device that has none is not in the machine.

use std::borrow::Cow;

use crate::state::StateError;

/// The longest name of a kind.
pub(super) const KIND_BYTES: usize = 16;
const HEADER_BYTES: usize = 32;
/// The most payloads of a state: vCPUs, devices and some more.
pub(super) const MAX_PAYLOADS: usize = 512;
/// The flag of what must be understood. Other flags have no meaning yet.
const NEEDED: u32 = 1;

/// One payload.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Payload<'a> {
    pub kind: &'a str,
    pub version: u32,
    pub number: u32,
    pub flags: u32,
    pub bytes: Cow<'a, [u8]>,
}

impl Payload<'_> {
    /// A payload that must be understood.
    pub fn needed(kind: &'static str, version: u32, number: u32, bytes: Vec<u8>) -> Self {
        Self {
            kind,
            version,
            number,
            flags: NEEDED,
            bytes: bytes.into(),
        }
    }

    /// Whether a reader that does not know it has to refuse the whole state; none if it has
    /// flags that this program does not know, and so must refuse.
    pub fn need(&self) -> Option<bool> {
        match self.flags {
            0 => Some(false),
            NEEDED => Some(true),
            _ => None,
        }
    }
}

/// The payloads as bytes, in their order.
pub(super) fn write(payloads: &[Payload<'_>]) -> Vec<u8> {
    let mut ordered: Vec<_> = payloads.iter().collect();
    ordered.sort_by_key(|payload| (payload.kind, payload.number));
    let mut out = Vec::new();
    for payload in ordered {
        let mut kind = [0; KIND_BYTES];
        kind[..payload.kind.len()].copy_from_slice(payload.kind.as_bytes());
        out.extend_from_slice(&kind);
        let length = u32::try_from(payload.bytes.len()).expect("a payload is far below 4 GiB");
        for number in [payload.version, payload.number, payload.flags, length] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        out.extend_from_slice(&payload.bytes);
    }
    out
}

/// The payloads of these bytes, which are no more than the list.
pub(super) fn read(mut content: &[u8]) -> Result<Vec<Payload<'_>>, StateError> {
    let mut payloads = Vec::<Payload<'_>>::new();
    while !content.is_empty() {
        if payloads.len() == MAX_PAYLOADS {
            return Err(StateError::Payloads {
                what: "more payloads than can be",
            });
        }
        let (payload, rest) = read_one(content).map_err(|what| StateError::Payloads { what })?;
        let place = (payload.kind, payload.number);
        if payloads
            .last()
            .is_some_and(|last| (last.kind, last.number) >= place)
        {
            return Err(StateError::Payloads {
                what: "payloads that are not in their order",
            });
        }
        payloads.push(payload);
        content = rest;
    }
    Ok(payloads)
}

fn read_one(content: &[u8]) -> Result<(Payload<'_>, &[u8]), &'static str> {
    let (header, rest) = content
        .split_first_chunk::<HEADER_BYTES>()
        .ok_or("a payload that ends early")?;
    let kind = kind(&content[..KIND_BYTES]).ok_or("a payload whose kind is no name")?;
    let (numbers, _) = header[KIND_BYTES..].as_chunks::<4>();
    let [version, number, flags, length] =
        [0, 1, 2, 3].map(|at: usize| u32::from_le_bytes(numbers[at]));
    if version == 0 {
        return Err("a payload of version 0");
    }
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    let (bytes, rest) = rest
        .split_at_checked(length)
        .ok_or("a payload that ends early")?;
    let payload = Payload {
        kind,
        version,
        number,
        flags,
        bytes: bytes.into(),
    };
    Ok((payload, rest))
}

/// The name of a kind, if it is one.
fn kind(padded: &[u8]) -> Option<&str> {
    let end = padded.iter().position(|&byte| byte == 0);
    let (name, padding) = padded.split_at(end.unwrap_or(padded.len()));
    let is_letter = |byte: &u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-');
    let is_name =
        !name.is_empty() && name.iter().all(is_letter) && padding.iter().all(|&byte| byte == 0);
    std::str::from_utf8(name).ok().filter(|_| is_name)
}
