//! The layout of a kernel's structures, as the kernel describes it in memory (BTF,
//! Documentation/bpf/btf.rst in the Linux sources).
//!
//! A guest may put anything there. Existing crates that read BTF trust it and parse all of it,
//! where only a few offsets are needed here.

use crate::inspect::memory::number;

const MAGIC: u64 = 0xeb9f;
const HEADER_BYTES: usize = 24;
/// Size of a type's head: name; kind and count; size or type.
const TYPE_BYTES: usize = 12;
/// Size of a member: name, type, offset.
const MEMBER_BYTES: usize = 12;

const KIND_STRUCT: u64 = 4;

/// A description of types.
#[derive(Debug)]
pub(super) struct Btf {
    types: Vec<u8>,
    strings: Vec<u8>,
}

/// A type.
struct Type<'a> {
    kind: u64,
    /// Whether members' offsets have a bit field's size in their upper bits.
    has_bitfields: bool,
    name: u64,
    /// What follows its head.
    rest: &'a [u8],
}

impl Btf {
    /// Parses the header of `bytes`; None if it makes no sense.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let header = bytes.get(..HEADER_BYTES)?;
        let field = |index: usize| number(&header[index * 4..][..4]);
        if number(&header[..2]) != MAGIC {
            return None;
        }
        let part = |offset: u64, len: u64| {
            let start = field(1).checked_add(offset)?;
            bytes.get(usize::try_from(start).ok()?..usize::try_from(start.checked_add(len)?).ok()?)
        };
        let (types, strings) = (part(field(2), field(3))?, part(field(4), field(5))?);
        Some(Self { types: types.to_vec(), strings: strings.to_vec() })
    }

    /// The offsets of `members` in structure `name`, in bytes; None if there is no such structure
    /// that has all of them, each at a whole byte.
    pub(super) fn offsets<const N: usize>(
        &self,
        name: &str,
        members: [&str; N],
    ) -> Option<[u64; N]> {
        self.types()
            .filter(|kind| kind.kind == KIND_STRUCT && self.is_named(kind.name, name))
            .find_map(|structure| {
                let offset = |member: &str| {
                    structure.rest.chunks_exact(MEMBER_BYTES).find_map(|entry| {
                        let [at_name, _, offset] = [0, 4, 8].map(|at| number(&entry[at..][..4]));
                        let mask = if structure.has_bitfields { 0xff_ffff } else { u64::MAX };
                        let bits = offset & mask;
                        let found = self.is_named(at_name, member) && bits.is_multiple_of(8);
                        found.then_some(bits / 8)
                    })
                };
                let mut all = [0; N];
                for (place, member) in all.iter_mut().zip(members) {
                    *place = offset(member)?;
                }
                Some(all)
            })
    }

    fn is_named(&self, at: u64, name: &str) -> bool {
        let text = usize::try_from(at).ok().and_then(|at| self.strings.get(at..));
        text.and_then(|text| text.strip_prefix(name.as_bytes()))
            .is_some_and(|rest| rest.first() == Some(&0))
    }

    /// All types, up to one that makes no sense.
    fn types(&self) -> impl Iterator<Item = Type<'_>> {
        let mut rest = &self.types[..];
        std::iter::from_fn(move || {
            let (head, behind) = rest.split_at_checked(TYPE_BYTES)?;
            let [name, info] = [0, 4].map(|at| number(&head[at..][..4]));
            let (kind, count) = (info >> 24 & 31, info as usize & 0xffff);
            // The length of what follows the head, by kind.
            let len = match kind {
                1 | 14 | 17 => 4,
                3 => 12,
                KIND_STRUCT | 5 | 15 | 19 => count * MEMBER_BYTES,
                6 | 13 => count * 8,
                2 | 7..=12 | 16 | 18 => 0,
                _ => return None,
            };
            let (own, next) = behind.split_at_checked(len)?;
            rest = next;
            Some(Type { kind, has_bitfields: info >> 31 != 0, name, rest: own })
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A description of `structures`, after types of other kinds.
    pub(in super::super) fn described(structures: &[(&str, &[(&str, u32)])]) -> Vec<u8> {
        let (mut types, mut strings) = (Vec::new(), vec![0]);
        let mut named = |name: &str| {
            let at = strings.len() as u32;
            strings.extend_from_slice(name.as_bytes());
            strings.push(0);
            at
        };
        let mut put = |words: &[u32]| {
            words.iter().for_each(|word| types.extend_from_slice(&word.to_le_bytes()));
        };
        // An integer, an array, an enumeration of two.
        put(&[named("int"), 1 << 24, 4, 32]);
        put(&[0, 3 << 24, 0, 1, 1, 8]);
        put(&[named("kind"), 6 << 24 | 2, 4, 0, 0, 0, 1]);
        for (name, members) in structures {
            put(&[named(name), 4 << 24 | members.len() as u32, 0]);
            for (member, offset) in *members {
                put(&[named(member), 1, offset * 8]);
            }
        }
        let mut all = vec![0x9f, 0xeb, 1, 0];
        let (types_len, strings_len) = (types.len() as u32, strings.len() as u32);
        [HEADER_BYTES as u32, 0, types_len, types_len, strings_len]
            .iter()
            .for_each(|word| all.extend_from_slice(&word.to_le_bytes()));
        all.extend(types);
        all.extend(strings);
        all
    }

    #[test]
    fn members_are_found_by_their_whole_names() {
        let bytes = described(&[
            ("module", &[("nothing", 0)]),
            ("modules", &[("list", 1), ("name", 2)]),
            ("module", &[("listing", 4), ("list", 8), ("name", 24)]),
        ]);
        let btf = Btf::parse(&bytes).expect("a description");
        // Of two structures with the same name, the one that has all the members.
        assert_eq!(btf.offsets("module", ["name", "list"]), Some([24, 8]));
        assert_eq!(btf.offsets("module", ["name", "lis"]), None);
        assert_eq!(btf.offsets("modul", ["name"]), None);
    }

    proptest! {
        #[test]
        fn nonsense_is_nothing(
            noise in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..20),
            cut in any::<prop::sample::Index>(),
        ) {
            let mut bytes = described(&[("module", &[("list", 8), ("name", 24)])]);
            for (place, byte) in noise {
                let place = place.index(bytes.len());
                bytes[place] = byte;
            }
            bytes.truncate(cut.index(bytes.len() + 1));
            if let Some(btf) = Btf::parse(&bytes) {
                let _whatever = btf.offsets("module", ["list", "name"]);
            }
        }
    }
}
