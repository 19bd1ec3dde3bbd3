//! The parts of machines and guests: programs, a kernel and its modules, all from Debian packages,
//! and `frazil`, built as a static program.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::archive::{Archive, read};

/// The emulator, without which these tests are skipped.
const QEMU: &str = "qemu-system-x86_64";
/// The Rust target for static programs, C library included.
const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// Where this machine has the emulator, the kernel and its modules.
#[derive(Debug)]
pub struct Parts {
    /// The emulator.
    pub qemu: PathBuf,
    /// A distribution's kernel, as shipped (bzImage).
    pub kernel: PathBuf,
    /// The folder of the kernel's modules, which has `modules.dep`.
    modules: PathBuf,
}

impl Parts {
    /// Finds the parts. Returns `None` if there is no QEMU, and says so on standard error even
    /// where the output of tests is captured.
    ///
    /// # Panics
    /// If there is QEMU but no kernel for it: `make setup-tests` installs both.
    #[must_use]
    pub fn find() -> Option<Self> {
        let Some(qemu) = on_path(QEMU) else {
            // Not eprintln!, whose output the test runner captures.
            let _said = writeln!(
                std::io::stderr(),
                "SKIPPED: there is no {QEMU} on this machine, and this test runs a kernel in it; \
                 `make setup-tests` installs it on Debian"
            );
            return None;
        };
        let (kernel, modules) = newest_kernel().unwrap_or_else(|| {
            panic!(
                "expected a /boot/vmlinuz-*-cloud-amd64 and its /lib/modules, or both below {}; \
                 found neither: `make setup-tests` brings them",
                unpacked_kernels().display()
            )
        });
        Some(Self { qemu, kernel, modules })
    }

    /// Adds a program of this machine to `archive`, in /bin.
    ///
    /// # Panics
    /// If this machine does not have it.
    pub fn program(archive: &mut Archive, name: &str) {
        let path = on_path(name)
            .unwrap_or_else(|| panic!("there is no {name} here; `make setup-tests` brings it"));
        archive.program(&format!("/bin/{name}"), &path);
    }

    /// Adds modules of the kernel to `archive`, below /modules, named so that in the order of names
    /// each comes after those it needs. Modules that are built into the kernel are left out.
    ///
    /// # Panics
    /// If the kernel has no such module.
    pub fn modules(&self, archive: &mut Archive, names: &[&str]) {
        let dependencies = self.text("modules.dep");
        let built_in = self.text("modules.builtin");
        let mut wanted: Vec<&str> = Vec::new();
        for name in names {
            let line = dependencies
                .lines()
                .find(|line| line.split(':').next().is_some_and(|path| module_name(path) == *name));
            let Some(line) = line else {
                let there = built_in.lines().any(|path| module_name(path) == *name);
                assert!(there, "{} has no module {name}", self.kernel.display());
                continue;
            };
            // `A: B C`: A needs B and C, and C has to be loaded before B.
            for path in line.split([':', ' ']).filter(|path| !path.is_empty()).rev() {
                if !wanted.contains(&path) {
                    wanted.push(path);
                }
            }
        }
        for (number, path) in wanted.into_iter().enumerate() {
            let target = format!("/modules/{number:02}-{}.ko", module_name(path));
            archive.data(&target, &decompressed(&self.modules.join(path)));
        }
    }

