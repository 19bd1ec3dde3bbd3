//! The generation id of a virtual machine, by which a guest notices that it was cloned or rewound.
//!
//! The id is sixteen random bytes in guest memory, whose address ACPI gives (`VM_Gen_Counter`).
//! Whenever a machine continues from a snapshot, the id is replaced and an interrupt, which the
//! tables turn into a notification of the device, makes the guest look at it: Linux then reseeds
//! its random number generator.
//!
//! The bytes are written through vm-memory, so that the next checkpoint saves them like any other
//! page.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

use super::{Captured, Device};
use crate::error::{Result, VmmError};
use crate::memory::GuestRam;
use crate::state::{HexBytes, Saved, chunk};
use crate::vcpu::saved::Reg;
use crate::virtio::Interrupt;
use frazil_snapstore::StateChunk;

/// Guest physical address of the id in a new machine: a page of its own after the tables, the last
/// page of a PC's firmware area, which kernels leave alone.
pub const ADDRESS: u64 = 0xf_f000;
/// The name of its chunk.
pub const CHUNK: &str = "vmgenid";

/// Number of inputs of KVM's IOAPIC.
const GSIS_END: u32 = 24;

/// Length of a generation id in bytes.
const LEN: usize = 16;

/// A source of generation ids.
pub trait Generations: Send + Sync + fmt::Debug {
    /// Returns an id that was never used before.
    ///
    /// # Errors
    /// If no random bytes are available.
    fn next(&self) -> io::Result<[u8; LEN]>;
}

/// Random bytes from the host's kernel.
#[derive(Clone, Copy, Debug, Default)]
pub struct RandomGenerations;

impl Generations for RandomGenerations {
    fn next(&self) -> io::Result<[u8; LEN]> {
        let mut id = [0; LEN];
        // So few bytes come all at once or not at all.
        getrandom(&mut id, GetRandomFlags::empty())?;
        Ok(id)
    }
}

/// The generation id of a machine.
#[derive(Debug)]
pub struct VmGenId {
    ram: Arc<GuestRam>,
    interrupt: Arc<dyn Interrupt>,
    generations: Box<dyn Generations>,
    place: Mutex<Place>,
}

/// The generation id, and where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    address: u64,
    gsi: u32,
    id: [u8; LEN],
}

impl VmGenId {
    /// Creates the id of a new machine, at [`ADDRESS`] in `ram`; `interrupt` is the input `gsi` of
    /// the IOAPIC.
    ///
    /// # Errors
    /// [`VmmError::Host`] if no random bytes are available, or `ram` does not reach that far.
    pub fn new(
        ram: Arc<GuestRam>,
        interrupt: Arc<dyn Interrupt>,
        gsi: u32,
        generations: Box<dyn Generations>,
    ) -> Result<Self> {
        let place = Mutex::new(Place { address: ADDRESS, gsi, id: [0; LEN] });
        let new = Self { ram, interrupt, generations, place };
        new.renew()?;
        Ok(new)
    }

    /// Creates the id of a machine with the state `saved`, whose memory is in `ram` or loaded on
    /// access. The id is renewed at once; [`Self::go_on`] tells the guest.
    ///
    /// # Errors
    /// [`VmmError::State`] if `saved` makes no sense; otherwise as [`Self::new`].
    pub fn restore(
        ram: Arc<GuestRam>,
        interrupt: Arc<dyn Interrupt>,
        saved: &SavedVmGenId,
        generations: Box<dyn Generations>,
    ) -> Result<Self> {
        let place = Mutex::new(saved.place(&ram)?);
        let restored = Self { ram, interrupt, generations, place };
        restored.renew()?;
        Ok(restored)
    }

    /// Rewinds the id of a machine to the state `saved`, once its memory has been put back. The id
    /// is renewed at once; [`Self::go_on`] tells the guest.
    ///
    /// # Errors
    /// As [`Self::restore`], and [`VmmError::State`] if `saved`, and thus the guest's tables, has
    /// another address or interrupt.
    pub fn put_back(&self, saved: &SavedVmGenId) -> Result<()> {
        self.check(saved)?;
        self.renew()
    }

