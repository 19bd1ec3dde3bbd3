//! Foreign guests: bare-metal ELF programs that know only the Linux boot protocol.

use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex};

use frazil_tests::vm_harness::{Host, frazil, kvm_or_skip, wait_for};

/// Prints "hello", the command line that the zero page (RSI) leads to, and resets the machine.
/// Ring 0, long mode, no stack.
const SOURCE: &str = r#"
    .text
    .globl _start
_start:
    mov %rsi, %rbx
    mov $0x3f8, %edx
    lea hello(%rip), %rcx
1:  movb (%rcx), %al
    test %al, %al
    jz 2f
    outb %al, %dx
    inc %rcx
    jmp 1b
2:  movl 0x228(%rbx), %ecx
3:  movb (%rcx), %al
    test %al, %al
    jz 4f
    outb %al, %dx
    inc %rcx
    jmp 3b
4:  movb $0x0a, %al
    outb %al, %dx
    movl 0x202(%rbx), %eax
    cmp $0x53726448, %eax
    jne 5f
    movb $0xfe, %al
    outb %al, $0x64
5:  hlt
    jmp 5b
hello:
    .asciz "hello\n"
"#;

/// Assembles `source` into an ELF executable at 1 MiB.
fn assemble(host: &Host, name: &str, source: &str) -> PathBuf {
    let (text, elf) = (host.path(&format!("{name}.s")), host.path(name));
    std::fs::write(&text, source).expect("the scratch folder");
    let output = Command::new("gcc")
        .args(["-nostdlib", "-static", "-no-pie", "-Wl,-N,--build-id=none,-Ttext=0x100000", "-o"])
        .args([&elf, &text])
        .output()
        .expect("gcc, which links this test too");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    elf
}

#[test]
fn a_bare_metal_elf_says_hello_and_resets() {
    if !kvm_or_skip() {
        return;
    }
    let host = Host::new();
    let elf = assemble(&host, "hello", SOURCE).display().to_string();
    // Repeated, since output written just before the end must not get lost.
    for round in 0..8 {
        let finished =
            host.ok(&["run", "--kernel", &elf, "--memory", "32MiB", "--cmdline", "frazil says=hi"]);
        assert_eq!(finished.stdout, "hello\nfrazil says=hi\n", "round {round}: {finished:#?}");
        finished.expect_says(&["reset"]);
    }
    let json = host.ok(&["run", "--kernel", &elf, "--memory", "32MiB", "--json"]);
    assert_eq!(json.json_lines().last().expect("a line")["reason"], "guest_reset", "{json:#?}");
    json.expect_says(&["hello", "console=ttyS0"]);
    let file = host.path("serial").display().to_string();
    let quiet = host.ok(&["run", "--kernel", &elf, "--memory", "32MiB", "--serial", &file]);
    assert_eq!(quiet.stdout, "");
    let written = std::fs::read_to_string(file).expect("the serial file");
    assert!(written.starts_with("hello\n"), "{written:?}");
}

/// Echoes each byte that it reads twice, and resets the machine at a full stop.
const ECHO: &str = r"
    .text
    .globl _start
_start:
    mov $0x3fd, %edx
    inb %dx, %al
    test $1, %al
    jz _start
    mov $0x3f8, %edx
    inb %dx, %al
    outb %al, %dx
    outb %al, %dx
    cmp $0x2e, %al
    jne _start
    movb $0xfe, %al
    outb %al, $0x64
    hlt
";

#[test]
fn what_comes_in_is_read_by_the_guest() {
    if !kvm_or_skip() {
        return;
    }
    let host = Host::new();
    let elf = assemble(&host, "echo", ECHO).display().to_string();
    let mut command =
        host.command(&["run", "--kernel", &elf, "--memory", "32MiB", "--serial-input", "stdin"]);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it starts");
    // More than the port's FIFO holds.
    let text: String = ('a'..='z').cycle().take(500).chain(['.']).collect();
    child.stdin.take().expect("a pipe").write_all(text.as_bytes()).expect("it is read");
    let finished = child.wait_with_output().expect("it ends");
    let expected: String = text.chars().flat_map(|c| [c, c]).collect();
    assert_eq!(String::from_utf8_lossy(&finished.stdout), expected);
    assert!(finished.status.success());
}

