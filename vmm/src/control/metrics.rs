//! `GET /metrics`: a VM's metrics in Prometheus's text format, version 0.0.4.
//!
//! Names carry their unit, counters end in `_total`, times are in seconds and sizes in bytes.
//! Metrics that a VM does not have, such as those of a pager if there is none, are left out.

use std::fmt::{Display, Write};

use frazil_snapstore::pager::PagerStats;

use super::api::{RunState, VmStatus};
use crate::machine::SavedGuest;
use crate::telemetry::{Bucket, CheckpointStatistics, CheckpointSums, Distribution};
use crate::vcpu::ExitCounts;
use crate::vm::Vm;

/// The format's media type.
pub(super) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

const PAGE_BYTES: u64 = frazil_snapstore::PAGE_SIZE as u64;
const MICROSECONDS: f64 = 1e6;

/// The present metrics of `vm`.
pub(super) fn of(vm: &Vm) -> String {
    let mut page = Page::default();
    let status = VmStatus::of(vm);
    machine(&mut page, &status, vm.ram().allocated_bytes());
    exits(&mut page, vm.vcpus.exits());
    checkpoints(&mut page, &vm.checkpoint_statistics());
    page.gauge(
        "frazil_checkpoint_in_progress_seconds",
        "Time since the checkpoint in progress began; 0 if there is none.",
        status.checkpoint_in_progress.map_or(0.0, |progress| progress.since_ms as f64 / 1e3),
    );
    rewinds(&mut page, &status);
    keep(&mut page, &status);
    pager(&mut page, &status);
    page.text
}

fn machine(page: &mut Page, status: &VmStatus, allocated_bytes: Option<u64>) {
    let guest = match &status.machine.guest {
        SavedGuest::Workload { .. } => "workload",
        SavedGuest::Kernel { .. } => "kernel",
    };
    page.family("frazil_vm_info", "gauge", "The VM, as labels; always 1.");
    let version = env!("CARGO_PKG_VERSION");
    let tracker = status.dirty_tracking.to_string();
    let labels = [("name", status.name.as_str()), ("guest", guest), ("version", version)];
    page.sample("", &[&labels[..], &[("dirty_tracking", tracker.as_str())]].concat(), 1);
    page.family("frazil_vm_state", "gauge", "1 for the VM's current state, else 0.");
    for (name, state) in
        [("running", RunState::Running), ("paused", RunState::Paused), ("ended", RunState::Ended)]
    {
        page.sample("", &[("state", name)], u8::from(status.state == state));
    }
    page.gauge(
        "frazil_uptime_seconds",
        "Time since the VM was booted or resumed.",
        status.uptime_ms as f64 / 1e3,
    );
    page.gauge("frazil_vcpus", "Virtual CPUs.", status.machine.cpus);
    page.gauge("frazil_memory_bytes", "Guest memory.", status.machine.ram_bytes);
    if let Some(bytes) = allocated_bytes {
        page.gauge(
            "frazil_memory_allocated_bytes",
            "Guest memory that is backed by host memory.",
            bytes,
        );
    }
    page.counter(
        "frazil_serial_dropped_bytes_total",
        "Serial output that was dropped because nobody read it in time.",
        status.serial_dropped_bytes,
    );
}

fn rewinds(page: &mut Page, status: &VmStatus) {
    let totals = &status.rewinds;
    page.labelled(
        "frazil_rewinds_total",
        "counter",
        "Rewinds of the guest to a snapshot: done, or failed.",
        "result",
        &[("done", totals.done), ("failed", totals.failed)],
    );
    page.counter("frazil_rewind_pages_total", "Pages of RAM put back by rewinds.", totals.pages);
}

fn exits(page: &mut Page, exits: ExitCounts) {
    let ExitCounts { port_io, mmio, kicked, ring_full, other } = exits;
    page.labelled(
        "frazil_vcpu_exits_total",
        "counter",
        "Exits of vCPUs to this process, by cause.",
        "cause",
        &[
            ("port_io", port_io),
            ("mmio", mmio),
            ("kicked", kicked),
            ("ring_full", ring_full),
            ("other", other),
        ],
    );
}

