//! Machine states from arbitrary bytes: never a panic, and one form per state.
//!
//! ```text
//! RUSTC_BOOTSTRAP=1 cargo fuzz run -s none state -- -max_total_time=60 -max_len=32768
//! ```
//!
//! `vmm/src/state/golden.bin` is a seed for the corpus.

#![no_main]

use libfuzzer_sys::fuzz_target;
use snapstore_vmm::state::MachineState;

/// Of the format: the header with its length field, and the checksum behind all.
const HEADER_BYTES: usize = 20;
const LENGTH_AT: std::ops::Range<usize> = 12..20;
const CHECKSUM_BYTES: usize = 32;

fuzz_target!(|bytes: &[u8]| {
    check(bytes);
    // A checksum cannot be guessed: without the right one, nothing gets further.
    if let Some(content_bytes) = bytes.len().checked_sub(HEADER_BYTES + CHECKSUM_BYTES) {
        let mut sealed = bytes.to_vec();
        sealed[..LENGTH_AT.start].copy_from_slice(b"SNAPVMST\x01\0\0\0");
        sealed[LENGTH_AT].copy_from_slice(&(content_bytes as u64).to_le_bytes());
        let checksum_at = sealed.len() - CHECKSUM_BYTES;
        let checksum = blake3::hash(&sealed[..checksum_at]);
        sealed[checksum_at..].copy_from_slice(checksum.as_bytes());
        check(&sealed);
    }
});

fn check(bytes: &[u8]) {
    if let Ok(state) = MachineState::decode(bytes) {
        assert!(state.encode() == bytes, "two forms of one state");
    }
}
