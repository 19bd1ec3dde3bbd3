//! The ELF file of a guest's kernel, and its location in the guest.
//!
//! With debug information, a kernel's file has half a GiB and more. Only parts of it are read: the
//! headers, the symbol table and the names, each in one piece, and the sections that are asked for.

use std::fs::File;
use std::ops::Range;
use std::path::Path;

use object::elf::{STT_FILE, STT_FUNC, STT_GNU_IFUNC, STT_SECTION};
use object::read::elf::{ElfFile, FileHeader, Sym};
use object::{
    CompressionFormat, Endianness, Object, ObjectSection, ReadCache, ReadRef, SectionKind,
};

use super::linux::LinuxKernel;
use super::memory::PhysicalMemory;
use super::{AddressSpace, InspectError, OrcFormat, OrcTable, Result, Symbol, Symbols};

/// Linux is placed at multiples of this many bytes (CONFIG_PHYSICAL_ALIGN).
const OFFSET_STEP_BYTES: u64 = 2 << 20;
/// The number of such offsets.
const OFFSET_COUNT: u64 = 512;
/// The most bytes that are compared.
const SAMPLE_BYTES: usize = 256;
/// A text in every Linux kernel, with its release and build time; it is never patched.
const BANNER: &[u8] = b"linux_banner";
/// More than any table of any kernel takes: the sizes that a file gives need not be true.
const PIECE_BYTES_MAX: u64 = 512 << 20;

/// A file that is read piece by piece, on demand.
#[derive(Debug)]
pub struct KernelBytes(ReadCache<File>);

impl KernelBytes {
    /// Opens the file at `path`.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub fn open(path: &Path) -> std::io::Result<Self> {
        Ok(Self(ReadCache::new(File::open(path)?)))
    }
}

impl<'a> ReadRef<'a> for &'a KernelBytes {
    fn len(self) -> Result<u64, ()> {
        (&self.0).len()
    }

    fn read_bytes_at(self, offset: u64, size: u64) -> Result<&'a [u8], ()> {
        if size > PIECE_BYTES_MAX {
            return Err(());
        }
        (&self.0).read_bytes_at(offset, size)
    }

    fn read_bytes_at_until(self, range: Range<u64>, delimiter: u8) -> Result<&'a [u8], ()> {
        (&self.0).read_bytes_at_until(range, delimiter)
    }
}

/// An ELF file with symbols.
#[derive(Debug)]
pub struct KernelFile<'a> {
    file: object::File<'a, &'a KernelBytes>,
    symbols: Vec<FileSymbol<'a>>,
}

/// A symbol with its address as linked.
#[derive(Debug)]
struct FileSymbol<'a> {
    address: u64,
    len_bytes: u64,
    is_code: bool,
    name: &'a [u8],
}

impl<'a> KernelFile<'a> {
    /// Reads the headers and symbols.
    ///
    /// # Errors
    /// A message, if `bytes` is not an ELF file or has no symbols.
    pub fn parse(bytes: &'a KernelBytes) -> Result<Self, String> {
        let file = object::File::parse(bytes)
            .map_err(|error| format!("expected an ELF file, such as a vmlinux: {error}"))?;
        let symbols = match &file {
            object::File::Elf32(file) => table(file),
            object::File::Elf64(file) => table(file),
            other => {
                let found = other.format();
                return Err(format!(
                    "expected an ELF file, such as a vmlinux, found one in format {found:?}"
                ));
            }
        };
        let symbols =
            symbols.map_err(|error| format!("expected an ELF file with symbols: {error}"))?;
        if symbols.is_empty() {
            return Err("expected an ELF file with symbols, found one that was stripped".into());
        }
        Ok(Self { file, symbols })
    }

    /// The offset of the kernel in the guest from its address as linked, in bytes: the one that a
    /// Linux kernel reports, or the one at which the contents are found in one of `spaces`. None if
    /// they are found nowhere: the guest has another kernel.
    ///
    /// # Errors
    /// Store errors.
    pub fn offset_in(
        &self,
        memory: &dyn PhysicalMemory,
        spaces: &[AddressSpace],
        kernel: Option<&LinuxKernel>,
    ) -> Result<Option<u64>> {
        let Some((address, sample)) = self.sample() else { return Ok(None) };
        let reported = kernel.map(|kernel| kernel.offset_bytes);
        let offsets =
            reported.into_iter().chain((0..OFFSET_COUNT).map(|step| step * OFFSET_STEP_BYTES));
        let spaces: Vec<AddressSpace> =
            kernel.map(|kernel| kernel.space).into_iter().chain(spaces.iter().copied()).collect();
        for offset in offsets {
            for space in &spaces {
                let mut found = vec![0; sample.len()];
                match space.read(memory, address.wrapping_add(offset), &mut found) {
                    Ok(()) if found == sample => return Ok(Some(offset)),
                    Err(InspectError::Store(error)) => return Err(error.into()),
                    Ok(()) | Err(_) => {}
                }
            }
        }
        Ok(None)
    }

