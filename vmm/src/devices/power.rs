//! The ports of ACPI's sleep and reset registers (ACPI specification 6.5, sections
//! 4.8.3.6 and 4.8.3.7). They keep nothing: what is written takes effect or is
//! forgotten, and all reads are zero, "not woken from sleep".

use super::effect::Effect;
use crate::addresses::{
    RESET_PORT, RESET_VALUE, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT, SLEEP_TYPE_OFF,
};

/// Sleep control: enter the sleep type of bits 2 to 4.
const SLEEP_ENABLE: u8 = 1 << 5;

pub(super) fn is_port(port: u16) -> bool {
    matches!(port, SLEEP_CONTROL_PORT | SLEEP_STATUS_PORT | RESET_PORT)
}

/// What a write to one of the ports leads to.
pub(super) fn write(port: u16, data: &[u8]) -> Effect {
    let is_off = |value: &u8| value & SLEEP_ENABLE != 0 && value >> 2 & 7 == SLEEP_TYPE_OFF;
    match port {
        SLEEP_CONTROL_PORT if data.iter().any(is_off) => Effect::PowerOff,
        RESET_PORT if data.contains(&RESET_VALUE) => Effect::Reset,
        _ => Effect::None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_soft_off_ends_the_machine() {
        assert_eq!(
            write(SLEEP_CONTROL_PORT, &[5 << 2 | 1 << 5]),
            Effect::PowerOff
        );
        for value in [0, 5 << 2, 1 << 5, 3 << 2 | 1 << 5] {
            assert_eq!(write(SLEEP_CONTROL_PORT, &[value]), Effect::None);
        }
        assert_eq!(write(SLEEP_STATUS_PORT, &[0xff]), Effect::None);
    }

    #[test]
    fn only_its_value_resets() {
        assert_eq!(write(RESET_PORT, &[RESET_VALUE]), Effect::Reset);
        assert_eq!(write(RESET_PORT, &[0]), Effect::None);
        assert!(is_port(RESET_PORT) && !is_port(RESET_PORT + 1));
    }
}
