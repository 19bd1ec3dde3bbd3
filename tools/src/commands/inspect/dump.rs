//! Memory as bytes and as text.

use std::ops::ControlFlow;

use frazil_vmm::inspect::{AddressSpace, GuestView, InspectError, PhysicalMemory};
use serde_json::json;

use super::{hex, listened, printable};
use crate::cli::Span;
use crate::output;

/// Bytes that are shown if nobody says how many.
const LEN_BYTES: u64 = 256;
/// Bytes of a line.
const LINE_BYTES: usize = 16;
/// Bytes of a page: what is read at a time, and is one object with --json.
const PART_BYTES: u64 = 4096;

/// At a guest physical address.
pub(super) fn physical(view: &GuestView, span: Span, json: bool) -> anyhow::Result<()> {
    let memory = view.memory();
    // Before anything is printed, and whatever the length.
    memory.read(span.address, &mut [0])?;
    let most = memory.ram_behind(span.address);
    let len = match span.len_bytes {
        Some(len) if len > most => anyhow::bail!(
            "guest physical {:#x}, {len} bytes: expected at most {most}, to where this range of RAM ends",
            span.address
        ),
        Some(len) => len,
        None => LEN_BYTES.min(most),
    };
    dump(Span { len_bytes: Some(len), ..span }, json, &mut |at, bytes| {
        memory.read(at, bytes)?;
        Ok(json!({"gpa": format!("{at:#x}")}))
    })
}

/// At a virtual address of a vCPU.
pub(super) fn virtually(
    view: &GuestView,
    vcpu: usize,
    span: Span,
    json: bool,
) -> anyhow::Result<()> {
    let space = view.space(vcpu)?;
    let memory = view.memory();
    if !json {
        explain(&space, memory, span.address, vcpu)?;
    }
    let len = span.len_bytes.unwrap_or(LEN_BYTES);
    dump(Span { len_bytes: Some(len), ..span }, json, &mut |at, bytes| {
        let found = space.translate(memory, at)?;
        space.read(memory, at, bytes)?;
        Ok(json!({"gva": format!("{at:#x}"), "gpa": format!("{:#x}", found.gpa), "vcpu": vcpu}))
    })
}

/// How the first address was found.
fn explain(
    space: &AddressSpace,
    memory: &dyn PhysicalMemory,
    gva: u64,
    vcpu: usize,
) -> Result<(), InspectError> {
    let found = space.translate(memory, gva)?;
    outln!("vCPU {vcpu}, {}: virtual {gva:#x} is guest physical {:#x}", space.mode, found.gpa);
    for step in &found.steps {
        outln!("  {:<28} entry at {:#x}: {:#018x}", step.level, step.entry_gpa, step.entry);
    }
    Ok(())
}

/// Reads bytes from an address on; returns what JSON says of the place.
type Read<'a> = dyn FnMut(u64, &mut [u8]) -> Result<serde_json::Value, InspectError> + 'a;

/// Prints `span`, read a page at a time: what cannot be read ends it where it begins.
fn dump(span: Span, json: bool, read: &mut Read<'_>) -> anyhow::Result<()> {
    let (mut at, mut left) = (span.address, span.len_bytes.unwrap_or(LEN_BYTES));
    let mut lines = Lines::default();
    let mut buffer = [0; PART_BYTES as usize];
    while left > 0 {
        let count = (PART_BYTES - at % PART_BYTES).min(left);
        let bytes = &mut buffer[..count as usize];
        let mut place = read(at, bytes)?;
        let flow = if json {
            place["hex"] = hex(bytes).into();
            listened(output::try_line(format_args!("{place}")))
        } else {
            lines.print(at, bytes)
        };
        if flow.is_break() {
            return Ok(());
        }
        left -= count;
        at = at.wrapping_add(count);
    }
    lines.end();
    Ok(())
}

/// Lines as `hexdump -C` prints them: those that repeat the one before are one star.
#[derive(Default)]
struct Lines {
    last: Option<Vec<u8>>,
    starred: bool,
    end: u64,
}

impl Lines {
    fn print(&mut self, at: u64, bytes: &[u8]) -> ControlFlow<()> {
        // Lines begin at multiples of their length.
        let head = (LINE_BYTES - at as usize % LINE_BYTES).min(bytes.len());
        let (head, rest) = bytes.split_at(if head == LINE_BYTES { 0 } else { head });
        let mut at = at;
        for line in
            [head].into_iter().filter(|head| !head.is_empty()).chain(rest.chunks(LINE_BYTES))
        {
            self.line(at, line)?;
            at = at.wrapping_add(line.len() as u64);
            self.end = at;
        }
        ControlFlow::Continue(())
    }

    fn line(&mut self, at: u64, line: &[u8]) -> ControlFlow<()> {
        let whole = line.len() == LINE_BYTES;
        if whole && self.last.as_deref() == Some(line) {
            if std::mem::replace(&mut self.starred, true) {
                return ControlFlow::Continue(());
            }
            return listened(output::try_line(format_args!("*")));
        }
        self.starred = false;
        self.last = whole.then(|| line.to_vec());
        listened(output::try_line(format_args!("{}", text(at, line))))
    }

    fn end(&self) {
        if self.starred {
            outln!("{:016x}", self.end);
        }
    }
}

/// "0000000000001000  48 65 …  |He…|"; a line that begins late is indented.
fn text(at: u64, line: &[u8]) -> String {
    let skip = at as usize % LINE_BYTES;
    let column = |column: usize| {
        let byte = column.checked_sub(skip).and_then(|index| line.get(index));
        let gap = if column == LINE_BYTES / 2 { " " } else { "" };
        byte.map_or_else(|| format!("{gap}   "), |byte| format!("{gap} {byte:02x}"))
    };
    let digits: String = (0..LINE_BYTES).map(column).collect();
    let blanks = " ".repeat(skip);
    format!("{:016x} {digits}  |{blanks}{}|", at - skip as u64, printable(line))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_stand_where_their_addresses_do() {
        assert_eq!(
            text(0x1000, b"Hello, world\n\0\xff~"),
            "0000000000001000  48 65 6c 6c 6f 2c 20 77  6f 72 6c 64 0a 00 ff 7e  |Hello, world...~|"
        );
        let late = text(0x100a, b"abc");
        assert_eq!(
            late,
            format!(
                "0000000000001000 {}61 62 63{}|{}abc|",
                " ".repeat(32),
                " ".repeat(11),
                " ".repeat(10)
            )
        );
    }
}