    /// Checks that `saved` can be [put back](Self::put_back).
    ///
    /// # Errors
    /// [`VmmError::State`] if it cannot.
    pub fn check(&self, saved: &SavedVmGenId) -> Result<()> {
        let (saved, ours) = (saved.place(&self.ram)?, *self.place());
        if (saved.address, saved.gsi) == (ours.address, ours.gsi) {
            return Ok(());
        }
        let place = |Place { address, gsi, id: _ }: Place| format!("{address:#x}, input {gsi}");
        Err(refuse(&place(ours), place(saved)))
    }

    /// Replaces the id with a new one. No vCPU may run.
    fn renew(&self) -> Result<()> {
        let id = self.generations.next().map_err(VmmError::host("make a generation id"))?;
        let mut place = self.place();
        self.ram
            .memory()
            .write_slice(&id, GuestAddress(place.address))
            .map_err(|error| VmmError::host("write the generation id")(io::Error::other(error)))?;
        place.id = id;
        Ok(())
    }

    /// Raises the interrupt that makes the guest look at its id; harmless if it has not changed.
    /// The interrupt controllers must have their state already.
    pub fn go_on(&self) {
        self.interrupt.raise();
    }

    /// The current id.
    #[must_use]
    pub fn id(&self) -> [u8; LEN] {
        self.place().id
    }

    fn place(&self) -> MutexGuard<'_, Place> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Device for VmGenId {
    type State = SavedVmGenId;

    fn state(&self) -> SavedVmGenId {
        let Place { address, gsi, id } = *self.place();
        SavedVmGenId { address: Reg(address), gsi, id: HexBytes(id.to_vec()) }
    }

    fn capture(&self, into: &mut SavedVmGenId) {
        let Place { address, gsi, id } = *self.place();
        into.address = Reg(address);
        into.gsi = gsi;
        into.id.0.copy_from_slice(&id);
    }
}

/// A machine's generation id, and what its tables say of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedVmGenId {
    /// Guest physical address of the id.
    pub address: Reg,
    /// The input of the IOAPIC that announces a new id.
    pub gsi: u32,
    /// The id, 16 bytes.
    pub id: HexBytes,
}

impl SavedVmGenId {
    /// Returns the input of the IOAPIC, if it exists and `is_free`.
    ///
    /// # Errors
    /// [`VmmError::State`] otherwise.
    pub(crate) fn gsi(&self, is_free: impl Fn(u32) -> bool) -> Result<u32> {
        if self.gsi < GSIS_END && is_free(self.gsi) {
            return Ok(self.gsi);
        }
        let expected = format!("a free IOAPIC input below {GSIS_END}");
        Err(refuse(&expected, self.gsi.to_string()))
    }

    fn place(&self, ram: &GuestRam) -> Result<Place> {
        let Self { address: Reg(address), gsi, id: HexBytes(id) } = self;
        let found = || format!("{} bytes", id.len());
        let id =
            id.as_slice().try_into().map_err(|_| refuse("a generation id of 16 bytes", found()))?;
        if !address.is_multiple_of(8) {
            return Err(refuse("an address that is a multiple of 8", format!("{address:#x}")));
        }
        if !ram.memory().check_range(GuestAddress(*address), LEN, Permissions::Write) {
            return Err(refuse("an address in RAM", format!("{address:#x}")));
        }
        Ok(Place { address: *address, gsi: *gsi, id })
    }
}

fn refuse(expected: &str, found: String) -> VmmError {
    VmmError::State { chunk: CHUNK.into(), expected: expected.into(), found }
}

impl Saved for SavedVmGenId {
    const KIND: &'static str = "vmgenid";
    const VERSION: u32 = 1;
}

