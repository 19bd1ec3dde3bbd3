//! The design's budgets, by the names of metrics.

use crate::metric::Metric;

/// The limit of a figure.
#[derive(Clone, Copy, Debug)]
enum Limit {
    /// At most this value, in the metric's unit.
    ValueMax(f64),
    /// At most this ratio to the floor.
    RatioMax(f64),
    /// At least this ratio to the floor.
    RatioMin(f64),
}

use Limit::{RatioMax, RatioMin, ValueMax};

/// The metrics that have a budget. One metric may have two.
const BUDGETS: &[(&str, Limit)] = &[
    ("pause.p1000_4g_p50_us", ValueMax(200.0)),
    ("pause.p1000_4g_p50_us", RatioMax(1.5)),
    ("pause.p1000_4g_p99_us", ValueMax(1000.0)),
    ("pause.dirty10_4g_p50_us", ValueMax(2000.0)),
    ("pause.dirty10_4g_p50_us", RatioMax(0.02)),
    ("pause.dirty10_seq_4g_p50_us", ValueMax(2000.0)),
    ("pause.dirty10_seq_4g_p50_us", RatioMax(0.02)),
    ("pause.storm_1g_max_us", ValueMax(5000.0)),
    ("pause.scale_16g_1g", RatioMax(1.2)),
    ("pause.guest_work_10hz", RatioMin(0.9)),
    ("pause.incr_vs_store", RatioMin(0.85)),
    ("store.full_write", RatioMin(0.85)),
    ("store.incr_write_contig", RatioMin(0.85)),
    ("store.incr_write", RatioMin(0.85)),
    ("store.overhead_contig", ValueMax(3.0)),
    ("store.overhead_scattered", ValueMax(5.0)),
    ("store.overhead_p1000", ValueMax(15.0)),
    ("store.commit_scale_16g_1g", RatioMax(1.2)),
    ("store.depth_1000_1", RatioMax(1.2)),
    ("store.diff_16g_ms", ValueMax(20.0)),
    ("store.verify", RatioMin(0.7)),
    ("store.delta_small_edit", RatioMax(0.25)),
    ("resume.first_progress_1g_ms", ValueMax(10.0)),
    ("resume.first_progress_16g_ms", ValueMax(10.0)),
    ("resume.first_progress_deep_ms", ValueMax(10.0)),
    ("resume.sweep_seq", RatioMax(1.25)),
    ("resume.working_set", RatioMax(1.05)),
    ("resume.fault_p50", RatioMax(1.3)),
    ("resume.fault_p99", RatioMax(2.0)),
    ("clone.ready", RatioMax(2.0)),
    ("clone.private_mib_100", ValueMax(100.0)),
    ("rewind.latency", RatioMax(1.0)),
    ("store.diff_process_16g_ms", ValueMax(50.0)),
    ("tools.search", RatioMin(0.7)),
    ("tools.search_regex", RatioMin(0.7)),
];

/// A budget of a figure, and whether it is met.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Judged {
    /// The budget in words.
    pub budget: String,
    /// Whether the figure is within it.
    pub met: bool,
}

/// Every budget that `metric` is held against.
pub(crate) fn judge(metric: &Metric) -> Vec<Judged> {
    let asked = BUDGETS.iter().filter(|(name, _)| *name == metric.name());
    asked.filter_map(|(_, limit)| limit.judge(metric)).collect()
}

/// The limit of a metric's ratio, if it has a budget for that.
pub(super) fn ratio_limit(name: &str) -> Option<f64> {
    BUDGETS.iter().filter(|(asked, _)| *asked == name).find_map(|(_, limit)| match limit {
        RatioMax(limit) | RatioMin(limit) => Some(*limit),
        ValueMax(_) => None,
    })
}

impl Limit {
    /// None if the limit is a ratio and the figure has none.
    fn judge(self, metric: &Metric) -> Option<Judged> {
        let (budget, met) = match self {
            ValueMax(max) => (format!("≤ {max} {}", metric.unit()), metric.value() <= max),
            RatioMax(max) => (format!("≤ {max} × floor"), metric.ratio()? <= max),
            RatioMin(min) => (format!("≥ {min} × floor"), metric.ratio()? >= min),
        };
        Some(Judged { budget, met })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_judged_by_value_and_by_ratio() {
        let of = |value, floor| {
            let metric = Metric::new("pause.p1000_4g_p50_us", value, "us", 9).against(floor);
            judge(&metric).iter().map(|judged| judged.met).collect::<Vec<_>>()
        };
        assert_eq!(of(150.0, 120.0), [true, true]);
        assert_eq!(of(190.0, 100.0), [true, false]);
        assert_eq!(of(250.0, 200.0), [false, true]);
        let verify = |value| judge(&Metric::new("store.verify", value, "MiB/s", 3).against(100.0));
        assert_eq!((verify(70.0)[0].met, verify(69.0)[0].met), (true, false));
        assert_eq!(verify(70.0)[0].budget, "≥ 0.7 × floor");
        assert_eq!(judge(&Metric::new("store.verify", 1.0, "MiB/s", 3)), [], "there is no floor");
        assert_eq!(judge(&Metric::new("floors.memcpy_us_per_page", 1.0, "us", 3)), []);
    }
}