/// By string instructions, reads the scratch register of the serial port four times, prints
/// "string\n" and the four bytes, and resets the machine.
const STRINGS: &str = r#"
    .text
    .globl _start
_start:
    cld
    mov $0x3ff, %edx
    mov $0x78, %al
    outb %al, %dx
    lea found(%rip), %rdi
    mov $4, %ecx
    rep insb
    mov $0x3f8, %edx
    lea string(%rip), %rsi
    mov $12, %ecx
    rep outsb
    movb $0xfe, %al
    outb %al, $0x64
    hlt
string:
    .ascii "string
"
found:
    .ascii "....
"
"#;

#[test]
fn string_instructions_stay_at_one_port() {
    if !kvm_or_skip() {
        return;
    }
    let host = Host::new();
    let elf = assemble(&host, "strings", STRINGS).display().to_string();
    let finished = host.ok(&["run", "--kernel", &elf, "--memory", "32MiB"]);
    assert_eq!(finished.stdout, "string\nxxxx\n", "{finished:#?}");
}

/// A command on a terminal of its own, made by script(1).
struct Terminal {
    child: Child,
    keys: ChildStdin,
    shown: Arc<Mutex<String>>,
}

impl Terminal {
    fn run(host: &Host, command: &str) -> Self {
        let mut script = Command::new("script");
        host.surround(&mut script);
        script.args(["-qec", command, "/dev/null"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = script.spawn().expect("script, which every Debian has");
        let (keys, mut screen) = (child.stdin.take(), child.stdout.take().expect("a pipe"));
        let shown = Arc::<Mutex<String>>::default();
        let all = Arc::clone(&shown);
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = screen.read(&mut bytes) {
                all.lock().expect("no panic").push_str(&String::from_utf8_lossy(&bytes[..count]));
            }
        });
        Self { child, keys: keys.expect("a pipe"), shown }
    }

    fn wait_shown(&self, text: &str) {
        wait_for(text, || self.shown.lock().expect("no panic").contains(text).then_some(()));
    }

    fn press(&mut self, keys: &[u8]) {
        self.keys.write_all(keys).and_then(|()| self.keys.flush()).expect("somebody reads");
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _gone = self.child.wait();
    }
}

#[test]
fn a_terminal_is_the_guests_until_it_is_left() {
    if !kvm_or_skip() {
        return;
    }
    let host = Host::new();
    let elf = assemble(&host, "echo", ECHO).display().to_string();
    let run = format!("{} run --kernel {elf} --memory 32MiB --name tty", frazil().display());
    let mut terminal = Terminal::run(&host, &format!("{run}; echo status $?; stty -a; echo over"));
    // From then on, keys go to the guest.
    terminal.wait_shown("Ctrl-A x ends it");
    // Keys are not echoed, not held back until the end of the line, and Ctrl-C is no signal.
    terminal.press(b"ab\x03c");
    terminal.wait_shown("aabb\x03\x03cc");
    terminal.press(b"\x01\x01");
    terminal.wait_shown("\x01\x01");
    terminal.press(b"\x01h");
    terminal.wait_shown("Ctrl-A Ctrl-A sends Ctrl-A");
    terminal.press(b"\x01x");
    terminal.wait_shown("VM `tty` was stopped");
    terminal.wait_shown("status 0");
    terminal.wait_shown("over\r\n");
    let shown = terminal.shown.lock().expect("no panic").clone();
    let modes = shown.rsplit("status 0").next().expect("what stty says");
    for mode in ["icanon", "isig", "echo", "icrnl"] {
        let is_on = modes.split_whitespace().any(|word| word == mode);
        assert!(is_on, "`{mode}` is as it was: {modes}");
    }
}

#[test]
fn a_guest_that_crashes_ends_the_vm_with_an_error() {
    if !kvm_or_skip() {
        return;
    }
    let host = Host::new();
    // No interrupt table: the first exception is a triple fault.
    let elf = assemble(&host, "crash", "    .globl _start\n_start: ud2\n").display().to_string();
    let finished = host.frazil(&["run", "--kernel", &elf, "--memory", "32MiB", "--json"]);
    finished.expect_code(1).expect_says(&["crashed", "triple fault", "rip 0x1000"]);
    assert_eq!(finished.json_lines().last().expect("a line")["reason"], "guest_crashed");
}
