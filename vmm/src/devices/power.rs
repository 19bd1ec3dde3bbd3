//! The sleep registers of hardware-reduced ACPI, by which a guest powers its machine off (ACPI
//! Specification 6.5, 4.8.3.7).

use super::{Device, Stateless};
use crate::vcpu::Ended;

/// The sleep control register, one byte wide; a free port, as on most machines of this kind.
pub const CONTROL: u16 = 0x600;
/// The sleep status register, one byte wide.
pub const STATUS: u16 = 0x601;
/// The sleep type that powers the machine off (S5), as given in the guest's ACPI tables.
pub const SLEEP_TYPE_OFF: u8 = 5;

const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE: u8 = 7 << 2;

/// Both registers. S5 is the only sleep state, so there is nothing to wake up from or to remember.
#[derive(Clone, Copy, Debug)]
pub struct Power;

/// Returns true if `port` is one of the two sleep registers.
#[must_use]
pub fn owns(port: u16) -> bool {
    matches!(port, CONTROL | STATUS)
}

impl Power {
    /// Handles a write; powering off ends the machine.
    #[must_use]
    pub fn write(self, port: u16, value: u8) -> Option<Ended> {
        let off = SLEEP_ENABLE | SLEEP_TYPE_OFF << 2;
        (port == CONTROL && value & (SLEEP_ENABLE | SLEEP_TYPE) == off).then_some(Ended::PoweredOff)
    }

    /// Handles a read: both are zero, as the machine has not been woken up.
    #[must_use]
    pub fn read(self, _port: u16) -> u8 {
        0
    }
}

impl Device for Power {
    type State = Stateless;

    fn state(&self) -> Stateless {
        Stateless
    }

    fn capture(&self, _into: &mut Stateless) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_s5_ends_the_machine() {
        assert_eq!(Power.write(CONTROL, 0x34), Some(Ended::PoweredOff));
        assert_eq!(Power.write(CONTROL, 0xf7), Some(Ended::PoweredOff), "other bits mean nothing");
        for value in [0, 0x14, 0x20, 0x2c, 0x3c] {
            assert_eq!(Power.write(CONTROL, value), None, "{value:#x}");
        }
        assert_eq!(Power.write(STATUS, 0x34), None);
        assert_eq!((Power.read(CONTROL), Power.read(STATUS)), (0, 0));
    }
}
