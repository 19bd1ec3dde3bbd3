//! Feeds standard input to a guest's serial port, and puts a terminal into the mode for that.

use std::io;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use anyhow::Context;
use frazil_vmm::Vm;
use rustix::process::getpgrp;
use rustix::stdio::stdin;
use rustix::termios::{
    InputModes, LocalModes, OptionalActions, Termios, isatty, tcgetattr, tcgetpgrp, tcsetattr,
};

/// The key after which the next one is for frazil: Ctrl-A.
const ESCAPE: u8 = 1;
/// How long to wait before trying again when a guest does not read its input.
const FULL_FOR: Duration = Duration::from_millis(5);
const HELP: &str =
    "\r\nfrazil: Ctrl-A x ends the VM, Ctrl-A Ctrl-A sends Ctrl-A, Ctrl-A h shows this\r\n";

/// The terminal's mode before it was changed.
static TERMINAL: Mutex<Option<Termios>> = Mutex::new(None);

/// Feeds standard input to a guest. Dropping it restores the terminal's mode.
#[derive(Debug)]
pub(crate) struct Console {
    is_terminal: bool,
}

/// True if standard input is a terminal, and this process may read from it without being stopped.
pub(crate) fn is_in_foreground() -> bool {
    isatty(stdin()) && tcgetpgrp(stdin()).is_ok_and(|group| group == getpgrp())
}

/// Puts the terminal back into the mode it was in.
pub(crate) fn give_terminal_back() {
    if let Some(before) = TERMINAL.lock().unwrap_or_else(PoisonError::into_inner).take() {
        // If the terminal is gone, so is its mode.
        let _gone = tcsetattr(stdin(), OptionalActions::Flush, &before);
    }
}

impl Console {
    /// Starts feeding. On a terminal all keys go to the guest, except Ctrl-A and the key after it.
    pub(crate) fn start(vm: &Arc<Vm>) -> anyhow::Result<Self> {
        let is_terminal = isatty(stdin());
        if is_terminal {
            take_terminal().context("cannot set the terminal's mode")?;
        }
        let console = Self { is_terminal };
        let vm = Arc::downgrade(vm);
        // The thread waits in a read that only the end of the process ends.
        std::thread::Builder::new()
            .name("frazil-console".into())
            .spawn(move || feed(&vm, is_terminal))
            .context("cannot start a thread")?;
        Ok(console)
    }

    pub(crate) fn is_terminal(&self) -> bool {
        self.is_terminal
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        give_terminal_back();
    }
}

/// Turns off line editing, echo and signals, which are the guest's business. Output processing
/// stays on, so that frazil's own lines end as they should.
fn take_terminal() -> io::Result<()> {
    let before = tcgetattr(stdin())?;
    let mut raw = before.clone();
    raw.local_modes -= LocalModes::ICANON
        | LocalModes::ECHO
        | LocalModes::ECHONL
        | LocalModes::ISIG
        | LocalModes::IEXTEN;
    raw.input_modes -= InputModes::IXON | InputModes::ICRNL | InputModes::INLCR | InputModes::IGNCR;
    *TERMINAL.lock().unwrap_or_else(PoisonError::into_inner) = Some(before);
    Ok(tcsetattr(stdin(), OptionalActions::Flush, &raw)?)
}

/// What a key means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Meaning {
    Key(u8),
    Nothing,
    End,
    Help,
}

/// Picks out the keys that are for frazil.
#[derive(Debug, Default)]
struct Keys {
    escaped: bool,
}

impl Keys {
    fn meaning(&mut self, key: u8) -> Meaning {
        match (std::mem::take(&mut self.escaped), key) {
            (false, ESCAPE) => {
                self.escaped = true;
                Meaning::Nothing
            }
            (false, key) | (true, key @ ESCAPE) => Meaning::Key(key),
            (true, b'x' | b'X') => Meaning::End,
            (true, _) => Meaning::Help,
        }
    }
}

fn feed(vm: &Weak<Vm>, is_terminal: bool) {
    let mut keys = Keys::default();
    let mut buffer = [0; 256];
    loop {
        let read = match rustix::io::read(stdin(), &mut buffer) {
            // End of input: the guest just gets nothing more.
            Ok(0) => return,
            Ok(count) => &buffer[..count],
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => {
                tracing::debug!(%error, "cannot read standard input");
                return;
            }
        };
        if !is_terminal {
            if !send(vm, read) {
                return;
            }
            continue;
        }
        for key in read {
            let goes_on = match keys.meaning(*key) {
                Meaning::Key(key) => send(vm, &[key]),
                Meaning::Nothing => true,
                Meaning::End => {
                    if let Some(vm) = vm.upgrade() {
                        vm.stop();
                    }
                    false
                }
                Meaning::Help => {
                    let _nobody_listens = io::Write::write_all(&mut io::stderr(), HELP.as_bytes());
                    true
                }
            };
            if !goes_on {
                return;
            }
        }
    }
}

/// Sends all of `bytes`, waiting for room in the guest's input. False if the VM has ended.
fn send(vm: &Weak<Vm>, mut bytes: &[u8]) -> bool {
    while !bytes.is_empty() {
        let Some(vm) = vm.upgrade().filter(|vm| vm.ended().is_none()) else { return false };
        let taken = vm.serial_input(bytes);
        drop(vm);
        bytes = &bytes[taken..];
        if taken == 0 {
            std::thread::sleep(FULL_FOR);
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_after_the_escape_are_ours() {
        let mut keys = Keys::default();
        let typed = b"a\x01\x01\x03\x01hb\x01x";
        let meanings: Vec<_> = typed.iter().map(|key| keys.meaning(*key)).collect();
        let expected = [
            Meaning::Key(b'a'),
            Meaning::Nothing,
            Meaning::Key(1),
            Meaning::Key(3),
            Meaning::Nothing,
            Meaning::Help,
            Meaning::Key(b'b'),
            Meaning::Nothing,
            Meaning::End,
        ];
        assert_eq!(meanings, expected);
    }
}
