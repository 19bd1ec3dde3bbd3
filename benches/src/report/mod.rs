//! `--report FILE`: all figures of a run beside the design's budgets, with pictures.
//!
//! A report is written as Markdown, with its pictures in files beside it; or it is turned into one
//! self-contained HTML file.

pub(crate) mod budgets;
mod machine;
mod plots;

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use pulldown_cmark::{Options, Parser, html};

use crate::metric::{LEGEND, Metric, plain};
use crate::samples::Samples;
use plots::Bar;
pub(crate) use plots::Curve;

/// The shares at which a distribution is drawn.
const SHARES: [f64; 14] =
    [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.975, 0.99, 0.995, 0.9975, 0.999, 0.9995, 0.9999];

/// A picture that shows several distributions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Picture {
    /// How long checkpoints pause a guest, in microseconds.
    Pauses,
    /// How long a fault on a page takes, in microseconds.
    Faults,
}

#[derive(Clone, Copy, Debug)]
enum Format {
    Markdown,
    Html,
}

/// A report that is being made.
#[derive(Debug)]
pub(crate) struct Report {
    path: PathBuf,
    format: Format,
    started: Instant,
    quick: bool,
    curves: Vec<(Picture, Curve)>,
    /// Suites that could not be measured, and why.
    failures: Vec<(String, String)>,
}

/// A finished picture.
struct Drawn {
    /// Its file's name.
    name: &'static str,
    title: &'static str,
    svg: String,
}

