//! Dumps of memory, as bytes and as text.

use std::ops::ControlFlow;

use anyhow::Context;
use frazil_vmm::inspect::{AddressSpace, GuestView, PhysicalMemory, SnapshotMemory, Translation};
use serde_json::json;

use super::{break_on_error, hex, printable};
use crate::cli::Span;
use crate::output;

/// Bytes to show by default.
const LEN_BYTES: u64 = 256;
/// Bytes per line.
const LINE_BYTES: usize = 16;
/// Bytes read at a time, and per JSON object: a page.
const PART_BYTES: u64 = 4096;

/// Dumps memory at a guest physical address.
pub(super) fn physical(memory: &SnapshotMemory, span: Span, json: bool) -> anyhow::Result<()> {
    // Fails here if nothing can be read, before anything is printed, and whatever the length.
    memory.read(span.address, &mut [0])?;
    let most = memory.ram_behind(span.address);
    let len = match span.len_bytes {
        Some(len) if len > most => anyhow::bail!(
            "guest physical {:#x}: expected at most {most} bytes, to the end of this range of RAM, \
             found {len}",
            span.address
        ),
        Some(len) => len,
        None => LEN_BYTES.min(most),
    };
    dump(span.address, len, json, &mut |at, bytes| {
        memory.read(at, bytes)?;
        Ok(json!({"gpa": format!("{at:#x}")}))
    })
}

/// Dumps memory at a virtual address of a vCPU.
pub(super) fn virtually(
    view: &GuestView,
    vcpu: usize,
    span: Span,
    json: bool,
) -> anyhow::Result<()> {
    let (space, memory, gva) = (view.space(vcpu)?, view.memory(), span.address);
    let read = |at: u64, bytes: &mut [u8]| -> anyhow::Result<Translation> {
        let found = space.translate(memory, at)?;
        // The bytes are within one page, so they are contiguous in guest physical memory.
        memory
            .read(found.gpa, bytes)
            .with_context(|| format!("virtual address {at:#x} of vCPU {vcpu}"))?;
        Ok(found)
    };
    // Fails here if nothing can be read, before anything is printed.
    let found = read(gva, &mut [0])?;
    let most = (space.last() - gva).saturating_add(1);
    let len = match span.len_bytes {
        Some(len) if len > most => anyhow::bail!(
            "virtual address {gva:#x}: expected at most {most} bytes, to the last address, found \
             {len}"
        ),
        Some(len) => len,
        // By default, as much as can be read.
        None => {
            let here = (PART_BYTES - gva % PART_BYTES).min(LEN_BYTES).min(most);
            let goes_on = here < LEN_BYTES.min(most) && read(gva + here, &mut [0]).is_ok();
            if goes_on { LEN_BYTES.min(most) } else { here }
        }
    };
    if !json {
        explain(&space, &found, gva, vcpu);
    }
    dump(gva, len, json, &mut |at, bytes| {
        let Translation { gpa, page_bytes, writable, user, executable, steps } = read(at, bytes)?;
        let steps: Vec<_> = steps
            .iter()
            .map(|step| {
                let [gpa, entry] =
                    [step.entry_gpa, step.entry].map(|number| format!("{number:#x}"));
                json!({"table": step.level, "gpa": gpa, "entry": entry})
            })
            .collect();
        Ok(json!({
            "gva": format!("{at:#x}"), "gpa": format!("{gpa:#x}"), "vcpu": vcpu,
            "page_bytes": page_bytes, "write": writable, "execute": executable, "user": user,
            "steps": steps,
        }))
    })
}

/// Prints how the first address was translated.
fn explain(space: &AddressSpace, found: &Translation, gva: u64, vcpu: usize) {
    outln!("vCPU {vcpu}, {}: virtual {gva:#x} is guest physical {:#x}", space.mode, found.gpa);
    for step in &found.steps {
        outln!("  {:<28} entry at {:#x}: {:#018x}", step.level, step.entry_gpa, step.entry);
    }
}

/// Reads bytes from an address on. Returns the JSON description of that place.
type Read<'a> = dyn FnMut(u64, &mut [u8]) -> anyhow::Result<serde_json::Value> + 'a;

/// Prints `left` bytes from `at` on, reading a page at a time: stops at the first page that cannot
/// be read.
fn dump(mut at: u64, mut left: u64, json: bool, read: &mut Read<'_>) -> anyhow::Result<()> {
    let mut lines = Lines::default();
    let mut buffer = [0; PART_BYTES as usize];
    while left > 0 {
        let count = (PART_BYTES - at % PART_BYTES).min(left);
        let bytes = &mut buffer[..count as usize];
        let mut place = read(at, bytes)?;
        let flow = if json {
            place["hex"] = hex(bytes).into();
            break_on_error(output::try_line(format_args!("{place}")))
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

/// Prints lines like `hexdump -C`: lines that repeat the previous one become a single star.
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
            return break_on_error(output::try_line(format_args!("*")));
        }
        self.starred = false;
        self.last = whole.then(|| line.to_vec());
        break_on_error(output::try_line(format_args!("{}", text(at, line))))
    }

    fn end(&self) {
        if self.starred {
            outln!("{:016x}", self.end);
        }
    }
}

/// A line such as "0000000000001000  48 65 …  |He…|"; one that begins late is indented.
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
