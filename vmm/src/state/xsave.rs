//! The XSAVE area of a vCPU: FPU, vector and AMX registers.
//!
//! `struct kvm_xsave` has 4096 bytes and an extension without a length. KVM
//! writes and reads as many bytes as `KVM_CAP_XSAVE2` says, whatever the caller
//! gave it, so that each buffer here has that size before KVM sees it.

use kvm_bindings::Xsave;
use kvm_ioctls::VcpuFd;

use super::machine::MIN_XSAVE_BYTES;
use super::{HostFacts, StateError};
use crate::Result;
use crate::error::KvmContext;

/// Reads the area, as long as this host's KVM makes it.
pub(super) fn save(vcpu: &VcpuFd, host: &HostFacts) -> Result<Vec<u8>> {
    let mut area = area(&vec![0; host.xsave_bytes]);
    if host.has_xsave2 {
        // SAFETY: the area is as long as KVM_CAP_XSAVE2 says, and no XSAVE feature
        // was enabled for this process since (HostFacts::new demands it).
        unsafe { vcpu.get_xsave2(&mut area) }.kvm("read the XSAVE area")?;
    } else {
        area = Xsave::from_header(vcpu.get_xsave().kvm("read the XSAVE area")?.into())
            .expect("it has no extension");
    }
    let words = area.as_fam_struct_ref().xsave.region.iter();
    Ok(words
        .chain(area.as_slice())
        .flat_map(|word| word.to_le_bytes())
        .collect())
}

/// Writes an area of any host: a shorter one is continued with zeros, which is
/// what components that a CPU lacks are.
pub(super) fn restore(vcpu: &VcpuFd, host: &HostFacts, bytes: &[u8]) -> Result<()> {
    let area = area(&fit(bytes, host.xsave_bytes)?);
    // SAFETY: the area is as long as KVM_CAP_XSAVE2 says, and no XSAVE feature was
    // enabled for this process since (HostFacts::new demands it). KVM checks what
    // is in it.
    unsafe { vcpu.set_xsave2(&area) }.kvm("take the XSAVE area")?;
    Ok(())
}

/// The bytes at exactly `size` bytes; nothing that is not zero is cut off.
fn fit(bytes: &[u8], size: usize) -> Result<Vec<u8>, StateError> {
    let used = bytes
        .iter()
        .rposition(|&byte| byte != 0)
        .map_or(0, |last| last + 1);
    if used > size {
        return Err(StateError::XsaveBeyondHost {
            bytes: used,
            limit: size,
        });
    }
    let mut fitted = bytes[..used].to_vec();
    fitted.resize(size, 0);
    Ok(fitted)
}

/// KVM's form of the bytes, whose length is at least [`MIN_XSAVE_BYTES`] and a
/// multiple of 4.
fn area(bytes: &[u8]) -> Xsave {
    let (region, extra) = bytes.split_at(MIN_XSAVE_BYTES);
    let mut area = Xsave::new(extra.len() / 4).expect("the extension is short");
    // SAFETY: the length of the extension stays as it is.
    let header = unsafe { area.as_mut_fam_struct() };
    fill(&mut header.xsave.region, region);
    fill(area.as_mut_slice(), extra);
    area
}

fn fill(words: &mut [u32], bytes: &[u8]) {
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(4)) {
        *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_area_keeps_every_byte() {
        let bytes: Vec<u8> = (0..4096 + 64).map(|i| (i % 251) as u8).collect();
        let area = area(&bytes);
        let region = area.as_fam_struct_ref().xsave.region;
        let back: Vec<u8> = region
            .iter()
            .chain(area.as_slice())
            .flat_map(|word| word.to_le_bytes())
            .collect();
        assert_eq!(back, bytes);
    }

    #[test]
    fn a_shorter_area_is_continued_with_zeros() {
        let mut bytes = vec![7; 4096];
        let fitted = fit(&bytes, 11008).unwrap();
        bytes.resize(11008, 0);
        assert_eq!(fitted, bytes);
    }

    #[test]
    fn a_longer_area_fits_only_if_its_end_is_zero() {
        let mut bytes = vec![0; 8192];
        bytes[4095] = 1;
        assert_eq!(fit(&bytes, 4096).unwrap(), bytes[..4096]);
        bytes[4096] = 1;
        let refused = fit(&bytes, 4096).unwrap_err();
        assert!(matches!(
            refused,
            StateError::XsaveBeyondHost {
                bytes: 4097,
                limit: 4096
            }
        ));
    }
}