impl Report {
    /// A report to be written to `path`, whose extension gives the format.
    pub(crate) fn new(path: PathBuf, quick: bool) -> anyhow::Result<Self> {
        let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
        let format = match ending {
            "html" => Format::Html,
            "md" => Format::Markdown,
            _ => bail!("{}: expected a report whose name ends in .html or .md", path.display()),
        };
        // Fails now rather than after an hour; an existing report stays until there is a new one.
        let folder = match path.parent() {
            Some(folder) if folder != Path::new("") => folder,
            _ => Path::new("."),
        };
        tempfile::NamedTempFile::new_in(folder)
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self {
            path,
            format,
            started: Instant::now(),
            quick,
            curves: Vec::new(),
            failures: Vec::new(),
        })
    }

    /// Adds the distribution of `samples`, which are times, to a picture.
    pub(crate) fn add_curve(&mut self, picture: Picture, name: &str, samples: &Samples) {
        let n = samples.n();
        // A share beyond which there is less than one value would only repeat the largest value.
        let there = |share: &f64| (1.0 - share) * n as f64 >= 1.0 || *share <= 0.5;
        let points = SHARES.into_iter().filter(there);
        let mut points: Vec<_> = points.map(|share| (share, samples.us(share))).collect();
        points.push((1.0 - 1.0 / (n as f64 + 1.0), samples.us(1.0)));
        let name = format!("{name} (n = {n})");
        self.curves.push((picture, Curve { name, points }));
    }

    /// Adds a suite that could not be measured, and why.
    pub(crate) fn add_failure(&mut self, suite: &str, why: String) {
        self.failures.push((suite.to_owned(), why));
    }

    /// Writes the report and its pictures.
    pub(crate) fn write(&self, metrics: &[Metric], file_system: &str) -> anyhow::Result<()> {
        let pictures = self.pictures(metrics)?;
        let text = match self.format {
            Format::Markdown => {
                for picture in &pictures {
                    write_file(&self.beside(picture), &picture.svg)?;
                }
                self.markdown(metrics, file_system, &pictures, |picture| {
                    let path = self.beside(picture);
                    let name = path.file_name().unwrap_or_default().to_string_lossy();
                    format!("![{}]({name})", picture.title)
                })
            }
            Format::Html => page(&self.markdown(metrics, file_system, &pictures, |picture| {
                // A block of HTML in Markdown ends at an empty line.
                picture.svg.replace("\n\n", "\n")
            })),
        };
        write_file(&self.path, &text)?;
        eprintln!("frazil-bench: the report is in {}", self.path.display());
        Ok(())
    }

    /// The path of a picture of a Markdown report.
    fn beside(&self, picture: &Drawn) -> PathBuf {
        let stem = self.path.file_stem().unwrap_or_default().to_string_lossy();
        self.path.with_file_name(format!("{stem}-{}.svg", picture.name))
    }

    fn markdown(
        &self,
        metrics: &[Metric],
        file_system: &str,
        pictures: &[Drawn],
        show: impl Fn(&Drawn) -> String,
    ) -> String {
        let mut text = String::from("# frazil: its figures, and the limits of this machine\n\n");
        text.push_str("| | |\n|---|---|\n");
        for (what, which) in machine::facts(file_system) {
            row(&mut text, &[what, which.as_str()]);
        }
        row(&mut text, &["took", took(self.started.elapsed()).as_str()]);
        if !self.failures.is_empty() {
            text.push_str("\n## Not measured\n\n| suite | why |\n|---|---|\n");
            for (suite, why) in &self.failures {
                row(&mut text, &[suite, why]);
            }
        }
        text.push_str("\n## Budgets\n\n");
        if self.quick {
            text.push_str("This was a quick run, which only shows that everything works. ");
            text.push_str(
                "Its figures are not reliable, so they are not compared with the budgets.\n",
            );
        } else {
            budget_table(&mut text, metrics);
        }
        for picture in pictures {
            // The title is inside the picture.
            let _infallible = write!(text, "\n{}\n", show(picture));
        }
        for suite in suites(metrics) {
            let _infallible = write!(text, "\n## {suite}\n\n");
            text.push_str(
                "| metric | value | unit | floor | ratio | n |\n|---|--:|---|--:|--:|--:|\n",
            );
            for metric in metrics.iter().filter(|metric| metric.suite() == suite) {
                row(&mut text, &figures(metric));
            }
        }
        let _infallible = write!(text, "\n## What the columns mean\n\n```text\n{LEGEND}\n```\n");
        text
    }

    /// All pictures for which there are figures.
    fn pictures(&self, metrics: &[Metric]) -> anyhow::Result<Vec<Drawn>> {
        let mut drawn = Vec::new();
        for (picture, name, title, axis) in [
            (Picture::Pauses, "pauses", "How long a checkpoint pauses the guest", "µs"),
            (Picture::Faults, "faults", "How long a page takes to arrive after a resume", "µs"),
        ] {
            let of = self.curves.iter().filter(|(of, _)| *of == picture);
            let curves: Vec<Curve> = of.map(|(_, curve)| curve.clone()).collect();
            if !curves.is_empty() {
                drawn.push(Drawn { name, title, svg: plots::curves(title, axis, &curves)? });
            }
        }
        let steps = steps(metrics);
        if !steps.is_empty() {
            let title = "A checkpoint, by pages written since the previous one (medians)";
            let svg =
                plots::lines(title, ("pages written since the previous checkpoint", "µs"), &steps)?;
            drawn.push(Drawn { name: "steps", title, svg });
        }
        for chart in CHARTS {
            let mut bars: Vec<Bar> = metrics.iter().filter_map(chart.bar).collect();
            // Bars of the same kind are next to each other; otherwise the order is kept.
            bars.sort_by_key(|bar| KINDS.iter().position(|kind| bar.name.starts_with(kind)));
            if !bars.is_empty() {
                let svg = plots::bars(chart.title, chart.axis, &bars, chart.log)?;
                drawn.push(Drawn { name: chart.name, title: chart.title, svg });
            }
        }
        Ok(drawn)
    }
}

