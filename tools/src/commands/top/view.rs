//! The screen of `frazil top`.

use std::collections::VecDeque;
use std::time::Duration;

use frazil_vmm::SavedGuest;
use frazil_vmm::telemetry::{Bucket, Distribution};
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Bar, BarChart, Block, Gauge, Padding, Paragraph, Sparkline};

use super::sample::{PAGE_BYTES, Rates, Sample};
use crate::commands::control::state_name;
use crate::output::{bytes, count, micros, plain};

/// Samples whose dirty rate is kept: more than the widest terminal shows.
const HISTORY: usize = 512;
/// Columns of a bar of the histogram, which its label needs, and between two bars.
const BAR_COLUMNS: u16 = 4;
const BAR_GAP: u16 = 1;

/// The state of the screen.
pub(super) struct View {
    sample: Sample,
    rates: Rates,
    dirty_pages_per_s: Option<f64>,
    /// The dirty rate at each sample, newest first.
    history: VecDeque<u64>,
    interval: Duration,
    /// Why the VM did not answer last time, if it did not.
    pub silent: Option<String>,
}

impl View {
    pub(super) fn new(first: Sample, interval: Duration) -> Self {
        let dirty_pages_per_s = first.dirty_pages_per_s(None);
        Self {
            sample: first,
            rates: Rates::default(),
            dirty_pages_per_s,
            history: VecDeque::new(),
            interval,
            silent: None,
        }
    }

    pub(super) fn update(&mut self, sample: Sample) {
        self.rates = sample.rates(&self.sample);
        self.dirty_pages_per_s = sample.dirty_pages_per_s(Some(&self.sample));
        // Without a new checkpoint the rate is unknown: leave a gap.
        let fresh = sample.found.totals.taken > self.sample.found.totals.taken;
        let rate = self.dirty_pages_per_s.filter(|_| fresh).unwrap_or(0.0);
        self.history.push_front(rate as u64);
        self.history.truncate(HISTORY);
        self.sample = sample;
        self.silent = None;
    }

    pub(super) fn draw(&self, frame: &mut Frame<'_>) {
        let pager_rows = if self.sample.status.pager.is_some() { 4 } else { 0 };
        let [header, figures, pager, pauses, footer] = Layout::vertical([
            Constraint::Length(2),
            Constraint::Length(7),
            Constraint::Length(pager_rows),
            Constraint::Min(0),
            Constraint::Length(1),
        ])
        .areas(frame.area());
        let [checkpoints, dirty] =
            Layout::horizontal([Constraint::Percentage(50), Constraint::Percentage(50)])
                .areas(figures);
        frame.render_widget(self.header(), header);
        frame.render_widget(self.checkpoints(), checkpoints);
        self.draw_dirty(frame, dirty);
        self.draw_pager(frame, pager);
        draw_pauses(frame, pauses, &self.sample);
        frame.render_widget(self.footer(), footer);
    }

