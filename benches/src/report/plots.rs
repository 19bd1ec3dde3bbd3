//! Plots of a report: SVG, in colours that everyone can tell apart (Okabe and Ito, 2008).

use std::ops::Range;

use anyhow::anyhow;
use plotters::coord::Shift;
use plotters::coord::ranged1d::{
    AsRangedCoord, DefaultFormatting, KeyPointHint, Ranged, ValueFormatter,
};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

const BLUE: RGBColor = RGBColor(0, 114, 178);
const ORANGE: RGBColor = RGBColor(230, 159, 0);
const GREEN: RGBColor = RGBColor(0, 158, 115);
const VERMILLION: RGBColor = RGBColor(213, 94, 0);
const PURPLE: RGBColor = RGBColor(204, 121, 167);
const SKY: RGBColor = RGBColor(86, 180, 233);
/// Colours of curves, in their order.
const COLOURS: [RGBColor; 7] = [BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY, BLACK];

const FONT: &str = "sans-serif";
const WIDTH: u32 = 860;
const TITLE_HEIGHT: u32 = 46;
const ROW_HEIGHT: u32 = 30;
const AXIS_HEIGHT: u32 = 52;
/// Width of the names of bars.
const NAMES_WIDTH: u32 = 270;
const CURVES_HEIGHT: u32 = 420;
const LEGEND_WIDTH: u32 = 240;
/// Shares that have a grid line.
const KEY_SHARES: [f64; 6] = [0.0, 0.5, 0.9, 0.99, 0.999, 0.9999];

/// A bar, and its budget.
#[derive(Clone, Debug)]
pub(super) struct Bar {
    pub name: String,
    pub value: f64,
    /// The text at the bar's end.
    pub label: String,
    /// Where the budget's mark is.
    pub budget: Option<f64>,
    /// The bar's group, which determines its colour.
    pub group: usize,
}

/// A distribution: shares of all values, ascending, and the value below which each share lies.
#[derive(Clone, Debug)]
pub(crate) struct Curve {
    pub name: String,
    pub points: Vec<(f64, f64)>,
}

/// Horizontal bars. With `log`, on a logarithmic scale: then a bar's length says little, and the
/// label at its end everything.
pub(super) fn bars(title: &str, axis: &str, bars: &[Bar], log: bool) -> anyhow::Result<String> {
    let most = bars.iter().map(reach).fold(0.0, f64::max);
    let height = TITLE_HEIGHT + AXIS_HEIGHT + ROW_HEIGHT * bars.len() as u32;
    drawn(height, |area| {
        if log {
            let least = bars.iter().map(|bar| bar.value).fold(f64::INFINITY, f64::min);
            let from = 10_f64.powf((least.max(1e-6) / 2.0).log10().floor());
            draw_bars(area, title, axis, bars, (from..most * 30.0).log_scale(), from)
        } else {
            draw_bars(area, title, axis, bars, 0.0..most * 1.7, 0.0)
        }
    })
}

/// How far a bar or its budget extends.
fn reach(bar: &Bar) -> f64 {
    bar.value.max(bar.budget.unwrap_or(0.0))
}

