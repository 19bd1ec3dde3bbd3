//! Lists what page tables map.

use frazil_vmm::inspect::{
    Access, BadEntry, Caching, Found, GuestView, Joining, MappedRange, PagingMode, TablesReport,
};
use serde_json::json;

use super::break_on_error;
use crate::cli::Span;
use crate::output;

pub(super) fn tables(
    view: &GuestView,
    vcpu: usize,
    span: Option<Span>,
    json: bool,
) -> anyhow::Result<()> {
    let space = view.space(vcpu)?;
    if space.mode == PagingMode::Off {
        anyhow::bail!(
            "vCPU {vcpu}: expected page tables, found paging off: virtual addresses are guest \
             physical addresses"
        );
    }
    let addresses = match span {
        None => 0..=u64::MAX,
        Some(Span { address, len_bytes }) => {
            address..=address.saturating_add(len_bytes.unwrap_or(1) - 1)
        }
    };
    space.check_some(&addresses)?;
    if !json {
        outln!("vCPU {vcpu}, {}, tables at guest physical {:#x}", space.mode, space.root_gpa);
        outln!("{:<38}{:>12}  {:<6}{:>8}  guest physical", "virtual", "size", "access", "pages");
    }
    let mut is_nothing = true;
    let report = space.mapped(view.memory(), addresses, Joining::Alike, &mut |found| {
        is_nothing = false;
        break_on_error(match (found, json) {
            (Found::Range(range), true) => output::try_line(format_args!("{}", object(&range))),
            (Found::Repeated { gva, span_bytes, times }, true) => output::try_line(format_args!(
                "{}",
                json!({"again": format!("{gva:#x}"), "span_bytes": span_bytes, "times": times})
            )),
            (Found::Range(range), false) => output::try_line(format_args!("{}", line(&range))),
            (Found::Repeated { span_bytes, times, .. }, false) => output::try_line(format_args!(
                "  … then the preceding {} again, {} more times",
                output::bytes(span_bytes),
                output::count(times)
            )),
        })
    })?;
    if is_nothing && !json {
        outln!("nothing is mapped");
    }
    print_bad_entries(&report);
    Ok(())
}

fn print_bad_entries(report: &TablesReport) {
    for bad in &report.bad {
        match bad {
            BadEntry::NoTable { gva, level, table_gpa } => errln!(
                "frazil: virtual {gva:#x}: expected a {level} in RAM, found one at guest physical {table_gpa:#x}"
            ),
            BadEntry::Reserved { gva, level, entry, bits } => errln!(
                "frazil: virtual {gva:#x}: expected a valid {level} entry, found {entry:#x} with \
                 reserved bits {bits:#x} set"
            ),
        }
    }
    let more = report.bad_entries - report.bad.len() as u64;
    if more > 0 {
        errln!("frazil: {} more such entries", output::count(more));
    }
}

/// Access rights such as "urwx", in the style of `ls`: a dash for each that is not granted.
fn access(access: Access) -> String {
    let flag = |on: bool, name: char| if on { name } else { '-' };
    [flag(access.user, 'u'), 'r', flag(access.write, 'w'), flag(access.execute, 'x')]
        .iter()
        .collect()
}

fn caching(caching: Caching) -> &'static str {
    match caching {
        Caching::WriteBack => "",
        Caching::WriteThrough => " write-through",
        Caching::WriteProtected => " write-protected cache",
        Caching::WriteCombining => " write-combining",
        Caching::UncachedMinus => " uncached-",
        Caching::Uncached => " uncached",
    }
}

fn line(range: &MappedRange) -> String {
    let gpa = range.gpa.map_or_else(|| "scattered".to_owned(), |gpa| format!("{gpa:#x}"));
    format!(
        "{:#018x}-{:#018x} {:>12}  {:<6}{:>8}  {gpa}{}{}",
        range.gva,
        range.gva.wrapping_add(range.len_bytes - 1),
        output::bytes(range.len_bytes),
        access(range.access),
        page_size(range.page_bytes),
        if range.global { " global" } else { "" },
        caching(range.caching),
    )
}

fn page_size(bytes: u64) -> String {
    match bytes {
        0x4000_0000.. => format!("{}G", bytes >> 30),
        0x10_0000.. => format!("{}M", bytes >> 20),
        _ => format!("{}K", bytes >> 10),
    }
}

fn object(range: &MappedRange) -> serde_json::Value {
    json!({
        "gva": format!("{:#x}", range.gva), "bytes": range.len_bytes, "page_bytes": range.page_bytes,
        "gpa": range.gpa.map(|gpa| format!("{gpa:#x}")), "write": range.access.write,
        "execute": range.access.execute, "user": range.access.user, "global": range.global,
        "caching": match range.caching {
            Caching::WriteBack => "write_back",
            Caching::WriteThrough => "write_through",
            Caching::WriteProtected => "write_protected",
            Caching::WriteCombining => "write_combining",
            Caching::UncachedMinus => "uncached_minus",
            Caching::Uncached => "uncached",
        },
    })
}
