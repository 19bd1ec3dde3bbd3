//! ACPI tables: the number of processors, the wiring of interrupts, the devices, and how to reset
//! the machine and power it off (section numbers are those of the ACPI Specification 6.5).
//!
//! The machine is hardware-reduced (4.1): it has no power management timer, fixed events or
//! buttons, so ACPI needs nothing but the tables, which are in RAM.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Arg, Device, EISAName, Equal, IO, If, Interrupt,
    Memory32Fixed, Method, Name, Notify, Package, Path, ResourceTemplate,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as Space, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes, GuestAddress};

use super::{BIOS_AREA, boot_error};
use crate::devices::{i8042, power, rtc, serial, vmgenid};
use crate::error::Result;
use crate::memory::GuestMemory;

/// The RSDP's address: the first place in the BIOS area where a guest looks for it (5.2.5.1).
pub(super) const RSDP: u64 = BIOS_AREA.start;
/// The other tables lie from here up to the generation id.
const TABLES: u64 = RSDP + 0x40;
const TABLES_END: u64 = vmgenid::ADDRESS;
const _: () = assert!(TABLES_END + 0x1000 == BIOS_AREA.end);

const OEM: [u8; 6] = *b"FRAZIL";
const OEM_TABLE: [u8; 8] = *b"FRAZILVM";
const OEM_REVISION: u32 = 1;
/// Length of a table's header.
const HEADER_BYTES: u32 = 36;

const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;
/// MADT: flag for two 8259As in addition (5.2.12).
const PCAT_COMPAT: u32 = 1;
/// MADT: types of the entries for interrupt source overrides and local APIC NMIs (5.2.12.5,
/// 5.2.12.7).
const OVERRIDE: u8 = 2;
const LOCAL_APIC_NMI: u8 = 4;
/// FADT: flags for the absence of VGA and of a CMOS clock (5.2.9.3).
const NO_VGA: u16 = 1 << 2;
const NO_CMOS_CLOCK: u16 = 1 << 5;

/// A virtio device on the MMIO bus, as described in the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MmioSlot {
    /// Guest physical address of its registers.
    pub base: u64,
    /// Length of its registers in bytes.
    pub len: u64,
    /// The IOAPIC input of its interrupt, which is edge-triggered.
    pub gsi: u32,
}

/// The machine's generation id, as described in the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GenerationSlot {
    /// Guest physical address of its sixteen bytes.
    pub address: u64,
    /// The IOAPIC input of the edge-triggered interrupt that announces a new id.
    pub gsi: u32,
}

/// The hardware that the tables list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hardware<'a> {
    /// Number of processors; their local APIC ids are their indices.
    pub cpus: usize,
    /// Virtio devices on the MMIO bus.
    pub slots: &'a [MmioSlot],
    /// The generation id, if there is one.
    pub generation: Option<GenerationSlot>,
    /// Whether there is a PC's CMOS clock.
    pub rtc: bool,
}

/// Writes the tables of a machine with `hardware`.
///
/// # Errors
/// [`VmmError::Boot`](crate::VmmError::Boot) if the tables do not fit the BIOS area, or RAM does
/// not reach that far.
pub(super) fn write(memory: &GuestMemory, hardware: &Hardware<'_>) -> Result<()> {
    let mut bytes = Vec::new();
    let mut add = |table: &dyn Aml| {
        // Aligned, for guests that read tables as structures.
        bytes.resize(bytes.len().next_multiple_of(16), 0);
        let address = TABLES + bytes.len() as u64;
        table.to_aml_bytes(&mut bytes);
        address
    };
    let dsdt = add(&dsdt(hardware));
    let (fadt, madt) = (add(&fadt(dsdt, hardware.rtc)), add(&madt(hardware.cpus)));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = add(&xsdt);
    if TABLES + bytes.len() as u64 > TABLES_END {
        let Hardware { cpus, slots, .. } = hardware;
        let found = format!("{} bytes for {cpus} vCPUs and {} devices", bytes.len(), slots.len());
        return Err(boot_error("the ACPI tables", "up to 123 KiB", found));
    }
    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    memory
        .write_slice(&rsdp, GuestAddress(RSDP))
        .and_then(|()| memory.write_slice(&bytes, GuestAddress(TABLES)))
        .map_err(|error| boot_error("the ACPI tables", "room in guest memory", error))
}

