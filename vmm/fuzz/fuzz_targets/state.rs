//! Machine states from arbitrary bytes: never a panic, and one form per state and version.
//!
//! ```text
//! RUSTC_BOOTSTRAP=1 cargo fuzz run -s none state -- -max_total_time=60 -max_len=32768
//! ```
//!
//! `vmm/src/state/format/golden-1.bin` and `golden-2.bin` are seeds for the corpus.

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
        sealed[..8].copy_from_slice(b"SNAPVMST");
        // Either of the versions that there are.
        sealed[8..LENGTH_AT.start].copy_from_slice(&(1 + u32::from(bytes[8] & 1)).to_le_bytes());
        sealed[LENGTH_AT].copy_from_slice(&(content_bytes as u64).to_le_bytes());
        let checksum_at = sealed.len() - CHECKSUM_BYTES;
        let checksum = blake3::hash(&sealed[..checksum_at]);
        sealed[checksum_at..].copy_from_slice(checksum.as_bytes());
        check(&sealed);
    }
});

fn check(bytes: &[u8]) {
    if let Ok(state) = MachineState::decode(bytes) {
        let again = state.encode();
        // What need not be understood is left out, and version 1 is not written.
        if bytes[8] == 2 && bytes.len() == again.len() {
            assert!(again == bytes, "two forms of one state");
        }
        let same = MachineState::decode(&again).expect("what is written can be read");
        assert!(same.encode() == again);
    }
}
