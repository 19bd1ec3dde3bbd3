//! Numbering of items in the order in which they are first seen.

use std::hash::Hash;

use foldhash::HashMap;

/// A list of distinct items, with a look-up of their numbers.
#[derive(Debug)]
pub(crate) struct Numbered<T> {
    items: Vec<T>,
    known: HashMap<T, u32>,
    newest: Option<(T, u32)>,
}

impl<T> Default for Numbered<T> {
    fn default() -> Self {
        Self { items: Vec::new(), known: HashMap::default(), newest: None }
    }
}

impl<T: Copy + Eq + Hash> Numbered<T> {
    /// The number of `item`, which is added if it is new. Fastest for the item asked for last,
    /// since runs of one frame are mostly adjacent.
    pub fn number(&mut self, item: T) -> u32 {
        if let Some((newest, number)) = self.newest
            && newest == item
        {
            return number;
        }
        let number = *self.known.entry(item).or_insert_with(|| {
            self.items.push(item);
            self.items.len() as u32 - 1
        });
        self.newest = Some((item, number));
        number
    }

    /// The items so far, in order of their numbers.
    pub fn items(&self) -> &[T] {
        &self.items
    }

    pub fn into_items(self) -> Vec<T> {
        self.items
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_places_in_order_of_first_sight() {
        let mut numbered = Numbered::default();
        let numbers = [7, 7, 3, 7, 9, 3, 3].map(|item| numbered.number(item));
        assert_eq!(numbers, [0, 0, 1, 0, 2, 1, 1]);
        assert_eq!(numbered.items(), [7, 3, 9]);
        assert_eq!(numbered.into_items(), [7, 3, 9]);
    }
}
