//! COM1: a 16550A at 0x3f8 with IRQ 4.

use std::io::{self, Write};
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender};
use kvm_ioctls::VmFd;
use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Captured, Device};
use crate::confine::{self, Role};
use crate::error::{Result, VmmError};
use crate::state::{Saved, chunk, saved_twin};
use crate::virtio::event;
use frazil_snapstore::StateChunk;

/// COM1's ports.
pub const PORTS: RangeInclusive<u16> = 0x3f8..=0x3ff;
/// COM1's interrupt: the input of the IOAPIC, and of the 8259A.
pub const GSI: u32 = 4;
/// The name of its chunk.
pub const CHUNK: &str = "serial0";
/// How many writes may wait for a slow reader before more are dropped.
const QUEUE_WRITES: usize = 64 * 1024;

/// How long to wait for a slow reader of the guest's last output.
const LAST_OUTPUT_PATIENCE: Duration = Duration::from_secs(1);

/// Returns the register at `port`, if `port` is one of the serial port's.
#[must_use]
pub fn register(port: u16) -> Option<u8> {
    PORTS.contains(&port).then(|| (port - PORTS.start()) as u8)
}

/// Where the guest's serial output goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SerialOutput {
    /// This process's standard output.
    Stdout,
    /// This process's standard error.
    Stderr,
    /// A file, which is appended to.
    File(std::path::PathBuf),
    /// Nowhere.
    Null,
}

impl SerialOutput {
    fn open(&self) -> Result<Box<dyn Write + Send>> {
        let open = |path: &Path| std::fs::OpenOptions::new().create(true).append(true).open(path);
        Ok(match self {
            Self::Stdout => Box::new(io::stdout()),
            Self::Stderr => Box::new(io::stderr()),
            Self::File(path) => {
                Box::new(open(path).map_err(VmmError::host(format!("open {}", path.display())))?)
            }
            Self::Null => Box::new(io::sink()),
        })
    }
}

/// Hands output to a thread, so that a slow terminal or a full pipe never stops a vCPU.
#[derive(Clone, Debug)]
struct QueuedOutput {
    /// `None` once finished.
    queue: Option<Sender<Vec<u8>>>,
    /// Disconnects when the thread has written everything, or has given up.
    written: Receiver<()>,
    dropped: Arc<AtomicU64>,
}

impl QueuedOutput {
    fn new(mut output: Box<dyn Write + Send>) -> Result<Self> {
        // A bounded channel would allocate all its slots up front: 2 MiB in each of many clones.
        let (queue, waiting) = crossbeam_channel::unbounded::<Vec<u8>>();
        let (writing, written) = crossbeam_channel::bounded::<()>(0);
        confine::spawn("frazil-serial".into(), Role::Output, move || {
            let _until_done = writing;
            while let Ok(first) = waiting.recv() {
                let bytes: Vec<u8> =
                    std::iter::once(first).chain(waiting.try_iter()).flatten().collect();
                // A reader that has gone away must not stop the guest.
                if output.write_all(&bytes).and_then(|()| output.flush()).is_err() {
                    return;
                }
            }
        })?;
        Ok(Self { queue: Some(queue), written, dropped: Arc::default() })
    }

    /// Stops accepting output, and briefly waits until all of it is written.
    fn finish(&mut self) {
        self.queue = None;
        // Nothing is ever sent: this returns when the thread ends or the time is up.
        let _done_or_late = self.written.recv_timeout(LAST_OUTPUT_PATIENCE);
    }
}

impl Write for QueuedOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = self.queue.as_ref().filter(|queue| queue.len() < QUEUE_WRITES);
        let sent = room.is_some_and(|queue| queue.send(bytes.to_vec()).is_ok());
        if !sent {
            self.dropped.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Debug)]
struct Irq(EventFd);

impl Trigger for Irq {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The serial port.
#[derive(Debug)]
pub struct SerialPort {
    serial: Serial<Irq, NoEvents, QueuedOutput>,
}

impl SerialPort {
    /// Creates a port in its reset state, its interrupt wired to `vm`.
    ///
    /// # Errors
    /// If the output cannot be opened or the interrupt cannot be wired.
    pub fn new(vm: &VmFd, output: &SerialOutput) -> Result<Self> {
        Ok(Self { serial: Serial::new(irq(vm)?, QueuedOutput::new(output.open()?)?) })
    }

