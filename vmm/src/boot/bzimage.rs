//! Loads a Linux bzImage: the compressed kernel as distributions ship it, which unpacks itself
//! (`Documentation/arch/x86/boot.rst` in the Linux sources).

use std::io::{Read, Seek, SeekFrom};

use linux_loader::loader::KernelLoader;
use linux_loader::loader::bootparam::{LOADED_HIGH, XLF_KERNEL_64, setup_header};
use linux_loader::loader::bzimage::BzImage;
use vm_memory::{ByteValued, GuestAddress, ReadVolatile};

use super::{HIGH_RAM, Loaded, boot_error};
use crate::error::{Result, VmmError};
use crate::memory::{GuestRam, HOLE_START};

/// Where the setup header starts in the file.
const SETUP_HEADER: usize = 0x1f1;
/// The byte at this offset is the distance from [`MAGIC`] to the end of the setup header.
const HEADER_LEN: usize = 0x201;
const MAGIC: usize = 0x202;
/// Bytes at the start of the file that contain the whole setup header.
pub(super) const HEAD_BYTES: u64 = 0x202 + 0xff;
/// The first boot protocol version that says whether a kernel has a 64-bit entry.
const VERSION_MIN: u16 = 0x20c;
/// Offset of the 64-bit entry from the address that the kernel is loaded at.
const ENTRY_64: u64 = 0x200;
const SECTOR_BYTES: u64 = 512;
const EXPECTED: &str = "a Linux bzImage for x86-64, of boot protocol 2.12 or newer";

/// True if a file that starts with `head` has a bzImage's magic number.
pub(super) fn is_bzimage(head: &[u8]) -> bool {
    head.get(MAGIC..MAGIC + 4) == Some(b"HdrS")
}

/// Where a kernel is loaded, in guest physical addresses.
#[derive(Debug, PartialEq, Eq)]
struct Place {
    load: u64,
    /// The end of the memory that the kernel needs while it unpacks itself.
    end: u64,
}

/// Loads the kernel in the file `image`, which starts with `head`, at its preferred address: a
/// kernel that is loaded lower moves itself up there.
///
/// # Errors
/// [`VmmError::Boot`] if the header is invalid, or the kernel has no 64-bit entry or does not fit
/// RAM.
pub(super) fn load<F: Read + ReadVolatile + Seek>(
    what: &str,
    head: &[u8],
    image: &mut F,
    ram: &GuestRam,
) -> Result<Loaded> {
    let header = read_header(head).map_err(|found| boot_error(what, EXPECTED, found))?;
    let file_bytes =
        image.seek(SeekFrom::End(0)).map_err(|error| boot_error(what, "a readable file", error))?;
    let setup_sectors = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
    let kernel_bytes = file_bytes
        .checked_sub((setup_sectors + 1) * SECTOR_BYTES)
        .filter(|bytes| *bytes > ENTRY_64)
        .ok_or_else(|| {
            boot_error(what, EXPECTED, format!("{file_bytes} bytes without a kernel"))
        })?;
    let place = place(what, &header, kernel_bytes)?;
    let low_end = ram.len_bytes().min(HOLE_START);
    if place.end > low_end {
        let found = format!("{} MiB below the hole for devices", low_end >> 20);
        let expected =
            format!("{} MiB of guest memory for the kernel", place.end.div_ceil(1 << 20));
        return Err(boot_error(what, &expected, found));
    }
    BzImage::load(ram.memory(), Some(GuestAddress(place.load)), image, None)
        .map_err(|error| boot_error(what, EXPECTED, error))?;
    Ok(Loaded {
        entry: place.load + ENTRY_64,
        end: place.end,
        initrd_end_max: u64::from(header.initrd_addr_max) + 1,
        header: Some(setup_header { code32_start: place.load as u32, ..header }),
    })
}

/// Reads the setup header of a file that starts with `head`, up to the end that it gives: code
/// follows.
fn read_header(head: &[u8]) -> Result<setup_header, String> {
    let end = MAGIC + usize::from(*head.get(HEADER_LEN).ok_or("a file that ends in its header")?);
    let there = head.get(SETUP_HEADER..end).ok_or("a file that ends in its header")?;
    let mut header = setup_header::default();
    let len = there.len().min(size_of::<setup_header>());
    header.as_mut_slice()[..len].copy_from_slice(&there[..len]);
    let (version, xloadflags) = (header.version, header.xloadflags);
    if { header.boot_flag } != 0xaa55 || version < VERSION_MIN {
        return Err(format!("boot protocol {}.{}", version >> 8, version & 0xff));
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return Err("a zImage, to be loaded below 1 MiB".into());
    }
    if xloadflags & XLF_KERNEL_64 == 0 {
        return Err("a kernel without a 64-bit entry".into());
    }
    Ok(header)
}

