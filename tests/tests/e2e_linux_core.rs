//! Looks into a snapshot of a stock Linux guest with `frazil inspect`, and with debuggers that open
//! its core file. The guest runs where `frazil_tests::linux` describes; its snapshot is examined on
//! this machine.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use frazil_snapstore::Description;
use frazil_snapstore::search::SearchProgress;
use frazil_tests::linux::run;
use frazil_tests::vm_harness::{Host, number, text};
use frazil_vmm::inspect::{GuestView, LinuxKernel, Symbol};
use serde_json::Value;

/// Boots without load, so that at least one vCPU waits in the kernel and has a stack there.
const SCRIPT: &str = r"
boot a ''
ticks a 2
checkpoint a one
crash a
keep /run/store
";

/// Returns a host whose store is the guest's, or `None` if there is no QEMU. It is made once per
/// process. `FRAZIL_LINUX_KEPT` names the archive of an earlier run
/// (`target/tmp/linux/core/kept.tar`), to work on these tests without running the guest again.
fn host() -> Option<&'static Host> {
    static HOST: OnceLock<Option<Host>> = OnceLock::new();
    let make = || {
        let kept = std::env::var_os("FRAZIL_LINUX_KEPT");
        let outcome = if kept.is_some() { None } else { Some(run("core", SCRIPT)?) };
        let host = Host::new();
        let _none_yet = std::fs::remove_dir_all(host.store_path());
        let folder = host.store_path().parent().expect("it is in a folder").to_owned();
        match (kept, outcome) {
            (Some(kept), _) => {
                let mut tar = Command::new("tar");
                let status = tar.arg("-xf").arg(kept).arg("-C").arg(folder).status();
                assert!(status.expect("tar runs").success());
            }
            (None, outcome) => outcome?.unpack_kept(&folder),
        }
        Some(host)
    };
    HOST.get_or_init(make).as_ref()
}

/// Returns the core file and the report of its export, made once per process.
fn core(host: &Host) -> &'static (PathBuf, Value) {
    static CORE: OnceLock<(PathBuf, Value)> = OnceLock::new();
    CORE.get_or_init(|| {
        let path = host.path("vmcore");
        let export =
            ["export", &host.at("one"), &path.display().to_string(), "--format", "elf-core"];
        (path, host.json(&export))
    })
}

/// Returns the standard output of a debugger, or `None` if it is not installed.
fn debugger(program: &str, arguments: &[&str]) -> Option<String> {
    let found = Command::new(program).args(arguments).output();
    let output = match found {
        Ok(output) => output,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            eprintln!("SKIPPED: there is no {program} here; `make setup-tests` brings it");
            return None;
        }
        Err(error) => panic!("{program}: {error}"),
    };
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{program}: {output:#?}");
    Some(said)
}

/// Returns the kernel's debug information, where Debian installs it or `make setup-tests` unpacks
/// it.
fn debug_information(release: &str) -> Option<PathBuf> {
    let this = std::env::current_exe().expect("a test knows its file");
    let target = this.ancestors().nth(3).expect("tests are in TARGET/PROFILE/deps");
    let name = format!("usr/lib/debug/boot/vmlinux-{release}");
    let roots = [Path::new("/"), &target.join("debian-debug")].map(|root| root.join(&name));
    let found = roots.into_iter().find(|path| path.is_file());
    if found.is_none() {
        eprintln!(
            "SKIPPED: there is no debug information of Linux {release}; `make setup-tests` brings it"
        );
    }
    found
}

#[test]
fn stacks_have_names_without_any_file() {
    let Some(host) = host() else { return };
    let stacks = host.ok(&["inspect", &host.at("one"), "--stack", "--json"]).json_lines();
    assert_eq!(stacks.len(), 2, "{stacks:#?}");
    for stack in &stacks {
        let frames = stack["frames"].as_array().expect("frames");
        let mut expected = vec!["bottom", "user_mode"];
        for frame in frames {
            match text(frame, "ip") {
                // Modules have symbols and tables of their own.
                ip if ip > "0xffffffffc0000000" => {
                    assert!(
                        frame["module"].is_string() && frame["function"].is_string(),
                        "{stack:#}"
                    );
                }
                // A program was running, about which nothing is known.
                ip if ip < "0xffff" => expected.extend(["no_way_up", "damaged"]),
                _ => {
                    assert!(
                        frame["function"].is_string() && frame["module"].is_null(),
                        "{stack:#}"
                    );
                }
            }
        }
        assert!(expected.contains(&text(stack, "end")), "{stack:#}");
        // Every kernel stack begins in one of these functions.
        let roots = [
            "secondary_startup_64",
            "ret_from_fork",
            "entry_SYSCALL_64_after_hwframe",
            "asm_exc_",
            "asm_sysvec_",
            "asm_common_interrupt",
            "start_kernel",
            "x86_64_start_kernel",
        ];
        let last = frames.last().and_then(|frame| frame["function"].as_str());
        assert!(
            expected.len() != 2
                || last.is_some_and(|last| roots.iter().any(|root| last.starts_with(root))),
            "{stack:#}"
        );
    }
}