/// Adds the metrics of how pages were saved.
fn pages(page: &mut Page, sums: &CheckpointSums) {
    page.labelled(
        "frazil_checkpoint_pages_total",
        "counter",
        "Pages written by checkpoints: before the cut, or after it.",
        "phase",
        &[("precopy", sums.precopied_pages), ("commit", sums.commit_pages)],
    );
    page.labelled(
        "frazil_checkpoint_kept_pages_total",
        "counter",
        "Pages kept as they were at the cut: copied before it, copied in the pause, or left in \
         place; and of the last, those copied because the guest was about to change them.",
        "how",
        &[
            ("staged", sums.staged_pages),
            ("cut", sums.cut_pages),
            ("protected", sums.protected_pages),
            ("cow", sums.cow_pages),
        ],
    );
    page.counter(
        "frazil_checkpoint_cow_waits_total",
        "Times a vCPU waited for a page left in place to be written, because copies had reached \
         their limit.",
        sums.cow_waits,
    );
    page.gauge(
        "frazil_checkpoint_cow_wait_max_seconds",
        "The longest of these waits. None of them is part of a pause.",
        sums.cow_wait_us_max as f64 / MICROSECONDS,
    );
}

fn checkpoints(page: &mut Page, found: &CheckpointStatistics) {
    let (totals, sums) = (&found.totals, &found.sums);
    page.labelled(
        "frazil_checkpoints_total",
        "counter",
        "Checkpoints: published, failed, cancelled, or skipped although they were due.",
        "result",
        &[
            ("taken", totals.taken),
            ("failed", totals.failed),
            ("cancelled", totals.cancelled),
            ("skipped", totals.skipped),
        ],
    );
    for (name, help, values) in [
        ("pause", "How long the guest stood still for a checkpoint.", &found.pause_us),
        ("quiesce", "Of the pause: until every vCPU stood still.", &found.quiesce_us),
        ("cut", "Of the pause: last harvest, copying, device state.", &found.cut_us),
        ("duration", "From request to publication.", &found.duration_us),
    ] {
        page.histogram(&format!("frazil_checkpoint_{name}_seconds"), help, values, MICROSECONDS);
    }
    page.histogram(
        "frazil_checkpoint_dirty_pages",
        "Distinct pages that changed since the previous checkpoint.",
        &found.dirty_pages,
        1.0,
    );
    pages(page, sums);
    page.labelled(
        "frazil_checkpoint_elided_pages_total",
        "counter",
        "Of these, pages that were not written whole: zero, unchanged, already in the store, or \
         written as differences.",
        "reason",
        &[
            ("zero", sums.zero_pages),
            ("equal", sums.equal_pages),
            ("dedup", sums.dedup_pages),
            ("delta", sums.delta_pages),
        ],
    );
    page.labelled(
        "frazil_checkpoint_stored_bytes_total",
        "counter",
        "Bytes appended to the store: compressed pages; tree nodes, state and manifests.",
        "kind",
        &[("frames", sums.frame_bytes), ("meta", sums.meta_bytes)],
    );
    last_checkpoint(page, found);
}

fn last_checkpoint(page: &mut Page, found: &CheckpointStatistics) {
    if let Some(rate) = found.dirty_pages_per_s {
        page.gauge(
            "frazil_dirty_pages_per_second",
            "Distinct pages changed per second between the last two checkpoints.",
            rate,
        );
    }
    if let Some(last) = &found.last {
        page.gauge(
            "frazil_last_checkpoint_timestamp_seconds",
            "When the last checkpoint was cut, Unix time.",
            last.time_unix_ms as f64 / 1e3,
        );
    }
}

fn keep(page: &mut Page, status: &VmStatus) {
    let Some(keep) = &status.keep else { return };
    page.counter(
        "frazil_keep_forgotten_snapshots_total",
        "Snapshots forgotten because no rule of the policy keeps them.",
        keep.forgotten,
    );
    page.labelled(
        "frazil_keep_prunes_total",
        "counter",
        "Background prunes: finished, or interrupted by a checkpoint.",
        "result",
        &[("finished", keep.prunes), ("interrupted", keep.interrupted)],
    );
    page.counter(
        "frazil_keep_pruned_bytes_total",
        "Bytes of the store freed by background prunes.",
        keep.pruned_bytes,
    );
    page.counter(
        "frazil_keep_failures_total",
        "Times that forgetting or pruning failed in the background.",
        keep.failed,
    );
}

