//! The built-in guest: a kernel without an operating system that writes memory in a known way and can tell
//! whether what it wrote is still there. See `vmm/src/workload` for the host's side.
//!
//! It boots like Linux (64-bit boot protocol, parameters on the command line, other vCPUs by INIT and SIPI).
//! `boot.s` takes every vCPU to [`guest_main`] in ring 3, where all of the work is done.
#![no_std]
#![no_main]

mod control;
mod machine;
mod oracle;
mod serial;
mod spec;
mod work;
mod writer;

use core::arch::global_asm;
use core::cell::UnsafeCell;
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicU64, Ordering};

use control::{
    CONTROL_GPA, DataRange, Header, RANGES_MAX, STATE_BOOTING, STATE_FAILED, STATE_RUNNING,
};
use machine::{Ram, cmdline, find_data_ranges, map_memory, pause, read_tsc, reset};
use serial::say;
use spec::WorkloadSpec;
use work::Worker;
use writer::{Memory, publish_header};

global_asm!(include_str!("boot.s"), options(att_syntax));

/// What the boot CPU finds out and the others go by.
#[derive(Clone, Copy)]
pub struct Plan {
    spec: WorkloadSpec,
    data_pages: u64,
    ranges: [DataRange; RANGES_MAX],
}

struct Shared(UnsafeCell<Option<Plan>>);

// SAFETY: the boot CPU writes the plan before it stores STATE_RUNNING to STAGE (release); the others read it
// only after they have loaded that (acquire), and nobody writes it again.
unsafe impl Sync for Shared {}

static PLAN: Shared = Shared(UnsafeCell::new(None));
static STAGE: AtomicU64 = AtomicU64::new(0);
static ONLINE: AtomicU64 = AtomicU64::new(0);

/// Entered by every vCPU, in ring 3, on its own stack. Only the boot CPU gets the address of `boot_params`.
#[unsafe(no_mangle)]
extern "C" fn guest_main(cpu: u64, boot_params_gpa: u64) -> ! {
    ONLINE.fetch_add(1, Ordering::AcqRel);
    if boot_params_gpa != 0 {
        set_up(boot_params_gpa);
        STAGE.store(STATE_RUNNING, Ordering::Release);
    }
    while STAGE.load(Ordering::Acquire) != STATE_RUNNING {
        pause();
    }
    // SAFETY: see `Shared`.
    let plan = unsafe { &*PLAN.0.get() };
    match plan {
        Some(plan) if cpu < plan.spec.cpus => Worker::new(plan, cpu).run(),
        _ => loop {
            pause(); // more vCPUs than the workload was told of: this one stays out of it
        },
    }
}

fn set_up(boot_params_gpa: u64) {
    set_state(STATE_BOOTING);
    let text = cmdline(boot_params_gpa);
    let spec = match WorkloadSpec::from_cmdline(text) {
        Ok(Some(spec)) => spec,
        Ok(None) => give_up(format_args!(
            "expected {}SPEC on the kernel command line, found none",
            spec::CMDLINE_KEY
        )),
        Err(error) => give_up(format_args!("{error}")),
    };
    if spec.tsc_khz == 0 {
        give_up(format_args!("workload: expected tsc_khz=, the TSC frequency, found none"));
    }
    let mut ranges = [DataRange::default(); RANGES_MAX];
    let available = match find_data_ranges(boot_params_gpa, &mut ranges) {
        Ok(pages) => pages,
        Err(why) => give_up(format_args!("memory: {why}")),
    };
    let Some(data_pages) = spec.data_pages(available) else {
        let (wanted, found) = (spec.touch_bytes.unwrap_or(0) >> 10, available << 2);
        give_up(format_args!(
            "workload: `touch` expected up to {found}KiB, which is all there is, found {wanted}KiB"
        ));
    };
    map_memory(&ranges);
    wait_for_cpus(&spec);

    let plan = Plan { spec, data_pages, ranges };
    if publish_header(&mut Ram, &plan.spec, &plan.ranges, plan.data_pages).is_err() {
        give_up(format_args!("workload: the specification is too long"));
    }
    // SAFETY: see `Shared`; this is the boot CPU and STAGE is not set yet.
    unsafe { *PLAN.0.get() = Some(plan) };
    say(0, &mut || (), format_args!("{} MiB of data, {spec}", data_pages >> 8));
}

fn wait_for_cpus(spec: &WorkloadSpec) {
    let start_tsc = read_tsc();
    while ONLINE.load(Ordering::Acquire) < spec.cpus {
        if read_tsc().wrapping_sub(start_tsc) > spec.tsc_khz * 10_000 {
            let online = ONLINE.load(Ordering::Acquire);
            give_up(format_args!(
                "expected {} vCPUs to start within 10 s, found {online}",
                spec.cpus
            ));
        }
        pause();
    }
}

fn set_state(state: u64) {
    Ram.store(CONTROL_GPA + core::mem::offset_of!(Header, state) as u64, state);
}

/// Says why, marks the header and resets the machine.
fn give_up(why: core::fmt::Arguments<'_>) -> ! {
    say(0, &mut || (), format_args!("error: {why}"));
    set_state(STATE_FAILED);
    reset()
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    give_up(format_args!("{info}"))
}
