//! What a snapshot saves of a disk besides its pages.

use frazil_snapstore::RegionReader;
use serde::{Deserialize, Serialize};

use super::base::is_disk_len;
use super::{DISK_MAX_BYTES, PAGE_BYTES, SECTOR_BYTES};
use crate::error::{Result, VmmError};
use crate::state::Saved;

/// Maximum length of a serial number in bytes: what a virtio block device has room for.
pub const SERIAL_LEN_MAX: usize = 20;

/// A disk as saved in a snapshot. Its chunk has the name of its region.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedDisk {
    /// The region with its contents.
    pub region: String,
    /// Its length in sectors of 512 bytes; the region's last page is padded with zeros.
    pub sectors: u64,
    /// True if the guest cannot write to it.
    pub read_only: bool,
    /// The serial number that the guest sees.
    pub serial: String,
}

impl Saved for SavedDisk {
    const KIND: &'static str = "frazil.disk";
    const VERSION: u32 = 1;
}

/// An invalid property of a disk.
pub(super) struct Wrong {
    pub(super) expected: String,
    pub(super) found: String,
}

impl SavedDisk {
    /// The disk's length in bytes; meaningless if `sectors` is invalid.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.sectors.saturating_mul(SECTOR_BYTES)
    }

    pub(super) fn pages(&self) -> u64 {
        self.len_bytes().div_ceil(PAGE_BYTES)
    }

    pub(super) fn check(&self) -> Result<(), Wrong> {
        if !is_disk_len(self.len_bytes()) {
            return Err(Wrong {
                expected: format!("1 to {} sectors", DISK_MAX_BYTES / SECTOR_BYTES),
                found: self.sectors.to_string(),
            });
        }
        let printable = |byte: u8| byte.is_ascii_graphic() || byte == b' ';
        if self.serial.len() > SERIAL_LEN_MAX || !self.serial.bytes().all(printable) {
            return Err(Wrong {
                expected: format!(
                    "a serial number of at most {SERIAL_LEN_MAX} printable ASCII characters"
                ),
                found: format!("{:?}", self.serial),
            });
        }
        Ok(())
    }

    pub(super) fn check_region(&self, region: &RegionReader) -> Result<()> {
        let named = (region.name() == self.region).then_some(()).ok_or_else(|| Wrong {
            expected: format!("region `{}`", self.region),
            found: format!("`{}`", region.name()),
        });
        let checked = named.and_then(|()| self.check()).and_then(|()| {
            (region.pages() == self.pages()).then_some(()).ok_or_else(|| Wrong {
                expected: format!("{} pages for {} sectors", self.pages(), self.sectors),
                found: format!("{} in region `{}`", region.pages(), self.region),
            })
        });
        checked.map_err(|Wrong { expected, found }| VmmError::State {
            chunk: self.region.clone(),
            expected,
            found,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{ChunkSet, chunk};

    fn saved() -> SavedDisk {
        SavedDisk { region: "disk0".into(), sectors: 9, read_only: false, serial: "frazil".into() }
    }

    #[test]
    fn it_describes_itself_and_comes_back() {
        let chunk = chunk("disk0", &saved()).unwrap();
        let body = serde_json::json!(
            {"region": "disk0", "sectors": 9, "read_only": false, "serial": "frazil"}
        );
        assert_eq!((chunk.kind.as_str(), chunk.version, &chunk.body), ("frazil.disk", 1, &body));
        let mut chunks = ChunkSet::new(vec![chunk]).unwrap();
        let back: SavedDisk = chunks.take("disk0").unwrap();
        assert_eq!(back, saved());
        assert_eq!((back.len_bytes(), back.pages()), (9 * 512, 2));
        assert!(SavedDisk::upgrade(0, body).is_err());
    }

    #[test]
    fn what_cannot_be_is_refused() {
        assert!(saved().check().is_ok());
        for sectors in [0, DISK_MAX_BYTES / SECTOR_BYTES + 1, u64::MAX] {
            assert!(SavedDisk { sectors, ..saved() }.check().is_err(), "{sectors}");
        }
        for serial in ["123456789012345678901", "tab\t", "\u{e9}"] {
            assert!(SavedDisk { serial: serial.into(), ..saved() }.check().is_err(), "{serial}");
        }
    }
}
