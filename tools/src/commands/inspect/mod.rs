//! `frazil inspect`: looks into a snapshot.

mod code;
mod dump;
mod find;
mod lines;
mod map;
mod names;
mod stack;
mod tables;

use std::io;
use std::ops::ControlFlow;

use frazil_vmm::inspect::{GuestView, SnapshotMemory};

use super::open_snapshot;
use crate::cli::{InspectArgs, usage_error};

pub(crate) fn inspect(args: &InspectArgs, json: bool) -> anyhow::Result<()> {
    check(args)?;
    let (_, snapshot) = open_snapshot(&args.snapshot)?;
    if args.search.is_some() || args.regex.is_some() {
        return find::find(args, &snapshot, json);
    }
    let view = || GuestView::open(&snapshot);
    let vcpu = args.vcpu.unwrap_or(0);
    if let Some(span) = args.gpa {
        // An imported snapshot has no machine, but its memory has addresses all the same.
        return dump::physical(&SnapshotMemory::open(&snapshot)?, span, json);
    }
    if let Some(span) = args.gva {
        return dump::virtually(&view()?, vcpu, span, json);
    }
    if let Some(span) = args.page_tables {
        return tables::tables(&view()?, vcpu, span, json);
    }
    if let Some(address) = args.disassemble {
        return code::disassemble(&view()?, vcpu, address, args, json);
    }
    if args.stack {
        return stack::stacks(&view()?, args, json);
    }
    map::map(args, &snapshot, json)
}

/// Rejects options that do not apply to what is asked for.
fn check(args: &InspectArgs) -> anyhow::Result<()> {
    let searches = args.search.is_some() || args.regex.is_some();
    let code = args.disassemble.is_some() || args.stack;
    let dumps = args.gpa.is_some() || args.gva.is_some() || args.page_tables.is_some();
    let wrong =
        if args.vcpu.is_some() && !(code || args.gva.is_some() || args.page_tables.is_some()) {
            Some("--vcpu is for --gva, --page-tables, --disassemble and --stack")
        } else if args.vmlinux.is_some() && !code {
            Some("--vmlinux is for --disassemble and --stack")
        } else if args.max_count.is_some() && !(code || searches) {
            Some("--max-count is for --search, --regex, --disassemble and --stack")
        } else if args.lines && !args.stack {
            Some("--lines is for --stack")
        } else if args.context.is_some() && !searches {
            Some("--context is for --search and --regex")
        } else if args.ranges.is_some() && (code || searches || dumps) {
            Some("--ranges is for the map of regions only")
        } else {
            None
        };
    wrong.map_or(Ok(()), |wrong| Err(usage_error("inspect", wrong).into()))
}

/// Ends long output when nobody reads it any more (`frazil inspect … | head`).
fn break_on_error(printed: io::Result<()>) -> ControlFlow<()> {
    match printed {
        Ok(()) => ControlFlow::Continue(()),
        Err(_) => ControlFlow::Break(()),
    }
}

/// `bytes` as hex digits.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// `bytes` as text, as in a hex dump: printable characters, and dots for the rest.
fn printable(bytes: &[u8]) -> String {
    let shown = |byte: &u8| if (0x20..0x7f).contains(byte) { char::from(*byte) } else { '.' };
    bytes.iter().map(shown).collect()
}
