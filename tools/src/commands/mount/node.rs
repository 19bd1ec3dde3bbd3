//! Inode numbers for everything in a mounted store. They encode what they stand for, so that
//! nothing has to be remembered for the kernel's sake.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};

/// A file, folder or link in a mounted store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Node {
    Root,
    /// The folder of all snapshots.
    Ids,
    /// The folder of links by tag.
    Tags,
    /// The folder of folders by VM.
    Vms,
    /// The link to the newest snapshot.
    Latest,
    /// A tag's link. The numbers of tags and VMs are those of [`Numbers`]; all others are of
    /// snapshots.
    Tag(u32),
    /// A VM's folder of links.
    Vm(u32),
    /// The link to a VM's newest snapshot.
    VmLatest(u32),
    /// The link to a snapshot in its VM's folder.
    VmEntry(u32),
    /// A link from another spelling of a snapshot's id to the one listed in `ids`.
    Alias(u32),
    /// A snapshot's folder, or something in it.
    In(u32, Part),
}

/// A file or folder within a snapshot's folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Part {
    Folder,
    Manifest,
    Memory,
    Disks,
    State,
    /// A region, by its place in the manifest.
    Region(u16),
    /// A state chunk, by its place in the manifest.
    Chunk(u16),
}

impl Node {
    /// The inode number: kind in bits 56 to 63, number in bits 16 to 47, place in bits 0 to 15.
    pub(super) fn ino(self) -> u64 {
        let pack = |kind: u64, number: u32, place: u16| {
            kind << 56 | u64::from(number) << 16 | u64::from(place)
        };
        match self {
            // FUSE requires it.
            Self::Root => 1,
            Self::Ids => pack(1, 0, 0),
            Self::Tags => pack(1, 1, 0),
            Self::Vms => pack(1, 2, 0),
            Self::Latest => pack(1, 3, 0),
            Self::Tag(number) => pack(2, number, 0),
            Self::Vm(number) => pack(3, number, 0),
            Self::VmLatest(number) => pack(4, number, 0),
            Self::VmEntry(number) => pack(5, number, 0),
            Self::Alias(number) => pack(6, number, 0),
            Self::In(number, part) => match part {
                Part::Folder => pack(7, number, 0),
                Part::Manifest => pack(7, number, 1),
                Part::Memory => pack(7, number, 2),
                Part::Disks => pack(7, number, 3),
                Part::State => pack(7, number, 4),
                Part::Region(place) => pack(8, number, place),
                Part::Chunk(place) => pack(9, number, place),
            },
        }
    }

    /// The folder that contains the node.
    pub(super) fn parent(self) -> Self {
        match self {
            Self::Tag(_) => Self::Tags,
            Self::Vm(_) => Self::Vms,
            Self::In(_, Part::Folder) | Self::Alias(_) => Self::Ids,
            Self::In(number, Part::Chunk(_)) => Self::In(number, Part::State),
            Self::In(number, Part::Region(_)) => Self::In(number, Part::Memory),
            Self::In(number, _) => Self::In(number, Part::Folder),
            _ => Self::Root,
        }
    }

    pub(super) fn of(ino: u64) -> Option<Self> {
        let (number, place) = ((ino >> 16) as u32, ino as u16);
        let node = match (ino >> 56, number, place) {
            (0, 0, 1) => Self::Root,
            (1, 0, 0) => Self::Ids,
            (1, 1, 0) => Self::Tags,
            (1, 2, 0) => Self::Vms,
            (1, 3, 0) => Self::Latest,
            (2, number, 0) => Self::Tag(number),
            (3, number, 0) => Self::Vm(number),
            (4, number, 0) => Self::VmLatest(number),
            (5, number, 0) => Self::VmEntry(number),
            (6, number, 0) => Self::Alias(number),
            (7, number, 0) => Self::In(number, Part::Folder),
            (7, number, 1) => Self::In(number, Part::Manifest),
            (7, number, 2) => Self::In(number, Part::Memory),
            (7, number, 3) => Self::In(number, Part::Disks),
            (7, number, 4) => Self::In(number, Part::State),
            (8, number, place) => Self::In(number, Part::Region(place)),
            (9, number, place) => Self::In(number, Part::Chunk(place)),
            _ => return None,
        };
        (node.ino() == ino).then_some(node)
    }
}

/// Numbers for things that have none, assigned in order of appearance.
#[derive(Debug)]
pub(super) struct Numbers<T>(Mutex<(Vec<T>, HashMap<T, u32>)>);

impl<T> Default for Numbers<T> {
    fn default() -> Self {
        Self(Mutex::new((Vec::new(), HashMap::new())))
    }
}

impl<T: Clone + Eq + Hash> Numbers<T> {
    /// The number of `thing`; assigns one if it has none.
    pub(super) fn number(&self, thing: &T) -> u32 {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (things, numbers) = &mut *known;
        if let Some(number) = numbers.get(thing) {
            return *number;
        }
        let number = u32::try_from(things.len()).expect("fewer than four billion names");
        things.push(thing.clone());
        numbers.insert(thing.clone(), number);
        number
    }

    /// The thing with this number.
    pub(super) fn get(&self, number: u32) -> Option<T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).0.get(number as usize).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inode_numbers_say_what_they_are_of() {
        let numbers = [0, 1, 77, u32::MAX];
        let places = [0, 1, 5, u16::MAX];
        let mut all = vec![Node::Root, Node::Ids, Node::Tags, Node::Vms, Node::Latest];
        for number in numbers {
            all.extend([
                Node::Tag(number),
                Node::Vm(number),
                Node::VmLatest(number),
                Node::VmEntry(number),
                Node::Alias(number),
            ]);
            let parts = [Part::Folder, Part::Manifest, Part::Memory, Part::Disks, Part::State];
            all.extend(parts.map(|part| Node::In(number, part)));
            for place in places {
                all.push(Node::In(number, Part::Region(place)));
                all.push(Node::In(number, Part::Chunk(place)));
            }
        }
        let inos: std::collections::HashSet<u64> = all.iter().map(|node| node.ino()).collect();
        assert_eq!(inos.len(), all.len(), "no two have one number");
        for node in all {
            assert_eq!(Node::of(node.ino()), Some(node));
        }
        for nonsense in [0, 2, 4 << 16 | 1 << 56, 7 << 56 | 9, 10 << 56, u64::MAX] {
            assert_eq!(Node::of(nonsense), None, "{nonsense:#x}");
        }
    }

    #[test]
    fn things_keep_their_numbers() {
        let numbers = Numbers::default();
        assert_eq!([numbers.number(&"a"), numbers.number(&"b"), numbers.number(&"a")], [0, 1, 0]);
        assert_eq!((numbers.get(1), numbers.get(2)), (Some("b"), None));
    }
}