/// The Fixed ACPI Description Table (5.2.9).
fn fadt(dsdt: u64, has_rtc: bool) -> impl Aml {
    let port = |port: u16| GAS::new(Space::SystemIo, 8, 0, AccessSize::ByteAccess, port.into());
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless)
        .flag(Flags::ResetRegSup);
    fadt.iapc_boot_arch = (NO_VGA | if has_rtc { 0 } else { NO_CMOS_CLOCK }).into();
    fadt.century = if has_rtc { rtc::CENTURY } else { 0 };
    fadt.reset_reg = port(i8042::COMMAND);
    fadt.reset_value = i8042::COMMAND_RESET;
    fadt.sleep_control_reg = port(power::CONTROL);
    fadt.sleep_status_reg = port(power::STATUS);
    fadt.finalize()
}

/// The table of processors and interrupt controllers (5.2.12).
fn madt(cpus: usize) -> impl Aml {
    let mut madt = Sdt::new(*b"APIC", HEADER_BYTES, 5, OEM, OEM_TABLE, OEM_REVISION);
    madt.append(LOCAL_APIC);
    madt.append(PCAT_COMPAT);
    for cpu in 0..cpus {
        let id = cpu as u8;
        ProcessorLocalApic::new(id, id, EnabledStatus::Enabled).to_aml_bytes(&mut madt);
    }
    IoApic::new(0, IO_APIC, 0).to_aml_bytes(&mut madt);
    // ISA interrupt 0, the timer's, is wired to input 0 (KVM's default), not to 2 as in most PCs.
    madt.append_slice(&[OVERRIDE, 10, 0, 0, 0, 0, 0, 0, 0, 0]);
    // For all processors, at LINT1.
    madt.append_slice(&[LOCAL_APIC_NMI, 6, 0xff, 0, 0, 1]);
    madt
}

/// The table of the devices and of the power-off state (5.2.11.1).
fn dsdt(hardware: &Hardware<'_>) -> impl Aml {
    let mut body = Vec::new();
    serial_port(&mut body);
    if hardware.rtc {
        clock(&mut body);
    }
    if let Some(slot) = &hardware.generation {
        generation(&mut body, slot);
    }
    hardware
        .slots
        .iter()
        .enumerate()
        .for_each(|(index, slot)| virtio_device(&mut body, index, slot));
    let off = power::SLEEP_TYPE_OFF;
    Name::new("_S5_".into(), &Package::new(vec![&off, &off])).to_aml_bytes(&mut body);
    let mut dsdt = Sdt::new(*b"DSDT", HEADER_BYTES, 2, OEM, OEM_TABLE, OEM_REVISION);
    dsdt.append_slice(&body);
    dsdt
}

fn serial_port(body: &mut Vec<u8>) {
    let (base, last) = (*serial::PORTS.start(), *serial::PORTS.end());
    let ports = IO::new(base, base, 1, (last - base + 1) as u8);
    let interrupt = Interrupt::new(true, true, false, false, serial::GSI);
    let (id, resources) =
        (EISAName::new("PNP0501"), ResourceTemplate::new(vec![&ports, &interrupt]));
    let id = Name::new("_HID".into(), &id);
    let number = Name::new("_UID".into(), &1_u8);
    let resources = Name::new("_CRS".into(), &resources);
    Device::new("_SB_.COM1".into(), vec![&id, &number, &resources]).to_aml_bytes(body);
}

/// A PC's CMOS clock, without an interrupt since it has no alarms.
fn clock(body: &mut Vec<u8>) {
    let ports = IO::new(rtc::INDEX, rtc::INDEX, 1, (rtc::DATA - rtc::INDEX + 1) as u8);
    let id = Name::new("_HID".into(), &EISAName::new("PNP0B00"));
    let resources = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports]));
    Device::new("_SB_.RTC_".into(), vec![&id, &resources]).to_aml_bytes(body);
}

/// The generation id, and the Generic Event Device that turns its interrupt into a notification:
/// hardware-reduced machines have no other events (5.6.9).
fn generation(body: &mut Vec<u8>, slot: &GenerationSlot) {
    const CHANGED: u8 = 0x80;
    let id = Name::new("_HID".into(), &"VMGENCTR");
    let compatible = Name::new("_CID".into(), &"VM_Gen_Counter");
    let description = Name::new("_DDN".into(), &"VM_Gen_Counter");
    let (low, high) = (slot.address as u32, (slot.address >> 32) as u32);
    let address = Name::new("ADDR".into(), &Package::new(vec![&low, &high]));
    Device::new("_SB_.VGEN".into(), vec![&id, &compatible, &description, &address])
        .to_aml_bytes(body);

    let id = Name::new("_HID".into(), &"ACPI0013");
    let number = Name::new("_UID".into(), &0_u8);
    let interrupt = Interrupt::new(true, true, false, false, slot.gsi);
    let resources = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&interrupt]));
    let device = Path::new("\\_SB_.VGEN");
    let notify = Notify::new(&device, &CHANGED);
    let (number_of_event, ours) = (Arg(0), slot.gsi);
    let is_ours = Equal::new(&number_of_event, &ours);
    let if_ours = If::new(&is_ours, vec![&notify]);
    let event = Method::new("_EVT".into(), 1, true, vec![&if_ours]);
    Device::new("_SB_.GED_".into(), vec![&id, &number, &resources, &event]).to_aml_bytes(body);
}

