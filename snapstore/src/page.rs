//! Pages, and where their contents come from.

use std::io;

/// Bytes in a page. Regions are made of whole pages.
pub const PAGE_SIZE: usize = 4096;

/// The contents of one page.
pub type Page = [u8; PAGE_SIZE];

/// Where the pages of a region are read from when they are written to the store.
///
/// The store reads from several threads at once.
pub trait PageSource: Sync {
    /// Copies page number `page` of the region into `buf`.
    ///
    /// # Errors
    /// Any error makes the transaction fail.
    fn read_page(&self, page: u64, buf: &mut Page) -> io::Result<()>;
}

impl PageSource for [Page] {
    fn read_page(&self, page: u64, buf: &mut Page) -> io::Result<()> {
        let index = usize::try_from(page).map_err(io::Error::other)?;
        let source = self.get(index).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("page {page} is beyond the source's {} pages", self.len()),
            )
        })?;
        buf.copy_from_slice(source);
        Ok(())
    }
}

impl PageSource for Vec<Page> {
    fn read_page(&self, page: u64, buf: &mut Page) -> io::Result<()> {
        self[..].read_page(page, buf)
    }
}

/// True if every byte is zero.
#[must_use]
pub fn is_zero(page: &[u8]) -> bool {
    // Chunks of 64 bytes vectorise and still allow an early exit.
    page.chunks(64).all(|chunk| chunk.iter().fold(0_u8, |acc, byte| acc | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_is_told_from_nearly_zero() {
        let mut page = [0_u8; PAGE_SIZE];
        assert!(is_zero(&page));
        for position in [0, 63, 64, 2048, PAGE_SIZE - 1] {
            page[position] = 1;
            assert!(!is_zero(&page), "byte {position}");
            page[position] = 0;
        }
    }
}
