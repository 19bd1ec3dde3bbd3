//! The zero page: the parameters that a boot loader passes to the kernel.

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::GuestAddress;

use super::{BIOS_AREA, EBDA, HIGH_RAM, ZERO_PAGE, acpi, boot_error};
use crate::error::Result;
use crate::memory::{GuestRam, HOLE_END, HOLE_START};

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
/// End of the extended BIOS data area, where a PC's graphics memory would start.
const EBDA_END: u64 = 0xa_0000;
/// The id of a boot loader that has none assigned.
const LOADER_UNDEFINED: u8 = 0xff;

/// What the zero page says besides the layout of RAM.
#[derive(Debug, Default)]
pub(super) struct BootInfo {
    /// The setup header, if the kernel is a bzImage.
    pub header: Option<setup_header>,
    /// The command line's address, and its length in bytes with the terminating zero.
    pub cmdline: (u64, u32),
    /// The initial RAM disk's address and length in bytes.
    pub initrd: Option<(u64, u64)>,
}

/// Writes the zero page.
///
/// # Errors
/// [`VmmError::Boot`](crate::VmmError::Boot) if RAM has no room for it.
pub(super) fn write(ram: &GuestRam, info: &BootInfo) -> Result<()> {
    let mut params =
        boot_params { hdr: header(info), acpi_rsdp_addr: acpi::RSDP, ..Default::default() };
    let ram_ranges = e820(ram.len_bytes()).into_iter().map(|(start, end)| (start, end, E820_RAM));
    let reserved = [(EBDA, EBDA_END), (BIOS_AREA.start, BIOS_AREA.end)];
    let reserved = reserved.into_iter().map(|(start, end)| (start, end, E820_RESERVED));
    for (entry, (start, end, kind)) in params.e820_table.iter_mut().zip(ram_ranges.chain(reserved))
    {
        *entry = boot_e820_entry { addr: start, size: end - start, r#type: kind };
        params.e820_entries += 1;
    }
    LinuxBootConfigurator::write_bootparams(
        &BootParams::new(&params, GuestAddress(ZERO_PAGE)),
        ram.memory(),
    )
    .map_err(|error| boot_error("the zero page", "room in guest memory", error))
}

fn header(info: &BootInfo) -> setup_header {
    let mut header = info.header.unwrap_or_else(|| setup_header {
        boot_flag: 0xaa55,
        header: u32::from_le_bytes(*b"HdrS"),
        kernel_alignment: 0x100_0000,
        cmdline_size: info.cmdline.1,
        ..Default::default()
    });
    header.type_of_loader = LOADER_UNDEFINED;
    header.cmd_line_ptr = info.cmdline.0 as u32;
    // These are the loader's to fill in, whatever the file says.
    let (address, len) = info.initrd.unwrap_or((0, 0));
    (header.ramdisk_image, header.ramdisk_size) = (address as u32, len as u32);
    header.setup_data = 0;
    header
}

/// The RAM that a guest may use, as ranges of addresses.
fn e820(ram_bytes: u64) -> Vec<(u64, u64)> {
    let mut ranges = vec![(0, EBDA), (HIGH_RAM, ram_bytes.min(HOLE_START))];
    if ram_bytes > HOLE_START {
        ranges.push((HOLE_END, HOLE_END + ram_bytes - HOLE_START));
    }
    ranges
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn e820_covers_all_ram_but_the_pc_hole() {
        let total: u64 = e820(5 << 30).iter().map(|(start, end)| end - start).sum();
        assert_eq!(total, (5 << 30) - (HIGH_RAM - EBDA));
    }

    #[test]
    fn a_setup_header_is_copied_and_completed() {
        let ram = GuestRam::new(4 << 20).unwrap();
        let header = setup_header {
            version: 0x20f,
            init_size: 0x1234,
            ramdisk_image: 7,
            setup_data: 7,
            ..Default::default()
        };
        let info = BootInfo { header: Some(header), cmdline: (0x2_0000, 5), ..Default::default() };
        write(&ram, &info).unwrap();
        let params: boot_params = ram.memory().read_obj(GuestAddress(ZERO_PAGE)).unwrap();
        let found = params.hdr;
        assert_eq!(({ found.version }, { found.init_size }), (0x20f, 0x1234));
        assert_eq!(({ found.cmd_line_ptr }, found.type_of_loader), (0x2_0000, 0xff));
        assert_eq!(({ found.ramdisk_image }, { found.setup_data }), (0, 0));
        assert_eq!((params.e820_entries, { params.acpi_rsdp_addr }), (4, acpi::RSDP));
    }
}
