//! Names of guest addresses, from the kernel's file or from what a Linux guest says of itself.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use frazil_vmm::inspect::{
    AddressSpace, GuestView, KernelBytes, KernelFile, LinuxKernel, OrcTable, Symbols,
};

/// What tells names.
pub(super) struct Names {
    symbols: Symbols,
    orc: Option<OrcTable>,
    lines: Option<addr2line::Loader>,
    /// How far addresses are from where the file has them.
    offset_bytes: u64,
    from: Source,
}

enum Source {
    /// This file.
    File(PathBuf),
    /// The guest itself: a kernel of this release.
    Guest(String),
    /// Nobody.
    Nobody,
}

impl Names {
    /// From `vmlinux`, or else from the guest.
    pub(super) fn find(
        view: &GuestView,
        kernel: Option<&LinuxKernel>,
        vmlinux: Option<&Path>,
    ) -> anyhow::Result<Self> {
        if let Some(path) = vmlinux {
            return Self::of_file(view, kernel, path)
                .with_context(|| format!("--vmlinux {}", path.display()));
        }
        let Some(kernel) = kernel else { return Ok(Self::nobody()) };
        let Some(symbols) = kernel.symbols(view.memory())? else { return Ok(Self::nobody()) };
        let orc = kernel.orc(view.memory(), &symbols)?;
        let from = Source::Guest(kernel.info.release().to_owned());
        Ok(Self { symbols, orc, lines: None, offset_bytes: 0, from })
    }

    /// None at all.
    pub(super) fn nobody() -> Self {
        let symbols = Symbols::default();
        Self { symbols, orc: None, lines: None, offset_bytes: 0, from: Source::Nobody }
    }

    fn of_file(
        view: &GuestView,
        kernel: Option<&LinuxKernel>,
        path: &Path,
    ) -> anyhow::Result<Self> {
        let bytes = KernelBytes::open(path)?;
        let file = KernelFile::parse(&bytes).map_err(anyhow::Error::msg)?;
        let spaces: Vec<AddressSpace> =
            (0..view.vcpus().len()).map(|index| view.space(index)).collect::<Result<_, _>>()?;
        let Some(offset_bytes) = file.offset_in(view.memory(), &spaces, kernel)? else {
            bail!(
                "expected the file of the kernel that this guest runs, found another: its contents are nowhere in the guest's memory{}",
                kernel.map_or_else(String::new, |kernel| format!(
                    ", which has Linux {}",
                    kernel.info.release()
                ))
            );
        };
        let lines = addr2line::Loader::new(path).ok();
        let orc = file.orc(offset_bytes, kernel);
        let from = Source::File(path.to_owned());
        Ok(Self { symbols: file.symbols(offset_bytes), orc, lines, offset_bytes, from })
    }

    /// Where they come from.
    pub(super) fn describe(&self) -> String {
        match &self.from {
            Source::File(path) => {
                let count = crate::output::count(self.symbols.len() as u64);
                let at = self.offset_bytes;
                format!(
                    "{count} symbols of {}, which is {at:#x} beyond where it was linked",
                    path.display()
                )
            }
            Source::Guest(release) => {
                let count = crate::output::count(self.symbols.len() as u64);
                format!("{count} symbols that Linux {release} has in the guest's memory")
            }
            Source::Nobody => {
                "no symbols: the guest has none that can be found, and no --vmlinux was given"
                    .to_owned()
            }
        }
    }

    pub(super) fn orc(&self) -> Option<&OrcTable> {
        self.orc.as_ref()
    }

    /// The function that `address` is in, and how far.
    pub(super) fn function(&self, address: u64) -> Option<(String, u64)> {
        let (name, offset) = self.symbols.function(address)?;
        Some((addr2line::demangle_auto(name.into(), None).into_owned(), offset))
    }

    /// `function at file:line`, of functions that were inlined there the innermost first.
    pub(super) fn lines(&self, address: u64) -> Vec<String> {
        let Some(loader) = &self.lines else { return Vec::new() };
        let Ok(mut frames) = loader.find_frames(address.wrapping_sub(self.offset_bytes)) else {
            return Vec::new();
        };
        let mut lines = Vec::new();
        while let Ok(Some(frame)) = frames.next() {
            let Some(place) = frame.location else { continue };
            let function = frame.function.as_ref().and_then(|function| function.demangle().ok());
            lines.push(format!(
                "{}{}:{}",
                function.map_or_else(String::new, |name| format!("{name} at ")),
                place.file.unwrap_or("?"),
                place.line.unwrap_or(0)
            ));
        }
        lines
    }
}
