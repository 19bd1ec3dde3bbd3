//! Call stacks.

use std::ops::{ControlFlow, RangeInclusive};

use frazil_snapstore::search::SearchProgress;
use frazil_vmm::inspect::{
    CodeMode, End, Frame, GuestView, LinuxKernel, PhysicalMemory, Stack, Translation, UnwindMethod,
};
use frazil_vmm::vcpu::saved::SavedVcpu;
use serde_json::{Value, json};

use super::break_on_error;
use super::names::{Names, Place, Vmlinux};
use crate::cli::InspectArgs;
use crate::output;

/// Frames to show by default.
const FRAMES: u64 = 64;
/// Words of the stack to show if there is nothing to unwind it by.
const WORDS: u64 = 16;
/// The addresses where Linux has modules, and code that it generates.
const MODULES: RangeInclusive<u64> = 0xffff_ffff_c000_0000..=0xffff_ffff_feff_ffff;

pub(super) fn stacks(view: &GuestView, args: &InspectArgs, json: bool) -> anyhow::Result<()> {
    let kernel = LinuxKernel::find(view, &SearchProgress::default())?;
    let vmlinux = args.vmlinux.as_deref().map(Vmlinux::open).transpose()?;
    let names = Names::find(view, kernel.as_ref(), vmlinux.as_ref(), args.lines)?;
    if !json {
        outln!("{}", names.describe());
    }
    let vcpus = match args.vcpu {
        Some(index) => index..index + 1,
        None => 0..view.vcpus().len(),
    };
    let mut has_lines = false;
    for index in vcpus {
        let walked = Walked::of(view, index, args, kernel.as_ref(), &names)?;
        has_lines |= walked.frames.iter().any(|(_, lines)| !lines.is_empty());
        let flow = if json {
            break_on_error(output::try_line(format_args!("{}", walked.object(&names))))
        } else {
            walked.show(&names)
        };
        if flow.is_break() {
            return Ok(());
        }
    }
    if args.lines && !has_lines {
        errln!(
            "frazil: --lines: expected a source line for at least one of these addresses in \
             --vmlinux, found none: is it the file of this kernel, and not stripped?"
        );
    }
    Ok(())
}

/// The stack of a vCPU.
struct Walked {
    vcpu: usize,
    /// Frames, each with its source lines.
    frames: Vec<(Frame, Vec<String>)>,
    end: End,
    /// The words on the stack, if only the innermost frame is known.
    words: Vec<Word>,
}

/// A word of a stack.
struct Word {
    gva: u64,
    value: u64,
    /// True if `value` is the address of executable memory.
    could_be_code: bool,
}

impl Walked {
    fn of(
        view: &GuestView,
        vcpu: usize,
        args: &InspectArgs,
        kernel: Option<&LinuxKernel>,
        names: &Names<'_>,
    ) -> anyhow::Result<Self> {
        let SavedVcpu { regs, sregs, .. } = view.vcpu(vcpu)?;
        let mut space = view.space(vcpu)?;
        // With page-table isolation, a vCPU in user mode has page tables without the kernel. Here
        // they only matter if the vCPU is in the kernel: then use the kernel's own.
        if let Some(kernel) = kernel
            && u64::from(regs.rip) >> 63 == 1
            && space.translate(view.memory(), regs.rip.into()).is_err()
        {
            space = kernel.space;
        }
        let mode = match view.code_mode(vcpu)? {
            // A segment with another base is treated like 16-bit code: nothing is known of its
            // frames.
            CodeMode::Bits32 if u64::from(sregs.ss.base) | view.code_base(vcpu)? != 0 => {
                CodeMode::Bits16
            }
            mode => mode,
        };
        let stack = Stack { space, memory: view.memory(), orc: names.orc(), mode };
        let most = args.max_count.unwrap_or(FRAMES) as usize;
        let (frames, end) = stack.walk(regs, most)?;
        let words = if frames.len() == 1 { words(view, vcpu)? } else { Vec::new() };
        let with_lines = |frame: Frame| (frame, names.lines(frame.lookup_ip()));
        let frames = frames.into_iter().map(with_lines).collect();
        Ok(Self { vcpu, frames, end, words })
    }

