//! What no pause can do without, and what it costs whoever has nothing better.

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

/// The ways in which a KVM may tell what was written, and what their figures are called.
const TRACKERS: [(TrackerKind, &str); 3] = [
    (TrackerKind::Bitmap, "dirty_log"),
    (TrackerKind::ManualBitmap, "dirty_log_manual"),
    (TrackerKind::Ring, "dirty_ring"),
];

/// Kick + state + dirty log of 1,000 pages, in the cheapest way this KVM has, on a bare machine
/// whose guest writes as much as the one that is checkpointed.
///
/// The vCPU is kicked out of KVM_RUN and goes back in, and who kicks it waits for either in a
/// loop; its state is all there is of it, and of its VM; the dirty log is read while it stands
/// still.
pub(super) fn pause_us(bench: &mut Bench, ram_bytes: u64) -> anyhow::Result<f64> {
    let name = |what: &str| format!("pause.floor_{}_{what}_us", size_label(ram_bytes));
    // Of each page only one write matters, so nothing is gained by filling them before.
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

/// Each time the guest has written 1,000 pages: times of kicking its vCPU and letting it go, and of
/// reading the dirty log in between.
fn kick_and_log(guest: &RawGuest, runs: usize) -> anyhow::Result<(Samples, Samples)> {
    let (mut kick, mut log) = (Samples::new(), Samples::new());
    let mut tracker = guest.tracker();
    let mut dirty = guest.no_pages();
    for _ in 0..runs {
        // What the reading in the pause left unwatched is watched again.
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

/// What a snapshot costs whoever has only a stopped guest and a copy of its RAM. The buffer is
/// small and used again and again, which is kind to the copy.
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
