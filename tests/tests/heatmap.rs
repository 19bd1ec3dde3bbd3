//! Heatmaps: every cell has the colour of the memory it stands for.

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;

use frazil_snapstore::{Store, StoreOptions};
use frazil_tests::oracle::{Edit, Model, take};
use frazil_tests::vm_harness::{Host, number, text};
use serde_json::Value;

/// Few enough that each page has a cell of its own: cells hold as few pages as there is room for.
const PAGES: usize = 6_000;
const COLUMNS: usize = 128;
const ROWS: usize = PAGES.div_ceil(COLUMNS);

const ZERO: &str = "#f3f3f0";
const SHARED: &str = "#0072b2";
const CHANGED: &str = "#d55e00";
const UNCHANGED: &str = "#d4d6d8";

struct Bed {
    host: Host,
    store: Arc<Store>,
    model: Model,
    steps: u64,
}

impl Bed {
    fn new() -> Self {
        let host = Host::new();
        let store = Store::open_or_create(&host.store_path(), StoreOptions::default());
        let model = Model { regions: [("ram".to_owned(), vec![0; PAGES])].into() };
        Self { store: store.expect("a store"), host, model, steps: 0 }
    }

    fn take(&mut self, pages: impl IntoIterator<Item = (u64, u8)>) {
        let parent = self.store.latest().map(|info| info.id);
        let rounds = vec![("ram".to_owned(), pages.into_iter().collect())];
        let edit = Edit { rounds, step: self.steps };
        self.steps += 1;
        let _taken = take(&self.store, parent, &mut self.model, &edit).expect("it works");
    }

    /// Draws with `args`, as SVG and PNG; returns the report, and the colours of all cells, which
    /// are 7 by 7 pixels, row by row.
    fn draw(&self, args: &[&str]) -> (Value, Vec<String>) {
        let [svg, png] = ["map.svg", "map.PNG"].map(|name| self.host.path(name));
        let draw = |file: &std::path::Path| {
            let file = file.display().to_string();
            let out = self.host.ok(&[args, &["--json", "--heatmap", &file]].concat());
            out.json_lines().pop().expect("a line")["heatmap"].clone()
        };
        let drawn = draw(&png);
        let bytes = fs::read(&png).expect("it is there");
        assert_eq!(bytes[..8], *b"\x89PNG\r\n\x1a\n");
        let side =
            |at: usize| u64::from(u32::from_be_bytes(bytes[at..at + 4].try_into().expect("4")));
        assert_eq!((side(16), side(20)), (number(&drawn, "width"), number(&drawn, "height")));
        let drawn = draw(&svg);
        let picture = fs::read_to_string(&svg).expect("it is there");
        (drawn, cells(&picture))
    }
}

/// Returns the colours of the rectangles of 7 by 7 pixels, row by row.
fn cells(svg: &str) -> Vec<String> {
    let mut found = BTreeMap::new();
    for line in svg.lines().filter_map(|line| line.strip_prefix("<path fill=\"")) {
        let (color, rest) = line.split_once("\" d=\"").expect("a path");
        for rect in
            rest.trim_end_matches("\"/>").split('M').filter(|rect| rect.ends_with("h7v7h-7z"))
        {
            let (x, y) = rect.trim_end_matches("h7v7h-7z").split_once(' ').expect("a place");
            let place = (y.parse::<u32>().expect("a number"), x.parse::<u32>().expect("a number"));
            assert!(found.insert(place, color.to_owned()).is_none(), "two at {place:?}");
        }
    }
    found.into_values().collect()
}

#[test]
fn one_snapshot_is_drawn_by_what_its_pages_are() {
    let mut bed = Bed::new();
    bed.take((0..2_000).step_by(3).map(|page| (page, 5)));
    let (_, first) = bed.draw(&["show", &bed.host.at("latest")]);
    let old = bed.model.regions["ram"].clone();
    // Two panels: kinds, and sizes.
    assert_eq!(first.len(), 2 * PAGES);
    for (page, color) in first[..PAGES].iter().enumerate() {
        assert_eq!(color, if old[page] == 0 { ZERO } else { CHANGED }, "page {page}: all is new");
    }
    bed.take([(3, 0), (4, 7), (5_999, 11)]);
    let (drawn, found) = bed.draw(&["show", &bed.host.at("latest")]);
    assert_eq!((text(&drawn, "region"), number(&drawn, "cell_bytes")), ("ram", 4096));
    let new = &bed.model.regions["ram"];
    for page in 0..PAGES {
        let kind = match (old[page] != new[page], new[page]) {
            (true, _) => CHANGED,
            (false, 0) => ZERO,
            (false, _) => SHARED,
        };
        assert_eq!(found[page], kind, "page {page}");
        let size = &found[PAGES + page];
        assert_eq!(size == ZERO, new[page] == 0, "page {page} takes nothing: {size}");
    }
}

