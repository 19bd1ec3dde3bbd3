//! See `frazil_vmm::virtio::fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| frazil_vmm::virtio::fuzzing::target("virtio_block")(bytes));