    /// Creates a port with the state `saved`.
    ///
    /// # Errors
    /// As [`Self::new`], and [`VmmError::State`] if the state makes no sense.
    pub fn restore(vm: &VmFd, output: &SerialOutput, saved: SavedSerial) -> Result<Self> {
        let output = QueuedOutput::new(output.open()?)?;
        Ok(Self { serial: from_state(saved, irq(vm)?, output)? })
    }

    /// Gives the port the state `saved`. Output that has left the port stays where it went.
    ///
    /// # Errors
    /// As [`Self::restore`]; the port is then unchanged.
    pub fn rewind(&mut self, saved: SavedSerial) -> Result<()> {
        let irq = self.serial.interrupt_evt().0.try_clone();
        let irq = Irq(irq.map_err(VmmError::host("duplicate the serial interrupt"))?);
        let output = self.serial.writer().clone();
        self.serial = from_state(saved, irq, output)?;
        Ok(())
    }

    pub(super) fn write(&mut self, register: u8, value: u8) {
        // Only the interrupt's eventfd can fail, when its counter is full; an interrupt is pending
        // then anyway.
        let _full = self.serial.write(register, value);
    }

    pub(super) fn read(&mut self, register: u8) -> u8 {
        self.serial.read(register)
    }

    /// Queues `bytes` for the guest to read. Returns how many of them, from the first on, there was
    /// room for.
    pub fn input(&mut self, bytes: &[u8]) -> usize {
        // Fails if there is no room, or the interrupt's counter is full: one is pending then
        // anyway.
        self.serial.enqueue_raw_bytes(bytes).unwrap_or(0)
    }

    /// Stops accepting output, and briefly waits until all of it is written.
    pub fn finish_output(&mut self) {
        self.serial.writer_mut().finish();
    }

    /// Returns the counter of bytes dropped because nobody read them in time.
    #[must_use]
    pub fn dropped_bytes(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.serial.writer().dropped)
    }
}

fn from_state<T: Trigger, W: Write>(
    saved: SavedSerial,
    irq: T,
    output: W,
) -> Result<Serial<T, NoEvents, W>> {
    Serial::from_state(&saved.into(), irq, NoEvents, output).map_err(|error| VmmError::State {
        chunk: CHUNK.into(),
        expected: "the state of a 16550A".into(),
        found: format!("{error:?}"),
    })
}

fn irq(vm: &VmFd) -> Result<Irq> {
    let event = event(EFD_NONBLOCK)?;
    vm.register_irqfd(&event, GSI).map_err(VmmError::kvm("wire the serial interrupt"))?;
    Ok(Irq(event))
}

impl Device for SerialPort {
    type State = SavedSerial;

    fn state(&self) -> SavedSerial {
        self.serial.state().into()
    }

    fn capture(&self, into: &mut SavedSerial) {
        *into = self.state();
    }
}

impl Captured for SavedSerial {
    fn chunk(&self) -> Result<Option<StateChunk>> {
        chunk(CHUNK, self).map(Some)
    }
}

saved_twin! {
    /// The registers of a 16550A, and the contents of its receive buffer.
    pub struct SavedSerial = SerialState {
        baud_divisor_low: u8,
        baud_divisor_high: u8,
        interrupt_enable: u8,
        interrupt_identification: u8,
        line_control: u8,
        line_status: u8,
        modem_control: u8,
        modem_status: u8,
        scratch: u8,
        in_buffer: Vec<u8>,
    }
}

impl SavedSerial {
    /// Checks that a port can be given this state.
    ///
    /// # Errors
    /// [`VmmError::State`] if it makes no sense.
    pub(crate) fn check(&self) -> Result<()> {
        from_state(self.clone(), NoIrq, io::sink()).map(|_port| ())
    }
}

/// The interrupt of a port that belongs to no guest.
struct NoIrq;

impl Trigger for NoIrq {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        Ok(())
    }
}

impl Saved for SavedSerial {
    const KIND: &'static str = "uart16550a";
    const VERSION: u32 = 1;
}
