//! What called what on a vCPU, from its registers and its stack.
//!
//! Linux tells for each instruction how to find the caller's registers (ORC, Documentation/x86/orc-unwinder.rst
//! in its sources). Code that keeps frame pointers is followed by them. Nothing is guessed: where neither
//! leads on, the walk ends and says why.

mod orc;
#[cfg(test)]
mod tests;

pub use orc::{OrcFormat, OrcTable};

use super::memory::{PhysicalMemory, number};
use super::{AddressSpace, CodeMode, Result};
use crate::vcpu::saved::SavedRegs;

/// One function on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// The next instruction in it.
    pub ip: u64,
    /// Its stack pointer.
    pub sp: u64,
    /// How it was found.
    pub how: By,
}

/// How a frame was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// It is what the vCPU is at.
    Registers,
    /// By the kernel's unwind table.
    Orc,
    /// By the kernel's unwind table: it was interrupted, so that its next instruction follows no call.
    OrcInterrupted,
    /// By frame pointers.
    FramePointer,
}

impl Frame {
    /// The address to look up: behind a call there may be another function already.
    #[must_use]
    pub fn lookup_ip(&self) -> u64 {
        match self.how {
            By::Registers | By::OrcInterrupted => self.ip,
            By::Orc | By::FramePointer => self.ip.wrapping_sub(1),
        }
    }
}

/// Why a walk ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// There is nothing above.
    Bottom,
    /// The frame above is user mode's.
    User,
    /// As many as were wanted.
    Enough,
    /// There is no table, or nothing in it for this instruction, and no frame pointer either.
    NoWay {
        /// The instruction's address.
        ip: u64,
    },
    /// The stack, or what is on it, makes no sense.
    Damaged {
        /// What.
        what: String,
    },
}

/// The registers of a frame, as far as they are known.
#[derive(Clone, Copy, Debug, Default)]
struct State {
    ip: u64,
    sp: u64,
    bp: u64,
    /// Registers that interrupted code had.
    saved: Option<Saved>,
    /// The next instruction follows no call.
    interrupted: bool,
}

/// Registers that Linux refers to in its table, other than those that are always known.
#[derive(Clone, Copy, Debug, Default)]
struct Saved {
    bp: u64,
    dx: u64,
    di: u64,
    r10: u64,
    r13: u64,
}

/// A stack to be walked.
#[derive(Clone, Copy)]
pub struct Stack<'a> {
    /// The addresses.
    pub space: AddressSpace,
    /// The memory.
    pub memory: &'a dyn PhysicalMemory,
    /// Linux's table, if there is one.
    pub orc: Option<&'a OrcTable>,
    /// What kind of code's it is: words have its size, and 16-bit code's frames are all alike to who does not
    /// know it, and are not followed.
    pub mode: CodeMode,
}

/// The most frames of a walk: registers that were saved where they were saved have no end.
const FRAMES_MAX: usize = 10_000;
/// The halves of the addresses in long mode: programs have the lower one.
const KERNEL_HALF: u64 = 1 << 63;

impl Stack<'_> {
    /// Walks from `regs` on, at most `most` frames.
    ///
    /// # Errors
    /// The store's. All else is in the second value.
    pub fn walk(&self, regs: &SavedRegs, most: usize) -> Result<(Vec<Frame>, End)> {
        let mut state = State {
            ip: regs.rip.into(),
            sp: regs.rsp.into(),
            bp: regs.rbp.into(),
            saved: Some(Saved {
                bp: regs.rbp.into(),
                dx: regs.rdx.into(),
                di: regs.rdi.into(),
                r10: regs.r10.into(),
                r13: regs.r13.into(),
            }),
            interrupted: true,
        };
        let kernel = state.ip & KERNEL_HALF != 0;
        let mut frames = vec![Frame { ip: state.ip, sp: state.sp, how: By::Registers }];
        if self.mode == CodeMode::Bits16 {
            return Ok((frames, End::NoWay { ip: state.ip }));
        }
        loop {
            if frames.len() >= most.min(FRAMES_MAX) {
                return Ok((frames, End::Enough));
            }
            let sp = state.sp;
            let next = match self.orc.and_then(|table| table.find(state.lookup_ip())) {
                Some(entry) => orc::step(self, entry, &mut state)?,
                None => self.by_frame_pointer(&mut state)?,
            };
            let how = match next {
                Step::Up(how) => how,
                Step::End(end) => return Ok((frames, end)),
            };
            if kernel && state.ip & KERNEL_HALF == 0 {
                let end = if state.ip == 0 { End::Bottom } else { End::User };
                return Ok((frames, end));
            }
            // Stacks grow down: one that does not go up goes round and round. Interrupts change stacks.
            if state.sp <= sp && how != By::OrcInterrupted {
                let what =
                    format!("the caller's stack pointer {:#x} is not above {sp:#x}", state.sp);
                return Ok((frames, End::Damaged { what }));
            }
            frames.push(Frame { ip: state.ip, sp: state.sp, how });
        }
    }

    /// The word at `gva`, if there is one.
    fn word(&self, gva: u64) -> Result<Option<u64>> {
        let mut bytes = [0; 8];
        match self.space.read(self.memory, gva, &mut bytes[..self.mode.word_bytes()]) {
            Ok(()) => Ok(Some(number(&bytes))),
            Err(super::InspectError::Store(error)) => Err(error.into()),
            Err(_) => Ok(None),
        }
    }

    /// `push rbp; mov rbp, rsp`: the caller's frame pointer, and above it where to return to.
    fn by_frame_pointer(&self, state: &mut State) -> Result<Step> {
        let no_way = Ok(Step::End(End::NoWay { ip: state.ip }));
        let word_bytes = self.mode.word_bytes() as u64;
        let is_known = self.orc.is_some() && orc::is_kernel(state.ip);
        if is_known || !state.bp.is_multiple_of(word_bytes) {
            return no_way;
        }
        if state.bp == 0 {
            return Ok(Step::End(End::Bottom));
        }
        // In a function's first instructions it may be the caller's still, but is never below the stack.
        let above = state.bp.wrapping_add(word_bytes);
        let (Some(bp), Some(ip)) = (self.word(state.bp)?, self.word(above)?) else {
            return no_way;
        };
        if state.bp < state.sp || (bp != 0 && bp <= state.bp) {
            return no_way;
        }
        if ip == 0 {
            return Ok(Step::End(End::Bottom));
        }
        // Code is where something can be executed.
        match self.space.translate(self.memory, ip) {
            Ok(found) if found.executable => {}
            Err(super::InspectError::Store(error)) => return Err(error.into()),
            Ok(_) | Err(_) => return no_way,
        }
        *state =
            State { ip, sp: above.wrapping_add(word_bytes), bp, saved: None, interrupted: false };
        Ok(Step::Up(By::FramePointer))
    }
}

impl State {
    fn lookup_ip(&self) -> u64 {
        if self.interrupted { self.ip } else { self.ip.wrapping_sub(1) }
    }
}

/// What one step came to; the state is the caller's if it leads up.
enum Step {
    Up(By),
    End(End),
}
