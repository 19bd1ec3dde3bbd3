//! frazil-bench
fn main() {}
