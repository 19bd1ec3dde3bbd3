//! Unwinds a vCPU's call stack, from its registers and its stack.
//!
//! For each instruction, Linux says how to find the caller's registers (ORC,
//! Documentation/x86/orc-unwinder.rst in the Linux sources). Other code is followed by its frame
//! pointers. Nothing is guessed: where neither leads on, the walk ends and says why.

mod orc;
#[cfg(test)]
mod tests;

pub use orc::{OrcFormat, OrcTable};

use super::memory::{PhysicalMemory, number};
use super::{AddressSpace, CodeMode, Result};
use crate::vcpu::saved::SavedRegs;

/// One frame of a call stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// The address of its next instruction.
    pub ip: u64,
    /// Its stack pointer.
    pub sp: u64,
    /// How the frame was found.
    pub how: UnwindMethod,
}

/// How a frame was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnwindMethod {
    /// It is the vCPU's current frame.
    Registers,
    /// By the kernel's unwind table.
    Orc,
    /// By the kernel's unwind table, as interrupted code: its next instruction does not follow a
    /// call.
    OrcInterrupted,
    /// By frame pointers.
    FramePointer,
}

impl Frame {
    /// The address to look up: after a call at the end of a function, `ip` is in another function.
    #[must_use]
    pub fn lookup_ip(&self) -> u64 {
        match self.how {
            UnwindMethod::Registers | UnwindMethod::OrcInterrupted => self.ip,
            UnwindMethod::Orc | UnwindMethod::FramePointer => self.ip.wrapping_sub(1),
        }
    }
}

/// Why a walk ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The last frame has no caller.
    Bottom,
    /// The caller's frame is in user mode.
    User,
    /// The wanted number of frames was found.
    Enough,
    /// Neither an unwind table nor frame pointers lead on from this instruction.
    NoWay {
        /// The instruction's address.
        ip: u64,
    },
    /// The stack, or what is on it, makes no sense.
    Damaged {
        /// What is wrong.
        what: String,
    },
}

/// The registers of a frame, as far as they are known.
#[derive(Clone, Copy, Debug, Default)]
struct State {
    ip: u64,
    sp: u64,
    bp: u64,
    /// More registers, known only of interrupted code.
    saved: Option<Saved>,
    /// Whether the code was interrupted, so that `ip` does not follow a call.
    interrupted: bool,
}

/// Registers that Linux's table refers to, other than those that are always known.
#[derive(Clone, Copy, Debug, Default)]
struct Saved {
    bp: u64,
    dx: u64,
    di: u64,
    r10: u64,
    r13: u64,
}

/// A stack to walk.
#[derive(Clone, Copy)]
pub struct Stack<'a> {
    /// The address space that the stack is in.
    pub space: AddressSpace,
    /// Guest memory.
    pub memory: &'a dyn PhysicalMemory,
    /// Linux's unwind table, if there is one.
    pub orc: Option<&'a OrcTable>,
    /// The mode of the code, which determines the size of words. Stacks of 16-bit code are not
    /// followed.
    pub mode: CodeMode,
}

/// The most frames of a walk: saved registers that lead to themselves would have no end.
const FRAMES_MAX: usize = 10_000;
/// The bit that tells the halves of the address space apart in long mode: programs have the lower.
const KERNEL_HALF: u64 = 1 << 63;

impl Stack<'_> {
    /// Walks the stack from `regs` on, for at most `most` frames. Returns the frames, and why the
    /// walk ended.
    ///
    /// # Errors
    /// Store errors. Any other problem is an [`End`].
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
        let mut frames = vec![Frame { ip: state.ip, sp: state.sp, how: UnwindMethod::Registers }];
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
            let (how, same_stack) = match next {
                Step::Up { how, same_stack } => (how, same_stack),
                Step::End(end) => return Ok((frames, end)),
            };
            if kernel && state.ip & KERNEL_HALF == 0 {
                let end = if state.ip == 0 { End::Bottom } else { End::User };
                return Ok((frames, end));
            }
            // Stacks grow down: a walk that does not go up may go in circles.
            if same_stack && state.sp <= sp {
                let what =
                    format!("the caller's stack pointer {:#x} is not above {sp:#x}", state.sp);
                return Ok((frames, End::Damaged { what }));
            }
            frames.push(Frame { ip: state.ip, sp: state.sp, how });
        }
    }

    /// The word at `gva`, if it can be read.
    fn word(&self, gva: u64) -> Result<Option<u64>> {
        let mut bytes = [0; 8];
        match self.space.read(self.memory, gva, &mut bytes[..self.mode.word_bytes()]) {
            Ok(()) => Ok(Some(number(&bytes))),
            Err(super::InspectError::Store(error)) => Err(error.into()),
            Err(_) => Ok(None),
        }
    }

    /// Steps up by the frame pointer. After `push rbp; mov rbp, rsp` it points to the caller's
    /// frame pointer, with the return address above.
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
        // In a function's first instructions it may still be the caller's, but it is never below
        // the stack pointer.
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
        // A return address must be executable.
        match self.space.translate(self.memory, ip) {
            Ok(found) if found.executable => {}
            Err(super::InspectError::Store(error)) => return Err(error.into()),
            Ok(_) | Err(_) => return no_way,
        }
        *state =
            State { ip, sp: above.wrapping_add(word_bytes), bp, saved: None, interrupted: false };
        Ok(Step::Up { how: UnwindMethod::FramePointer, same_stack: true })
    }
}

impl State {
    fn lookup_ip(&self) -> u64 {
        if self.interrupted { self.ip } else { self.ip.wrapping_sub(1) }
    }
}

/// The result of one step. After `Up` the state is the caller's.
enum Step {
    Up {
        how: UnwindMethod,
        /// False if the caller may have another stack, above or below: an interrupt's.
        same_stack: bool,
    },
    End(End),
}
