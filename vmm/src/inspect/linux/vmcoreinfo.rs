//! The VMCOREINFO note (Documentation/admin-guide/kdump/vmcoreinfo.rst in the Linux sources): lines
//! of `KEY=value`, `SYMBOL(name)=hex`, `NUMBER(name)=decimal`, and so on.

/// The contents of a note.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmCoreInfo {
    bytes: Vec<u8>,
    text: String,
}

impl VmCoreInfo {
    /// Parses `bytes`; None if they are not a kernel's note.
    pub(super) fn parse(bytes: Vec<u8>) -> Option<Self> {
        let text = std::str::from_utf8(&bytes).ok()?.trim_end_matches('\0').to_owned();
        text.starts_with("OSRELEASE=").then_some(Self { bytes, text })
    }

    /// The bytes of the note as it was found.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The value after `key=`.
    #[must_use]
    pub fn value(&self, key: &str) -> Option<&str> {
        let lines = self.text.lines();
        lines
            .filter_map(|line| line.split_once('='))
            .find(|(name, _)| *name == key)
            .map(|(_, value)| value)
    }

    /// The kernel's release, such as 6.1.0-56-cloud-amd64.
    #[must_use]
    pub fn release(&self) -> &str {
        self.value("OSRELEASE").unwrap_or_default()
    }

    /// The first two numbers of the release, such as 6 and 1.
    #[must_use]
    pub fn version(&self) -> Option<(u32, u32)> {
        let mut numbers = self.release().split(|c: char| !c.is_ascii_digit()).map(str::parse);
        Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
    }

    /// The hexadecimal number after `key=`.
    #[must_use]
    pub fn hex(&self, key: &str) -> Option<u64> {
        u64::from_str_radix(self.value(key)?, 16).ok()
    }

    /// The virtual address of the symbol `name`.
    #[must_use]
    pub fn symbol(&self, name: &str) -> Option<u64> {
        self.hex(&format!("SYMBOL({name})"))
    }

    /// The decimal number `name`.
    #[must_use]
    pub fn number(&self, name: &str) -> Option<i64> {
        self.value(&format!("NUMBER({name})"))?.parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_found_by_their_whole_names() {
        let text = "OSRELEASE=6.1.0-56-cloud-amd64\nSYMBOL(_stext)=ffffffffa3200000\n\
                    NUMBER(phys_base)=-230686720\nKERNELOFFSET=22200000\n";
        let info = VmCoreInfo::parse(text.as_bytes().to_vec()).expect("a note");
        assert_eq!((info.release(), info.version()), ("6.1.0-56-cloud-amd64", Some((6, 1))));
        assert_eq!(info.symbol("_stext"), Some(0xffff_ffff_a320_0000));
        assert_eq!(info.number("phys_base"), Some(-230_686_720));
        assert_eq!(info.hex("KERNELOFFSET"), Some(0x2220_0000));
        assert_eq!((info.symbol("stext"), info.number("_stext")), (None, None));
        assert_eq!(VmCoreInfo::parse(b"RELEASE=6".to_vec()), None);
        assert_eq!(VmCoreInfo::parse(b"OSRELEASE=\xff".to_vec()), None);
    }
}