/// The cost of a checkpoint by the pages written since the one before, from the metrics
/// `pause.after_PAGES_SIZE_…`.
fn steps(metrics: &[Metric]) -> Vec<Curve> {
    const LINES: [(&str, &str); 3] = [
        ("_pause_us", "the guest is paused"),
        ("_gap_us", "the pause that the guest sees"),
        ("_duration_us", "until it is published"),
    ];
    let step = |metric: &Metric, end: &str| {
        let rest = metric.name().strip_prefix("pause.after_")?.strip_suffix(end)?;
        rest.split('_').next()?.parse::<f64>().ok()
    };
    let of = |end: &str, value: fn(&Metric) -> Option<f64>| -> Vec<(f64, f64)> {
        metrics.iter().filter_map(|metric| Some((step(metric, end)?, value(metric)?))).collect()
    };
    let mut curves: Vec<Curve> = LINES
        .iter()
        .map(|(end, name)| Curve {
            name: (*name).to_owned(),
            points: of(end, |metric| Some(metric.value())),
        })
        .collect();
    curves.push(Curve {
        name: "others: stop and copy everything".to_owned(),
        points: of(LINES[0].0, Metric::floor),
    });
    curves.retain(|curve| !curve.points.is_empty());
    curves
}

/// A bar chart: its metrics, and their bars.
struct Chart {
    name: &'static str,
    title: &'static str,
    axis: &'static str,
    log: bool,
    bar: fn(&Metric) -> Option<Bar>,
}

/// The costs of saving and resuming.
const KINDS: [&str; 4] = ["pause", "gap", "duration", "resume"];

const CHARTS: &[Chart] = &[
    Chart {
        name: "roofline",
        title: "Throughput as a share of this machine's limit",
        axis: "share of the limit, measured in the same run (the line: the budget)",
        log: false,
        bar: |metric| metric.is_throughput().then(|| ratio_bar(metric)).flatten(),
    },
    Chart {
        name: "scaling",
        title: "What must not grow with memory or with history",
        axis: "ratio of the larger to the smaller (the line: the budget)",
        log: false,
        bar: |metric| {
            let name = metric.name();
            let grows = name.contains("scale_16g_1g") && !name.ends_with("_p90");
            (grows || name.starts_with("store.depth_")).then(|| ratio_bar(metric)).flatten()
        },
    },
    Chart {
        name: "first-progress",
        title: "From the start of `frazil resume` to the guest's first progress",
        axis: "ms (the line: the budget; below each: creating an empty VM of that size)",
        log: false,
        bar: |metric| {
            let rest = metric.name().strip_prefix("resume.")?.strip_suffix("_ms")?;
            let (what, group) = match rest.strip_prefix("first_progress_") {
                Some(of) => (format!("first progress, {of}"), 0),
                None => (format!("an empty VM, {}", rest.strip_prefix("create_vm_")?), 1),
            };
            let extra = ["_p99", "_from_main"].iter().any(|extra| rest.ends_with(extra));
            let budget = (group == 0).then_some(10.0);
            (!extra).then(|| Bar { budget, ..value_bar(metric, what, group) })
        },
    },
    Chart {
        name: "guest-work",
        title: "The guest's work, by checkpoints per second",
        axis: "share of its work when the dirty log is only read (the line: the budget)",
        log: false,
        bar: |metric| {
            let rate = metric.name().strip_prefix("pause.guest_work_")?.strip_suffix("hz")?;
            let bar = ratio_bar(metric)?;
            Some(Bar { name: format!("{rate} per second"), ..bar })
        },
    },
    Chart {
        name: "sweeps",
        title: "A resumed guest writes all its memory",
        axis: "times as long as in resident memory (the line: the budget)",
        log: true,
        bar: |metric| {
            let name = metric.name().strip_prefix("resume.")?;
            let is = ["sweep_", "lazy_sweep", "map_private_sweep", "uffd_copy_sweep"]
                .iter()
                .any(|start| name.starts_with(start));
            (is && metric.ratio().is_some()).then(|| ratio_bar(metric)).flatten()
        },
    },
    Chart {
        name: "peers",
        title: "The same guest saved and resumed by other VMMs",
        axis: "ms",
        log: true,
        bar: |metric| {
            let rest = metric.name().strip_prefix("peers.")?.strip_suffix("_ms")?;
            let group = usize::from(!rest.starts_with("frazil"));
            let kind = KINDS.iter().find(|kind| rest.contains(*kind))?;
            let who = rest.replacen(kind, "", 1).replace("qemu", "QEMU").replace('_', " ");
            let who = who.split_whitespace().collect::<Vec<_>>().join(" ");
            Some(value_bar(metric, format!("{kind}: {who}"), group))
        },
    },
];

