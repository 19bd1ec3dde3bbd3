//! Names for guest addresses, from the kernel's file or from a Linux guest's own symbol table.

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use frazil_vmm::inspect::{
    AddressSpace, GuestView, KernelBytes, KernelFile, LinuxKernel, OrcTable, Symbols,
};

use super::lines::Lines;

/// A kernel's file.
pub(super) struct Vmlinux {
    path: PathBuf,
    bytes: KernelBytes,
}

impl Vmlinux {
    pub(super) fn open(path: &Path) -> anyhow::Result<Self> {
        let path = path.to_owned();
        let bytes =
            KernelBytes::open(&path).with_context(|| format!("--vmlinux {}", path.display()))?;
        Ok(Self { path, bytes })
    }

    fn argument(&self) -> String {
        format!("--vmlinux {}", self.path.display())
    }
}

/// Names of functions, and where they come from.
pub(super) struct Names<'a> {
    symbols: Symbols,
    orc: Option<OrcTable>,
    lines: Option<Lines<'a>>,
    /// How far the guest's addresses are from those in the file.
    offset_bytes: u64,
    /// The number of loaded modules, if the kernel tells.
    modules: Option<usize>,
    from: Source,
}

enum Source {
    /// A kernel's file.
    File(PathBuf),
    /// The guest itself, a kernel of this release.
    Guest(String),
    /// There are no names.
    Nobody,
}

/// The place of an address in a function.
pub(super) struct Place {
    /// The function's name.
    pub name: String,
    /// The module that the function belongs to, if any.
    pub module: Option<String>,
    /// Distance from the function's beginning, in bytes.
    pub offset: u64,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, module, offset } = self;
        match offset {
            0 => write!(f, "{name}")?,
            _ => write!(f, "{name}+{offset:#x}")?,
        }
        module.iter().try_for_each(|module| write!(f, " [{module}]"))
    }
}

impl<'a> Names<'a> {
    /// The names from `vmlinux`, or else from the guest. With source lines if `lines`.
    pub(super) fn find(
        view: &GuestView,
        kernel: Option<&LinuxKernel>,
        vmlinux: Option<&'a Vmlinux>,
        lines: bool,
    ) -> anyhow::Result<Self> {
        if let Some(vmlinux) = vmlinux {
            return Self::of_file(view, kernel, vmlinux, lines).with_context(|| vmlinux.argument());
        }
        let Some(kernel) = kernel else { return Ok(Self::none()) };
        let Some(symbols) = kernel.symbols(view.memory())? else { return Ok(Self::none()) };
        let orc = kernel.orc(view.memory(), &symbols)?;
        let from = Source::Guest(kernel.info.release().to_owned());
        Self { symbols, orc, from, ..Self::none() }.with_modules(view, kernel)
    }

    /// Without any names.
    pub(super) fn none() -> Self {
        let (symbols, from) = (Symbols::default(), Source::Nobody);
        Self { symbols, orc: None, lines: None, offset_bytes: 0, modules: None, from }
    }

    fn of_file(
        view: &GuestView,
        kernel: Option<&LinuxKernel>,
        vmlinux: &'a Vmlinux,
        lines: bool,
    ) -> anyhow::Result<Self> {
        let file = KernelFile::parse(&vmlinux.bytes).map_err(anyhow::Error::msg)?;
        let spaces: Vec<AddressSpace> =
            (0..view.vcpus().len()).map(|index| view.space(index)).collect::<Result<_, _>>()?;
        let Some(offset_bytes) = file.offset_in(view.memory(), &spaces, kernel)? else {
            bail!(
                "expected the file of the kernel that the guest runs, found another: its contents \
                 are nowhere in the guest's memory{}",
                kernel.map_or_else(String::new, |kernel| format!(
                    ", which holds Linux {}",
                    kernel.info.release()
                ))
            );
        };
        let lines = lines.then(|| Lines::of(&file)).transpose()?;
        let orc = file.orc(offset_bytes, kernel);
        let symbols = file.symbols(offset_bytes);
        let from = Source::File(vmlinux.path.clone());
        let names = Self { symbols, orc, lines, offset_bytes, modules: None, from };
        match kernel {
            Some(kernel) => names.with_modules(view, kernel),
            None => Ok(names),
        }
    }

    /// Adds the modules of `kernel`, if it tells which those are.
    fn with_modules(mut self, view: &GuestView, kernel: &LinuxKernel) -> anyhow::Result<Self> {
        let Some(modules) = kernel.modules(view.memory(), &self.symbols)? else { return Ok(self) };
        if let Some(orc) = &mut self.orc {
            modules.iter().for_each(|module| module.add_to(orc));
        }
        self.modules = Some(modules.len());
        let symbols = modules.into_iter().flat_map(|module| module.symbols).collect();
        self.symbols = self.symbols.with(symbols);
        Ok(self)
    }

    /// Describes where the names come from.
    pub(super) fn describe(&self) -> String {
        let modules = match (&self.from, self.modules) {
            (Source::Nobody, _) => String::new(),
            (_, Some(modules)) => {
                format!(", and those of {} modules", crate::output::count(modules as u64))
            }
            (_, None) => ", without modules: the kernel does not say where they are".to_owned(),
        };
        let source = match &self.from {
            Source::File(path) => {
                let count = crate::output::count(self.symbols.len() as u64);
                let at = self.offset_bytes;
                format!(
                    "{count} symbols of {}, loaded {at:#x} above its link address",
                    path.display()
                )
            }
            Source::Guest(release) => {
                let count = crate::output::count(self.symbols.len() as u64);
                format!("{count} symbols of Linux {release}, from the guest's memory")
            }
            Source::Nobody => {
                "no symbols: none were found in the guest, and no --vmlinux was given".to_owned()
            }
        };
        source + &modules
    }

    /// True if the kernel told where its modules are.
    pub(super) fn has_modules(&self) -> bool {
        self.modules.is_some()
    }

    pub(super) fn orc(&self) -> Option<&OrcTable> {
        self.orc.as_ref()
    }

    /// The function that contains `address`.
    pub(super) fn function(&self, address: u64) -> Option<Place> {
        let (symbol, offset) = self.symbols.function(address)?;
        let name = addr2line::demangle_auto(symbol.name.as_str().into(), None).into_owned();
        Some(Place { name, module: symbol.module.as_deref().map(str::to_owned), offset })
    }

    /// The source lines for `address`, as `function at file:line`; of functions inlined there, the
    /// innermost first.
    pub(super) fn lines(&self, address: u64) -> Vec<String> {
        let found =
            self.lines.as_ref().map(|lines| lines.find(address.wrapping_sub(self.offset_bytes)));
        found.unwrap_or_default()
    }
}
