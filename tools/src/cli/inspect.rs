//! The arguments of `frazil inspect`.

use std::path::PathBuf;

use clap::{ArgGroup, Args};

use super::parse::{Span, address, number_or_all, span};

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("look"))]
pub(crate) struct InspectArgs {
    /// The snapshot, as STORE@REF.
    #[arg(default_value = "latest")]
    pub snapshot: String,
    /// Dump LEN bytes (default: 256) of guest memory at this guest physical address.
    #[arg(long, value_name = "ADDR[,LEN]", value_parser = span, group = "look")]
    pub gpa: Option<Span>,
    /// Dump guest memory at this virtual address, translated by the vCPU's page tables.
    #[arg(long, value_name = "ADDR[,LEN]", value_parser = span, group = "look")]
    pub gva: Option<Span>,
    /// Find text, or bytes with `hex:DEADBEEF`, or text of two bytes per character with
    /// `utf16:TEXT`. (Put `text:` before text that itself begins like that.)
    #[arg(long, value_name = "WHAT", group = "look")]
    pub search: Option<String>,
    /// Find the matches of a regular expression. It is matched against bytes: `.` is any but a line
    /// feed, \xff is one, \w is ASCII; `^` and `$` match at the ends of lines. Matches of up to 4
    /// KiB are found whole; if the expression limits their length, all are, up to 64 KiB.
    #[arg(long, value_name = "RE", group = "look")]
    pub regex: Option<String>,
    /// List what the vCPU's page tables map, with ranges that are mapped alike joined: for all
    /// addresses, or for LEN bytes (default: 1) from ADDR.
    #[arg(long, value_name = "ADDR[,LEN]", num_args = 0..=1, value_parser = span, group = "look")]
    #[allow(clippy::option_option)] // absent, without a value, with one
    pub page_tables: Option<Option<Span>>,
    /// Disassemble at this virtual address, or at the vCPU's next instruction.
    #[arg(long, value_name = "ADDR", num_args = 0..=1, value_parser = address, group = "look")]
    #[allow(clippy::option_option)] // absent, without a value, with one
    pub disassemble: Option<Option<u64>>,
    /// Show call stacks, of every vCPU or of one. Names come from --vmlinux, or from a Linux
    /// guest's own symbol table; without either, shows what lies on the stack.
    #[arg(long, group = "look")]
    pub stack: bool,
    /// Use this vCPU.
    #[arg(long, value_name = "N")]
    pub vcpu: Option<usize>,
    /// The guest kernel's file, whose symbols name functions.
    #[arg(long, value_name = "FILE")]
    pub vmlinux: Option<PathBuf>,
    /// With --stack, also show source lines and inlined functions, from the debug information of
    /// --vmlinux; for a whole kernel this takes a second or more.
    #[arg(long, requires = "vmlinux")]
    pub lines: bool,
    /// The only region to search or to show. Default: `ram` to search, all to show.
    #[arg(long, value_name = "NAME", conflicts_with_all = ["gpa", "gva", "page_tables", "disassemble", "stack"])]
    pub region: Option<String>,
    /// Stop after N matches, instructions (default: 16) or frames of a stack (64).
    #[arg(long, short = 'n', value_name = "N", visible_alias = "limit", value_parser = clap::value_parser!(u64).range(1..))]
    pub max_count: Option<u64>,
    /// Bytes to show before and after each match, up to 4096 [default: 16].
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u16).range(0..=4096))]
    pub context: Option<u16>,
    /// Show at most N ranges of each region, or `all` [default: 20]. With --json it is always all.
    #[arg(long, value_name = "N|all", value_parser = number_or_all)]
    pub ranges: Option<usize>,
}
