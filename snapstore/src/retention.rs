//! Retention: decides which snapshots a policy keeps, by the rules of `restic forget`. Changes
//! nothing itself.
//!
//! Each VM's snapshots are judged by themselves, so that a VM that takes many does not push out
//! another's. A rule for a period keeps the newest snapshot of each of the last N periods *that
//! have one*: a VM that was idle for a month loses nothing by it.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;
use std::time::Duration;

/// The time zone in which [`decide`] tells days apart.
pub use jiff::tz::TimeZone;
use jiff::{SignedDuration, Span, SpanRelativeTo, Timestamp};

use crate::id::SnapshotId;

/// Which snapshots to keep. A snapshot is kept if any rule keeps it; a rule of 0 does not count.
///
/// A policy with at least one rule keeps at least the newest snapshot of every VM, and one without
/// rules keeps everything: no policy forgets everything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// Keep the newest N snapshots.
    pub last: Option<u32>,
    /// Keep the newest of each of the last N minutes that have one.
    pub minutely: Option<u32>,
    /// The same for hours. An hour that a clock change repeats counts as two.
    pub hourly: Option<u32>,
    /// The same for calendar days.
    pub daily: Option<u32>,
    /// The same for ISO weeks, which begin on Mondays and may span two years.
    pub weekly: Option<u32>,
    /// The same for calendar months.
    pub monthly: Option<u32>,
    /// The same for calendar years.
    pub yearly: Option<u32>,
    /// Keep all that are older than the VM's newest by less than this.
    pub within: Option<Duration>,
}

/// A snapshot to judge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// The snapshot's id.
    pub id: SnapshotId,
    /// When it was cut, in Unix milliseconds.
    pub time_unix_ms: u64,
    /// The VM's name: snapshots of one group are judged together.
    pub group: String,
    /// Tagged snapshots are kept whatever the rules say, but the rules count them.
    pub tagged: bool,
}

/// The decision on a candidate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The snapshot's id.
    pub id: SnapshotId,
    /// True if it is kept.
    pub keep: bool,
    /// Why it is kept: names of rules, `tagged` or `no rules`.
    pub reasons: Vec<&'static str>,
}

#[derive(Clone, Copy, Debug)]
enum Period {
    Snapshot,
    Minute,
    Hour,
    Day,
    Week,
    Month,
    Year,
}

impl Policy {
    /// True if the policy has no rules and so keeps everything.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.period_rules().iter().all(|(_, count, _)| *count == 0) && self.within().is_none()
    }

    fn period_rules(&self) -> [(&'static str, u32, Period); 7] {
        let Self { last, minutely, hourly, daily, weekly, monthly, yearly, within: _ } = *self;
        [
            ("last", last, Period::Snapshot),
            ("minutely", minutely, Period::Minute),
            ("hourly", hourly, Period::Hour),
            ("daily", daily, Period::Day),
            ("weekly", weekly, Period::Week),
            ("monthly", monthly, Period::Month),
            ("yearly", yearly, Period::Year),
        ]
        .map(|(name, count, period)| (name, count.unwrap_or(0), period))
    }

    fn within(&self) -> Option<Duration> {
        self.within.filter(|within| !within.is_zero())
    }

    fn count_mut(&mut self, name: &str) -> Option<&mut Option<u32>> {
        Some(match name {
            "last" => &mut self.last,
            "minutely" => &mut self.minutely,
            "hourly" => &mut self.hourly,
            "daily" => &mut self.daily,
            "weekly" => &mut self.weekly,
            "monthly" => &mut self.monthly,
            "yearly" => &mut self.yearly,
            _ => return None,
        })
    }
}

