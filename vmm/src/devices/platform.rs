//! The devices that KVM emulates itself: interrupt controllers, interval timer, clock.
//!
//! `unsafe` is allowed here because KVM's interrupt controller state is a C union.
#![allow(unsafe_code)]

use std::time::{Duration, SystemTime};

use frazil_snapstore::StateChunk;
use kvm_bindings::{
    KVM_CLOCK_REALTIME, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    kvm_clock_data, kvm_ioapic_state, kvm_irqchip, kvm_pic_state, kvm_pit_channel_state,
    kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Result, VmmError};
use crate::state::{ChunkSet, Saved, chunk, never_written, saved_twin};
use crate::vcpu::saved::Reg;

const IRQCHIP: &str = "irqchip";
const PIT: &str = "pit";
const CLOCK: &str = "clock";

/// The raw state of all three, as read while the guest is stopped.
#[derive(Debug, Default)]
pub struct CapturedPlatform {
    pics: [kvm_pic_state; 2],
    ioapic: kvm_ioapic_state,
    pit: kvm_pit_state2,
    clock: kvm_clock_data,
    realtime_ns: u64,
}

impl std::fmt::Debug for SavedIrqchip {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SavedIrqchip").finish_non_exhaustive()
    }
}

/// Reads the platform's state. The vCPUs must have stopped.
///
/// # Errors
/// [`VmmError::Kvm`].
pub fn capture(vm: &VmFd) -> Result<CapturedPlatform> {
    let chip = |chip_id| -> Result<kvm_irqchip> {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        vm.get_irqchip(&mut chip).map_err(VmmError::kvm("read the interrupt controllers"))?;
        Ok(chip)
    };
    let (master, slave, ioapic) =
        (chip(KVM_IRQCHIP_PIC_MASTER)?, chip(KVM_IRQCHIP_PIC_SLAVE)?, chip(KVM_IRQCHIP_IOAPIC)?);
    // SAFETY: KVM filled the member of the union that the chip id names.
    let (pics, ioapic) = unsafe { ([master.chip.pic, slave.chip.pic], ioapic.chip.ioapic) };
    let clock = vm.get_clock().map_err(VmmError::kvm("read the clock"))?;
    // As of the same moment as the clock, where KVM can tell (Linux 5.16).
    let realtime_ns =
        if clock.flags & KVM_CLOCK_REALTIME == 0 { realtime_ns() } else { clock.realtime };
    Ok(CapturedPlatform {
        pics,
        ioapic,
        pit: vm.get_pit2().map_err(VmmError::kvm("read the timer"))?,
        clock,
        realtime_ns,
    })
}

impl CapturedPlatform {
    /// Encodes the platform's chunks.
    ///
    /// # Errors
    /// If one cannot be encoded.
    pub fn save(&self) -> Result<Vec<StateChunk>> {
        let irqchip = SavedIrqchip {
            pics: self.pics.map(SavedPic::from),
            ioapic: SavedIoapic::from(&self.ioapic),
        };
        let clock = SavedClock {
            kvmclock_ns: self.clock.clock.into(),
            realtime_ns: Some(self.realtime_ns.into()),
        };
        Ok(vec![
            chunk(IRQCHIP, &irqchip)?,
            chunk(PIT, &SavedPit::from(&self.pit))?,
            chunk(CLOCK, &clock)?,
        ])
    }
}

/// The platform of a snapshot.
#[derive(Clone, Debug)]
pub struct SavedPlatform {
    irqchip: SavedIrqchip,
    pit: SavedPit,
    clock: SavedClock,
}

impl SavedPlatform {
    /// Takes the platform's chunks out of `chunks`.
    ///
    /// # Errors
    /// [`VmmError::State`] if one is missing or makes no sense.
    pub fn take(chunks: &mut ChunkSet) -> Result<Self> {
        let irqchip: SavedIrqchip = chunks.take(IRQCHIP)?;
        let (inputs, found) =
            (kvm_ioapic_state::default().redirtbl.len(), irqchip.ioapic.redirtbl.len());
        if inputs != found {
            return Err(VmmError::State {
                chunk: IRQCHIP.into(),
                expected: format!("an IOAPIC with {inputs} inputs"),
                found: found.to_string(),
            });
        }
        Ok(Self { irqchip, pit: chunks.take(PIT)?, clock: chunks.take(CLOCK)? })
    }

    /// Returns how long ago the platform was saved, by the host's time of day. Zero if the host's
    /// clock has gone back since, or the snapshot does not record the time.
    #[must_use]
    pub fn age(&self) -> Duration {
        let saved = self.clock.realtime_ns.map_or(u64::MAX, |saved| saved.0);
        Duration::from_nanos(realtime_ns().saturating_sub(saved))
    }
}