/// A bar of the ratio to the floor.
fn ratio_bar(metric: &Metric) -> Option<Bar> {
    let value = metric.ratio()?;
    let unit = metric.unit().trim_end_matches(" (more is better)");
    let label = format!(
        "{}  ({} of {} {unit})",
        plain(value),
        plain(metric.value()),
        plain(metric.floor()?)
    );
    let budget = budgets::ratio_limit(metric.name());
    Some(Bar { name: metric.name().to_owned(), value, label, budget, group: 0 })
}

/// A bar of the value itself.
fn value_bar(metric: &Metric, name: String, group: usize) -> Bar {
    let label = format!("{} {}", plain(metric.value()), metric.unit());
    Bar { name, value: metric.value(), label, budget: None, group }
}

fn budget_table(text: &mut String, metrics: &[Metric]) {
    text.push_str("| | metric | value | unit | floor | ratio | n | budget |\n");
    text.push_str("|---|---|--:|---|--:|--:|--:|---|\n");
    for metric in metrics {
        for judged in budgets::judge(metric) {
            let verdict = if judged.met { "met" } else { "**missed**" };
            let [name, value, unit, floor, ratio, n] = figures(metric);
            row(text, &[verdict.to_owned(), name, value, unit, floor, ratio, n, judged.budget]);
        }
    }
}

/// The cells for name, value, unit, floor, ratio and n.
fn figures(metric: &Metric) -> [String; 6] {
    let number = |value: Option<f64>| value.map_or_else(String::new, plain);
    [
        format!("`{}`", metric.name()),
        plain(metric.value()),
        metric.unit().to_owned(),
        number(metric.floor()),
        number(metric.ratio()),
        metric.n().to_string(),
    ]
}

/// Adds a row to a table, escaping what would end a cell.
fn row(text: &mut String, cells: &[impl AsRef<str>]) {
    for cell in cells {
        let _infallible =
            write!(text, "| {} ", cell.as_ref().replace('|', "\\|").replace('<', "&lt;"));
    }
    text.push_str("|\n");
}

/// The suites, in the order in which they were run.
fn suites(metrics: &[Metric]) -> Vec<&str> {
    let mut suites: Vec<&str> = Vec::new();
    for metric in metrics {
        if !suites.contains(&metric.suite()) {
            suites.push(metric.suite());
        }
    }
    suites
}

fn took(time: Duration) -> String {
    let seconds = time.as_secs();
    format!("{} min {} s", seconds / 60, seconds % 60)
}

fn write_file(path: &Path, text: &str) -> anyhow::Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// The report as a self-contained HTML file.
fn page(markdown: &str) -> String {
    let mut body = String::new();
    html::push_html(&mut body, Parser::new_ext(markdown, Options::ENABLE_TABLES));
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <title>frazil-bench</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )
}

