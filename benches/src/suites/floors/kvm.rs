//! KVM by itself: creating a VM, stopping a vCPU, reading its state.

use std::time::Duration;

use anyhow::Context;
use frazil_vmm::kvm::Hypervisor;
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_CPUID_ENTRIES,
    KVM_PIT_SPEAKER_DUMMY, Msrs, kvm_irqchip, kvm_msr_entry, kvm_pit_config,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use crate::bench::{Bench, size_label};
use crate::machine::Machine;
use crate::metric::Metric;
use crate::raw::{SharedMemory, SlotVm};
use crate::samples::Samples;

/// The address of three pages below 4 GiB that KVM needs on Intel processors.
const TSS_ADDRESS: usize = 0xfffb_d000;

pub(super) fn create_and_read(bench: &mut Bench) -> anyhow::Result<()> {
    let ram_bytes = bench.memory_sizes(1)[0];
    let times = create_empty_vms(ram_bytes, bench.runs(30))?;
    let name = format!("floors.create_vm_{}", size_label(ram_bytes));
    bench.emit_times(&name, &times)?;

    let (vm, vcpu) = empty_vm(&Kvm::new().context("cannot open /dev/kvm")?, ram_bytes)?;
    let (vcpu_times, vm_times) = state_times(&vm.vm, &vcpu, bench.runs(100))?;
    bench.emit_times("floors.vcpu_state", &vcpu_times)?;
    bench.emit_times("floors.vm_state", &vm_times)
}

/// Times of creating an empty VM: memfd, interrupt controllers, timer, slot, vCPU, CPUID.
pub(crate) fn create_empty_vms(ram_bytes: u64, runs: usize) -> anyhow::Result<Samples> {
    let mut times = Samples::new();
    for _ in 0..runs {
        // Dropped after the clock is read.
        let _vm = times.time(|| {
            let kvm = Kvm::new().context("cannot open /dev/kvm")?;
            empty_vm(&kvm, ram_bytes)
        })?;
    }
    Ok(times)
}

fn empty_vm(kvm: &Kvm, ram_bytes: u64) -> anyhow::Result<(SlotVm, VcpuFd)> {
    let vm = kvm.create_vm().context("KVM refused a VM")?;
    vm.set_tss_address(TSS_ADDRESS).context("KVM refused the TSS address")?;
    // The slot first: creating interrupt controllers and the timer starts grace periods in KVM, for
    // which adding a slot afterwards waits several milliseconds.
    let vm = SlotVm::new(vm, SharedMemory::new(ram_bytes as usize)?)?;
    vm.vm.create_irq_chip().context("KVM refused interrupt controllers")?;
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.vm.create_pit2(pit).context("KVM refused a timer")?;
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).context("KVM has no CPUID")?;
    let vcpu = vm.vm.create_vcpu(0).context("KVM refused a vCPU")?;
    vcpu.set_cpuid2(&cpuid).context("KVM refused CPUID")?;
    Ok((vm, vcpu))
}

/// Times of reading all state of a stopped vCPU, and all other state of its VM.
pub(crate) fn state_times(
    vm: &VmFd,
    vcpu: &VcpuFd,
    runs: usize,
) -> anyhow::Result<(Samples, Samples)> {
    let mut msrs = readable_msrs(vcpu)?;
    let (mut vcpu_times, mut vm_times) = (Samples::new(), Samples::new());
    for _ in 0..runs {
        vcpu_times.time(|| read_vcpu(vcpu, &mut msrs)).context("cannot read a vCPU's state")?;
        vm_times.time(|| read_vm(vm)).context("cannot read a VM's state")?;
    }
    Ok((vcpu_times, vm_times))
}

/// The MSRs that KVM lists and this vCPU has: one that it lacks would end a read early.
fn readable_msrs(vcpu: &VcpuFd) -> anyhow::Result<Msrs> {
    let entry = |index| kvm_msr_entry { index, ..Default::default() };
    let mut readable = Vec::new();
    for index in Hypervisor::open()?.msr_indices()? {
        let mut one = Msrs::from_entries(&[entry(index)]).context("cannot list an MSR")?;
        if vcpu.get_msrs(&mut one).is_ok_and(|read| read == 1) {
            readable.push(entry(index));
        }
    }
    Msrs::from_entries(&readable).context("cannot list MSRs")
}

fn read_vcpu(vcpu: &VcpuFd, msrs: &mut Msrs) -> Result<(), kvm_ioctls::Error> {
    vcpu.get_mp_state()?;
    vcpu.get_regs()?;
    vcpu.get_sregs()?;
    vcpu.get_xsave()?;
    vcpu.get_xcrs()?;
    vcpu.get_debug_regs()?;
    vcpu.get_lapic()?;
    vcpu.get_msrs(msrs)?;
    vcpu.get_vcpu_events()?;
    Ok(())
}

fn read_vm(vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
    for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC] {
        vm.get_irqchip(&mut kvm_irqchip { chip_id, ..Default::default() })?;
    }
    vm.get_pit2()?;
    vm.get_clock()?;
    Ok(())
}

/// Measures the time from the request until a vCPU in guest mode stands still, and until it runs
/// again.
pub(super) fn kick(bench: &mut Bench) -> anyhow::Result<()> {
    let machine = Machine::boot("rate=1000,content=zero,report=0", 64 << 20, None)?;
    let (stop, go) = stop_and_go(&machine, bench.runs(100))?;
    bench.emit_times("floors.kick", &stop)?;
    bench.emit(Metric::new("floors.go_on_p50_us", go.us(0.5), "us", go.n()))
}

/// Pauses the guest and lets it go on, `runs` times. Returns the times of both.
pub(crate) fn stop_and_go(machine: &Machine, runs: usize) -> anyhow::Result<(Samples, Samples)> {
    let (mut stop, mut go) = (Samples::new(), Samples::new());
    for _ in 0..runs {
        // Long enough for the guest to be back in its loop.
        std::thread::sleep(Duration::from_millis(10));
        stop.time(|| machine.vm.pause())?;
        go.time(|| machine.vm.go())?;
    }
    Ok((stop, go))
}
