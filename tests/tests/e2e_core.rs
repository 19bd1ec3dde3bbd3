//! Core files of the built-in guest on real KVM, compared with the memory that `export` writes and
//! the registers that `show` prints.

use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

use frazil_tests::inspect_bed::{Bed, bed, hex};
use frazil_tests::vm_harness::{number, text};
use serde_json::Value;

fn core(bed: &Bed) -> PathBuf {
    static CORE: OnceLock<PathBuf> = OnceLock::new();
    let make = || {
        let path = bed.host.path("core");
        let report = bed.host.json(&[
            "export",
            &bed.at,
            &path.display().to_string(),
            "--format",
            "elf-core",
        ]);
        assert_eq!((number(&report, "cpus"), &report["kernel"]), (2, &Value::Null), "{report}");
        assert_eq!(text(&report, "direct_map"), "0x0", "memory is mapped one to one");
        path
    };
    CORE.get_or_init(make).clone()
}

#[test]
fn gdb_reads_registers_and_memory_of_a_core_file() {
    let Some(bed) = bed() else { return };
    let path = core(bed);
    let metadata = std::fs::metadata(&path).expect("it");
    assert!(metadata.len() > 64 << 20);
    let taken = std::os::unix::fs::MetadataExt::blocks(&metadata) * 512;
    assert!(taken < 40 << 20, "what is zero takes no space: {taken}");
    let commands = [
        "info threads",
        "thread apply all -q print/x $rip",
        "thread apply all -q print/x $rsp",
        "thread apply all -q x/16xb $rip",
    ];
    let mut gdb = Command::new("gdb");
    gdb.args(["-nx", "-batch", "-ex"]).arg(format!("core-file {}", path.display()));
    for command in commands {
        gdb.args(["-ex", command]);
    }
    let output = match gdb.output() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            eprintln!("SKIPPED: there is no gdb here; `make setup-tests` brings it");
            return;
        }
        output => output.expect("gdb runs"),
    };
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    for vcpu in 0..2 {
        for register in ["rip", "rsp"] {
            let value = format!("= {:#x}\n", bed.register(vcpu, register));
            assert!(said.contains(&value), "{register} of {vcpu}, {value} in\n{said}");
        }
        let rip = bed.register(vcpu, "rip") as usize;
        let bytes: Vec<String> =
            bed.ram[rip..rip + 8].iter().map(|byte| format!("0x{byte:02x}")).collect();
        assert!(said.contains(&bytes.join("\t")), "{bytes:?} in\n{said}");
    }
    assert!(!said.contains("Cannot access memory"), "{said}");
}

/// Returns the name, type and contents of each note of a core file.
fn notes(core: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
    let u32_at = |at: usize| u32::from_le_bytes(core[at..at + 4].try_into().expect("4"));
    let u64_at = |at: usize| u64::from_le_bytes(core[at..at + 8].try_into().expect("8")) as usize;
    // The first program header is that of the notes.
    let header = u64_at(32);
    assert_eq!(u32_at(header), 4, "PT_NOTE");
    let (mut at, mut found) = (u64_at(header + 8), Vec::new());
    let end = at + u64_at(header + 32);
    while at < end {
        let [name_len, len] = [at, at + 4].map(|at| u32_at(at) as usize);
        let name = at + 12;
        let contents = name + name_len.next_multiple_of(4);
        let name = String::from_utf8(core[name..name + name_len - 1].to_vec()).expect("UTF-8");
        found.push((name, u32_at(at + 8), core[contents..contents + len].to_vec()));
        at = contents + len.next_multiple_of(4);
    }
    assert_eq!(at, end);
    found
}

#[test]
fn a_core_file_says_of_each_vcpu_what_linux_and_qemu_say() {
    let Some(bed) = bed() else { return };
    let path = core(bed);
    let found = notes(&std::fs::read(&path).expect("it"));
    let of = |name: &str, kind: u32| -> Vec<&[u8]> {
        let notes = found.iter().filter(|(of, is, _)| (of.as_str(), *is) == (name, kind));
        notes.map(|(_, _, contents)| &contents[..]).collect()
    };
    let u64_at =
        |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8"));
    let (threads, states) = (of("CORE", 1), of("QEMU", 0));
    assert_eq!((threads.len(), states.len()), (2, 2));
    for vcpu in 0..2 {
        let rip = bed.register(vcpu, "rip");
        // struct elf_prstatus: the number of the thread, and the registers from byte 112 on.
        assert_eq!(threads[vcpu][32..36], (vcpu as u32 + 1).to_le_bytes());
        assert_eq!(u64_at(threads[vcpu], 112 + 16 * 8), rip);
        // struct QEMUCPUState: version and length, registers, ten segments, control registers.
        let state = states[vcpu];
        assert_eq!(u64_at(state, 0), 1 | (state.len() as u64) << 32);
        assert_eq!(u64_at(state, 8 + 16 * 8), rip);
        let sregs = &bed.vcpus[vcpu]["sregs"];
        let control = 8 + 18 * 8 + 10 * 24;
        for (index, name) in [(0, "cr0"), (2, "cr2"), (3, "cr3"), (4, "cr4")] {
            assert_eq!(u64_at(state, control + index * 8), hex(text(sregs, name)), "{name}");
        }
        assert_eq!(u64_at(state, 8 + 18 * 8 + 7 * 24 + 16), hex(text(&sregs["tr"], "base")));
        assert_eq!(u64_at(state, 8 + 18 * 8 + 9 * 24 + 16), hex(text(&sregs["idt"], "base")));
    }
    let readelf = Command::new("readelf").args(["-a", "-W"]).arg(&path).output();
    let readelf = readelf.expect("readelf, of binutils, runs");
    let complaints = String::from_utf8_lossy(&readelf.stderr).into_owned();
    assert!(readelf.status.success() && complaints.is_empty(), "{complaints}");
}

#[test]
fn a_core_file_is_of_the_machine_and_replaces_nothing() {
    let Some(bed) = bed() else { return };
    let path = core(bed).display().to_string();
    let again = bed.host.frazil(&["export", &bed.at, &path, "--format", "elf-core"]);
    again.expect_code(1).expect_says(&["--force"]);
    let region = ["export", &bed.at, "x", "--format", "elf-core", "--region", "disk0"];
    bed.host.frazil(&region).expect_code(2).expect_says(&["disk0"]);
}
