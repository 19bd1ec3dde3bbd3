//! Stacks: what called what.

use std::ops::ControlFlow;

use frazil_snapstore::search::SearchProgress;
use frazil_vmm::inspect::{By, End, Frame, GuestView, LinuxKernel, PhysicalMemory, Stack};
use serde_json::{Value, json};

use super::listened;
use super::names::Names;
use crate::cli::InspectArgs;
use crate::output;

/// Frames that are shown if nobody says how many.
const FRAMES: u64 = 64;
/// Words of the stack that are shown where nothing tells what they are.
const WORDS: u64 = 16;

pub(super) fn stacks(view: &GuestView, args: &InspectArgs, json: bool) -> anyhow::Result<()> {
    let kernel = LinuxKernel::find(view, &SearchProgress::default())?;
    let names = Names::find(view, kernel.as_ref(), args.vmlinux.as_deref())?;
    if !json {
        outln!("{}", names.describe());
    }
    let vcpus = match args.vcpu {
        Some(index) => index..index + 1,
        None => 0..view.vcpus().len(),
    };
    for index in vcpus {
        let regs = &view.vcpu(index)?.regs;
        let mut space = view.space(index)?;
        // With page-table isolation a vCPU in user mode has no tables for the kernel; here it is the
        // kernel's stack that is asked for only if the vCPU is in the kernel.
        if let Some(kernel) = &kernel
            && u64::from(regs.rip) >> 63 == 1
            && space.translate(view.memory(), regs.rip.into()).is_err()
        {
            space = kernel.space;
        }
        let stack = Stack { space, memory: view.memory(), orc: names.orc() };
        let most = args.max_count.unwrap_or(FRAMES) as usize;
        let (frames, end) = stack.walk(regs, most)?;
        let flow = if json {
            let frames: Vec<Value> = frames.iter().map(|frame| object(frame, &names)).collect();
            let (why, detail) = end_words(&end);
            let stack = json!({"vcpu": index, "frames": frames, "end": why, "detail": detail});
            listened(output::try_line(format_args!("{stack}")))
        } else {
            show(view, index, &frames, &end, &names)?
        };
        if flow.is_break() {
            break;
        }
    }
    Ok(())
}

fn show(
    view: &GuestView,
    vcpu: usize,
    frames: &[Frame],
    end: &End,
    names: &Names,
) -> anyhow::Result<ControlFlow<()>> {
    outln!("\nvCPU {vcpu}");
    for (number, frame) in frames.iter().enumerate() {
        let name = names.function(frame.lookup_ip());
        let name = name.map_or_else(
            || "?".to_owned(),
            |(name, offset)| {
                // As seen from the frame's own instruction.
                let offset = offset + (frame.ip - frame.lookup_ip());
                format!("{name}+{offset:#x}")
            },
        );
        let how = match frame.how {
            By::OrcInterrupted => "  (interrupted)",
            By::FramePointer => "  (by frame pointer)",
            By::Registers | By::Orc => "",
        };
        let lines = names.lines(frame.lookup_ip());
        if listened(output::try_line(format_args!("{number:>3}  {:#018x}  {name}{how}", frame.ip)))
            .is_break()
        {
            return Ok(ControlFlow::Break(()));
        }
        lines.iter().for_each(|line| outln!("                            {line}"));
    }
    let (why, detail) = end_words(end);
    outln!(
        "     {}{}",
        why.replace('_', " "),
        detail.map_or_else(String::new, |detail| format!(": {detail}"))
    );
    if frames.len() == 1 {
        words(view, vcpu)?;
    }
    Ok(ControlFlow::Continue(()))
}

/// What lies on the stack, where nothing tells more.
fn words(view: &GuestView, vcpu: usize) -> anyhow::Result<()> {
    let (space, memory, top) = (view.space(vcpu)?, view.memory(), view.stack_top(vcpu)?);
    let mut word = [0; 8];
    for index in 0..WORDS {
        let at = top.wrapping_add(index * 8);
        if space.read(memory, at, &mut word).is_err() {
            break;
        }
        let value = u64::from_le_bytes(word);
        let runs = space
            .translate(memory, value)
            .is_ok_and(|found| found.executable && memory.has(found.gpa, 1) && value >= 4096);
        outln!("     {at:#018x}  {value:#018x}{}", if runs { "  could be code" } else { "" });
    }
    Ok(())
}

/// Why a walk ended: a word, and what there is to say besides.
fn end_words(end: &End) -> (&'static str, Option<String>) {
    match end {
        End::Bottom => ("bottom", None),
        End::User => ("user_mode", None),
        End::Enough => ("more", None),
        End::NoWay { ip } => {
            ("no_way_up", Some(format!("nothing tells where {ip:#x} was called from")))
        }
        End::Damaged { what } => ("damaged", Some(what.clone())),
    }
}

fn object(frame: &Frame, names: &Names) -> Value {
    let function = names.function(frame.lookup_ip());
    json!({
        "ip": format!("{:#x}", frame.ip), "sp": format!("{:#x}", frame.sp),
        "function": function.as_ref().map(|(name, _)| name),
        "offset": function.as_ref().map(|(_, offset)| offset + (frame.ip - frame.lookup_ip())),
        "lines": names.lines(frame.lookup_ip()),
        "by": match frame.how {
            By::Registers => "registers",
            By::Orc => "orc",
            By::OrcInterrupted => "orc_interrupted",
            By::FramePointer => "frame_pointer",
        },
    })
}
