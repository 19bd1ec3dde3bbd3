//! The suites, one file or folder each: lists of named measurements.

pub(crate) mod checkpoint;
pub(crate) mod clone;
pub(crate) mod endurance;
pub(crate) mod floors;
pub(crate) mod pause;
pub(crate) mod peers;
pub(crate) mod resume;
pub(crate) mod rewind;
pub(crate) mod store;
