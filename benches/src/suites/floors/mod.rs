//! `floors`: what this machine can do at best. These figures have no floor of their own.

mod cpu;
mod disk;
mod guest;
mod kvm;
mod uffd;

pub(crate) use disk::sequential_write;
pub(crate) use kvm::{create_empty_vms, state_times};
pub(crate) use uffd::{answer_faults, open as open_uffd, uffd_unpack};

use crate::bench::Bench;

type Measure = fn(&mut Bench) -> anyhow::Result<()>;

const MEASUREMENTS: [(&str, Measure); 9] = [
    ("copying memory", cpu::copy),
    ("zstd", cpu::compression),
    ("BLAKE3", cpu::hashing),
    ("disk", disk::measure),
    ("userfaultfd", uffd::measure),
    ("creating VMs, reading their state", kvm::create_and_read),
    ("stopping a vCPU", kvm::kick),
    ("guest: first touch of memory", guest::first_touch),
    ("guest: the dirty log, and writes under it", guest::dirty_log),
];

pub(crate) fn run(bench: &mut Bench) -> anyhow::Result<()> {
    for (name, measure) in MEASUREMENTS {
        bench.say(name);
        measure(bench)?;
    }
    Ok(())
}
