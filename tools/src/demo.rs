pub(crate) fn demo(_: &crate::cli::DemoArgs, _: bool) -> anyhow::Result<()> { Ok(()) }
