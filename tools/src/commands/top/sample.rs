//! A sample of a VM's figures, and the rates between two samples.

use std::time::Instant;

use frazil_vmm::control::Client;
use frazil_vmm::control::api::VmStatus;
use frazil_vmm::telemetry::CheckpointStatistics;
use serde_json::{Value, json};

/// Bytes of a page.
pub(super) const PAGE_BYTES: u64 = frazil_snapstore::PAGE_SIZE as u64;

/// A VM's figures at one moment.
#[derive(Clone, Debug)]
pub(super) struct Sample {
    at: Instant,
    pub status: VmStatus,
    pub found: CheckpointStatistics,
}

/// What happened between two samples, per second.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Rates {
    /// Time between the samples, in seconds.
    pub seconds: f64,
    /// Checkpoints published.
    pub checkpoints_per_s: f64,
    /// Pages written by checkpoints.
    pub pages_per_s: f64,
    /// Bytes written by checkpoints.
    pub stored_bytes_per_s: f64,
    /// Faults of a lazily resumed VM.
    pub faults_per_s: f64,
    /// Average time of these faults, in microseconds; None if there were none.
    pub fault_us_mean: Option<f64>,
    /// Bytes that became resident.
    pub filled_bytes_per_s: f64,
}

impl Sample {
    /// Asks the VM for its figures.
    pub(super) fn take(client: &Client) -> frazil_vmm::Result<Self> {
        let status = client.get("/vm")?;
        let found = client.get("/checkpoints/statistics")?;
        Ok(Self { at: Instant::now(), status, found })
    }

    /// Distinct pages that the guest changed per second, by its checkpoints: since the last one of
    /// `previous` if there were any, else between the last two. None as long as that is unknown.
    pub(super) fn dirty_pages_per_s(&self, previous: Option<&Self>) -> Option<f64> {
        let since = || {
            let (before, now) = (previous?, self);
            let (first, last) = (before.found.last.as_ref()?, now.found.last.as_ref()?);
            let ms = last.time_unix_ms.checked_sub(first.time_unix_ms).filter(|ms| *ms > 0)?;
            let (from, to) = (before.found.sums.dirty_pages, now.found.sums.dirty_pages);
            let pages = to.saturating_sub(from);
            Some(pages as f64 * 1e3 / ms as f64)
        };
        since().or(self.found.dirty_pages_per_s)
    }

    pub(super) fn rates(&self, previous: &Self) -> Rates {
        let seconds = self.at.saturating_duration_since(previous.at).as_secs_f64();
        if seconds <= 0.0 {
            return Rates::default();
        }
        let per_s = |now: u64, before: u64| now.saturating_sub(before) as f64 / seconds;
        let (now, before) = (&self.found.totals, &previous.found.totals);
        let mut rates = Rates {
            seconds,
            checkpoints_per_s: per_s(now.taken, before.taken),
            pages_per_s: per_s(now.pages, before.pages),
            stored_bytes_per_s: per_s(now.stored_bytes, before.stored_bytes),
            ..Rates::default()
        };
        if let (Some(now), Some(before)) = (&self.status.pager, &previous.status.pager) {
            let faults = now.faults.saturating_sub(before.faults);
            let us = now.fault_us_total.saturating_sub(before.fault_us_total);
            rates.faults_per_s = faults as f64 / seconds;
            rates.fault_us_mean = (faults > 0).then(|| us as f64 / faults as f64);
            rates.filled_bytes_per_s =
                per_s(now.resident_pages(), before.resident_pages()) * PAGE_BYTES as f64;
        }
        rates
    }

    /// For a lazily resumed VM: the share of RAM that takes no more faults, 0 to 1. Until all
    /// memory is resident, zero pages that were never touched count as missing.
    pub(super) fn resident_share(&self) -> Option<f64> {
        let pager = self.status.pager.as_ref()?;
        if pager.complete {
            return Some(1.0);
        }
        let pages = pager.resident_pages() as f64;
        let ram_pages = (self.status.machine.ram_bytes / PAGE_BYTES).max(1) as f64;
        Some((pages / ram_pages).clamp(0.0, 1.0))
    }

