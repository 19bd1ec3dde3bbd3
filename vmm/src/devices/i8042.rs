//! As much of the keyboard controller as a guest needs to reset its machine.

use super::{Device, Stateless};
use crate::vcpu::Ended;

const DATA: u16 = 0x60;
/// The command register.
pub const COMMAND: u16 = 0x64;
/// "Pulse output line 0", which is wired to the processor's reset.
pub const COMMAND_RESET: u8 = 0xfe;

/// The controller. No keyboard, no mouse: its buffers are always empty.
#[derive(Clone, Copy, Debug)]
pub struct I8042;

/// Returns true if `port` is one of the controller's two.
#[must_use]
pub fn owns(port: u16) -> bool {
    matches!(port, DATA | COMMAND)
}

impl I8042 {
    /// Handles a write; a reset ends the machine.
    #[must_use]
    pub fn write(self, port: u16, value: u8) -> Option<Ended> {
        (port == COMMAND && value == COMMAND_RESET).then_some(Ended::GuestReset)
    }

    /// Handles a read: status and data are both zero, since the buffers are empty.
    #[must_use]
    pub fn read(self, _port: u16) -> u8 {
        0
    }
}

impl Device for I8042 {
    type State = Stateless;

    fn state(&self) -> Stateless {
        Stateless
    }

    fn capture(&self, _into: &mut Stateless) {}
}
