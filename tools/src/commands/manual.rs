//! `frazil completion` and `frazil man`: what shells and `man` know of the command, from its own
//! definition.

use std::io;

use anyhow::Context;
use serde_json::json;

use super::print_json;
use crate::cli::{CompletionArgs, ManArgs, visible};

pub(crate) fn completion(args: &CompletionArgs) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut visible(), "frazil", &mut script);
    match io::Write::write_all(&mut io::stdout(), &script) {
        // `frazil completion bash | head`.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => Ok(written?),
    }
}

pub(crate) fn man(args: &ManArgs, json: bool) -> anyhow::Result<()> {
    let failed = || format!("cannot write man pages to {}", args.folder.display());
    std::fs::create_dir_all(&args.folder).with_context(failed)?;
    clap_mangen::generate_to(crate::cli::command(), &args.folder).with_context(failed)?;
    let entries = args.folder.read_dir().with_context(failed)?;
    let mut pages: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with("frazil") && name.ends_with(".1"))
        .collect();
    pages.sort();
    if json {
        return print_json(&json!({"folder": args.folder, "pages": pages}));
    }
    outln!("{}: {} man pages, from frazil.1 on", args.folder.display(), pages.len());
    Ok(())
}
