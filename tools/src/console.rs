//! Standard input as what a guest reads from its serial port, and a terminal in the mode for that.

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

/// The key after which the next one is ours: Ctrl-A.
const ESCAPE: u8 = 1;
/// How long a guest that does not read is left alone.
const FULL_FOR: Duration = Duration::from_millis(5);
const HELP: &str =
    "\r\nfrazil: Ctrl-A x ends the VM, Ctrl-A Ctrl-A sends Ctrl-A, Ctrl-A h shows this\r\n";

/// How the terminal was before.
static TERMINAL: Mutex<Option<Termios>> = Mutex::new(None);

/// Feeds standard input to a guest. When it is dropped a terminal is as it was before.
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
        // It may be gone, and then nobody misses its mode.
        let _gone = tcsetattr(stdin(), OptionalActions::Flush, &before);
    }
}

impl Console {
    /// Starts it: all keys of a terminal are the guest's, but Ctrl-A and the next.
    pub(crate) fn start(vm: &Arc<Vm>) -> anyhow::Result<Self> {
        let is_terminal = isatty(stdin());
        if is_terminal {
            take_terminal().context("cannot set the terminal's mode")?;
        }
        let console = Self { is_terminal };
        let vm = Arc::downgrade(vm);
        // It waits in a read that nothing ends but the end of the process.
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

/// No line editing, no echo, no signals: that is the guest's. What is put out is treated as before, so
/// that our own lines end as they should.
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

/// Finds the keys that are ours.
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
            // Nothing more comes: the guest just waits.
            Ok(0) => return,
            Ok(count) => &buffer[..count],
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => {
                tracing::debug!(%error, "standard input cannot be read");
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

/// Waits until the guest has room for all of `bytes`. False if it has ended.
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
