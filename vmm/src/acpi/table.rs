//! What all tables have in common.

use acpi_tables::Aml;

/// Who made the tables, as they say.
pub(super) const OEM_ID: [u8; 6] = *b"SNAPST";
pub(super) const OEM_TABLE_ID: [u8; 8] = *b"SNAPSTOR";
pub(super) const OEM_REVISION: u32 = 1;

/// A table as it lies in memory.
pub(super) fn to_bytes(aml: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    aml.to_aml_bytes(&mut bytes);
    bytes
}