#[test]
fn two_snapshots_are_drawn_by_what_differs() {
    let mut bed = Bed::new();
    bed.take((0..2_000).map(|page| (page, 5)));
    let old = bed.model.regions["ram"].clone();
    bed.take((0..900).step_by(7).map(|page| (page, 8)).chain([(1_000, 0), (3_000, 9)]));
    let new = &bed.model.regions["ram"];
    let (_, found) = bed.draw(&["diff", &bed.host.at("latest~1"), "latest"]);
    assert_eq!(found.len(), PAGES);
    for page in 0..PAGES {
        let is = match (old[page] != new[page], new[page]) {
            (true, _) => found[page] != ZERO && found[page] != UNCHANGED,
            (false, 0) => found[page] == ZERO,
            (false, _) => found[page] == UNCHANGED,
        };
        assert!(is, "page {page}: {}", found[page]);
    }
    // With A and B exchanged, the same pages differ.
    let (_, back) = bed.draw(&["diff", &bed.host.at("latest"), "latest~1"]);
    let differs = |cells: &[String], page: usize| ![ZERO, UNCHANGED].contains(&&*cells[page]);
    assert!((0..PAGES).all(|page| differs(&found, page) == differs(&back, page)));
}

#[test]
fn a_history_is_drawn_by_how_often_what_changed() {
    let mut bed = Bed::new();
    bed.take((0..2_000).map(|page| (page, 5)));
    let mut often = vec![0; PAGES];
    for turn in 0..9_u64 {
        let pages: Vec<u64> = (0..=turn).map(|step| step * 100).chain([4_000 + turn]).collect();
        pages.iter().for_each(|page| often[*page as usize] += 1);
        bed.take(pages.into_iter().map(|page| (page, 10 + turn as u8)));
    }
    let store = bed.host.store_path().display().to_string();
    let (_, found) = bed.draw(&["log", &store]);
    assert_eq!(found.len(), PAGES, "and the timeline has other cells");
    assert!(found.len().div_ceil(COLUMNS) == ROWS);
    let mut color_of: BTreeMap<u32, &str> = BTreeMap::new();
    for (page, times) in often.iter().enumerate() {
        let color = &*found[page];
        match times {
            0 => assert_eq!(color, if page < 2_000 { UNCHANGED } else { ZERO }, "page {page}"),
            // Steps are powers of two.
            times => assert_eq!(*color_of.entry(u32::ilog2(*times)).or_insert(color), color),
        }
    }
    assert_eq!(color_of.len(), 4, "1, 2-3, 4-7, 8-9: {color_of:?}");
    // The history of an older snapshot is what it descends from.
    let (_, before) = bed.draw(&["log", &bed.host.at("latest~5")]);
    assert_eq!((&*before[4_003], &*before[4_004]), (color_of[&0], ZERO));
    let listed = bed.host.ok(&["log", &bed.host.at("latest~5"), "--json"]).json_lines();
    assert_eq!(listed.len(), 5);
    let alone = bed.host.frazil(&["log", &bed.host.at("latest~9"), "--heatmap", "x.png"]);
    alone.expect_code(1).expect_says(&["two or more", "found 1"]);
}

#[test]
fn what_cannot_be_drawn_is_refused() {
    let mut bed = Bed::new();
    bed.take([(1, 5)]);
    let at = bed.host.at("latest");
    bed.host.frazil(&["show", &at, "--heatmap", "x.jpg"]).expect_code(1).expect_says(&[".png"]);
    let refused =
        bed.host.frazil(&["show", &at, "--heatmap", "x.png", "--heatmap-region", "disk7"]);
    refused.expect_code(1).expect_says(&["disk7", "ram"]);
    bed.host
        .frazil(&["show", &at, "--heatmap", "no/such/x.png"])
        .expect_code(1)
        .expect_says(&["no/such"]);
    bed.host.frazil(&["show", &at, "--heatmap-region", "ram"]).expect_code(2);
}
