//! Branches of snapshots drawn side by side, as `git log --graph` draws commits.
//!
//! The order is git's: children before parents, the newest branch first, each branch down to where
//! it joins another before the next is drawn. So are the columns: a branch keeps its column until
//! its last snapshot, and branches with a common ancestor join in the leftmost of their columns as
//! soon as that ancestor is their next snapshot. A snapshot has at most one parent, so `\`, which
//! git draws where merges begin, never occurs.

use std::collections::HashMap;
use std::hash::Hash;

/// The order in which to draw `nodes`, pairs `(id, parent)` with the newest first: the index and
/// the parent of each. A parent that is not among them counts as none.
pub(crate) fn order<K: Copy + Eq + Hash>(nodes: &[(K, Option<K>)]) -> Vec<(usize, Option<K>)> {
    let index: HashMap<K, usize> =
        nodes.iter().enumerate().map(|(index, (id, _))| (*id, index)).collect();
    let parent = |of: usize| nodes[of].1.and_then(|parent| index.get(&parent).copied());
    let mut children_left = vec![0_u32; nodes.len()];
    (0..nodes.len()).filter_map(parent).for_each(|parent| children_left[parent] += 1);
    let mut order = Vec::with_capacity(nodes.len());
    for tip in (0..nodes.len()).filter(|node| children_left[*node] == 0).collect::<Vec<_>>() {
        let mut next = Some(tip);
        while let Some(node) = next {
            let known = parent(node);
            order.push((node, known.map(|parent| nodes[parent].0)));
            next = known.filter(|parent| {
                children_left[*parent] -= 1;
                children_left[*parent] == 0
            });
        }
    }
    order
}

/// A place in a line of text: the column that the edge there is heading for, if there is one.
type Target = Option<usize>;

/// Draws nodes one by one, children before parents. Each takes time proportional to the graph's
/// width.
pub(crate) struct Graph<K> {
    /// The node that each column waits for.
    columns: Vec<K>,
    /// The edges of the line drawn last; each column has two places.
    edges: Vec<Target>,
    /// The edges of the line above a node, if edges moved in that line.
    moved: Option<Vec<Target>>,
}

impl<K: Copy + Eq + Hash> Graph<K> {
    pub(crate) fn new() -> Self {
        Self { columns: Vec::new(), edges: Vec::new(), moved: None }
    }

    /// Returns the line of `node`, and the lines below it in which edges move to their columns.
    pub(crate) fn draw(&mut self, node: K, parent: Option<K>) -> (String, Vec<String>) {
        let width = self.columns.len();
        let place = self.columns.iter().position(|column| *column == node).unwrap_or(width);
        self.advance(place, parent);
        let line = (0..width.max(place + 1)).map(|column| self.symbol(column, place)).collect();
        let mut below = Vec::new();
        self.moved = None;
        while !self.is_settled() {
            below.push(self.move_edges());
        }
        (line, below)
    }

    /// Replaces the node in column `place` by its parent, and finds where each edge has to go.
    fn advance(&mut self, place: usize, parent: Option<K>) {
        let before = std::mem::take(&mut self.columns);
        let mut known: HashMap<K, usize> = HashMap::with_capacity(before.len() + 1);
        self.edges.clear();
        for column in 0..before.len().max(place + 1) {
            let waits_for = if column == place { parent } else { before.get(column).copied() };
            let target = waits_for.map(|node| {
                *known.entry(node).or_insert_with(|| {
                    self.columns.push(node);
                    self.columns.len() - 1
                })
            });
            self.edges.extend([target, None]);
        }
        self.shrink();
    }