fn pager(page: &mut Page, status: &VmStatus) {
    let Some(pager) = &status.pager else { return };
    page.histogram(
        "frazil_pager_fault_seconds",
        "How long it took to answer page faults.",
        &fault_times(pager),
        MICROSECONDS,
    );
    page.gauge(
        "frazil_pager_fault_max_seconds",
        "The longest time it took to answer a page fault.",
        pager.fault_us_max as f64 / MICROSECONDS,
    );
    page.gauge(
        "frazil_pager_resident_bytes",
        "Guest memory loaded from the snapshot, or touched where the snapshot has zeros.",
        pager.resident_pages() * PAGE_BYTES,
    );
    page.gauge(
        "frazil_pager_complete",
        "1 once all of the snapshot's memory is resident, else 0.",
        u8::from(pager.complete),
    );
    page.counter(
        "frazil_pager_deaths_total",
        "Separate pager processes that died and were replaced.",
        status.pager_deaths,
    );
}

fn fault_times(pager: &PagerStats) -> Distribution {
    let last = pager.fault_us_log2.len() - 1;
    let le = |class: usize| (class < last).then(|| (1 << class) - 1);
    let buckets = pager.fault_us_log2.iter().enumerate();
    let buckets = buckets.map(|(class, count)| Bucket { le: le(class), count: *count }).collect();
    Distribution {
        count: pager.faults,
        sum: pager.fault_us_total,
        min: 0,
        p50: pager.fault_us_within(0.5),
        p90: pager.fault_us_within(0.9),
        p99: pager.fault_us_within(0.99),
        max: pager.fault_us_max,
        buckets,
    }
}

/// A page of metrics being written.
#[derive(Default)]
struct Page {
    text: String,
    /// The metric that samples belong to.
    name: String,
}

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        name.clone_into(&mut self.name);
        // Our own help texts contain nothing that has to be escaped.
        let _to_memory = write!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    fn sample(&mut self, suffix: &str, labels: &[(&str, &str)], value: impl Display) {
        self.text.push_str(&self.name);
        self.text.push_str(suffix);
        for (index, (label, text)) in labels.iter().enumerate() {
            let before = if index == 0 { '{' } else { ',' };
            let _to_memory = write!(self.text, "{before}{label}=\"{}\"", escaped(text));
        }
        let end = if labels.is_empty() { "" } else { "}" };
        let _to_memory = writeln!(self.text, "{end} {value}");
    }

    fn counter(&mut self, name: &str, help: &str, value: impl Display) {
        self.family(name, "counter", help);
        self.sample("", &[], value);
    }

    fn gauge(&mut self, name: &str, help: &str, value: impl Display) {
        self.family(name, "gauge", help);
        self.sample("", &[], value);
    }

    fn labelled(
        &mut self,
        name: &str,
        kind: &str,
        help: &str,
        label: &str,
        values: &[(&str, u64)],
    ) {
        self.family(name, kind, help);
        for (text, value) in values {
            self.sample("", &[(label, text)], value);
        }
    }

    /// Adds a histogram; the metric's unit is `per_unit` times that of the distribution's values.
    fn histogram(&mut self, name: &str, help: &str, values: &Distribution, per_unit: f64) {
        self.family(name, "histogram", help);
        let mut so_far = 0;
        for bucket in &values.buckets {
            so_far += bucket.count;
            let le = bucket
                .le
                .map_or_else(|| "+Inf".to_owned(), |le| (le as f64 / per_unit).to_string());
            self.sample("_bucket", &[("le", &le)], so_far);
        }
        self.sample("_sum", &[], values.sum as f64 / per_unit);
        self.sample("_count", &[], values.count);
    }
}

/// Escapes a label's value for use between quotation marks.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_escaped_and_histograms_add_up() {
        let mut page = Page::default();
        page.family("a_info", "gauge", "About a.");
        page.sample("", &[("name", "x\"\\\ny"), ("b", "c")], 1);
        let buckets = [(Some(10), 2), (Some(1_000_000), 3), (None, 1)];
        let values = Distribution {
            count: 6,
            sum: 2_500_000,
            min: 0,
            p50: 0,
            p90: 0,
            p99: 0,
            max: 0,
            buckets: buckets.map(|(le, count)| Bucket { le, count }).to_vec(),
        };
        page.histogram("b_seconds", "About b.", &values, MICROSECONDS);
        let expected = "\
# HELP a_info About a.
# TYPE a_info gauge
a_info{name=\"x\\\"\\\\\\ny\",b=\"c\"} 1
# HELP b_seconds About b.
# TYPE b_seconds histogram
b_seconds_bucket{le=\"0.00001\"} 2
b_seconds_bucket{le=\"1\"} 5
b_seconds_bucket{le=\"+Inf\"} 6
b_seconds_sum 2.5
b_seconds_count 6
";
        assert_eq!(page.text, expected);
    }
}
