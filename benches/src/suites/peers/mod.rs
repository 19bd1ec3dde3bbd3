//! `peers`: the same guest in another VMM, saved and resumed as its users do it, and in frazil, in
//! one run.
//!
//! The other VMM is QEMU, if it is installed: `savevm`, migration to a file, and that as a
//! background snapshot. Both use the same KVM, and nothing else runs meanwhile. Methods of other
//! VMMs are measured with frazil's own guest, without their programs: here, a dump of all memory
//! while the guest is paused; in `resume`, raw files that are mapped or copied page by page.

mod qemu;
mod qmp;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use frazil_vmm::workload::WorkloadSpec;
use kvm_ioctls::Kvm;
use vm_memory::{Bytes, GuestAddress};

use crate::bench::{Bench, GIB, size_label};
use crate::machine::{Machine, create_store};
use crate::metric::Metric;
use crate::samples::Samples;
use crate::series::{checkpoint, largest_gap_us, view_once_running};
use crate::suites::resume::{find_frazil, resume_once};
pub(crate) use qemu::version as qemu_version;
use qemu::{Qemu, Way};

/// A guest that has work to do, and writes a thousand pages a second.
const SPEC: &str = "rate=1000,pattern=uniform,content=text,report=0,gap_us=50";
/// Pages that it writes between two checkpoints.
const BETWEEN_PAGES: u64 = 1000;
const MIB: f64 = (1 << 20) as f64;

type CostFn = fn(&Costs) -> f64;

/// The costs of saving a machine, several times.
struct Costs {
    /// The pause as the host sees it.
    pause: Samples,
    /// The longest time for which the guest could not look at its clock.
    gap: Samples,
    duration: Samples,
    bytes: Samples,
}

/// The only way in which the guest's clock shows the pause: in the others QEMU stops that clock
/// too.
const WAY_THAT_SHOWS_GAP: Way = Way::Background;

impl Costs {
    fn new() -> Self {
        let none = Samples::new();
        Self { pause: none.clone(), gap: none.clone(), duration: none.clone(), bytes: none }
    }

    fn add(&mut self, pause: Duration, gap_us: Option<u64>, duration: Duration, bytes: u64) {
        self.pause.add_time(pause);
        gap_us.into_iter().for_each(|us| self.gap.add_time(Duration::from_micros(us)));
        self.duration.add_time(duration);
        self.bytes.add(bytes);
    }

    /// Prints the costs; `floor` is those of frazil for the same.
    fn emit(&self, bench: &mut Bench, name: &str, floor: Option<&Self>) -> anyhow::Result<()> {
        let parts: [(&str, &str, CostFn); 4] = [
            ("pause_ms", "ms", |costs| costs.pause.ms(0.5)),
            ("gap_ms", "ms", |costs| costs.gap.ms(0.5)),
            ("duration_ms", "ms", |costs| costs.duration.ms(0.5)),
            ("stored_mib", "MiB", |costs| costs.bytes.median() / MIB),
        ];
        for (suffix, unit, value) in parts {
            if suffix == "gap_ms" && self.gap.n() == 0 {
                continue;
            }
            let metric = Metric::new(format!("{name}_{suffix}"), value(self), unit, self.pause.n());
            bench.emit(match floor {
                Some(floor) => metric.against(value(floor)),
                None => metric,
            })?;
        }
        Ok(())
    }
}

pub(crate) fn run(bench: &mut Bench, frazil: Option<PathBuf>) -> anyhow::Result<()> {
    let frazil = find_frazil(frazil)?;
    let ram_bytes = bench.memory_size(GIB);
    let label = size_label(ram_bytes);
    bench.say(&format!("frazil, {label}"));
    let ours = ours(bench, &frazil, ram_bytes, &label)?;
    bench.say(&format!("a dump of all memory, {label}"));
    dumps(bench, ram_bytes, &label, &ours)?;
    let Some(version) = qemu_version() else {
        bench.say("QEMU: skipped: there is no qemu-system-x86_64 (package qemu-system-x86)");
        return Ok(());
    };
    for way in Way::ALL {
        bench.say(&format!("QEMU {version}, {label}: {}", way.name()));
        theirs(bench, way, ram_bytes, &label, &ours)?;
    }
    Ok(())
}

/// frazil's costs, which are the floor of the others'.
struct Ours {
    first: Costs,
    resume: Samples,
}

