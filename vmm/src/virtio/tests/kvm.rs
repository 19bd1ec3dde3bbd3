//! Tests of a device in a bare KVM guest, which notifies it by an ioeventfd, reads its registers
//! through exits, and is interrupted by it.

use std::path::Path;

use kvm_bindings::kvm_segment;
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::*;
use crate::devices::platform;
use crate::kvm::{Hypervisor, VmShell};
use crate::virtio::IrqLine;

/// Guest physical address of the window, in the hole below 4 GiB.
const WINDOW: u64 = 0xd000_0000;
const GSI: u32 = 5;
const CODE: u64 = 0x8000;
/// Notifies queue 0, waits until InterruptStatus is not 0, then says so on a port.
const PROGRAM: [u8; 18] = [
    0x31, 0xc0, // xor eax, eax
    0xa3, 0x50, 0x00, 0x00, 0xd0, // mov [0xd0000050], eax
    0xa1, 0x60, 0x00, 0x00, 0xd0, // again: mov eax, [0xd0000060]
    0x85, 0xc0, // test eax, eax
    0x74, 0xf7, // jz again
    0xe6, 0x80, // out 0x80, al
];

/// Puts the vCPU into flat protected mode, at the program.
fn enter(vcpu: &VcpuFd) {
    let flat = |selector: u16, type_: u8| kvm_segment {
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let mut sregs = vcpu.get_sregs().unwrap();
    sregs.cr0 |= 1;
    sregs.cs = flat(8, 11);
    (sregs.ds, sregs.es, sregs.ss) = (flat(16, 3), flat(16, 3), flat(16, 3));
    vcpu.set_sregs(&sregs).unwrap();
    let mut regs = vcpu.get_regs().unwrap();
    (regs.rip, regs.rflags) = (CODE, 2);
    vcpu.set_regs(&regs).unwrap();
}

/// Returns the interrupt requests of the first 8259A.
fn requests(shell: &VmShell) -> u64 {
    let chunks = platform::capture(&shell.fd).unwrap().save().unwrap();
    let irqchip = chunks.iter().find(|chunk| chunk.name == "irqchip").unwrap();
    irqchip.body["pics"][0]["irr"].as_u64().unwrap()
}

#[test]
fn a_guest_notifies_and_is_interrupted_without_our_help() {
    if !Path::new("/dev/kvm").exists() {
        eprintln!("SKIPPED: there is no /dev/kvm on this machine, and this test runs a guest");
        return;
    }
    let ram = Arc::new(GuestRam::new(RAM_BYTES).unwrap());
    let shell = VmShell::new(&Hypervisor::open().unwrap(), Arc::clone(&ram), None).unwrap();
    let line = Arc::new(IrqLine::wire(&shell.fd, GSI).unwrap());
    let (disk, _file) = disk_of(&noise(8192, 2), false);
    let device = Arc::new(Block::new(disk).unwrap());
    let mmio = VirtioMmio::new("virtio0", device, Arc::clone(&ram), line).unwrap();
    let bed = Bed { ram, interrupts: Arc::default(), mmio };
    bed.mmio.wire_doorbells(&shell.fd, WINDOW).unwrap();
    bed.set_up(0);
    let mut ring = Ring::new(0);
    // A header of zeros: reads sector 0.
    ring.add(&bed, &[(0x9000, 16, false), (DATA, 512, true), (0x9100, 1, true)]);
    bed.write(CODE, &PROGRAM);
    let mut vcpu = shell.fd.create_vcpu(0).unwrap();
    enter(&vcpu);
    assert_eq!(requests(&shell), 0);
    loop {
        match vcpu.run().unwrap() {
            VcpuExit::MmioRead(address, data) => bed.mmio.read(address - WINDOW, data),
            VcpuExit::MmioWrite(address, _) => panic!("a write to {address:#x} leaves the guest"),
            VcpuExit::IoOut(0x80, _) => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(ring.used(&bed).map(|(_, len)| len), Some(513));
    assert_eq!(bed.read(DATA, 512), noise(8192, 2)[..512]);
    // KVM raises the interrupt in a thread of its own.
    let until = Instant::now() + PATIENCE;
    while requests(&shell) & 1 << GSI == 0 {
        assert!(Instant::now() < until, "no interrupt");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn programs_that_are_started_get_no_interrupts_and_doorbells() {
    let (disk, _file) = disk_of(&noise(8192, 2), false);
    let _bed = Bed::new(Arc::new(Block::new(disk).unwrap()));
    let mut events = 0;
    // This also looks at those of other tests.
    for entry in std::fs::read_dir("/proc/self/fd").unwrap() {
        let path = entry.unwrap().path();
        let is_event =
            std::fs::read_link(&path).is_ok_and(|to| to.ends_with("anon_inode:[eventfd]"));
        let info = Path::new("/proc/self/fdinfo").join(path.file_name().unwrap());
        // Other descriptors come and go meanwhile.
        if let (true, Ok(info)) = (is_event, std::fs::read_to_string(info)) {
            let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
            let flags = i32::from_str_radix(flags.trim(), 8).unwrap();
            assert_eq!(flags & libc::O_CLOEXEC, libc::O_CLOEXEC, "{}: {info}", path.display());
            events += 1;
        }
    }
    assert!(events > 0);
}