const STYLE: &str = "\
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { padding: .2em .7em; border-bottom: 1px solid #ddd; text-align: left; }
code { font-size: .92em; }
svg { max-width: 100%; height: auto; margin: 1em 0; display: block; }
strong { color: #b3261e; }
";

#[cfg(test)]
mod tests {
    use super::*;

    fn metrics() -> Vec<Metric> {
        vec![
            Metric::new("store.verify", 80.0, "MiB/s (more is better)", 3).against(100.0),
            Metric::new("store.commit_scale_16g_1g", 13.0, "ms", 9).against(10.0),
            Metric::new("resume.first_progress_1g_ms", 8.0, "ms", 9).against(3.0),
            Metric::new("peers.qemu_savevm_1g_pause_ms", 3000.0, "ms", 3).against(2.0),
            Metric::new("pause.guest_work_10hz", 95.0, "pages/s", 3).against(100.0),
            Metric::new("pause.after_10_1g_pause_us", 150.0, "us", 3).against(90_000.0),
            Metric::new("pause.after_1000_1g_pause_us", 160.0, "us", 3).against(90_000.0),
            Metric::new("pause.after_1000_1g_duration_us", 30_000.0, "us", 3).against(90_000.0),
        ]
    }

    fn report(name: &str) -> (tempfile::TempDir, String, Vec<String>) {
        let folder = tempfile::tempdir().unwrap();
        let mut report = Report::new(folder.path().join(name), false).unwrap();
        let mut samples = Samples::new();
        (1..1000).for_each(|us| samples.add_time(Duration::from_micros(us)));
        report.add_curve(Picture::Pauses, "a <guest>", &samples);
        report.write(&metrics(), "ext4").unwrap();
        let text = fs::read_to_string(folder.path().join(name)).unwrap();
        let names = fs::read_dir(folder.path()).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        (folder, text, names)
    }

    #[test]
    fn markdown_has_its_pictures_beside_it() {
        let (folder, text, names) = report("out.md");
        assert!(
            text.contains(
                "| met | `store.verify` | 80.0 | MiB/s (more is better) | 100.0 | 0.800 |"
            )
        );
        assert!(text.contains("| **missed** | `store.commit_scale_16g_1g` |"), "{text}");
        for picture in
            ["pauses", "steps", "roofline", "scaling", "first-progress", "guest-work", "peers"]
        {
            let name = format!("out-{picture}.svg");
            assert!(
                text.contains(&format!("({name})")) && names.contains(&name),
                "{name}: {names:?}"
            );
            let svg = fs::read_to_string(folder.path().join(name)).unwrap();
            assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        }
        assert!(!text.contains("out-faults.svg"), "there are no figures for it");
    }

    #[test]
    fn html_is_one_file() {
        let (_folder, text, names) = report("out.html");
        assert_eq!(names, ["out.html"]);
        assert_eq!(text.matches("<svg").count(), 7);
        assert!(text.contains("<td><strong>missed</strong></td>"), "{text}");
        assert!(!text.contains("<guest>"), "names are text");
    }

    #[test]
    fn what_was_not_measured_is_said_and_an_older_report_stays_until_then() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.md");
        fs::write(&path, "older").unwrap();
        let mut report = Report::new(path.clone(), false).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "older");
        report.add_failure("peers", "QEMU is gone: no | such file".to_owned());
        report.write(&metrics(), "ext4").unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains("| peers | QEMU is gone: no \\| such file |"), "{text}");
    }

    #[test]
    fn steps_are_lines_over_the_pages_written() {
        let curves = steps(&metrics());
        let named: Vec<_> = curves.iter().map(|curve| curve.points.clone()).collect();
        assert_eq!(
            named,
            [
                vec![(10.0, 150.0), (1000.0, 160.0)],
                vec![(1000.0, 30_000.0)],
                vec![(10.0, 90_000.0), (1000.0, 90_000.0)],
            ]
        );
    }

    #[test]
    fn a_report_is_markdown_or_html() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["out", "out.pdf", "out.HTML5"] {
            let error = Report::new(folder.path().join(name), false).unwrap_err().to_string();
            assert!(error.contains(".html or .md"), "{error}");
        }
        assert!(Report::new(folder.path().join("none/out.md"), false).is_err());
    }
}
