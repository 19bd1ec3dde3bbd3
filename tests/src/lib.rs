//! Simulators and oracles shared by the tests of this room.

pub mod faulty_storage;
pub mod fixture;
pub mod format_reader;
pub mod inspect_bed;
pub mod linux;
pub mod memory_copy;
pub mod mounted;
pub mod oracle;
pub mod pager_bed;
pub mod populated;
pub mod rng;
pub mod storage_sim;
pub mod vm_harness;
