//! Compiles the built-in guest (`guest/`) to `$OUT_DIR/guest.elf` with the compiler that builds this crate.
//! It is a freestanding program, so no target beyond the ordinary one and no tool beyond the linker is needed.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() -> ExitCode {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=guest");
    match build_guest() {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("error: the built-in guest does not build: {why}");
            ExitCode::FAILURE
        }
    }
}

fn build_guest() -> Result<(), String> {
    let guest = directory("CARGO_MANIFEST_DIR")?.join("guest");
    let rustc = env::var_os("RUSTC")
        .ok_or("expected RUSTC in the environment, as cargo sets it, found none")?;
    let output = rustc_command(Path::new(&rustc), &guest, &directory("OUT_DIR")?.join("guest.elf"))
        .output()
        .map_err(|error| format!("cannot run {}: {error}", rustc.display()))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!(
        "rustc ended with {}; it needs the standard library of {TARGET} (`rustup target add {TARGET}`) \
         and a C compiler as linker driver; it said:\n{said}",
        output.status
    ))
}

fn directory(variable: &str) -> Result<PathBuf, String> {
    env::var_os(variable).map(PathBuf::from).ok_or_else(|| {
        format!("expected {variable} in the environment, as cargo sets it, found none")
    })
}

fn rustc_command(rustc: &Path, guest: &Path, elf: &Path) -> Command {
    let mut command = Command::new(rustc);
    command.arg(guest.join("main.rs")).arg("-o").arg(elf);
    command.args([
        "--crate-name",
        "guest",
        "--crate-type",
        "bin",
        "--edition",
        "2024",
        "--target",
        TARGET,
    ]);
    // Optimised in every profile: a slow guest makes tests slow, and figures meaningless.
    for option in [
        "opt-level=3",
        "codegen-units=1",
        "panic=abort",
        "strip=symbols",
        "relocation-model=static",
        "code-model=small",
        "link-arg=-nostdlib",
        "link-arg=-static",
        "link-arg=-no-pie",
        "link-arg=-Wl,--build-id=none,-z,max-page-size=4096,-z,noexecstack",
    ] {
        command.args(["-C", option]);
    }
    command.arg("-C").arg(format!("link-arg=-T{}", guest.join("guest.ld").display()));
    // The same bytes wherever the sources are.
    command.arg(format!("--remap-path-prefix={}=guest", guest.display()));
    command
}