    fn symbol(&self, column: usize, place: usize) -> &'static str {
        // An edge that reached this column in the line above, and moves on to the left below.
        let on_its_way = || {
            let came = self.moved.as_ref()?.get(2 * column + 1).copied().flatten()?;
            let goes = self.edges.get(2 * column).copied().flatten()?;
            Some(came == column && goes < column)
        };
        match column {
            _ if column == place => "* ",
            _ if on_its_way() == Some(true) => "/ ",
            _ => "| ",
        }
    }

    fn is_settled(&self) -> bool {
        let there = |(at, target): (usize, &Target)| target.is_none_or(|target| target == at / 2);
        self.edges.iter().enumerate().all(there)
    }

    /// Draws a line in which every edge moves left by one character, or by two across another edge.
    /// One edge, the leftmost that can, goes all the way at once, drawn with `_`.
    fn move_edges(&mut self) -> String {
        let from = std::mem::take(&mut self.edges);
        let mut to: Vec<Target> = vec![None; from.len()];
        // Where the edge that goes all the way starts, and its column.
        let mut all_the_way: Option<(usize, usize)> = None;
        for (at, target) in from.iter().enumerate() {
            let Some(target) = *target else { continue };
            let start = if 2 * target == at {
                to[at] = Some(target);
                continue;
            } else if to[at - 1].is_none() {
                to[at - 1] = Some(target);
                at
            } else if to[at - 1] == Some(target) {
                // This edge joins the one to its left.
                continue;
            } else {
                to[at - 2] = Some(target);
                at - 1
            };
            if all_the_way.is_none() {
                all_the_way = Some((start, target));
                for step in (2 * target + 3..at.saturating_sub(2)).step_by(2) {
                    to[step] = Some(target);
                }
            }
        }
        self.moved = Some(to.clone());
        self.edges = to;
        // The rightmost edge moved left, and left its place empty.
        if self.edges.last() == Some(&None) {
            self.edges.pop();
        }
        self.draw_moved(all_the_way)
    }

    fn draw_moved(&mut self, all_the_way: Option<(usize, usize)>) -> String {
        let mut line = String::with_capacity(self.edges.len());
        let mut went_along = false;
        for at in 0..self.edges.len() {
            let Some(target) = self.edges[at] else {
                line.push(' ');
                continue;
            };
            let goes_along = |(start, goal): (usize, usize)| goal == target && at + 1 != start;
            if 2 * target == at {
                line.push('|');
            } else if all_the_way.is_some_and(goes_along) {
                // The next line continues from the first piece only.
                if at != 2 * target + 3 {
                    self.edges[at] = None;
                }
                went_along = true;
                line.push('_');
            } else {
                if went_along && all_the_way.is_some_and(|(start, _)| at < start) {
                    self.edges[at] = None;
                }
                line.push('/');
            }
        }
        line
    }

    fn shrink(&mut self) {
        let used = self.edges.iter().rposition(Option::is_some).map_or(1, |last| last + 1);
        self.edges.truncate(used);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The drawing of nodes `(id, parent)`, newest first.
    fn drawn(nodes: &[(&str, Option<&str>)]) -> Vec<String> {
        let mut graph = Graph::new();
        let mut out = Vec::new();
        for (index, parent) in order(nodes) {
            let id = nodes[index].0;
            let (line, below) = graph.draw(id, parent);
            out.push(format!("{line}{id}"));
            out.extend(below);
        }
        out.iter().map(|line| line.trim_end().to_owned()).collect()
    }

    /// Checks the drawing of nodes such as `"c>b b>a a"`, newest first; `>` names the parent.
    #[track_caller]
    fn expect(nodes: &str, drawing: &[&str]) {
        let nodes: Vec<(&str, Option<&str>)> = nodes
            .split(' ')
            .map(|node| node.split_once('>').map_or((node, None), |(id, to)| (id, Some(to))))
            .collect();
        let found = drawn(&nodes);
        assert_eq!(found, drawing, "found:\n{}", found.join("\n"));
    }

    // The drawings expected here are those of git 2.47 for the same commits.

    #[test]
    fn one_line_is_one_column() {
        expect("a", &["* a"]);
        expect("c>b b>a a", &["* c", "* b", "* a"]);
    }

    #[test]
    fn a_fork_joins_at_its_parent() {
        let drawing = ["* e", "* d", "| * c", "|/", "* b", "* a"];
        expect("e>d d>b c>b b>a a", &drawing);
        // The same if snapshots of the two branches alternate.
        expect("e>c d>b c>b b>a a", &["* e", "* c", "| * d", "|/", "* b", "* a"]);
    }

    #[test]
    fn two_roots_stand_one_below_the_other() {
        expect("d>b c>a b a", &["* d", "* b", "* c", "* a"]);
    }

    #[test]
    fn many_clones_of_one_snapshot_take_two_columns() {
        let clones = (0..500).rev().map(|n| format!("c{n}>base"));
        let nodes = clones.chain(["base>first".into(), "first".into()]).collect::<Vec<_>>();
        let mut drawing = vec!["* c499".to_owned()];
        for n in (0..499).rev() {
            drawing.extend([format!("| * c{n}"), "|/".into()]);
        }
        drawing.extend(["* base".into(), "* first".into()]);
        let drawing: Vec<&str> = drawing.iter().map(String::as_str).collect();
        expect(&nodes.join(" "), &drawing);
    }

    #[test]
    fn a_parent_that_is_not_listed_is_none() {
        expect("c>gone b>a a", &["* c", "* b", "* a"]);
    }

    #[test]
    fn lines_cross_where_they_must() {
        let drawing = ["* g", "| * f", "| | * e", "| |/", "|/|", "* | c", "| | * d"];
        let rest = ["| |/", "| * b", "|/", "* a"];
        expect("g>c f>b e>c d>b c>a b>a a", &[&drawing[..], &rest].concat());
    }

    #[test]
    fn ten_thousand_are_drawn_at_once() {
        let started = std::time::Instant::now();
        let chain: Vec<(u32, Option<u32>)> =
            (0..10_000_u32).rev().map(|id| (id, id.checked_sub(1))).collect();
        // As wide as it gets: each node of the line has one more child, which has no children.
        let comb: Vec<(u32, Option<u32>)> = (0..1_000)
            .rev()
            .map(|id| (id + 10_000, Some(id)))
            .chain((0..1_000_u32).rev().map(|id| (id, id.checked_sub(1))))
            .collect();
        for nodes in [chain, comb] {
            let mut graph = Graph::new();
            for (index, parent) in order(&nodes) {
                assert!(graph.draw(nodes[index].0, parent).0.contains('*'));
            }
        }
        let took = started.elapsed();
        assert!(took.as_secs() < 10, "{took:?}");
    }
}
