//! The ELF file of a guest's kernel, and where in the guest it is.

use std::fs::File;
use std::path::Path;

use object::{Object, ObjectSection, ObjectSymbol, ReadCache, SectionKind};

use super::linux::LinuxKernel;
use super::memory::PhysicalMemory;
use super::{AddressSpace, InspectError, OrcFormat, OrcTable, Result, Symbols};

/// Linux is put at multiples of so many bytes (CONFIG_PHYSICAL_ALIGN), this far at the most.
const OFFSET_STEP_BYTES: u64 = 2 << 20;
const OFFSETS: u64 = 512;
/// Bytes that are compared.
const SAMPLE_BYTES: usize = 256;
/// Text that every Linux kernel has, with its release and when it was built: it is never patched.
const BANNER: &str = "linux_banner";

/// A file that is read where it is looked at: with debug information, kernels' have half a GiB and more.
#[derive(Debug)]
pub struct KernelBytes(ReadCache<File>);

impl KernelBytes {
    /// Opens it.
    ///
    /// # Errors
    /// The system's.
    pub fn open(path: &Path) -> std::io::Result<Self> {
        Ok(Self(ReadCache::new(File::open(path)?)))
    }
}

/// An ELF file with symbols.
#[derive(Debug)]
pub struct KernelFile<'a> {
    file: object::File<'a, &'a ReadCache<File>>,
}

impl<'a> KernelFile<'a> {
    /// Reads its headers.
    ///
    /// # Errors
    /// A message, if it is no ELF file, or has no symbols.
    pub fn parse(bytes: &'a KernelBytes) -> Result<Self, String> {
        let file = object::File::parse(&bytes.0)
            .map_err(|error| format!("expected an ELF file, such as a vmlinux: {error}"))?;
        if file.symbols().next().is_none() {
            return Err("expected an ELF file with symbols, found one that was stripped".into());
        }
        Ok(Self { file })
    }

    /// How far beyond where it was linked it is in the guest, in bytes: as a Linux kernel tells, or where its
    /// contents are found by one of `spaces`. None if nowhere: the guest has another kernel.
    ///
    /// # Errors
    /// The store's.
    pub fn offset_in(
        &self,
        memory: &dyn PhysicalMemory,
        spaces: &[AddressSpace],
        kernel: Option<&LinuxKernel>,
    ) -> Result<Option<u64>> {
        let Some((address, sample)) = self.sample() else { return Ok(None) };
        let told = kernel.map(|kernel| kernel.offset_bytes);
        let offsets = told.into_iter().chain((0..OFFSETS).map(|step| step * OFFSET_STEP_BYTES));
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

    /// An address, and what is there as long as the kernel runs.
    fn sample(&self) -> Option<(u64, &'a [u8])> {
        let banner = self.file.symbols().find(|symbol| symbol.name() == Ok(BANNER));
        let (address, len) = if let Some(symbol) = banner {
            (symbol.address(), symbol.size())
        } else {
            // Of any other program, its code: the most there is of it, since what is small may be tables.
            let texts = self.file.sections().filter(|section| section.kind() == SectionKind::Text);
            let text = texts.max_by_key(ObjectSection::size)?;
            (text.address(), text.size())
        };
        let len = (len as usize).min(SAMPLE_BYTES);
        let section = self.file.sections().find(|section| {
            section.address() <= address && address < section.address() + section.size()
        })?;
        let data = section.data().ok()?;
        let start = (address - section.address()) as usize;
        let sample = data.get(start..)?;
        Some((address, &sample[..len.min(sample.len())])).filter(|(_, sample)| !sample.is_empty())
    }

    /// Its symbols, in a guest that has it `offset_bytes` beyond where it was linked.
    #[must_use]
    pub fn symbols(&self, offset_bytes: u64) -> Symbols {
        Symbols::of_file(&self.file, offset_bytes)
    }

    /// Its unwind table, likewise; its layout is that of `kernel`'s release, or else of the newest.
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