/// The modules that the guest has loaded are found in its memory alone.
#[test]
fn modules_are_found_without_any_file() {
    let Some(host) = host() else { return };
    let shown = host.ok(&["inspect", &host.at("one"), "--stack"]).stdout;
    let said = shown.lines().next().expect("where names are from");
    let count =
        said.split_once("and those of ").and_then(|(_, rest)| rest.strip_suffix(" modules"));
    let count: usize =
        count.and_then(|count| count.parse().ok()).unwrap_or_else(|| panic!("{said}"));
    assert!((2..200).contains(&count), "{said}");
}

/// For each module, makes a snapshot as if a vCPU had stopped at the start of one of its functions,
/// called from the frames on the vCPU's stack.
#[test]
fn stacks_go_through_modules() {
    let Some(host) = host() else { return };
    let stacks = host.ok(&["inspect", &host.at("one"), "--stack", "--json"]).json_lines();
    let hex = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).expect("hex");
    // The frames from the first that was found by unwinding the stack of a vCPU in the kernel.
    let called = stacks.iter().find_map(|stack| {
        let frames = stack["frames"].as_array()?;
        let place = frames.iter().position(|frame| frame["by"] == "orc")?;
        Some((number(stack, "vcpu"), frames[place..].to_vec()))
    });
    let (vcpu, above) = called.expect("a vCPU in the kernel");
    let return_gva = hex(text(&above[0], "sp")) - 8;

    let store = host.store();
    let one = store.snapshot(store.resolve("one").expect("it").id).expect("it");
    let view = GuestView::open(&one).expect("a machine");
    let memory = view.memory();
    let kernel = LinuxKernel::find(&view, &SearchProgress::default()).expect("readable");
    let kernel = kernel.expect("a kernel");
    let symbols = kernel.symbols(memory).expect("readable").expect("symbols");
    let modules = kernel.modules(memory, &symbols).expect("readable").expect("modules");
    assert!(modules.len() > 1);
    for module in modules {
        let function = |symbol: &&Symbol| symbol.is_code && module.code.contains(&symbol.address);
        let Some(function) = module.symbols.iter().find(function) else { continue };
        let mut state = one.states().expect("chunks");
        let name = format!("vcpu{vcpu}");
        let chunk = state.iter_mut().find(|chunk| chunk.name == name).expect("a vCPU");
        chunk.body["regs"]["rip"] = format!("{:#x}", function.address).into();
        chunk.body["regs"]["rsp"] = format!("{return_gva:#x}").into();
        let mut transaction = store.begin(Some(one.id())).expect("nobody writes");
        let _as_it_is = transaction.region("ram", memory.region().pages()).expect("it");
        let message = format!("in {}", module.name);
        let description = Description { state, message, ..Description::default() };
        let id = transaction.commit(description).expect("published").id;
        let at = host.at(&id.to_string());
        let stack = host.json(&["inspect", &at, "--stack", "--vcpu", &vcpu.to_string()]);
        let frames = stack["frames"].as_array().expect("frames");
        assert_eq!(frames[0]["module"], *module.name, "{stack:#}");
        assert_eq!(frames[0]["offset"], 0, "{stack:#}");
        assert_eq!(frames[1..], above, "{}: {stack:#}", module.name);
    }
}

/// The kernel's file gives the same functions as its memory, and source lines on request.
#[test]
fn a_kernel_s_file_agrees_with_its_memory() {
    let Some(host) = host() else { return };
    let at = host.at("one");
    let (_, report) = core(host);
    let Some(vmlinux) = debug_information(text(&report["kernel"], "release")) else { return };
    let vmlinux = vmlinux.display().to_string();
    let inspect = |more: &[&str]| {
        let look = ["inspect", &at, "--stack", "--json"];
        host.ok(&[&look[..], more].concat()).json_lines()
    };
    let (without, with) = (inspect(&[]), inspect(&["--vmlinux", &vmlinux]));
    let with_lines = inspect(&["--vmlinux", &vmlinux, "--lines"]);
    let (mut frames, mut lines) = (0, 0);
    for ((without, with), with_lines) in without.iter().zip(&with).zip(&with_lines) {
        let each =
            [without, with, with_lines].map(|stack| stack["frames"].as_array().expect("frames"));
        assert!(each.iter().all(|frames| frames.len() == each[0].len()), "{without:#} {with:#}");
        for ((without, with), with_lines) in each[0].iter().zip(each[1]).zip(each[2]) {
            assert_eq!(without["ip"], with["ip"]);
            assert_eq!(with["lines"].as_array().map(Vec::len), Some(0), "{with:#}");
            if text(with, "ip") < "0xffff" || with["module"].is_string() {
                continue;
            }
            frames += 1;
            assert_eq!(without["offset"], with["offset"], "{without:#} {with:#}");
            let told = with_lines["lines"].as_array().expect("lines");
            lines += usize::from(
                told.iter().any(|line| line.as_str().is_some_and(|line| line.contains(':'))),
            );
        }
    }
    // Code written in assembly has lines too, so all frames should.
    assert!(lines == frames, "{lines} of {frames} have lines: {with_lines:#?}");
}