fn draw_bars<X>(
    area: &DrawingArea<SVGBackend<'_>, Shift>,
    title: &str,
    axis: &str,
    bars: &[Bar],
    scale: X,
    from: f64,
) -> anyhow::Result<()>
where
    X: AsRangedCoord<Value = f64>,
    X::CoordDescType: ValueFormatter<f64>,
{
    let rows = bars.len() as f64;
    let mut chart = ChartBuilder::on(area)
        .caption(title, (FONT, 19))
        .margin(8)
        .x_label_area_size(AXIS_HEIGHT - 14)
        .y_label_area_size(NAMES_WIDTH)
        .build_cartesian_2d(scale, rows..0.0)
        .map_err(cannot)?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .y_labels(0)
        .x_labels(8)
        .x_desc(axis)
        .x_label_formatter(&|value| number(*value))
        .label_style((FONT, 13))
        .light_line_style(TRANSPARENT)
        .draw()
        .map_err(cannot)?;
    for (row, bar) in bars.iter().enumerate() {
        let row = row as f64;
        let colour = COLOURS[bar.group % COLOURS.len()];
        let corners = [(from, row + 0.2), (bar.value, row + 0.8)];
        let shape = std::iter::once(Rectangle::new(corners, colour.filled()));
        chart.draw_series(shape).map_err(cannot)?;
        let style = text_style(Pos::new(HPos::Left, VPos::Center));
        // Beyond the budget's mark, too.
        let at = (reach(bar), row + 0.5);
        let behind = EmptyElement::at(at) + Text::new(bar.label.clone(), (7, 0), style);
        chart.draw_series(std::iter::once(behind)).map_err(cannot)?;
        if let Some(budget) = bar.budget {
            let line = [(budget, row + 0.08), (budget, row + 0.92)];
            let line = PathElement::new(line, BLACK.stroke_width(3));
            chart.draw_series(std::iter::once(line)).map_err(cannot)?;
        }
    }
    draw_names(area, bars)
}

/// Draws the names left of the bars, where the chart has left room.
fn draw_names(area: &DrawingArea<SVGBackend<'_>, Shift>, bars: &[Bar]) -> anyhow::Result<()> {
    let (_, height) = area.dim_in_pixel();
    let top = f64::from(TITLE_HEIGHT) - 14.0;
    let bottom = f64::from(height) - f64::from(AXIS_HEIGHT) + 6.0;
    let row_height = (bottom - top) / bars.len() as f64;
    for (row, bar) in bars.iter().enumerate() {
        let y = top + row_height * (row as f64 + 0.5);
        let style = text_style(Pos::new(HPos::Right, VPos::Center));
        let at = (NAMES_WIDTH as i32, y as i32);
        area.draw(&Text::new(bar.name.clone(), at, style)).map_err(cannot)?;
    }
    Ok(())
}

/// Distributions: for each share of values, the value that they lie below. Shares are on a scale of
/// nines, which shows both ends.
pub(super) fn curves(title: &str, axis: &str, curves: &[Curve]) -> anyhow::Result<String> {
    let in_nines = |(share, value): &(f64, f64)| (nines(*share), *value);
    let curves: Vec<Curve> = curves
        .iter()
        .map(|curve| Curve {
            name: curve.name.clone(),
            points: curve.points.iter().map(in_nines).collect(),
        })
        .collect();
    let points = || curves.iter().flat_map(|curve| &curve.points);
    let nines_max = points().map(|(nines, _)| *nines).fold(1.0, f64::max);
    let ys = reach_of(points().map(|(_, value)| *value));
    let axes = ("share of all, on a scale of nines", axis);
    let scales = (Nines(nines_max), ys.start * 0.7..ys.end * 1.5);
    draw_curves(title, axes, scales, share, &curves, false)
}

/// Lines with both axes logarithmic: how one quantity grows with another.
pub(super) fn lines(title: &str, axes: (&str, &str), curves: &[Curve]) -> anyhow::Result<String> {
    let points = || curves.iter().flat_map(|curve| &curve.points);
    let (xs, ys) = (reach_of(points().map(|(x, _)| *x)), reach_of(points().map(|(_, y)| *y)));
    let scales = ((xs.start * 0.8..xs.end * 1.2).log_scale(), ys.start * 0.6..ys.end * 1.7);
    draw_curves(title, axes, scales, number, curves, true)
}