    /// The JSON object that `frazil top --json` prints.
    pub(super) fn line(&self, previous: Option<&Self>) -> Value {
        let rates = previous.map(|previous| self.rates(previous));
        let rate = |of: fn(&Rates) -> f64| rates.as_ref().map(of);
        let (status, found) = (&self.status, &self.found);
        let pager = status.pager.as_ref().map(|pager| {
            json!({
                "faults": pager.faults, "fault_us_total": pager.fault_us_total,
                "fault_us_max": pager.fault_us_max, "fault_us_p50": pager.fault_us_within(0.5),
                "fault_us_p99": pager.fault_us_within(0.99), "filled_pages": pager.filled_pages,
                "zero_pages": pager.zero_pages, "complete": pager.complete,
                "resident_share": self.resident_share(),
                "faults_per_s": rate(|rates| rates.faults_per_s),
                "fault_us_mean": rates.and_then(|rates| rates.fault_us_mean),
                "filled_bytes_per_s": rate(|rates| rates.filled_bytes_per_s),
            })
        });
        json!({
            "vm": status.name, "state": status.state,
            "time_unix_ms": frazil_snapstore::unix_ms(), "uptime_ms": status.uptime_ms,
            "interval_ms": rate(|rates| (rates.seconds * 1e3).round()),
            "ram_bytes": status.machine.ram_bytes, "head": status.head,
            "checkpoints": found.totals,
            "checkpoints_per_s": rate(|rates| rates.checkpoints_per_s),
            "pages_per_s": rate(|rates| rates.pages_per_s),
            "stored_bytes_per_s": rate(|rates| rates.stored_bytes_per_s),
            "dirty_pages_per_s": self.dirty_pages_per_s(previous),
            "pause_us": found.pause_us, "duration_us": found.duration_us,
            "dirty_pages": found.dirty_pages,
            "cow_waits": found.sums.cow_waits, "cow_wait_us_max": found.sums.cow_wait_us_max,
            "pager": pager,
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::time::Duration;

    fn distribution(count: u64) -> Value {
        json!({
            "count": count, "sum": count * 700, "min": 90, "p50": 600, "p90": 900, "p99": 4_000,
            "max": 5_000,
            "buckets": [
                {"le": 10, "count": 0}, {"le": 100, "count": 1}, {"le": 1_000, "count": count - 2},
                {"le": 5_000, "count": 1}, {"le": 1_000_000, "count": 0}, {"le": null, "count": 0},
            ],
        })
    }

    /// Sample number `n` of a VM that is sampled once a second, takes ten checkpoints a second, and
    /// was resumed lazily if `lazy`.
    pub(in crate::commands::top) fn sample(n: u64, lazy: bool) -> Sample {
        let taken = 10 + 10 * n;
        let totals = json!({
            "taken": taken, "failed": 1, "skipped": 2, "pages": taken * 100,
            "stored_bytes": taken * 1_000, "pause_us_max": 5_000,
        });
        let pager = lazy.then(|| {
            json!({
                "faults": 100 * n, "fault_us_total": 5_000 * n, "fault_us_max": 900,
                "fault_us_log2": [0, 0, 0, 0, 0, 0, 100 * n, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                    0, 0, 0],
                "filled_pages": 1_024 * (n + 1), "zero_pages": 0, "total_pages": 0,
                "complete": false,
            })
        });
        let status = json!({
            "name": "vm1", "pid": 1, "state": "running",
            "machine": {"ram_bytes": 64 << 20, "cpus": 2, "disks": 0, "devices": [], "rtc": false, "generation": false,
                "guest": {"kind": "workload", "spec": ""}},
            "store": "store st", "resumed_from": null, "head": null, "dirty_tracking": "ring",
            "pager_process": null, "pager_deaths": 0, "uptime_ms": 1_000 * n,
            "rewinds": {"done": 0, "failed": 0, "pages": 0, "pause_us_max": 0},
            "checkpoints": totals, "checkpoint_in_progress": null, "pager": pager,
            "serial_dropped_bytes": 0,
        });
        let last = json!({
            "vm": "vm1", "id": format!("{n:064x}"), "parent": null, "time_unix_ms": 1_000 * n + 7,
            "ram_bytes": 64 << 20, "dirty_pages": 80, "zero_pages": 0, "precopied_pages": 0,
            "cut_pages": 100, "frame_bytes": 900, "rounds": [], "pause_us": 650,
            "quiesce_us": 300, "cut_us": 300, "go_on_us": 50, "precopy_us": 0, "meta_bytes": 100,
            "stored_bytes": 1_000, "commit_us": 2_000, "sync_us": 1_000, "duration_us": 3_000,
        });
        let sums = json!({
            "dirty_pages": taken * 80, "precopied_pages": 0, "staged_pages": taken * 90,
            "cut_pages": taken * 10, "protected_pages": 0, "cow_pages": 0, "cow_waits": n, "cow_wait_us_max": 700,
            "commit_pages": taken * 100,
            "zero_pages": 0, "equal_pages": 0, "dedup_pages": 0, "delta_pages": 0,
            "frame_bytes": taken * 900, "meta_bytes": taken * 100,
        });
        let found = json!({
            "totals": totals, "sums": sums, "pause_us": distribution(taken),
            "quiesce_us": distribution(taken), "cut_us": distribution(taken),
            "duration_us": distribution(taken), "dirty_pages": distribution(taken),
            "dirty_pages_per_s": 790.5, "last": last,
        });
        let start = Instant::now();
        Sample {
            at: start + Duration::from_secs(n),
            status: serde_json::from_value(status).unwrap(),
            found: serde_json::from_value(found).unwrap(),
        }
    }

    #[test]
    fn two_looks_make_rates_and_one_makes_none() {
        let (first, second) = (sample(0, true), sample(2, true));
        let line = first.line(None);
        for name in ["interval_ms", "checkpoints_per_s", "stored_bytes_per_s"] {
            assert_eq!(line[name], Value::Null, "{name}");
        }
        assert_eq!(line["dirty_pages_per_s"], 790.5, "what the VM says of the last two");
        assert_eq!(line["pager"]["faults_per_s"], Value::Null);
        let line = second.line(Some(&first));
        let close = |name: &str, expected: f64| {
            let found = line.pointer(name).and_then(Value::as_f64).unwrap();
            assert!((found / expected - 1.0).abs() < 0.01, "{name}: {found}");
        };
        close("/checkpoints_per_s", 10.0);
        close("/pages_per_s", 1_000.0);
        close("/stored_bytes_per_s", 10_000.0);
        close("/dirty_pages_per_s", 800.0);
        close("/cow_waits", 2.0);
        close("/cow_wait_us_max", 700.0);
        close("/pager/faults_per_s", 100.0);
        close("/pager/fault_us_mean", 50.0);
        close("/pager/resident_share", 3.0 / 16.0);
        assert_eq!(sample(1, false).line(Some(&first))["pager"], Value::Null);
    }

    #[test]
    fn a_vm_that_is_all_there_is_resident_whatever_was_counted() {
        let mut seen = sample(0, true);
        if let Some(pager) = &mut seen.status.pager {
            pager.complete = true;
        }
        assert_eq!(seen.resident_share(), Some(1.0));
        assert_eq!(sample(0, false).resident_share(), None);
        assert_eq!(sample(100, true).resident_share(), Some(1.0), "never more than all");
    }
}