/// Parses a policy such as `last=10,hourly=24,within=2h`.
impl FromStr for Policy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const EXPECTED: &str = "expected rules such as `last=10,hourly=24,within=2h`, using last, \
            minutely, hourly, daily, weekly, monthly, yearly and within";
        let mut policy = Self::default();
        for rule in text.split(',').map(str::trim) {
            let Some((name, value)) = rule.split_once('=') else {
                return Err(format!("{EXPECTED}; found `{rule}`"));
            };
            let (name, value) = (name.trim(), value.trim());
            let twice = if name == "within" {
                policy.within.replace(parse_within(value)?).is_some()
            } else if let Some(count) = policy.count_mut(name) {
                let wrong =
                    || format!("expected `{name}` to be a number of at least 1, found `{value}`");
                let parsed = value.parse().ok().filter(|count| *count > 0).ok_or_else(wrong)?;
                count.replace(parsed).is_some()
            } else {
                return Err(format!("{EXPECTED}; found `{name}`"));
            };
            if twice {
                return Err(format!("expected each rule once, found `{name}` twice"));
            }
        }
        Ok(policy)
    }
}

/// Parses a duration for `within` of a [`Policy`]: `90m`, `2h`, `1d12h`, `6w`.
///
/// # Errors
/// A message that says what was expected and what was found.
pub fn parse_within(text: &str) -> Result<Duration, String> {
    let wrong = |why: String| {
        format!("expected a time such as 90m, 2h, 1d12h or 6w, found `{text}`: {why}")
    };
    let span: Span = text.parse().map_err(|error: jiff::Error| wrong(error.to_string()))?;
    if span.get_months() != 0 || span.get_years() != 0 {
        return Err(wrong("months and years differ in length; give days or weeks".into()));
    }
    let length: SignedDuration = span
        .to_duration(SpanRelativeTo::days_are_24_hours())
        .map_err(|error| wrong(error.to_string()))?;
    match Duration::try_from(length) {
        Ok(length) if !length.is_zero() => Ok(length),
        _ => Err(wrong("it must be longer than zero".into())),
    }
}

/// Judges `candidates` by calendar times in `zone`; returns a verdict for each, in the same order.
/// Of equal times, the later in the list is the newer.
#[must_use]
pub fn decide(policy: &Policy, candidates: &[Candidate], zone: &TimeZone) -> Vec<Verdict> {
    let mut reasons: Vec<Vec<&'static str>> = candidates
        .iter()
        .map(|candidate| if candidate.tagged { vec!["tagged"] } else { Vec::new() })
        .collect();
    if policy.is_empty() {
        reasons.iter_mut().for_each(|reasons| reasons.push("no rules"));
    }
    let mut groups: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (index, candidate) in candidates.iter().enumerate() {
        groups.entry(&candidate.group).or_default().push(index);
    }
    for newest_first in groups.values_mut() {
        newest_first
            .sort_unstable_by_key(|index| Reverse((candidates[*index].time_unix_ms, *index)));
        for (name, count, period) in policy.period_rules() {
            let mut seen = BTreeSet::new();
            for index in newest_first.iter().copied() {
                // A set, since periods can recur: clocks may go back across midnight.
                let key = period.key(candidates[index].time_unix_ms, index, zone);
                if seen.len() < count as usize && seen.insert(key) {
                    reasons[index].push(name);
                }
            }
        }
        let Some(within) = policy.within() else { continue };
        let newest = newest_first.first().map_or(0, |index| candidates[*index].time_unix_ms);
        for index in newest_first.iter().copied() {
            let age_ms = newest - candidates[index].time_unix_ms;
            if Duration::from_millis(age_ms) < within {
                reasons[index].push("within");
            }
        }
    }
    let judge = |(candidate, reasons): (&Candidate, Vec<&'static str>)| Verdict {
        id: candidate.id,
        keep: !reasons.is_empty(),
        reasons,
    };
    candidates.iter().zip(reasons).map(judge).collect()
}