/// The host's time of day, in nanoseconds since 1970.
fn realtime_ns() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// Puts `saved` into a VM whose vCPUs stand still and have their state already. The guest's clock
/// is advanced by `later`.
///
/// # Errors
/// [`VmmError::State`] if KVM refuses.
pub fn restore(vm: &VmFd, saved: SavedPlatform, later: Duration) -> Result<()> {
    let SavedPlatform { irqchip, pit, clock: SavedClock { kvmclock_ns, realtime_ns: _ } } = saved;
    let SavedIrqchip { pics: [master, slave], ioapic } = irqchip;
    let chips = [
        (KVM_IRQCHIP_PIC_MASTER, kvm_bindings::kvm_irqchip__bindgen_ty_1 { pic: master.into() }),
        (KVM_IRQCHIP_PIC_SLAVE, kvm_bindings::kvm_irqchip__bindgen_ty_1 { pic: slave.into() }),
        (KVM_IRQCHIP_IOAPIC, kvm_bindings::kvm_irqchip__bindgen_ty_1 { ioapic: ioapic.into() }),
    ];
    let refuses = |chunk: &'static str| {
        move |error: kvm_ioctls::Error| VmmError::State {
            chunk: chunk.into(),
            expected: "a state that this KVM accepts".into(),
            found: format!("one that it refuses: {error}"),
        }
    };
    for (chip_id, chip) in chips {
        vm.set_irqchip(&kvm_irqchip { chip_id, pad: 0, chip }).map_err(refuses(IRQCHIP))?;
    }
    vm.set_pit2(&pit.into()).map_err(refuses(PIT))?;
    let later = u64::try_from(later.as_nanos()).unwrap_or(u64::MAX);
    let clock = kvm_clock_data { clock: kvmclock_ns.0.saturating_add(later), ..Default::default() };
    vm.set_clock(&clock).map_err(refuses(CLOCK))
}

/// Both 8259As and the I/O APIC.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedIrqchip {
    pics: [SavedPic; 2],
    ioapic: SavedIoapic,
}

impl Saved for SavedIrqchip {
    const KIND: &'static str = "kvm.irqchip";
    const VERSION: u32 = 1;
}

saved_twin! {
    /// One 8259A.
    struct SavedPic = kvm_pic_state {
        last_irr: u8,
        irr: u8,
        imr: u8,
        isr: u8,
        priority_add: u8,
        irq_base: u8,
        read_reg_select: u8,
        poll: u8,
        special_mask: u8,
        init_state: u8,
        auto_eoi: u8,
        rotate_on_auto_eoi: u8,
        special_fully_nested_mode: u8,
        init4: u8,
        elcr: u8,
        elcr_mask: u8,
    }
}

#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedIoapic {
    base_address: Reg,
    ioregsel: u32,
    id: u32,
    irr: u32,
    redirtbl: Vec<Reg>,
}

impl From<&kvm_ioapic_state> for SavedIoapic {
    fn from(state: &kvm_ioapic_state) -> Self {
        let kvm_ioapic_state { base_address, ioregsel, id, irr, pad: _, redirtbl } = *state;
        // SAFETY: both members of each entry are plain 64 bits.
        let redirtbl = redirtbl.iter().map(|entry| Reg(unsafe { entry.bits })).collect();
        Self { base_address: base_address.into(), ioregsel, id, irr, redirtbl }
    }
}

impl From<SavedIoapic> for kvm_ioapic_state {
    fn from(saved: SavedIoapic) -> Self {
        let SavedIoapic { base_address, ioregsel, id, irr, redirtbl } = saved;
        let mut state =
            Self { base_address: base_address.into(), ioregsel, id, irr, ..Default::default() };
        for (entry, bits) in state.redirtbl.iter_mut().zip(redirtbl) {
            entry.bits = bits.into();
        }
        state
    }
}

saved_twin! {
    /// One channel of the 8254.
    struct SavedPitChannel = kvm_pit_channel_state {
        count: u32, latched_count: u16, count_latched: u8, status_latched: u8, status: u8, read_state: u8,
    write_state: u8, write_latch: u8, rw_mode: u8, mode: u8, bcd: u8, gate: u8, count_load_time: i64,
    }
}

/// The 8254.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedPit {
    channels: [SavedPitChannel; 3],
    flags: u32,
}

impl From<&kvm_pit_state2> for SavedPit {
    fn from(state: &kvm_pit_state2) -> Self {
        let kvm_pit_state2 { channels, flags, reserved: _ } = *state;
        Self { channels: channels.map(SavedPitChannel::from), flags }
    }
}

impl From<SavedPit> for kvm_pit_state2 {
    fn from(saved: SavedPit) -> Self {
        let SavedPit { channels, flags } = saved;
        Self { channels: channels.map(kvm_pit_channel_state::from), flags, ..Default::default() }
    }
}

impl Saved for SavedPit {
    const KIND: &'static str = "kvm.pit2";
    const VERSION: u32 = 1;
}

/// kvmclock.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedClock {
    /// Nanoseconds since the guest's boot.
    kvmclock_ns: Reg,
    /// The host's time of day at that moment, in nanoseconds since 1970.
    realtime_ns: Option<Reg>,
}

impl Saved for SavedClock {
    const KIND: &'static str = "kvm.clock";
    const VERSION: u32 = 2;

    fn upgrade(version: u32, mut body: Value) -> Result<Value, String> {
        match version {
            // Version 1 did not record the time of day.
            1 => {
                body["realtime_ns"] = Value::Null;
                Ok(body)
            }
            _ => Err(never_written(version)),
        }
    }
}
