//! Lines on the first serial port.

use core::fmt::{self, Write};
use core::mem::offset_of;
use core::sync::atomic::{AtomicU64, Ordering};

use super::control::{CONTROL_GPA, Header};
use super::machine::{input, out, pause};

const DATA: u16 = 0x3f8;
const LINE_STATUS: u16 = 0x3fd;
const TRANSMITTER_EMPTY: u8 = 0x20;
const LINE_BYTES_MAX: usize = 512;

/// A line in the making: formatted first, then sent in one go under the lock.
struct Line {
    bytes: [u8; LINE_BYTES_MAX],
    used: usize,
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let kept = text.len().min(LINE_BYTES_MAX - self.used);
        self.bytes[self.used..self.used + kept].copy_from_slice(&text.as_bytes()[..kept]);
        self.used += kept;
        Ok(()) // a line that is too long is cut
    }
}

/// Prints `frazil-guest: ` and `text` as one line. Sending takes a VM exit for each byte, so `meanwhile` is
/// called between bytes: whoever watches the clock can go on watching it.
///
/// The lock is in the control area. A vCPU that is frozen with it goes on with it when resumed, as do those
/// that wait for it.
pub fn say(cpu: u64, meanwhile: &mut dyn FnMut(), text: fmt::Arguments<'_>) {
    let mut line = Line { bytes: [0; LINE_BYTES_MAX], used: 0 };
    // Formatting into a `Line` cannot fail.
    let _ = line.write_str("frazil-guest: ").and_then(|()| line.write_fmt(text));

    // SAFETY: the header is RAM, mapped, and this field is used as an atomic only.
    let owner = unsafe {
        AtomicU64::from_ptr((CONTROL_GPA + offset_of!(Header, serial_owner) as u64) as *mut u64)
    };
    while owner.compare_exchange_weak(0, cpu + 1, Ordering::Acquire, Ordering::Relaxed).is_err() {
        meanwhile();
        pause();
    }
    for byte in line.bytes[..line.used].iter().chain(b"\n") {
        while input(LINE_STATUS) & TRANSMITTER_EMPTY == 0 {
            pause();
        }
        out(DATA, *byte);
        meanwhile();
    }
    owner.store(0, Ordering::Release);
}
