//! How the memory of a resumed machine is loaded: by whom, and into what.
//!
//! | [`Loading`] | memory | who loads it |
//! |---|---|---|
//! | `Eager` | a memfd of its own | this process, before the guest runs |
//! | `Lazy` | a memfd of its own | a pager, in this process or one of its own |
//! | `Shared` | an image, mapped privately | a pager of its own, in this process, for all clones |
//! | `Joined` | an image, mapped privately | the process that serves it to many processes |

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Arc, OnceLock, Weak};

use frazil_snapstore::Snapshot;
use frazil_snapstore::pager::{
    self, Image, Offer, OnFailure, Pager, PagerError, PagerOptions, PagerStats, RemotePager, Seat,
    StartPager,
};

use crate::error::{Result, VmmError};
use crate::machine::{Loading, MACHINE_CHUNK, PagerPlace, SavedMachine};
use crate::memory::{GuestRam, RAM_REGION, ram_extents, ram_memfd};
use crate::privileges::User;
use crate::vcpu::{Ended, VcpuSet};
use crate::workload_memory::saved_machine;

/// The vCPUs to end if the pager fails; set once they exist.
pub(crate) type LateVcpus = Arc<OnceLock<Weak<VcpuSet>>>;

/// Creates an image of the memory of `snapshot`, with no page loaded yet: for any number of clones
/// that are resumed with [`Loading::Shared`], or for a process that serves it to others.
///
/// # Errors
/// As [`saved_machine`]; store errors; if the host refuses something.
pub fn shared_image(snapshot: &Snapshot) -> Result<Arc<Image>> {
    let machine = saved_machine(snapshot)?;
    let memory = ram_memfd(machine.ram_bytes)?;
    let image = Image::new(snapshot.region(RAM_REGION)?, &memory, &ram_extents(machine.ram_bytes))?;
    Ok(Arc::new(image))
}

/// The pager that loads a running machine's memory.
#[derive(Debug)]
pub(crate) enum Paging {
    Here(Pager),
    Elsewhere(RemotePager),
}

impl Paging {
    pub fn stats(&self) -> PagerStats {
        match self {
            Self::Here(pager) => pager.stats(),
            Self::Elsewhere(pager) => pager.stats(),
        }
    }

    pub fn failure(&self) -> Option<Arc<PagerError>> {
        match self {
            Self::Here(pager) => pager.failure(),
            Self::Elsewhere(pager) => pager.failure(),
        }
    }

    /// The id of the pager's process, if the pager runs in another one, and how many such processes
    /// have died.
    pub fn process(&self) -> (Option<u32>, u64) {
        match self {
            Self::Here(_) => (None, 0),
            Self::Elsewhere(pager) => (pager.process(), pager.deaths()),
        }
    }
}

/// How the contents of mapped memory will be loaded.
pub(crate) enum PendingLoad {
    Eager,
    Lazy(PagerOptions, PagerPlace),
    Shared(Arc<Image>, PagerOptions),
    Joined(Offer),
}

/// Maps RAM for the machine in `snapshot`.
pub(crate) fn map_ram(
    machine: &SavedMachine,
    snapshot: &Snapshot,
    loading: Loading,
) -> Result<(GuestRam, PendingLoad)> {
    let region = snapshot.region(RAM_REGION)?;
    let ram_bytes = machine.ram_bytes;
    let (ram, pending) = match loading {
        Loading::Eager => (GuestRam::new(ram_bytes)?, PendingLoad::Eager),
        Loading::Lazy(options, place) => {
            (GuestRam::new(ram_bytes)?, PendingLoad::Lazy(options, place))
        }
        Loading::Shared(image, options) => {
            let same = image.region().snapshot() == snapshot.id();
            if !same {
                return Err(VmmError::Config("the image is of another snapshot".into()));
            }
            let memory = image.memory().try_clone();
            let memory = memory.map_err(VmmError::host("duplicate a file descriptor"))?;
            (GuestRam::private(memory, ram_bytes)?, PendingLoad::Shared(image, options))
        }
        Loading::Joined(socket) => {
            let connection = pager::connect(&socket)
                .map_err(VmmError::host(format!("connect to {}", socket.display())))?;
            let offer = Offer::receive(connection, &region)?;
            let memory = offer.memory().try_clone();
            let memory = memory.map_err(VmmError::host("duplicate a file descriptor"))?;
            (GuestRam::private(memory, ram_bytes)?, PendingLoad::Joined(offer))
        }
    };
    if region.pages() == ram.end_page() {
        return Ok((ram, pending));
    }
    Err(VmmError::State {
        chunk: MACHINE_CHUNK.into(),
        expected: format!(
            "a region `{RAM_REGION}` of {} pages for {ram_bytes} bytes of RAM",
            ram.end_page()
        ),
        found: format!("{} pages", region.pages()),
    })
}

/// Starts loading the contents of `ram`. Returns the pager that does it; None if everything is
/// loaded already.
pub(crate) fn start_loading(
    snapshot: &Snapshot,
    ram: &GuestRam,
    pending: PendingLoad,
    vcpus: &LateVcpus,
) -> Result<Option<Paging>> {
    let region = snapshot.region(RAM_REGION)?;
    let on_failure = end_on_failure(vcpus);
    Ok(match pending {
        PendingLoad::Eager => {
            pager::load_memory(&region, ram.memfd(), &ram.mappings())?;
            None
        }
        PendingLoad::Lazy(options, PagerPlace::Here) => {
            let mappings = ram.mappings();
            let pager = Pager::start(region, ram.memfd(), &mappings, options, on_failure)?;
            Some(Paging::Here(pager))
        }
        PendingLoad::Lazy(options, PagerPlace::Process { program, user }) => {
            let folder = snapshot.store().folder().ok_or_else(|| {
                VmmError::Config("a separate pager process needs a store in a folder".into())
            })?;
            let image = Image::new(region, ram.memfd(), &ram_extents(ram.len_bytes()))?;
            let seat = Seat::take(&ram.mappings())?;
            let start = start_program(program, user);
            let pager = RemotePager::start(image, &folder, seat, options, start, on_failure)?;
            Some(Paging::Elsewhere(pager))
        }
        // A complete image needs no pager: its missing pages are zeros.
        PendingLoad::Shared(image, _) if image.is_complete() => None,
        PendingLoad::Shared(image, options) => {
            let seat = Seat::take(&ram.mappings())?;
            let options = PagerOptions { maps_ahead: false, ..options };
            Some(Paging::Here(Pager::serve(image, seat, options, on_failure)?))
        }
        PendingLoad::Joined(offer) => {
            let seat = Seat::take(&ram.mappings())?;
            Some(Paging::Elsewhere(offer.accept(region, seat, on_failure)?))
        }
    })
}

fn end_on_failure(vcpus: &LateVcpus) -> OnFailure {
    let vcpus = Arc::clone(vcpus);
    Box::new(move |error| {
        if let Some(vcpus) = vcpus.get().and_then(Weak::upgrade) {
            vcpus.end(Ended::Failed { detail: error.to_string() });
        }
    })
}

/// Runs `program pager` with the socket as its standard input.
fn start_program(program: PathBuf, user: Option<User>) -> StartPager {
    Box::new(move |socket| {
        let mut command = Command::new(&program);
        command.arg("pager");
        if let Some(user) = &user {
            command.arg("--user").arg(user.spec());
        }
        command.stdin(Stdio::from(socket)).stdout(Stdio::null()).spawn()
    })
}