fn ours(bench: &mut Bench, frazil: &Path, ram_bytes: u64, label: &str) -> anyhow::Result<Ours> {
    let (mut first, mut next, mut resume) = (Costs::new(), Costs::new(), Samples::new());
    let runs = bench.runs(3);
    for _ in 0..runs {
        let folder = bench.scratch()?;
        let path = folder.path().join("store");
        let machine = Machine::boot(SPEC, ram_bytes, Some(create_store(&path)?))?;
        take(&machine, &mut first)?;
        for _ in 0..runs {
            machine.wait_turns(machine.turns()? + BETWEEN_PAGES)?;
            take(&machine, &mut next)?;
        }
        drop(machine);
        // The first run brings the program into the page cache, as QEMU already is by then.
        resume_once(frazil, folder.path())?;
        for _ in 0..runs {
            resume.add_time(resume_once(frazil, folder.path())?.0);
        }
    }
    first.emit(bench, &format!("peers.frazil_first_{label}"), None)?;
    next.emit(bench, &format!("peers.frazil_next_{label}"), None)?;
    let name = format!("peers.frazil_resume_{label}_ms");
    bench.emit(Metric::new(name, resume.ms(0.5), "ms", resume.n()))?;
    Ok(Ours { first, resume })
}

fn take(machine: &Machine, costs: &mut Costs) -> anyhow::Result<()> {
    let before = machine.view()?;
    let report = checkpoint(&machine.vm)?;
    let after = view_once_running(|| machine.view(), &before)?;
    let (pause, duration) =
        (Duration::from_micros(report.stats.pause_us), Duration::from_micros(report.duration_us));
    costs.add(pause, Some(largest_gap_us(&before, &after)), duration, report.stored_bytes);
    Ok(())
}

/// Measures writing all memory to a file, raw, while the guest is paused, without waiting for the
/// disk: what a VMM with nothing better does. Saves neither vCPUs nor devices.
fn dumps(bench: &mut Bench, ram_bytes: u64, label: &str, ours: &Ours) -> anyhow::Result<()> {
    let machine = Machine::boot(SPEC, ram_bytes, None)?;
    let mut costs = Costs::new();
    for _ in 0..bench.runs(3) {
        let folder = bench.scratch()?;
        let mut file = File::create(folder.path().join("memory")).context("cannot dump memory")?;
        let started = Instant::now();
        machine.vm.while_paused(|| dump(&machine, &mut file))??;
        let pause = started.elapsed();
        // The guest's clock stands still as well, so the guest sees no gap.
        costs.add(pause, None, pause, file.metadata()?.len());
    }
    costs.emit(bench, &format!("peers.dump_{label}"), Some(&ours.first))
}

fn dump(machine: &Machine, file: &mut File) -> anyhow::Result<()> {
    let ram = machine.vm.ram();
    for (range, _) in ram.mapped_ranges() {
        let len = usize::try_from(range.len_bytes)?;
        ram.memory()
            .write_all_volatile_to(GuestAddress(range.gpa), file, len)
            .context("cannot dump memory")?;
    }
    Ok(())
}

fn theirs(
    bench: &mut Bench,
    way: Way,
    ram_bytes: u64,
    label: &str,
    ours: &Ours,
) -> anyhow::Result<()> {
    let mut spec: WorkloadSpec = SPEC.parse()?;
    spec.tsc_khz = tsc_khz()?;
    let (mut costs, mut resume) = (Costs::new(), Samples::new());
    for _ in 0..bench.runs(3) {
        let folder = bench.scratch()?;
        let mut qemu = Qemu::boot(folder.path(), &spec, ram_bytes)?;
        let before = qemu.view()?;
        let saved = qemu.save(way)?;
        let after = view_once_running(|| qemu.view(), &before)?;
        let gap_us = (way == WAY_THAT_SHOWS_GAP).then(|| largest_gap_us(&before, &after));
        costs.add(saved.pause, gap_us, saved.duration, saved.bytes);
        drop(qemu);
        resume.add_time(Qemu::resume(folder.path(), way, ram_bytes)?);
    }
    let name = format!("peers.qemu_{}", way.name());
    costs.emit(bench, &format!("{name}_{label}"), Some(&ours.first))?;
    let metric = Metric::new(format!("{name}_resume_{label}_ms"), resume.ms(0.5), "ms", resume.n());
    bench.emit(metric.against(ours.resume.ms(0.5)))
}

/// The frequency of guests' clocks, in kHz.
fn tsc_khz() -> anyhow::Result<u64> {
    let vm = Kvm::new().and_then(|kvm| kvm.create_vm()).context("KVM refused a VM")?;
    let vcpu = vm.create_vcpu(0).context("KVM refused a vCPU")?;
    Ok(vcpu.get_tsc_khz().context("KVM reports no TSC frequency")?.into())
}