    fn header(&self) -> Paragraph<'_> {
        let status = &self.sample.status;
        let guest = match &status.machine.guest {
            SavedGuest::Workload { .. } => "built-in workload",
            SavedGuest::Kernel { .. } => "kernel",
        };
        let uptime = humantime::format_duration(Duration::from_secs(status.uptime_ms / 1000));
        let first = Line::from(vec![
            Span::raw("frazil top  ").dim(),
            Span::raw(plain(&status.name)).bold(),
            format!("  {}, up {uptime}", state_name(status.state)).into(),
        ]);
        let machine = format!(
            "{} RAM, {} vCPU{}, {guest}; {}",
            bytes(status.machine.ram_bytes),
            status.machine.cpus,
            if status.machine.cpus == 1 { "" } else { "s" },
            status.store.as_deref().map_or_else(|| "no store".into(), |store| plain(store)),
        );
        Paragraph::new(vec![first, Line::from(machine).dim()])
    }

    fn checkpoints(&self) -> Paragraph<'_> {
        let (totals, rates) = (&self.sample.found.totals, &self.rates);
        let failed = Span::raw(format!("{} failed", count(totals.failed)));
        let failed = if totals.failed > 0 { failed.red().bold() } else { failed };
        let stored = format!(
            "{}/s stored, {} in all",
            bytes(rates.stored_bytes_per_s as u64),
            bytes(totals.stored_bytes)
        );
        let last = self.sample.found.last.as_ref().map_or_else(
            || "none yet".to_owned(),
            |last| {
                let stats = &last.stats;
                format!("last: {} pages in {}", count(stats.dirty_pages), micros(last.duration_us))
            },
        );
        let progress = self.sample.status.checkpoint_in_progress.as_ref();
        let head = self.sample.found.last.as_ref();
        let now = match (progress, head) {
            (Some(progress), _) => format!(
                "now: {} of {}, {}",
                count(progress.pages_done),
                count(progress.pages_total),
                micros(progress.since_ms.saturating_mul(1_000))
            ),
            (None, Some(last)) => format!("snapshot {}", last.id.short()),
            (None, None) => String::new(),
        };
        let counts = vec![
            format!("{} taken, {} skipped, ", count(totals.taken), count(totals.skipped)).into(),
            failed,
        ];
        Paragraph::new(vec![
            Line::from(counts),
            Line::from(format!(
                "{:.1}/s, {} pages/s",
                rates.checkpoints_per_s,
                count(rates.pages_per_s as u64)
            )),
            Line::from(stored),
            Line::from(last),
            Line::from(now).dim(),
        ])
        .block(block("checkpoints"))
    }

    fn draw_dirty(&self, frame: &mut Frame<'_>, area: Rect) {
        let rate = self.dirty_pages_per_s.map_or_else(
            || "unknown before the first checkpoint".to_owned(),
            |rate| {
                format!(
                    "{} pages/s ({}/s)",
                    count(rate as u64),
                    bytes((rate * PAGE_BYTES as f64) as u64)
                )
            },
        );
        let block = block("dirty rate");
        let [text, chart] =
            Layout::vertical([Constraint::Length(1), Constraint::Min(0)]).areas(block.inner(area));
        frame.render_widget(block, area);
        frame.render_widget(Paragraph::new(rate), text);
        // The newest at the right edge, as in every other monitor.
        let width = usize::from(chart.width);
        let values: Vec<u64> = self.history.iter().take(width).rev().copied().collect();
        let left = width.saturating_sub(values.len());
        let chart = Rect {
            x: chart.x + left as u16,
            width: chart.width.saturating_sub(left as u16),
            ..chart
        };
        frame.render_widget(Sparkline::default().data(values).green(), chart);
    }

    fn draw_pager(&self, frame: &mut Frame<'_>, area: Rect) {
        let (Some(pager), Some(share)) = (&self.sample.status.pager, self.sample.resident_share())
        else {
            return;
        };
        let resident = pager.resident_pages() * PAGE_BYTES;
        let label = if pager.complete {
            format!("all resident ({} came from the snapshot)", bytes(resident))
        } else {
            format!("{:.1} %, {} resident", share * 100.0, bytes(resident))
        };
        let mean = self.rates.fault_us_mean.map_or_else(
            || "none just now".to_owned(),
            |mean| format!("{} each", micros(mean.round() as u64)),
        );
        let faults = format!(
            "{} faults/s, {mean}; {} in all, 99 % within {}; filling {}/s",
            count(self.rates.faults_per_s as u64),
            count(pager.faults),
            micros(pager.fault_us_within(0.99)),
            bytes(self.rates.filled_bytes_per_s as u64),
        );
        let block = block("resumed lazily");
        let [gauge, text] =
            Layout::vertical([Constraint::Length(1), Constraint::Min(0)]).areas(block.inner(area));
        frame.render_widget(block, area);
        let style = Style::new().fg(Color::Blue).add_modifier(Modifier::BOLD);
        frame.render_widget(
            Gauge::default().ratio(share).label(label).gauge_style(style).use_unicode(true),
            gauge,
        );
        frame.render_widget(Paragraph::new(faults), text);
    }

    fn footer(&self) -> Paragraph<'_> {
        match &self.silent {
            Some(error) => Paragraph::new(plain(error)).red().bold(),
            None => Paragraph::new(format!(
                "q quits; every {}",
                humantime::format_duration(self.interval)
            ))
            .dim(),
        }
    }
}