    /// Decompresses the ELF file in the kernel image (Linux boot protocol 2.08, payload_offset).
    ///
    /// # Panics
    /// If there is none, or the program that decompresses it is missing.
    #[must_use]
    pub fn vmlinux(&self) -> Vec<u8> {
        let image = read(&self.kernel);
        let word = |at: usize| -> [u8; 4] { image[at..at + 4].try_into().expect("four bytes") };
        let [offset, len] = [0x248, 0x24c].map(|at| u32::from_le_bytes(word(at)) as usize);
        let from = (usize::from(image[0x1f1]) + 1) * 512 + offset;
        // The last four bytes are the uncompressed size.
        let payload = &image[from..from + len - 4];
        let tool = match payload {
            [0x02, 0x21, 0x4c, 0x18, ..] => "lz4",
            [0xfd, b'7', b'z', ..] => "xz",
            [0x28, 0xb5, 0x2f, 0xfd, ..] => "zstd",
            _ => panic!("{}: not compressed by lz4, xz or zstd", self.kernel.display()),
        };
        let mut packed = tempfile::NamedTempFile::new().expect("a scratch file");
        packed.write_all(payload).expect("a scratch file");
        let packed = packed.reopen().expect("a scratch file");
        let output = Command::new(tool).arg("-dc").stdin(packed).output();
        let output = output.unwrap_or_else(|error| {
            panic!(
                "{tool}, which {} wants: {error}; `make setup-tests` brings it",
                self.kernel.display()
            )
        });
        assert!(output.stdout.starts_with(b"\x7fELF"), "{tool}: {}", output.status);
        output.stdout
    }

    fn text(&self, name: &str) -> String {
        let path = self.modules.join(name);
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }
}

/// Returns the name of the module at `path`, as lsmod has it: `virtio_ring` for
/// `kernel/drivers/virtio/virtio_ring.ko.xz`. Dashes become underscores.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

fn decompressed(path: &Path) -> Vec<u8> {
    let tool = match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => return read(path),
    };
    let output = Command::new(tool)
        .arg("-dc")
        .arg(path)
        .output()
        .unwrap_or_else(|error| panic!("{tool}, which {} wants: {error}", path.display()));
    assert!(output.status.success(), "{}: {output:?}", path.display());
    output.stdout
}

fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    // Not every user's PATH has the administrators' folders.
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|file| file.is_file())
}

/// Returns the folder in which `make setup-tests` unpacks a kernel without installing it.
fn unpacked_kernels() -> PathBuf {
    target_folder().join("debian-kernel")
}

/// Returns the newest kernel of the flavour `cloud-amd64`, and the folder of its modules.
fn newest_kernel() -> Option<(PathBuf, PathBuf)> {
    let mut found = Vec::new();
    for root in [PathBuf::from("/"), unpacked_kernels()] {
        let Ok(entries) = fs::read_dir(root.join("boot")) else { continue };
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let Some(release) = name.strip_prefix("vmlinuz-") else { continue };
            let modules = ["lib/modules", "usr/lib/modules"]
                .map(|folder| root.join(folder).join(release))
                .into_iter()
                .find(|folder| folder.join("modules.dep").is_file());
            if let (true, Some(modules)) = (release.ends_with("-cloud-amd64"), modules) {
                let numbers: Vec<u64> =
                    release.split(['.', '-']).map_while(|part| part.parse().ok()).collect();
                found.push((numbers, entry.path(), modules));
            }
        }
    }
    found.into_iter().max().map(|(_, kernel, modules)| (kernel, modules))
}

/// Returns cargo's target folder of this workspace.
pub(super) fn target_folder() -> PathBuf {
    // Tests are at TARGET/PROFILE/deps/NAME.
    let this = std::env::current_exe().expect("a test knows its file");
    this.ancestors().nth(3).expect("tests are in TARGET/PROFILE/deps").to_owned()
}

/// Builds `frazil` as a static program without debugging information. Built with optimisations: the
/// emulated machine is slow enough.
pub(super) fn static_frazil() -> Vec<u8> {
    let target = target_folder();
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args(["build", "--quiet", "--release", "--locked", "-p", "frazil-tools"])
        .args(["--target", TRIPLE, "--target-dir"])
        .arg(&target)
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .status()
        .expect("cargo runs");
    assert!(status.success(), "frazil does not build as a static program");
    let built = target.join(TRIPLE).join("release/frazil");
    let stripped = target.join(TRIPLE).join("release/frazil.stripped");
    let status =
        Command::new("strip").arg("-o").arg(&stripped).arg(&built).status().expect("strip runs");
    assert!(status.success(), "strip: {status}");
    read(&stripped)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_known_by_the_names_of_lsmod() {
        assert_eq!(module_name("kernel/drivers/char/hw_random/virtio-rng.ko"), "virtio_rng");
        assert_eq!(module_name("kernel/drivers/net/tun.ko.xz"), "tun");
    }
}