impl Captured for SavedVmGenId {
    fn chunk(&self) -> Result<Option<StateChunk>> {
        chunk(CHUNK, self).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

    use frazil_snapstore::PageSet;

    use super::*;
    use crate::state::ChunkSet;

    #[derive(Debug, Default)]
    struct Count(AtomicU32);

    impl Interrupt for Count {
        fn raise(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Yields an id of all ones, then of all twos, and so on.
    #[derive(Debug, Default)]
    struct Numbered(AtomicU8);

    impl Generations for Numbered {
        fn next(&self) -> io::Result<[u8; LEN]> {
            Ok([self.0.fetch_add(1, Ordering::SeqCst) + 1; LEN])
        }
    }

    fn in_memory(ram: &GuestRam, address: u64) -> [u8; LEN] {
        let mut found = [0; LEN];
        ram.memory().read_slice(&mut found, GuestAddress(address)).unwrap();
        found
    }

    fn dirty(ram: &GuestRam) -> Vec<u64> {
        let mut dirty = PageSet::new(ram.end_page());
        ram.harvest_vmm_writes(&mut dirty);
        dirty.iter().collect()
    }

    fn new(ram: &Arc<GuestRam>) -> (VmGenId, Arc<Count>) {
        let count = Arc::<Count>::default();
        let interrupt = Arc::clone(&count) as _;
        let new = VmGenId::new(Arc::clone(ram), interrupt, 9, Box::<Numbered>::default());
        (new.unwrap(), count)
    }

    #[test]
    fn a_resumed_machine_is_another_and_is_told() {
        let ram = Arc::new(GuestRam::new(2 << 20).unwrap());
        let (old, count) = new(&ram);
        assert_eq!((in_memory(&ram, ADDRESS), dirty(&ram)), ([1; LEN], vec![0xff]));
        let state = old.state().chunk().unwrap().expect("it has state");
        assert_eq!(count.0.load(Ordering::SeqCst), 0, "a new machine has nothing to notice");
        let mut chunks = ChunkSet::new(vec![state]).unwrap();
        let saved: SavedVmGenId = chunks.take(CHUNK).unwrap();
        assert_eq!((saved.gsi, saved.address.0), (9, ADDRESS));
        // The write to its page is noted, though KVM does not see it.
        let numbered = Box::new(Numbered(AtomicU8::new(7)));
        let clone = VmGenId::restore(Arc::clone(&ram), Arc::clone(&count) as _, &saved, numbered);
        let clone = clone.unwrap();
        assert_eq!((in_memory(&ram, ADDRESS), dirty(&ram)), ([8; LEN], vec![0xff]));
        assert_eq!((clone.id(), count.0.load(Ordering::SeqCst)), ([8; LEN], 0));
        clone.go_on();
        assert_eq!(count.0.load(Ordering::SeqCst), 1);
        // A rewind makes a new generation, too.
        ram.memory().write_slice(&[1; LEN], GuestAddress(ADDRESS)).unwrap();
        clone.put_back(&saved).unwrap();
        assert_eq!((in_memory(&ram, ADDRESS), clone.id()), ([9; LEN], [9; LEN]));
        assert_eq!(clone.state().id, HexBytes(vec![9; LEN]));
    }

    #[test]
    fn what_makes_no_sense_is_refused_and_changes_nothing() {
        let ram = Arc::new(GuestRam::new(2 << 20).unwrap());
        let (machine, count) = new(&ram);
        let good = machine.state();
        let bad = [
            SavedVmGenId { id: HexBytes(vec![0; 15]), ..good.clone() },
            SavedVmGenId { address: Reg(ADDRESS + 1), ..good.clone() },
            SavedVmGenId { address: Reg(2 << 20), ..good.clone() },
            SavedVmGenId { address: Reg(u64::MAX - 7), ..good.clone() },
        ];
        for saved in bad {
            let numbered = Box::<Numbered>::default();
            let interrupt = Arc::clone(&count) as _;
            assert!(VmGenId::restore(Arc::clone(&ram), interrupt, &saved, numbered).is_err());
            assert!(machine.put_back(&saved).is_err());
        }
        assert!(machine.put_back(&SavedVmGenId { gsi: 8, ..good.clone() }).is_err());
        assert_eq!((in_memory(&ram, ADDRESS), machine.state()), ([1; LEN], good));
    }

    #[test]
    fn random_generations_differ() {
        let [first, second] = [(); 2].map(|()| RandomGenerations.next().unwrap());
        assert_ne!(first, second);
    }
}
