//! The least that any pause takes, and the cost of a snapshot with the simplest means.

use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use frazil_vmm::dirty::TrackerKind;
use vm_memory::{Bytes, GuestAddress};

use super::bed::{Bed, RANDOM_SPEC};
use crate::bench::{Bench, size_label};
use crate::metric::Metric;
use crate::raw_guest::RawGuest;
use crate::samples::Samples;
use crate::suites::floors;

const PAGES: u64 = 1000;
const COPY_BYTES: u64 = 32 << 20;

/// The ways in which KVM may report writes, and the names of their figures.
const TRACKERS: [(TrackerKind, &str); 3] = [
    (TrackerKind::Bitmap, "dirty_log"),
    (TrackerKind::ManualBitmap, "dirty_log_manual"),
    (TrackerKind::Ring, "dirty_ring"),
];

/// The floor of a pause: kick + state + dirty log of 1,000 pages, in the cheapest way this KVM has,
/// on a bare machine whose guest writes as much as the one that checkpoints are taken of.
///
/// The vCPU is kicked out of KVM_RUN and goes back in, while the kicking thread spins; the state is
/// all that of the vCPU and its VM; the dirty log is read while the vCPU stands still.
pub(super) fn pause_us(bench: &mut Bench, ram_bytes: u64) -> anyhow::Result<f64> {
    let name = |what: &str| format!("pause.floor_{}_{what}_us", size_label(ram_bytes));
    // Filling pages beforehand gains nothing: only one write to each page matters.
    let spec = format!("{RANDOM_SPEC},populate=no");
    let (mut kick_us, mut state_us, mut log_us) = (f64::MAX, f64::MAX, f64::MAX);
    for (kind, what) in TRACKERS {
        let mut guest = match RawGuest::start_tracked(&spec, ram_bytes, Some(kind), |_ram| Ok(())) {
            Ok(guest) => guest,
            Err(error) => {
                bench.say(&format!("{}: not measured: {error:#}", name(what)));
                continue;
            }
        };
        let (kick, log) = kick_and_log(&guest, bench.runs(100))?;
        bench.emit(Metric::new(name(what), log.us(0.5), "us", log.n()))?;
        let vcpu = guest.stop()?;
        let (vcpu_state, vm_state) = floors::state_times(guest.vm(), &vcpu, bench.runs(100))?;
        log_us = log_us.min(log.us(0.5));
        kick_us = kick_us.min(kick.us(0.5));
        state_us = state_us.min(vcpu_state.us(0.5) + vm_state.us(0.5));
    }
    let n = bench.runs(100) as u64;
    bench.emit(Metric::new(name("kick"), kick_us, "us", n))?;
    bench.emit(Metric::new(name("state"), state_us, "us", n))?;
    Ok(kick_us + state_us + log_us)
}

/// Each time the guest has written 1,000 pages: kicks its vCPU, reads the dirty log, and lets it go
/// on. Returns the times of kicking and letting go, and of reading the log.
fn kick_and_log(guest: &RawGuest, runs: usize) -> anyhow::Result<(Samples, Samples)> {
    let (mut kick, mut log) = (Samples::new(), Samples::new());
    let mut tracker = guest.tracker();
    let mut dirty = guest.no_pages();
    for _ in 0..runs {
        // Watches again what reading the log in the pause left unwatched.
        tracker.harvest(&mut dirty)?;
        dirty.clear();
        guest.wait_turns(guest.turns()? + PAGES)?;
        let started = Instant::now();
        guest.hold()?;
        let stopped = started.elapsed();
        log.time(|| tracker.harvest_at_cut(&mut dirty))?;
        let going = Instant::now();
        guest.release();
        kick.add_time(stopped + going.elapsed());
    }
    Ok((kick, log))
}

/// The cost of a snapshot with nothing but a stopped guest and a copy of its RAM. The buffer is
/// small and reused, which favours the copy.
pub(super) fn stop_and_copy_us(bench: &mut Bench, bed: &Bed) -> anyhow::Result<f64> {
    let mut buffer = vec![1; COPY_BYTES as usize];
    let mut times = Samples::new();
    let ram = Arc::clone(bed.machine.vm.ram());
    for _ in 0..bench.runs(3) {
        times.time(|| {
            bed.machine.vm.while_paused(|| -> anyhow::Result<()> {
                for (range, _) in ram.mapped_ranges() {
                    let mut done = 0;
                    while done < range.len_bytes {
                        let len = (range.len_bytes - done).min(COPY_BYTES);
                        ram.memory()
                            .read_slice(&mut buffer[..len as usize], GuestAddress(range.gpa + done))
                            .context("cannot copy guest memory")?;
                        done += len;
                    }
                }
                Ok(())
            })
        })??;
    }
    Ok(times.us(0.5))
}
