//! Disassembly.

use std::ops::ControlFlow;

use frazil_snapstore::search::SearchProgress;
use frazil_vmm::inspect::{CodeMode, GuestView, LinuxKernel};
use iced_x86::{
    Decoder, DecoderError, DecoderOptions, FlowControl, Formatter, Instruction, IntelFormatter,
};
use serde_json::json;

use super::names::{Names, Vmlinux};
use super::{break_on_error, hex};
use crate::cli::InspectArgs;
use crate::output;

/// Instructions to show by default.
const COUNT: u64 = 16;
/// The length of the longest instruction.
const INSTRUCTION_BYTES_MAX: usize = 15;

pub(super) fn disassemble(
    view: &GuestView,
    vcpu: usize,
    address: Option<u64>,
    args: &InspectArgs,
    json: bool,
) -> anyhow::Result<()> {
    let (space, mode) = (view.space(vcpu)?, view.code_mode(vcpu)?);
    let (next, base) = (view.next_instruction(vcpu)?, view.code_base(vcpu)?);
    let mut at = address.unwrap_or(next);
    // Only names from a file are worth the time it takes to find the kernel.
    let vmlinux = args.vmlinux.as_deref().map(Vmlinux::open).transpose()?;
    let names = match &vmlinux {
        Some(vmlinux) => {
            let kernel = LinuxKernel::find(view, &SearchProgress::default())?;
            Names::find(view, kernel.as_ref(), Some(vmlinux), false)?
        }
        None => Names::none(),
    };
    let mut printer =
        Printer { formatter: IntelFormatter::new(), names, next, base, json, function: None };
    printer.formatter.options_mut().set_hex_prefix("0x");
    printer.formatter.options_mut().set_hex_suffix("");
    if !json {
        outln!("vCPU {vcpu}, {}-bit code, {}", mode.bits(), space.mode);
    }
    for _ in 0..args.max_count.unwrap_or(COUNT) {
        let mut buffer = [0; INSTRUCTION_BYTES_MAX];
        let bytes = readable(view, vcpu, at, &mut buffer)?;
        // Branches are relative to the code segment's base.
        let ip = at.wrapping_sub(base);
        let mut decoder = Decoder::with_ip(mode.bits(), bytes, ip, DecoderOptions::NONE);
        let decoded = decoder.decode();
        let is_cut = decoder.last_error() == DecoderError::NoMoreBytes;
        let len = match (is_cut, decoded.is_invalid()) {
            (true, _) => bytes.len(),
            (false, true) => 1,
            (false, false) => decoded.len(),
        };
        let text = match (is_cut, decoded.is_invalid()) {
            (true, _) => Err("(continues where nothing is mapped)"),
            (false, true) => Err("(bad)"),
            (false, false) => Ok(&decoded),
        };
        if printer.print(at, &bytes[..len], text).is_break() {
            break;
        }
        // There is nothing after the last address.
        let Some(following) = after(at, len as u64, mode) else { break };
        at = following;
    }
    Ok(())
}

/// Prints instructions.
struct Printer<'a> {
    formatter: IntelFormatter,
    names: Names<'a>,
    /// The address of the vCPU's next instruction.
    next: u64,
    /// The base of its code segment.
    base: u64,
    json: bool,
    /// The function of the instruction printed last.
    function: Option<String>,
}

impl Printer<'_> {
    /// Prints an instruction, or the text that takes its place.
    fn print(
        &mut self,
        at: u64,
        bytes: &[u8],
        decoded: Result<&Instruction, &str>,
    ) -> ControlFlow<()> {
        let mut text = String::new();
        match decoded {
            Ok(instruction) => self.formatter.format(instruction, &mut text),
            Err(instead) => text.push_str(instead),
        }
        let place = self.names.function(at);
        let target = decoded.ok().and_then(|instruction| self.target(instruction));
        if self.json {
            let object = json!({
                "gva": format!("{at:#x}"), "hex": hex(bytes), "text": text, "next": at == self.next,
                "function": place.as_ref().map(|place| &place.name),
                "module": place.as_ref().and_then(|place| place.module.as_ref()),
                "offset": place.as_ref().map(|place| place.offset), "target": target,
            });
            return break_on_error(output::try_line(format_args!("{object}")));
        }
        if let Some(place) = place
            && self.function.as_ref() != Some(&place.name)
        {
            break_on_error(output::try_line(format_args!("{place}:")))?;
            self.function = Some(place.name);
        }
        let mark = if at == self.next { "->" } else { "  " };
        let target = target.map_or_else(String::new, |target| format!("  ; {target}"));
        let line = format_args!("{mark} {at:#018x}  {:<30}  {text}{target}", hex(bytes));
        break_on_error(output::try_line(line))
    }

    /// The name of the place a branch leads to.
    fn target(&self, decoded: &Instruction) -> Option<String> {
        let branches =
            [FlowControl::UnconditionalBranch, FlowControl::ConditionalBranch, FlowControl::Call];
        if !branches.contains(&decoded.flow_control()) {
            return None;
        }
        let target = self.base.wrapping_add(decoded.near_branch_target());
        Some(self.names.function(target)?.to_string())
    }
}

/// The address after `len` bytes at `at`; None after the last address.
fn after(at: u64, len: u64, mode: CodeMode) -> Option<u64> {
    match mode {
        CodeMode::Bits64 => at.checked_add(len),
        CodeMode::Bits16 | CodeMode::Bits32 => u32::try_from(at + len).ok().map(u64::from),
    }
}

/// As many bytes from `at` on as can be read, at least one: the next page may not be mapped.
fn readable<'a>(
    view: &GuestView,
    vcpu: usize,
    at: u64,
    buffer: &'a mut [u8; INSTRUCTION_BYTES_MAX],
) -> anyhow::Result<&'a [u8]> {
    let (space, memory) = (view.space(vcpu)?, view.memory());
    if space.read(memory, at, buffer).is_ok() {
        return Ok(buffer);
    }
    let here = (4096 - at % 4096).min(buffer.len() as u64) as usize;
    space.read(memory, at, &mut buffer[..here])?;
    Ok(&buffer[..here])
}