#[test]
fn memory_is_found_and_read_by_virtual_address() {
    let Some(host) = host() else { return };
    let at = host.at("one");
    let banner = host.ok(&[
        "inspect",
        &at,
        "--regex",
        r"Linux version 6\.[0-9.]+-[^\x00]+#1[^\x00]+",
        "--json",
    ]);
    let banner = banner.json_lines();
    assert!(!banner.is_empty());
    let (_, report) = core(host);
    let release = text(&report["kernel"], "release");
    assert!(banner.iter().any(|found| text(found, "text").contains(release)), "{banner:#?}");
    // What is found by physical address is also at its virtual address in the direct map.
    let found = &banner[0];
    let hex = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).expect("hex");
    let direct = hex(text(report, "direct_map"));
    let (gpa, len) = (hex(text(found, "gpa")), number(found, "len"));
    let gva = format!("{:#x},{len}", direct + gpa);
    let dump = host.ok(&["inspect", &at, "--gva", &gva, "--json"]).json_lines();
    let bytes: String = dump.iter().map(|page| text(page, "hex")).collect();
    assert_eq!(bytes, text(found, "match"));
    assert_eq!(text(&dump[0], "gpa"), text(found, "gpa"));
}

#[test]
fn gdb_opens_the_core_file() {
    let Some(host) = host() else { return };
    let (path, report) = core(host);
    let path = path.display().to_string();
    assert_eq!(number(report, "cpus"), 2);
    let show = host.json(&["show", &host.at("one")]);
    let states = show["state"].as_array().expect("chunks");
    let command = "thread apply all -q print/x $rip";
    let Some(said) =
        debugger("gdb", &["-nx", "-batch", "-ex", &format!("core-file {path}"), "-ex", command])
    else {
        return;
    };
    for name in ["vcpu0", "vcpu1"] {
        let vcpu = states.iter().find(|chunk| chunk["name"] == name).expect("a vCPU");
        let rip = text(&vcpu["body"]["regs"], "rip");
        assert!(said.contains(&format!("= {rip}\n")), "{name}: {rip} in\n{said}");
    }
}

/// With the kernel's debug information, drgn lists the kernel's tasks.
#[test]
fn drgn_lists_the_tasks() {
    let Some(host) = host() else { return };
    let (path, report) = core(host);
    let release = text(&report["kernel"], "release");
    let Some(vmlinux) = debug_information(release) else { return };
    let script = host.path("tasks.py");
    std::fs::write(
        &script,
        "import sys, drgn\n\
         from drgn.helpers.linux.sched import task_state_to_char\n\
         from drgn.helpers.linux.pid import for_each_task\n\
         prog = drgn.Program()\n\
         prog.set_core_dump(sys.argv[1])\n\
         prog.load_debug_info([sys.argv[2]])\n\
         print('release', prog['init_uts_ns'].name.release.string_().decode())\n\
         for task in for_each_task(prog):\n    \
             print('task', task.pid.value_(), task.comm.string_().decode())\n",
    )
    .expect("a file");
    let [script, path, vmlinux] = [&script, path, &vmlinux].map(|path| path.display().to_string());
    let python = "/usr/bin/python3";
    if !Command::new(python)
        .args(["-c", "import drgn"])
        .status()
        .is_ok_and(|status| status.success())
    {
        eprintln!("SKIPPED: {python} has no drgn; `make setup-tests` brings it");
        return;
    }
    let Some(said) = debugger(python, &[&script, &path, &vmlinux]) else { return };
    assert!(said.contains(&format!("release {release}\n")), "{said}");
    let tasks: Vec<&str> = said.lines().filter_map(|line| line.strip_prefix("task ")).collect();
    // The guest's first program, the kernel's thread daemon, and many others.
    assert!(tasks.iter().any(|task| task.starts_with("1 ")), "{said}");
    assert!(tasks.contains(&"2 kthreadd"), "{said}");
    assert!(tasks.len() > 20, "{said}");
}