/// A virtio device; its registers say which kind it is.
fn virtio_device(body: &mut Vec<u8>, index: usize, slot: &MmioSlot) {
    let interrupt = Interrupt::new(true, true, false, false, slot.gsi);
    let near = u32::try_from(slot.base).ok().zip(u32::try_from(slot.len).ok());
    let registers: Box<dyn Aml> = if let Some((base, len)) = near {
        Box::new(Memory32Fixed::new(true, base, len))
    } else {
        let last = slot.base.saturating_add(slot.len.saturating_sub(1));
        let plain = AddressSpaceCacheable::NotCacheable;
        Box::new(AddressSpace::new_memory(plain, true, slot.base, last, None))
    };
    let id = Name::new("_HID".into(), &"LNRO0005");
    let number = Name::new("_UID".into(), &index);
    let coherent = Name::new("_CCA".into(), &1_u8);
    let resources = ResourceTemplate::new(vec![registers.as_ref(), &interrupt]);
    let resources = Name::new("_CRS".into(), &resources);
    let path = format!("_SB_.V{index:03X}");
    Device::new(path.as_str().into(), vec![&id, &number, &coherent, &resources]).to_aml_bytes(body);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::GuestRam;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
    }

    fn read(ram: &GuestRam, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        ram.memory().read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    fn number(bytes: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
    }

    /// Returns the table at `address` after checking its signature and checksum.
    fn table(ram: &GuestRam, address: u64, signature: [u8; 4]) -> Vec<u8> {
        let header = read(ram, address, HEADER_BYTES as usize);
        assert_eq!(header[..4], signature[..]);
        let table =
            read(ram, address, u32::from_le_bytes(header[4..8].try_into().unwrap()) as usize);
        assert_eq!(sum(&table), 0, "the checksum of {signature:?}");
        table
    }

    /// The tables that the RSDP leads to: FADT, MADT, DSDT.
    fn tables(hardware: &Hardware<'_>) -> [Vec<u8>; 3] {
        let ram = GuestRam::new(2 << 20).unwrap();
        write(ram.memory(), hardware).unwrap();
        let rsdp = read(&ram, RSDP, 36);
        assert_eq!((&rsdp[..8], sum(&rsdp[..20]), sum(&rsdp)), (&b"RSD PTR "[..], 0, 0));
        let xsdt = table(&ram, number(&rsdp, 24), *b"XSDT");
        assert_eq!(xsdt.len(), 36 + 2 * 8);
        let fadt = table(&ram, number(&xsdt, 36), *b"FACP");
        let dsdt = table(&ram, number(&fadt, 140), *b"DSDT");
        [fadt, table(&ram, number(&xsdt, 44), *b"APIC"), dsdt]
    }

    fn contains(table: &[u8], what: &[u8]) -> bool {
        table.windows(what.len()).any(|window| window == what)
    }

    #[test]
    fn the_madt_lists_every_processor() {
        for cpus in [1, 2, 254] {
            let [_, madt, _] = tables(&Hardware { cpus, ..Default::default() });
            let mut entries = &madt[44..];
            let mut kinds = Vec::new();
            while let [kind, len, rest @ ..] = entries {
                if *kind == 0 {
                    let id = kinds.len() as u8;
                    assert_eq!(rest[..6], [id, id, 1, 0, 0, 0]);
                }
                kinds.push(*kind);
                entries = &entries[usize::from(*len)..];
            }
            assert_eq!(kinds[..cpus], vec![0; cpus]);
            assert_eq!(kinds[cpus..], [1, OVERRIDE, LOCAL_APIC_NMI]);
        }
    }

    #[test]
    fn the_fadt_says_how_to_reset_and_power_off() {
        let [fadt, ..] = tables(&Hardware { cpus: 1, ..Default::default() });
        assert_eq!(fadt.len(), 276);
        let flags = u32::from_le_bytes(fadt[112..116].try_into().unwrap());
        assert_eq!(flags >> 20 & 1, 1, "hardware-reduced");
        assert_eq!(flags >> 10 & 1, 1, "with a reset register");
        assert_eq!((fadt[108], fadt[109] & 0x20), (0, 0x20), "without a clock");
        assert_eq!((fadt[116], number(&fadt, 120), fadt[128]), (1, 0x64, 0xfe));
        assert_eq!((fadt[244], number(&fadt, 248)), (1, power::CONTROL.into()));
        assert_eq!((fadt[256], number(&fadt, 260)), (1, power::STATUS.into()));
    }

    #[test]
    fn the_dsdt_lists_the_devices() {
        let slots = [
            MmioSlot { base: 0xd000_0000, len: 0x1000, gsi: 5 },
            MmioSlot { base: 0x12_3456_7000, len: 0x1000, gsi: 23 },
        ];
        let [_, _, dsdt] = tables(&Hardware { cpus: 2, slots: &slots, ..Default::default() });
        assert!(contains(&dsdt, b"COM1") && contains(&dsdt, b"_S5_"));
        assert!(contains(&dsdt, b"V000") && contains(&dsdt, b"V001"));
        assert!(contains(&dsdt, b"LNRO0005"));
        // Memory32Fixed, writable, and the interrupt behind it: consumer, edge, one of them.
        let near = [0x86, 9, 0, 1, 0, 0, 0, 0xd0, 0, 0x10, 0, 0, 0x89, 6, 0, 3, 1, 5, 0, 0, 0];
        assert!(contains(&dsdt, &near));
        assert!(contains(&dsdt, &0x12_3456_7000_u64.to_le_bytes()));
        assert!(contains(&dsdt, &0x12_3456_7fff_u64.to_le_bytes()));
        let [_, _, none] = tables(&Hardware { cpus: 2, ..Default::default() });
        assert!(!contains(&none, b"LNRO0005"));
        for name in [&b"VGEN"[..], b"GED_", b"RTC_"] {
            assert!(!contains(&none, name), "{name:?}");
        }
    }

    #[test]
    fn a_clock_is_told_of_with_its_century() {
        let [fadt, _, dsdt] = tables(&Hardware { cpus: 1, rtc: true, ..Default::default() });
        assert_eq!((fadt[108], fadt[109] & 0x20), (rtc::CENTURY, 0));
        // _CRS: two ports from 0x70.
        assert!(contains(&dsdt, b"RTC_") && contains(&dsdt, &[0x47, 1, 0x70, 0, 0x70, 0, 1, 2]));
        assert!(contains(&dsdt, &[0x41, 0xd0, 0x0b, 0x00]), "PNP0B00");
    }

    #[test]
    fn the_generation_is_told_of_by_an_event() {
        let generation = Some(GenerationSlot { address: 0x1_000f_f000, gsi: 9 });
        let [.., dsdt] = tables(&Hardware { cpus: 1, generation, ..Default::default() });
        assert!(contains(&dsdt, b"_HID\x0dVMGENCTR\0"));
        assert!(contains(&dsdt, b"_CID\x0dVM_Gen_Counter\0"));
        // A package of two numbers, the lower half of the address first.
        assert!(contains(&dsdt, b"ADDR\x12\x08\x02\x0c\x00\xf0\x0f\x00\x01"));
        assert!(contains(&dsdt, b"_HID\x0dACPI0013\0"));
        assert!(contains(&dsdt, &[0x89, 6, 0, 3, 1, 9, 0, 0, 0]), "an edge of input 9");
        // Method (_EVT, 1, Serialized) { If (Arg0 == 9) { Notify (\_SB.VGEN, 0x80) } }
        let notify = b"\x86\\\x2e_SB_VGEN\x0a\x80";
        let event = [&b"_EVT\x09\xa0\x12\x93\x68\x0a\x09"[..], notify].concat();
        assert!(contains(&dsdt, &event), "{dsdt:02x?}");
    }

    #[test]
    fn more_devices_than_there_is_room_for_are_refused() {
        let ram = GuestRam::new(2 << 20).unwrap();
        let slots = vec![MmioSlot { base: 0xd000_0000, len: 0x1000, gsi: 5 }; 3000];
        let hardware = Hardware { cpus: 1, slots: &slots, ..Default::default() };
        assert!(write(ram.memory(), &hardware).is_err());
    }
}
