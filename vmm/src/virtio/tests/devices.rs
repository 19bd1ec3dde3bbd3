//! Devices that are small.

use super::*;
use crate::virtio::SavedDevice;
use crate::virtio::rng::Rng;

#[test]
fn random_bytes_fill_the_buffer_and_no_more() {
    let bed = Bed::new(Arc::new(Rng));
    bed.set_up(0);
    let mut ring = Ring::new(0);
    ring.add(&bed, &[(DATA, 100, true), (DATA + 5000, 28, true)]);
    ring.add(&bed, &[(DATA + 0x8000, 1 << 20, true)]);
    ring.add(&bed, &[(DATA, 0, true)]);
    ring.add(&bed, &[(DATA, 64, false)]);
    ring.kick(&bed);
    let lens: Vec<u32> = std::iter::from_fn(|| ring.used(&bed)).map(|(_, len)| len).collect();
    assert_eq!(lens, [128, 4096, 0, 0]);
    let (first, second) = (bed.read(DATA, 100), bed.read(DATA + 5000, 28));
    assert!(first.iter().any(|byte| *byte != 0) && second.iter().any(|byte| *byte != 0));
    assert_eq!(bed.read(DATA + 100, 4900), [0; 4900]);
    assert_eq!(bed.read(DATA + 0x9000, 4096), [0; 4096]);
    assert!(matches!(bed.mmio.save().device, SavedDevice::Rng {}));
}
