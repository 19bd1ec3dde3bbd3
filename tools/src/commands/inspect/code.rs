//! Instructions.

use std::ops::ControlFlow;

use frazil_snapstore::search::SearchProgress;
use frazil_vmm::inspect::{CodeMode, GuestView, LinuxKernel};
use iced_x86::{Decoder, DecoderOptions, FlowControl, Formatter, Instruction, IntelFormatter};
use serde_json::json;

use super::names::Names;
use super::{hex, listened};
use crate::cli::InspectArgs;
use crate::output;

/// Instructions that are shown if nobody says how many.
const COUNT: u64 = 16;
/// No instruction is longer.
const INSTRUCTION_BYTES_MAX: usize = 15;

pub(super) fn disassemble(
    view: &GuestView,
    vcpu: usize,
    address: Option<u64>,
    args: &InspectArgs,
    json: bool,
) -> anyhow::Result<()> {
    let (space, mode) = (view.space(vcpu)?, view.code_mode(vcpu)?);
    let next = view.next_instruction(vcpu)?;
    let mut at = address.unwrap_or(next);
    // Only a file is worth looking for the kernel.
    let names = match args.vmlinux.as_deref() {
        Some(file) => {
            let kernel = LinuxKernel::find(view, &SearchProgress::default())?;
            Names::find(view, kernel.as_ref(), Some(file))?
        }
        None => Names::nobody(),
    };
    let mut printer =
        Printer { formatter: IntelFormatter::new(), names, next, json, function: None };
    printer.formatter.options_mut().set_hex_prefix("0x");
    printer.formatter.options_mut().set_hex_suffix("");
    if !json {
        outln!("vCPU {vcpu}, {}-bit code, {}", mode.bits(), space.mode);
    }
    for _ in 0..args.max_count.unwrap_or(COUNT) {
        let mut buffer = [0; INSTRUCTION_BYTES_MAX];
        let bytes = readable(view, vcpu, at, &mut buffer)?;
        let decoded = Decoder::with_ip(mode.bits(), bytes, at, DecoderOptions::NONE).decode();
        let len = if decoded.is_invalid() { 1 } else { decoded.len() };
        if printer.print(at, &bytes[..len], &decoded).is_break() {
            break;
        }
        at = wrap(at, len as u64, mode);
    }
    Ok(())
}

/// Prints instructions.
struct Printer {
    formatter: IntelFormatter,
    names: Names,
    /// The vCPU's next one.
    next: u64,
    json: bool,
    /// What the last one was in.
    function: Option<String>,
}

impl Printer {
    fn print(&mut self, at: u64, bytes: &[u8], decoded: &Instruction) -> ControlFlow<()> {
        let mut text = String::new();
        if decoded.is_invalid() {
            text.push_str("(bad)");
        } else {
            self.formatter.format(decoded, &mut text);
        }
        let place = self.names.function(at);
        let target = self.target(decoded);
        if self.json {
            let object = json!({
                "gva": format!("{at:#x}"), "hex": hex(bytes), "text": text, "next": at == self.next,
                "function": place.as_ref().map(|(name, _)| name),
                "offset": place.as_ref().map(|(_, offset)| offset), "target": target,
            });
            return listened(output::try_line(format_args!("{object}")));
        }
        if let Some((name, offset)) = place
            && self.function.as_ref() != Some(&name)
        {
            listened(output::try_line(format_args!("{name}+{offset:#x}:")))?;
            self.function = Some(name);
        }
        let mark = if at == self.next { "->" } else { "  " };
        let target = target.map_or_else(String::new, |target| format!("  ; {target}"));
        let line = format_args!("{mark} {at:#018x}  {:<30}  {text}{target}", hex(bytes));
        listened(output::try_line(line))
    }

    /// Where a branch leads, by name.
    fn target(&self, decoded: &Instruction) -> Option<String> {
        let branches =
            [FlowControl::UnconditionalBranch, FlowControl::ConditionalBranch, FlowControl::Call];
        if !branches.contains(&decoded.flow_control()) {
            return None;
        }
        let (name, offset) = self.names.function(decoded.near_branch_target())?;
        Some(if offset == 0 { name } else { format!("{name}+{offset:#x}") })
    }
}

fn wrap(at: u64, len: u64, mode: CodeMode) -> u64 {
    match mode {
        CodeMode::Bits64 => at.wrapping_add(len),
        CodeMode::Bits16 | CodeMode::Bits32 => at.wrapping_add(len) & 0xffff_ffff,
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