    /// A linked address, and the bytes that are there for as long as the kernel runs.
    fn sample(&self) -> Option<(u64, &'a [u8])> {
        let banner = self.symbols.iter().find(|symbol| symbol.name == BANNER);
        let (address, len) = if let Some(symbol) = banner {
            (symbol.address, symbol.len_bytes)
        } else {
            // For any other program, its largest text section: small ones may be tables.
            let texts = self.file.sections().filter(|section| section.kind() == SectionKind::Text);
            let text = texts.max_by_key(ObjectSection::size)?;
            (text.address(), text.size())
        };
        let len = len.min(SAMPLE_BYTES as u64) as usize;
        let offset_in = |section: &object::Section<'a, '_, &'a KernelBytes>| {
            address.checked_sub(section.address()).filter(|offset| *offset < section.size())
        };
        let section = self.file.sections().find(|section| offset_in(section).is_some())?;
        let sample = section.data().ok()?.get(offset_in(&section)? as usize..)?;
        Some((address, &sample[..len.min(sample.len())])).filter(|(_, sample)| !sample.is_empty())
    }

    /// The symbols in a guest that has the kernel `offset_bytes` above its address as linked.
    #[must_use]
    pub fn symbols(&self, offset_bytes: u64) -> Symbols {
        let symbols = self.symbols.iter().filter_map(|symbol| {
            let FileSymbol { address, len_bytes, is_code, name } = *symbol;
            let name = str::from_utf8(name).ok()?.to_owned();
            let address = address.wrapping_add(offset_bytes);
            Some(Symbol { address, len_bytes, is_code, name, module: None })
        });
        Symbols::new(symbols.collect())
    }

    /// The contents of section `name`, if there is one.
    ///
    /// # Errors
    /// [`InspectError::Section`] if it is compressed or incomplete.
    pub fn section(&self, name: &'static str) -> Result<Option<&'a [u8]>> {
        let Some(section) = self.file.section_by_name(name) else { return Ok(None) };
        let wrong = |found: String| InspectError::Section { name, found };
        let contents = section.compressed_data().map_err(|error| wrong(error.to_string()))?;
        match contents.format {
            CompressionFormat::None => Ok(Some(contents.data)),
            format => Err(wrong(format!("one that is compressed ({format:?})"))),
        }
    }

    /// The unwind table in such a guest, if the file has one. Its layout is that of `kernel`'s
    /// release, or else of the newest.
    #[must_use]
    pub fn orc(&self, offset_bytes: u64, kernel: Option<&LinuxKernel>) -> Option<OrcTable> {
        let section = |name| self.file.section_by_name(name);
        let (ips, entries) = (section(".orc_unwind_ip")?, section(".orc_unwind")?);
        let format = match kernel.and_then(|kernel| kernel.info.version()) {
            Some(version) => OrcFormat::of_version(version),
            None => OrcFormat::New,
        };
        let at = ips.address().wrapping_add(offset_bytes);
        Some(OrcTable::new(ips.data().ok()?, at, entries.data().ok()?, format))
    }
}

/// The symbols of `file`. The section with the names is read as a whole: reading them one by one
/// would take three system calls each, and there are two hundred thousand.
fn table<'a, Elf: FileHeader<Endian = Endianness>>(
    file: &ElfFile<'a, Elf, &'a KernelBytes>,
) -> Result<Vec<FileSymbol<'a>>, object::Error> {
    let (endian, table) = (file.endian(), file.elf_symbol_table());
    if table.is_empty() {
        return Ok(Vec::new());
    }
    let names = file.section_by_index(table.string_section())?.data()?;
    let texts: Vec<usize> = file
        .sections()
        .filter(|section| section.kind() == SectionKind::Text)
        .map(|section| section.index().0)
        .collect();
    let mut symbols = Vec::new();
    for (index, symbol) in table.enumerate() {
        let kind = symbol.st_type();
        if symbol.is_undefined(endian) || kind == STT_SECTION || kind == STT_FILE {
            continue;
        }
        let name = names.get(symbol.st_name(endian) as usize..).unwrap_or_default();
        let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
        if name.is_empty() {
            continue;
        }
        let section = table.symbol_section(endian, symbol, index).ok().flatten();
        let is_code = kind == STT_FUNC
            || kind == STT_GNU_IFUNC
            || section.is_some_and(|section| texts.contains(&section.0));
        let (address, len_bytes) = (symbol.st_value(endian).into(), symbol.st_size(endian).into());
        symbols.push(FileSymbol { address, len_bytes, is_code, name });
    }
    Ok(symbols)
}
