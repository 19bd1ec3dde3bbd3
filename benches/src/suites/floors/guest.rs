//! The cost of memory to a guest that writes it.

use frazil_vmm::memory::GuestRam;
use rustix::fs::{FallocateFlags, fallocate};

use anyhow::Context;

use crate::bench::Bench;
use crate::metric::Metric;
use crate::raw;
use crate::raw_guest::RawGuest;
use crate::samples::Samples;

/// Writes every page whole, with zeros: the time is mostly the cost of reaching the page.
const TOUCH_SPEC: &str = "rate=max,pattern=seq,content=zero";
/// After the first lap, writes two words of each page.
const EDIT_SPEC: &str = "rate=max,pattern=seq,content=edit";

type Prepare = fn(&GuestRam) -> anyhow::Result<()>;

/// Measures the first write to each page, by how much is prepared: page tables, memory, or nothing.
pub(super) fn first_touch(bench: &mut Bench) -> anyhow::Result<()> {
    let ram_bytes = bench.memory_sizes(1)[0];
    let prepared: [(&str, Prepare); 3] =
        [("populated", raw::populate), ("page_cache", allocate), ("unallocated", |_ram| Ok(()))];
    // The host hands memory out lazily: this pays for it before anything is timed.
    raw::populate(&GuestRam::new(ram_bytes)?)?;
    let mut warm = Samples::new();
    for (name, prepare) in prepared {
        let mut first = Samples::new();
        let mut pages = 1;
        for _ in 0..bench.runs(2) {
            let guest = RawGuest::start(TOUCH_SPEC, ram_bytes, prepare)?;
            let (from, started) = guest.wait_turns(1)?;
            pages = guest.data_pages();
            let (to, ended) = guest.wait_turns(pages)?;
            let share = pages as f64 / (to - from).max(1) as f64;
            first.add_time((ended - started).mul_f64(share));
            warm.add_time(guest.lap()?);
        }
        emit(bench, &format!("guest_first_touch_{name}"), &first, pages, 0.0)?;
        if name == "unallocated" {
            emit(bench, "guest_pass_whole_pages", &warm, pages, 0.0)?;
        }
    }
    Ok(())
}

fn allocate(ram: &GuestRam) -> anyhow::Result<()> {
    fallocate(ram.memfd(), FallocateFlags::empty(), 0, ram.len_bytes())
        .context("cannot allocate guest memory")
}

/// Measures reading the dirty log with everything and with nothing dirty, and the next write to a
/// page.
pub(super) fn dirty_log(bench: &mut Bench) -> anyhow::Result<()> {
    let ram_bytes = bench.memory_sizes(1)[0];
    let gib = ram_bytes as f64 / (1 << 30) as f64;
    let guest = RawGuest::start(EDIT_SPEC, ram_bytes, |_ram| Ok(()))?;
    guest.wait_turns(guest.data_pages())?;
    let (mut warm, mut cleared) = (Samples::new(), Samples::new());
    let (mut all, mut none) = (Samples::new(), Samples::new());
    for _ in 0..bench.runs(3) {
        // A lap before the timed one, so that no page in that still has its first write ahead.
        guest.lap()?;
        warm.add_time(guest.lap()?);
        all.add_time(guest.dirty_log()?.0);
        // Read again at once: the guest has had time for a page or two.
        none.add_time(guest.dirty_log()?.0);
        cleared.add_time(guest.lap()?);
    }
    let pages = guest.data_pages();
    let (all_us, none_us) = (all.us(0.5) / gib, none.us(0.5) / gib);
    bench.emit(Metric::new("floors.dirty_log_all_us_per_gib", all_us, "us/GiB", all.n()))?;
    bench.emit(Metric::new("floors.dirty_log_clean_us_per_gib", none_us, "us/GiB", none.n()))?;
    emit(bench, "guest_pass_warm", &warm, pages, 0.0)?;
    emit(bench, "guest_write_after_clear", &cleared, pages, warm.us(0.5))
}

/// Prints the median time per page, minus `base_us` that a lap takes in any case.
fn emit(
    bench: &mut Bench,
    name: &str,
    laps: &Samples,
    pages: u64,
    base_us: f64,
) -> anyhow::Result<()> {
    let us = (laps.us(0.5) - base_us) / pages as f64;
    let metric = format!("floors.{name}_us_per_page");
    bench.emit(Metric::new(metric, us, "us/page", laps.n()))
}