/// Decides where to load a kernel of `kernel_bytes`, and how much memory it needs there
/// ("init_size" in the boot protocol).
fn place(what: &str, header: &setup_header, kernel_bytes: u64) -> Result<Place, VmmError> {
    let (preferred, alignment) = (header.pref_address, u64::from(header.kernel_alignment));
    let nonsense = |found: String| boot_error(what, "a bzImage that can be placed in RAM", found);
    let (load, runs_at) = if header.relocatable_kernel == 0 {
        (u64::from(header.code32_start), preferred)
    } else if alignment.is_power_of_two() {
        let start = preferred
            .max(HIGH_RAM)
            .checked_next_multiple_of(alignment)
            .ok_or_else(|| nonsense(format!("the preferred address {preferred:#x}")))?;
        (start, start)
    } else {
        return Err(nonsense(format!("the alignment {alignment:#x}")));
    };
    if load < HIGH_RAM || runs_at < HIGH_RAM {
        return Err(nonsense(format!("one to load at {load:#x} and run at {runs_at:#x}")));
    }
    let end = |start: u64, bytes: u64| {
        start
            .checked_add(bytes)
            .ok_or_else(|| nonsense(format!("one of {bytes:#x} bytes at {start:#x}")))
    };
    let needs = end(runs_at, u64::from(header.init_size))?;
    Ok(Place { load, end: end(load, kernel_bytes)?.max(needs) })
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use proptest::prelude::*;
    use vm_memory::Bytes;

    use super::*;

    const LEN: usize = 0x2000;

    fn good() -> setup_header {
        setup_header {
            setup_sects: 1,
            boot_flag: 0xaa55,
            jump: 0x6aeb,
            header: u32::from_le_bytes(*b"HdrS"),
            version: 0x20f,
            loadflags: LOADED_HIGH,
            code32_start: 0x10_0000,
            initrd_addr_max: 0x7fff_ffff,
            kernel_alignment: 0x20_0000,
            relocatable_kernel: 1,
            xloadflags: XLF_KERNEL_64,
            cmdline_size: 0x7ff,
            pref_address: 0x100_0000,
            init_size: 0x40_0000,
            ..Default::default()
        }
    }

    fn image(header: &setup_header) -> Vec<u8> {
        let mut image = vec![0x90; LEN];
        let bytes = header.as_slice();
        image[SETUP_HEADER..SETUP_HEADER + bytes.len()].copy_from_slice(bytes);
        image
    }

    fn load_image(image: &[u8], ram: &GuestRam) -> Result<Loaded> {
        let head = &image[..image.len().min(HEAD_BYTES as usize)];
        load("x", head, &mut Cursor::new(image), ram)
    }

    #[test]
    fn a_kernel_is_loaded_where_it_prefers_to_be() {
        let ram = GuestRam::new(32 << 20).unwrap();
        let mut image = image(&good());
        image[0x400..0x404].copy_from_slice(b"code");
        let loaded = load_image(&image, &ram).unwrap();
        assert_eq!((loaded.entry, loaded.end), (0x100_0200, 0x140_0000));
        assert_eq!(loaded.initrd_end_max, 1 << 31);
        assert_eq!({ loaded.header.unwrap().cmdline_size }, 0x7ff);
        let mut found = [0; 4];
        ram.memory().read_slice(&mut found, GuestAddress(0x100_0000)).unwrap();
        assert_eq!(&found, b"code");
    }

    #[test]
    fn kernels_that_cannot_move_are_loaded_where_they_say() {
        let fixed = setup_header { relocatable_kernel: 0, ..good() };
        let expected = Place { load: 0x10_0000, end: 0x140_0000 };
        assert_eq!(place("x", &fixed, 0x1000).unwrap(), expected);
        let unaligned = setup_header { pref_address: 0x100_0001, ..good() };
        assert_eq!(place("x", &unaligned, 0x1000).unwrap().load, 0x120_0000);
    }

    #[test]
    fn hostile_headers_are_refused_with_a_reason() {
        let ram = GuestRam::new(32 << 20).unwrap();
        let cases = [
            (setup_header { version: 0x20b, ..good() }, "protocol 2.11"),
            (setup_header { boot_flag: 0, ..good() }, "found boot protocol"),
            (setup_header { loadflags: 0, ..good() }, "zImage"),
            (setup_header { xloadflags: 0, ..good() }, "64-bit entry"),
            (setup_header { setup_sects: 0xff, ..good() }, "without a kernel"),
            (setup_header { init_size: u32::MAX, ..good() }, "4112 MiB of guest memory"),
            (setup_header { pref_address: u64::MAX, ..good() }, "preferred address"),
            (setup_header { pref_address: u64::MAX - 0x1f_ffff, ..good() }, "bytes at"),
            (setup_header { kernel_alignment: 0, ..good() }, "alignment 0x0"),
            (setup_header { kernel_alignment: 3, ..good() }, "alignment 0x3"),
            (
                setup_header { relocatable_kernel: 0, code32_start: 0x7000, ..good() },
                "load at 0x7000",
            ),
            (setup_header { relocatable_kernel: 0, pref_address: 0, ..good() }, "run at 0x0"),
            (setup_header { jump: 0x00eb, ..good() }, "protocol 0.0"),
        ];
        for (header, says) in cases {
            let error = load_image(&image(&header), &ram).unwrap_err().to_string();
            assert!(error.contains(says), "{says}: {error}");
        }
        for len in [0x202, 0x206, 0x240, 0x400, 0x600] {
            assert!(load_image(&image(&good())[..len], &ram).is_err(), "{len:#x}");
        }
    }

    proptest! {
        #[test]
        fn no_header_leads_outside_ram_or_low(noise in proptest::collection::vec(any::<u8>(), 123)) {
            let ram = GuestRam::new(32 << 20).unwrap();
            let mut image = image(&good());
            // Keeps the bytes that make it a bzImage, or nearly all would be refused early.
            let kept = [0, 13, 14, 16, 17, 18, 19, 20, 21, 22, 32, 0x236 - SETUP_HEADER];
            for (index, byte) in noise.iter().enumerate().filter(|(index, _)| !kept.contains(index)) {
                image[SETUP_HEADER + index] = *byte;
            }
            if let Ok(loaded) = load_image(&image, &ram) {
                prop_assert!(loaded.entry >= HIGH_RAM && loaded.end <= 32 << 20);
                prop_assert!(loaded.entry < loaded.end);
            }
        }
    }
}