fn block(title: &'static str) -> Block<'static> {
    Block::bordered()
        .padding(Padding::horizontal(1))
        .title(Line::from(format!(" {title} ")).bold())
        .border_style(Style::new().dim())
}

fn draw_pauses(frame: &mut Frame<'_>, area: Rect, sample: &Sample) {
    let pause = &sample.found.pause_us;
    let block = block("pause");
    let [figures, chart] =
        Layout::vertical([Constraint::Length(1), Constraint::Min(0)]).areas(block.inner(area));
    frame.render_widget(block, area);
    if pause.count == 0 {
        frame.render_widget(Paragraph::new("no checkpoint yet"), figures);
        return;
    }
    let last = sample.found.last.as_ref().map_or(0, |last| last.stats.pause_us);
    let line = [("p50", pause.p50), ("p90", pause.p90), ("p99", pause.p99), ("max", pause.max)]
        .into_iter()
        .flat_map(|(name, us)| [format!("{name} ").dim(), format!("{}   ", micros(us)).bold()])
        .chain([Span::raw("last ").dim(), micros(last).into()])
        .collect::<Line<'_>>();
    frame.render_widget(Paragraph::new(line), figures);
    let bars: Vec<Bar<'_>> = shown_buckets(pause, chart.width)
        .iter()
        .map(|(label, value)| {
            Bar::with_label(label.clone(), *value).text_value(if *value == 0 {
                String::new()
            } else {
                short_count(*value)
            })
        })
        .collect();
    let chart_of_bars = BarChart::vertical(bars)
        .bar_width(BAR_COLUMNS)
        .bar_gap(BAR_GAP)
        .bar_style(Style::new().cyan())
        .value_style(Style::new().black().on_cyan());
    frame.render_widget(chart_of_bars, chart);
}

/// The buckets that a chart of `columns` columns shows, as label and count: from the first to the
/// last one that is not empty, with an empty one on each side for the eye. If they do not fit,
/// those of the longest pauses are kept, which matter most.
fn shown_buckets(values: &Distribution, columns: u16) -> Vec<(String, u64)> {
    let filled = |bucket: &Bucket| bucket.count > 0;
    let buckets = &values.buckets;
    let first = buckets.iter().position(filled).unwrap_or(0).saturating_sub(1);
    let last = buckets.iter().rposition(filled).map_or(0, |last| last + 1);
    let end = buckets.len().min(last + 1);
    let room = usize::from((columns + BAR_GAP) / (BAR_COLUMNS + BAR_GAP)).max(1);
    let start = first.max(end.saturating_sub(room)).min(end);
    (start..end)
        .map(|index| {
            let bucket = &buckets[index];
            let label = bucket.le.map_or_else(
                || {
                    let below = index.checked_sub(1).and_then(|before| buckets[before].le);
                    format!(">{}", short_time(below.unwrap_or(0)))
                },
                short_time,
            );
            (label, bucket.count)
        })
        .collect()
}

/// A time short enough to fit under a bar: "20µ", "500m", "1s".
fn short_time(us: u64) -> String {
    match us {
        0..1_000 => format!("{us}µ"),
        1_000..1_000_000 => format!("{}m", us / 1_000),
        _ => format!("{}s", us / 1_000_000),
    }
}

/// A count of at most four characters: "999", "1.2k", "34k", "5M".
fn short_count(count: u64) -> String {
    let tenths = |unit: u64| (count / unit, count % unit * 10 / unit);
    match count {
        0..1_000 => count.to_string(),
        1_000..10_000 => format!("{}.{}k", tenths(1_000).0, tenths(1_000).1),
        10_000..1_000_000 => format!("{}k", count / 1_000),
        1_000_000..1_000_000_000 => format!("{}M", count / 1_000_000),
        _ => "lots".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::sample::tests::sample;
    use super::*;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    fn drawn(view: &View, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| view.draw(frame)).unwrap();
        terminal.backend().to_string()
    }

    #[test]
    fn the_view_shows_what_was_seen() {
        let mut view = View::new(sample(0, true), Duration::from_secs(1));
        view.update(sample(1, true));
        let found = drawn(&view, 80, 24);
        for part in [
            "vm1  running, up 1s",
            "64.00 MiB RAM, 2 vCPUs, built-in workload; store st",
            "20 taken, 2 skipped, 1 failed",
            "pages/s (3.12 MiB/s)",
            "p50 600 µs   p90 900 µs   p99 4.0 ms   max 5.0 ms   last 650 µs",
            "12.5 %, 8.00 MiB resident",
            "faults/s, 50 µs each; 100 in all, 99 % within 64 µs",
            "q quits; every 1s",
        ] {
            assert!(found.contains(part), "expected `{part}` in\n{found}");
        }
        // The figures of a large VM fit, too, with their units.
        let mut large = sample(2, false);
        large.status.checkpoint_in_progress = Some(
            serde_json::from_value(serde_json::json!({
                "pages_total": 1_048_576, "pages_done": 1_048_000, "stored_bytes": 0,
                "since_ms": 12_340,
            }))
            .unwrap(),
        );
        let last = large.found.last.as_mut().unwrap();
        (last.stats.dirty_pages, last.duration_us) = (1_048_576, 36_400);
        view.update(large);
        let found = drawn(&view, 80, 24);
        for part in ["last: 1,048,576 pages in 36.4 ms", "now: 1,048,000 of 1,048,576, 12.34 s"] {
            assert!(found.contains(part), "expected `{part}` in\n{found}");
        }
        view.silent = Some("no \u{1b}[31manswer".into());
        assert!(drawn(&view, 80, 24).contains("no \\u001b[31manswer"));
    }

    #[test]
    fn any_size_can_be_drawn_on_and_nothing_hostile_gets_through() {
        for lazy in [true, false] {
            let mut seen = sample(3, lazy);
            seen.status.name = "\u{1b}[2J\u{9b}evil\u{202e}".into();
            seen.status.store = Some("\u{1b}]0;x\u{7}".into());
            let mut view = View::new(sample(2, lazy), Duration::from_millis(250));
            view.update(seen);
            for (width, height) in [(1, 1), (5, 3), (20, 5), (80, 24), (300, 90)] {
                let found = drawn(&view, width, height);
                let odd = found.chars().find(|c| c.is_control() && *c != '\n' || *c == '\u{202e}');
                assert_eq!(odd, None, "{found}");
            }
            assert!(drawn(&view, 80, 24).contains("\\u001b[2J\\u009bevil\\u202e"));
        }
    }

    #[test]
    fn the_chart_shows_where_pauses_are_and_keeps_the_longest() {
        let pause = sample(0, false).found.pause_us;
        let label = |(label, _): &(String, u64)| label.clone();
        let all: Vec<String> = shown_buckets(&pause, 80).iter().map(label).collect();
        assert_eq!(all, ["10µ", "100µ", "1m", "5m", "1s"]);
        let few: Vec<String> = shown_buckets(&pause, 10).iter().map(label).collect();
        assert_eq!(few, ["5m", "1s"]);
        let mut slow = pause;
        slow.buckets.last_mut().unwrap().count = 3;
        assert_eq!(shown_buckets(&slow, 80).last(), Some(&(">1s".to_owned(), 3)));
    }

    #[test]
    fn short_texts_fit_under_a_bar() {
        for (count, text) in [(0, "0"), (999, "999"), (1_234, "1.2k"), (56_789, "56k")] {
            assert_eq!(short_count(count), text);
        }
        assert_eq!(short_count(7_800_000), "7M");
        assert_eq!((short_time(200), short_time(20_000)), ("200µ".into(), "20m".into()));
    }
}