    fn show(&self, names: &Names<'_>) -> ControlFlow<()> {
        let print = |line: std::fmt::Arguments<'_>| break_on_error(output::try_line(line));
        print(format_args!("\nvCPU {}", self.vcpu))?;
        for (number, (frame, lines)) in self.frames.iter().enumerate() {
            let name =
                place(frame, names).map_or_else(|| "?".to_owned(), |place| place.to_string());
            let how = match frame.how {
                UnwindMethod::OrcInterrupted => "  (interrupted)",
                UnwindMethod::FramePointer => "  (by frame pointer)",
                UnwindMethod::Registers | UnwindMethod::Orc => "",
            };
            print(format_args!("{number:>3}  {:#018x}  {name}{how}", frame.ip))?;
            for line in lines {
                print(format_args!("                            {line}"))?;
            }
        }
        let (why, detail) = self.end_words(names);
        let detail = detail.map_or_else(String::new, |detail| format!(": {detail}"));
        print(format_args!("     {}{detail}", why.replace('_', " ")))?;
        for Word { gva, value, could_be_code } in &self.words {
            let what = if *could_be_code { "  could be code" } else { "" };
            print(format_args!("     {gva:#018x}  {value:#018x}{what}"))?;
        }
        ControlFlow::Continue(())
    }

    fn object(&self, names: &Names<'_>) -> Value {
        let frames: Vec<Value> =
            self.frames.iter().map(|(frame, lines)| object(frame, lines, names)).collect();
        let words: Vec<Value> = self
            .words
            .iter()
            .map(|Word { gva, value, could_be_code }| {
                let [gva, value] = [gva, value].map(|number| format!("{number:#x}"));
                json!({"gva": gva, "value": value, "could_be_code": could_be_code})
            })
            .collect();
        let (why, detail) = self.end_words(names);
        json!({"vcpu": self.vcpu, "frames": frames, "end": why, "detail": detail, "words": words})
    }

    /// Why the walk ended: a word, and details if there are any.
    fn end_words(&self, names: &Names<'_>) -> (&'static str, Option<String>) {
        match &self.end {
            End::Bottom => ("bottom", None),
            End::User => ("user_mode", None),
            End::Enough => ("more", None),
            End::NoWay { ip } => {
                let why = if !MODULES.contains(ip) {
                    ""
                } else if names.has_modules() {
                    ": it is in code generated at run time (BPF, tracing), or in a module without \
                     an unwind table"
                } else {
                    ": it is in a module or in code generated at run time, and the kernel does not \
                     say where modules' unwind tables are (it was built without \
                     CONFIG_DEBUG_INFO_BTF)"
                };
                let detail = format!("cannot tell where {ip:#x} was called from{why}");
                ("no_way_up", Some(detail))
            }
            End::Damaged { what } => ("damaged", Some(what.clone())),
        }
    }
}

/// The words at the top of the stack of `vcpu`.
fn words(view: &GuestView, vcpu: usize) -> anyhow::Result<Vec<Word>> {
    let (space, memory, top) = (view.space(vcpu)?, view.memory(), view.stack_top(vcpu)?);
    let mode = view.code_mode(vcpu)?;
    let word_bytes = mode.word_bytes();
    let mut words = Vec::new();
    for index in 0..WORDS {
        let Some(gva) = top.checked_add(index * word_bytes as u64) else { break };
        let mut word = [0; 8];
        if space.read(memory, gva, &mut word[..word_bytes]).is_err() {
            break;
        }
        let value = u64::from_le_bytes(word);
        let runs = |found: Translation| found.executable && memory.has(found.gpa, 1);
        // In 16-bit code any word could be an address of code.
        let could_be_code = mode != CodeMode::Bits16
            && value >= 4096
            && space.translate(memory, value).is_ok_and(runs);
        words.push(Word { gva, value, could_be_code });
    }
    Ok(words)
}

/// The place of a frame's own address: its function is looked up by `lookup_ip`.
fn place(frame: &Frame, names: &Names<'_>) -> Option<Place> {
    let mut place = names.function(frame.lookup_ip())?;
    place.offset += frame.ip - frame.lookup_ip();
    Some(place)
}

fn object(frame: &Frame, lines: &[String], names: &Names<'_>) -> Value {
    let place = place(frame, names);
    json!({
        "ip": format!("{:#x}", frame.ip), "sp": format!("{:#x}", frame.sp),
        "function": place.as_ref().map(|place| &place.name),
        "module": place.as_ref().and_then(|place| place.module.as_ref()),
        "offset": place.as_ref().map(|place| place.offset),
        "lines": lines,
        "by": match frame.how {
            UnwindMethod::Registers => "registers",
            UnwindMethod::Orc => "orc",
            UnwindMethod::OrcInterrupted => "orc_interrupted",
            UnwindMethod::FramePointer => "frame_pointer",
        },
    })
}