impl Period {
    /// A key that is equal for two snapshots exactly if they are of the same period.
    fn key(self, time_unix_ms: u64, position: usize, zone: &TimeZone) -> (i64, i64) {
        if matches!(self, Self::Snapshot) {
            return (position as i64, 0);
        }
        // A clock beyond the year 9999 is wrong anyway.
        let time = i64::try_from(time_unix_ms)
            .ok()
            .and_then(|ms| Timestamp::from_millisecond(ms).ok())
            .unwrap_or(Timestamp::MAX)
            .to_zoned_datetime(zone.clone());
        let offset = i64::from(time.offset().seconds());
        let shown = time.timestamp().as_second() + offset;
        match self {
            Self::Snapshot => (position as i64, 0),
            // With the offset, a time shown twice when clocks go back counts as two.
            Self::Minute => (shown.div_euclid(60), offset),
            Self::Hour => (shown.div_euclid(3600), offset),
            Self::Day => (i64::from(time.year()), i64::from(time.day_of_year())),
            Self::Week => {
                let week = time.date().iso_week_date();
                (i64::from(week.year()), i64::from(week.week()))
            }
            Self::Month => (i64::from(time.year()), i64::from(time.month())),
            Self::Year => (i64::from(time.year()), 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    /// Central Europe: clocks go forward on 2026-03-29 at 2:00, and back on 2026-10-25 at 3:00.
    fn cet() -> TimeZone {
        TimeZone::posix("CET-1CEST,M3.5.0,M10.5.0/3").unwrap()
    }

    fn policy(text: &str) -> Policy {
        text.parse().unwrap()
    }

    fn ms(timestamp: Timestamp) -> u64 {
        u64::try_from(timestamp.as_millisecond()).unwrap()
    }

    /// `2026-10-25T02:30:00+01:00` and the like.
    fn at(text: &str) -> u64 {
        ms(text.parse().unwrap())
    }

    fn candidate(position: usize, time_unix_ms: u64) -> Candidate {
        let mut id = crate::id::Hash([0; 32]);
        id.0[..8].copy_from_slice(&(position as u64).to_be_bytes());
        Candidate { id, time_unix_ms, group: "vm".into(), tagged: false }
    }

    fn candidates(times: &[u64]) -> Vec<Candidate> {
        times.iter().enumerate().map(|(position, time)| candidate(position, *time)).collect()
    }

    /// The positions of the candidates kept.
    fn kept_of(policy: &Policy, candidates: &[Candidate], zone: &TimeZone) -> Vec<usize> {
        let verdicts = decide(policy, candidates, zone);
        assert!(verdicts.iter().map(|verdict| verdict.id).eq(candidates.iter().map(|c| c.id)));
        assert!(verdicts.iter().all(|verdict| verdict.keep != verdict.reasons.is_empty()));
        (0..verdicts.len()).filter(|index| verdicts[*index].keep).collect()
    }

    #[track_caller]
    fn expect_kept(rules: &str, times: &[u64], positions: &[usize]) {
        assert_eq!(kept_of(&policy(rules), &candidates(times), &cet()), positions, "{rules}");
    }

    #[test]
    fn no_rules_keep_everything() {
        let all = candidates(&[3, 1, 2]);
        for empty in [Policy::default(), Policy { last: Some(0), ..Policy::default() }] {
            assert!(empty.is_empty());
            assert_eq!(kept_of(&empty, &all, &TimeZone::UTC), [0, 1, 2]);
            assert_eq!(decide(&empty, &all, &TimeZone::UTC)[0].reasons, ["no rules"]);
        }
        let no_time = Policy { within: Some(Duration::ZERO), ..Policy::default() };
        assert!(no_time.is_empty(), "it would forget all there is");
        assert!(decide(&policy("last=1"), &[], &TimeZone::UTC).is_empty());
    }

    #[test]
    fn a_period_is_represented_by_its_newest_and_gaps_count_for_nothing() {
        let times = ["2026-01-02T08:00Z", "2026-01-02T20:00Z", "2026-03-07T09:00Z"].map(at);
        expect_kept("daily=2", &times, &[1, 2]);
        expect_kept("daily=1", &times, &[2]);
        expect_kept("monthly=9", &times, &[1, 2]);
        expect_kept("yearly=9", &times, &[2]);
        expect_kept("hourly=2,last=1", &times, &[1, 2]);
        expect_kept("last=2", &times, &[1, 2]);
        let verdicts = decide(&policy("daily=5,last=1"), &candidates(&times), &cet());
        assert_eq!(verdicts[2].reasons, ["last", "daily"]);
        assert_eq!(verdicts[1].reasons, ["daily"]);
    }

    #[test]
    fn within_counts_from_the_newest_of_the_group() {
        let hour = 3_600_000;
        let start = at("2020-05-05T05:05Z");
        let times = [start, start + 1, start + hour, start + 2 * hour];
        // A snapshot of exactly that age is out, as with restic.
        expect_kept("within=2h", &times, &[1, 2, 3]);
        expect_kept("within=1ms", &times, &[3]);
        expect_kept("within=600w", &times, &[0, 1, 2, 3]);
        let mut two = candidates(&times);
        two[0].group = "other".into();
        assert_eq!(kept_of(&policy("within=1m"), &two, &cet()), [0, 3]);
    }

    #[test]
    fn groups_do_not_push_each_other_out() {
        let mut all = candidates(&[10, 20, 30, 40, 50]);
        all[0].group = "quiet".into();
        all[2].group = "quiet".into();
        assert_eq!(kept_of(&policy("last=1"), &all, &cet()), [2, 4]);
    }

    #[test]
    fn tagged_ones_stay_and_count() {
        let mut all = candidates(&[10, 20, 30]);
        all[0].tagged = true;
        all[2].tagged = true;
        let verdicts = decide(&policy("last=1"), &all, &cet());
        let reasons: Vec<_> = verdicts.into_iter().map(|verdict| verdict.reasons).collect();
        assert_eq!(reasons, [vec!["tagged"], vec![], vec!["tagged", "last"]]);
    }

    #[test]
    fn an_hour_that_is_shown_twice_is_two() {
        let times = [
            "2026-10-25T01:59+02:00",
            "2026-10-25T02:10+02:00",
            "2026-10-25T02:50+02:00",
            "2026-10-25T02:10+01:00",
            "2026-10-25T02:50+01:00",
            "2026-10-25T03:00+01:00",
        ]
        .map(at);
        expect_kept("hourly=3", &times, &[2, 4, 5]);
        expect_kept("minutely=4", &times, &[2, 3, 4, 5]);
        expect_kept("daily=9", &times, &[5]);
        // A skipped hour: 1:59 is followed by 3:00.
        let spring = ["2026-03-29T01:59+01:00", "2026-03-29T03:00+02:00"].map(at);
        expect_kept("hourly=2", &spring, &[0, 1]);
        expect_kept("hourly=1", &spring, &[1]);
    }

    #[test]
    fn days_are_those_of_the_zone() {
        // In Central Europe both are on the 26th, in UTC only the second is.
        let times = ["2026-10-25T23:30Z", "2026-10-26T01:00Z"].map(at);
        expect_kept("daily=2", &times, &[1]);
        assert_eq!(kept_of(&policy("daily=2"), &candidates(&times), &TimeZone::UTC), [0, 1]);
        // A day of 25 hours is one day.
        let times = ["2026-10-25T00:00+02:00", "2026-10-25T23:59+01:00"].map(at);
        expect_kept("daily=2", &times, &[1]);
    }

    #[test]
    fn a_clock_change_across_midnight_does_not_make_a_day_twice() {
        // At a minute past midnight clocks go back an hour, as they did in Newfoundland.
        let zone = TimeZone::posix("NST3:30NDT,M4.1.0/0:01,M10.5.0/0:01").unwrap();
        let times = [
            "2026-10-24T23:30-02:30", // Saturday
            "2026-10-25T00:00-02:30", // Sunday, for a minute
            "2026-10-24T23:30-03:30", // Saturday again
            "2026-10-25T09:00-03:30", // Sunday
        ]
        .map(at);
        assert!(times.is_sorted());
        assert_eq!(kept_of(&policy("daily=9"), &candidates(&times), &zone), [2, 3]);
    }

    #[test]
    fn iso_weeks_go_across_new_year() {
        let noons = |days: &[&str]| -> Vec<u64> {
            days.iter().map(|day| at(&format!("{day}T12:00+01:00"))).collect()
        };
        // Week 53 of 2026 is from Monday, 28 December to Sunday, 3 January.
        let times = noons(&["2026-12-27", "2026-12-28", "2027-01-03", "2027-01-04"]);
        expect_kept("weekly=9", &times, &[0, 2, 3]);
        expect_kept("weekly=2", &times, &[2, 3]);
        expect_kept("yearly=9", &times, &[1, 3]);
        // 29 December 2025 is in the first week of 2026, not of 2025.
        let times = noons(&["2025-01-02", "2025-12-29", "2026-01-01"]);
        expect_kept("weekly=9", &times, &[0, 2]);
    }

    #[test]
    fn of_equal_times_the_later_is_the_newer() {
        expect_kept("last=1", &[7, 7, 7], &[2]);
        expect_kept("last=2", &[7, 7, 7], &[1, 2]);
        expect_kept("minutely=3", &[7, 7, 7], &[2]);
        expect_kept("within=1ms", &[7, 7, 6], &[0, 1]);
    }

    #[test]
    fn a_clock_that_went_back_is_believed() {
        let day = 24 * 3_600_000;
        let times = [day, 5 * day, 2 * day, 3 * day];
        expect_kept("last=2", &times, &[1, 3]);
        expect_kept("daily=3", &times, &[1, 2, 3]);
        expect_kept("within=1d", &times, &[1]);
    }

    #[test]
    fn impossible_times_are_no_panic() {
        let times = [0, u64::MAX, i64::MAX as u64, u64::MAX - 1];
        for rules in ["last=1", "minutely=9", "yearly=9", "weekly=1", "within=1s"] {
            let kept = kept_of(&policy(rules), &candidates(&times), &cet());
            assert!(kept.contains(&1), "{rules}: {kept:?}");
        }
    }

    #[test]
    fn the_short_form_is_read() {
        let day = Duration::from_hours(24);
        assert_eq!(
            policy("last=10, hourly=24,daily=7,within=2h"),
            Policy {
                last: Some(10),
                hourly: Some(24),
                daily: Some(7),
                within: Some(Duration::from_hours(2)),
                ..Policy::default()
            }
        );
        let all = policy("minutely=1,weekly=2,monthly=3,yearly=4");
        assert_eq!(
            (all.minutely, all.weekly, all.monthly, all.yearly),
            (Some(1), Some(2), Some(3), Some(4))
        );
        assert_eq!(parse_within("1d12h"), Ok(day * 3 / 2));
        assert_eq!(parse_within("6w"), Ok(day * 42));
        assert_eq!(parse_within("250ms"), Ok(Duration::from_millis(250)));
        for (bad, says) in [
            ("", "expected rules such as"),
            ("last", "expected rules such as"),
            ("last=3,", "expected rules such as"),
            ("secondly=3", "`secondly`"),
            ("last=0", "at least 1"),
            ("last=-1", "at least 1"),
            ("last=99999999999", "at least 1"),
            ("daily=two", "`daily` to be a number of at least 1, found `two`"),
            ("daily=2,daily=3", "`daily` twice"),
            ("within=2h,within=3h", "`within` twice"),
            ("within=0s", "longer than zero"),
            ("within=-2h", "longer than zero"),
            ("within=2h ago", "longer than zero"),
            ("within=1mo", "months and years differ"),
            ("within=1y", "months and years differ"),
            ("within=soon", "expected a time such as"),
            ("within=5", "expected a time such as"),
            ("within=999999999999999w", "expected a time such as"),
        ] {
            let error = bad.parse::<Policy>().unwrap_err();
            assert!(error.contains(says), "{bad}: {error}");
        }
    }

    /// Judges a single candidate as a person would, rule by rule: is there a newer one in the same
    /// period, and how many periods have newer ones?
    fn oracle(policy: &Policy, all: &[Candidate], zone: &TimeZone, position: usize) -> bool {
        let shown = |index: usize, format: &str| {
            let time = Timestamp::from_millisecond(all[index].time_unix_ms as i64).unwrap();
            time.to_zoned_datetime(zone.clone()).strftime(format).to_string()
        };
        let newer: Vec<usize> = (0..all.len())
            .filter(|other| all[*other].group == all[position].group)
            .filter(|other| {
                let (a, b) = (all[*other].time_unix_ms, all[position].time_unix_ms);
                a > b || (a == b && *other > position)
            })
            .collect();
        let formats = [
            (policy.minutely, "%Y-%m-%d %H:%M %z"),
            (policy.hourly, "%Y-%m-%d %H %z"),
            (policy.daily, "%Y-%m-%d"),
            (policy.weekly, "%G %V"),
            (policy.monthly, "%Y-%m"),
            (policy.yearly, "%Y"),
        ];
        let of_period = formats.iter().any(|(count, format)| {
            let periods: HashSet<String> =
                newer.iter().map(|index| shown(*index, format)).collect();
            let own = shown(position, format);
            !periods.contains(&own) && periods.len() < count.unwrap_or(0) as usize
        });
        let newest_ms = newer
            .iter()
            .map(|index| all[*index].time_unix_ms)
            .max()
            .unwrap_or(all[position].time_unix_ms);
        let is_within = policy.within.is_some_and(|within| {
            u128::from(newest_ms - all[position].time_unix_ms) < within.as_millis()
        });
        let nothing_said = *policy == Policy::default();
        let of_last = newer.len() < policy.last.unwrap_or(0) as usize;
        nothing_said || all[position].tagged || of_last || of_period || is_within
    }

    fn rule() -> impl Strategy<Value = Option<u32>> {
        proptest::option::weighted(0.3, 1..6_u32)
    }

    prop_compose! {
        fn any_policy()(
            rules in proptest::array::uniform7(rule()),
            within_s in proptest::option::weighted(0.3, 1..10_000_000_u64),
        ) -> Policy {
            let [last, minutely, hourly, daily, weekly, monthly, yearly] = rules;
            let within = within_s.map(Duration::from_secs);
            Policy { last, minutely, hourly, daily, weekly, monthly, yearly, within }
        }
    }

    /// Around a clock change, around new year, and anywhere in a few years.
    fn any_time() -> impl Strategy<Value = u64> {
        let hours = |text: &str, hours: u64| {
            let middle = at(text);
            // Whole minutes, so that some are equal.
            (0..hours * 60).prop_map(move |minute| middle - hours * 1_800_000 + minute * 60_000)
        };
        prop_oneof![
            hours("2026-10-25T01:00Z", 8),
            hours("2026-03-29T01:00Z", 8),
            hours("2026-12-31T23:00Z", 24 * 20),
            hours("2026-01-01T00:00Z", 24 * 1500),
        ]
    }

    prop_compose! {
        fn any_candidates()(
            list in proptest::collection::vec((any_time(), 0..3_u8, proptest::bool::weighted(0.1)), 0..40),
        ) -> Vec<Candidate> {
            let make = |(position, (time, group, tagged)): (usize, (u64, u8, bool))| Candidate {
                group: format!("vm{group}"),
                tagged,
                ..candidate(position, time)
            };
            list.into_iter().enumerate().map(make).collect()
        }
    }

    proptest! {
        #[test]
        fn decides_as_the_oracle_does(policy in any_policy(), all in any_candidates()) {
            let expected: Vec<usize> = (0..all.len())
                .filter(|position| oracle(&policy, &all, &cet(), *position))
                .collect();
            prop_assert_eq!(kept_of(&policy, &all, &cet()), expected);
        }

        #[test]
        fn every_group_keeps_its_newest(policy in any_policy(), all in any_candidates()) {
            let kept = kept_of(&policy, &all, &cet());
            for one in &all {
                let newest = (0..all.len())
                    .filter(|index| all[*index].group == one.group)
                    .max_by_key(|index| (all[*index].time_unix_ms, *index));
                prop_assert!(newest.is_some_and(|newest| kept.contains(&newest)));
            }
        }

        #[test]
        fn deciding_again_forgets_no_more(policy in any_policy(), all in any_candidates()) {
            let kept: Vec<Candidate> =
                kept_of(&policy, &all, &cet()).into_iter().map(|index| all[index].clone()).collect();
            prop_assert_eq!(kept_of(&policy, &kept, &cet()).len(), kept.len());
        }
    }
}