/// One line per curve, with dots at the points if `has_dots`. The vertical axis is logarithmic.
fn draw_curves<X>(
    title: &str,
    (x_axis, y_axis): (&str, &str),
    (xs, ys): (X, Range<f64>),
    x_label: fn(f64) -> String,
    curves: &[Curve],
    has_dots: bool,
) -> anyhow::Result<String>
where
    X: AsRangedCoord<Value = f64>,
    X::CoordDescType: ValueFormatter<f64>,
{
    drawn(CURVES_HEIGHT, |area| {
        let (area, legend) = area.split_horizontally(WIDTH - LEGEND_WIDTH);
        let mut chart = ChartBuilder::on(&area)
            .caption(title, (FONT, 19))
            .margin(10)
            .x_label_area_size(44)
            .y_label_area_size(72)
            .build_cartesian_2d(xs, ys.log_scale())
            .map_err(cannot)?;
        chart
            .configure_mesh()
            .x_desc(x_axis)
            .y_desc(y_axis)
            .x_label_formatter(&|value| x_label(*value))
            .y_label_formatter(&|value| number(*value))
            .label_style((FONT, 13))
            .light_line_style(TRANSPARENT)
            .draw()
            .map_err(cannot)?;
        for (row, (curve, colour)) in curves.iter().zip(COLOURS.iter().cycle()).enumerate() {
            let points = || curve.points.iter().copied();
            let line = LineSeries::new(points(), colour.stroke_width(3));
            chart.draw_series(line).map_err(cannot)?;
            let dots = points().filter(|_| has_dots);
            let dots = dots.map(|point| Circle::new(point, 4, colour.filled()));
            chart.draw_series(dots).map_err(cannot)?;
            draw_key(&legend, row, &curve.name, *colour)?;
        }
        Ok(())
    })
}

/// The range from the least value to the greatest, limited to positive values.
fn reach_of(values: impl Iterator<Item = f64> + Clone) -> Range<f64> {
    let least = values.clone().fold(f64::INFINITY, f64::min).max(1e-3);
    least..values.fold(least, f64::max)
}

/// An entry of the legend.
fn draw_key(
    legend: &DrawingArea<SVGBackend<'_>, Shift>,
    row: usize,
    name: &str,
    colour: RGBColor,
) -> anyhow::Result<()> {
    let y = 60 + 24 * row as i32;
    let line = PathElement::new([(4, y), (26, y)], colour.stroke_width(3));
    legend.draw(&line).map_err(cannot)?;
    let style = text_style(Pos::new(HPos::Left, VPos::Center));
    legend.draw(&Text::new(name.to_owned(), (34, y), style)).map_err(cannot)
}

/// A scale of shares in nines, up to the number given, with grid lines at the usual shares.
struct Nines(f64);

impl Ranged for Nines {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (from, to): (i32, i32)) -> i32 {
        from + (f64::from(to - from) * value / self.0).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _hint: Hint) -> Vec<f64> {
        KEY_SHARES.map(nines).into_iter().filter(|nines| *nines <= self.0).collect()
    }

    fn range(&self) -> Range<f64> {
        0.0..self.0
    }
}

/// The number of nines in a share: half is 0.3 nines, 90 % is one, 99 % is two.
fn nines(share: f64) -> f64 {
    -(1.0 - share).max(1e-6).log10()
}

fn share(nines: f64) -> String {
    let percent = 100.0 * (1.0 - 10_f64.powf(-nines));
    // As many digits as there are nines.
    format!("{} %", (percent * 1e3).round() / 1e3)
}

/// A number in its shortest form.
fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        size if size >= 1e6 => format!("{} M", value / 1e6),
        size if size >= 1e4 => format!("{} k", value / 1e3),
        _ => format!("{}", (value * 1e4).round() / 1e4),
    }
}

fn text_style(position: Pos) -> TextStyle<'static> {
    TextStyle::from((FONT, 14).into_font()).pos(position)
}

fn drawn(
    height: u32,
    draw: impl FnOnce(&DrawingArea<SVGBackend<'_>, Shift>) -> anyhow::Result<()>,
) -> anyhow::Result<String> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        area.fill(&WHITE).map_err(cannot)?;
        draw(&area)?;
        area.present().map_err(cannot)?;
    }
    Ok(svg)
}

/// Drawing only writes to memory, so nothing should fail.
fn cannot(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("cannot draw a plot: {error}")
}
