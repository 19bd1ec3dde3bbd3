//! The terminal while `frazil top` uses it: samples, keys, and restoring it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};
use std::time::{Duration, Instant};

use anyhow::Context;
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

use super::sample::Sample;
use super::view::View;
use super::{Look, Outcome, Watched, next_due};
use crate::cli::TopArgs;

/// How long to wait for a key before checking for samples and signals.
const KEY_PATIENCE: Duration = Duration::from_millis(50);

/// The terminal in raw mode, on its alternate screen, until this is dropped.
struct Screen(DefaultTerminal);

impl Screen {
    fn take() -> anyhow::Result<Self> {
        // Also sets a hook that restores the terminal after a panic.
        ratatui::try_init().map(Self).map_err(|error| {
            let _as_far_as_it_came = ratatui::try_restore();
            anyhow::Error::from(error)
                .context("cannot draw on this terminal: use --json, or another terminal")
        })
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // A terminal that is gone needs no restoring.
        let _gone = ratatui::try_restore();
    }
}

/// What ends the wait between two drawings.
enum News {
    Look(Look),
    /// The terminal's size has changed.
    Resized,
    Quit,
}

/// Shows the VM until the user quits, the VM ends, or enough samples were shown.
pub(super) fn show(
    watched: Watched,
    first: Sample,
    args: &TopArgs,
    quit: &AtomicBool,
) -> anyhow::Result<Outcome> {
    let mut view = View::new(first, args.interval);
    let looks = look_apart(watched, args.interval)?;
    let mut screen = Screen::take()?;
    let mut seen = 1;
    loop {
        screen.0.draw(|frame| view.draw(frame)).context("cannot draw on the terminal")?;
        if args.count.is_some_and(|count| seen >= count) {
            return Ok(Outcome::Done);
        }
        match wait(&looks, quit)? {
            News::Look(Look::Seen(sample)) => {
                view.update(*sample);
                seen += 1;
            }
            News::Look(Look::Silent(error)) => view.silent = Some(error),
            News::Look(Look::Ended(why)) => return Ok(Outcome::Ended(why)),
            News::Resized => {}
            News::Quit => return Ok(Outcome::Done),
        }
    }
}

/// Looks at the VM in a thread of its own, so that keys work while a VM is slow to answer. The
/// thread ends with the VM, or when nobody receives its looks any more.
fn look_apart(mut watched: Watched, interval: Duration) -> anyhow::Result<Receiver<Look>> {
    let (sender, looks) = sync_channel(1);
    let look = move || {
        let mut due = Instant::now();
        loop {
            due = next_due(due, interval);
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            let look = watched.look();
            let last = matches!(look, Look::Ended(_));
            if sender.send(look).is_err() || last {
                return;
            }
        }
    };
    std::thread::Builder::new()
        .name("frazil-top".into())
        .spawn(look)
        .context("cannot start a thread")?;
    Ok(looks)
}

fn wait(looks: &Receiver<Look>, quit: &AtomicBool) -> anyhow::Result<News> {
    loop {
        if quit.load(Ordering::Relaxed) {
            return Ok(News::Quit);
        }
        match looks.try_recv() {
            Ok(look) => return Ok(News::Look(look)),
            Err(TryRecvError::Empty) => {}
            Err(TryRecvError::Disconnected) => {
                anyhow::bail!("the thread that watches the VM is gone")
            }
        }
        if !event::poll(KEY_PATIENCE).context("cannot read keys from the terminal")? {
            continue;
        }
        match event::read().context("cannot read keys from the terminal")? {
            Event::Key(key) if quits(key) => return Ok(News::Quit),
            Event::Resize(..) => return Ok(News::Resized),
            _ => {}
        }
    }
}

fn quits(key: KeyEvent) -> bool {
    // In raw mode Ctrl-C is an ordinary key.
    let control_c = key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
    key.kind != KeyEventKind::Release
        && (control_c || matches!(key.code, KeyCode::Char('q' | 'Q') | KeyCode::Esc))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn q_escape_and_control_c_quit_and_nothing_else_does() {
        let key = |code, modifiers| KeyEvent::new(code, modifiers);
        for (code, modifiers) in [
            (KeyCode::Char('q'), KeyModifiers::NONE),
            (KeyCode::Char('Q'), KeyModifiers::SHIFT),
            (KeyCode::Esc, KeyModifiers::NONE),
            (KeyCode::Char('c'), KeyModifiers::CONTROL),
        ] {
            assert!(quits(key(code, modifiers)), "{code:?}");
        }
        assert!(!quits(key(KeyCode::Char('c'), KeyModifiers::NONE)));
        assert!(!quits(key(KeyCode::Enter, KeyModifiers::NONE)));
    }
}
