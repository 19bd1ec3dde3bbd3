//! Looking ahead with several lanes, against one search from the beginning to the end.

use proptest::prelude::*;
use regex_automata::Input;
use regex_automata::meta::Regex;
use regex_automata::util::syntax;

use super::pattern::Found;
use super::*;

/// Without bytes that have to be there, or looking ahead would be left to what knows those.
const EXPRESSIONS: [&str; 7] = [
    r"[\w&&[^c]][\w&&[^a]]",
    r"[\w&&[^c]]{3,6}c?",
    r"\b\w{2}\b",
    r"^\w{1,9}[\w&&[^a]]$",
    r"\w\b\n?",
    r"\w(?:[\w&&[^a]]{4}|c)",
    r"(?:\w[\w&&[^a]]|[\w&&[^a]]\w){2}",
];

fn naive(expression: &str, bytes: &[u8], from: usize, to: usize, end: usize) -> Vec<Range<usize>> {
    let syntax = syntax::Config::new().unicode(false).utf8(false).multi_line(true);
    let regex = Regex::builder().syntax(syntax).build(expression).expect("an expression");
    let (mut found, mut at) = (Vec::new(), from);
    while let Some(next) = regex.find(Input::new(bytes).span(at..end)) {
        if next.start() >= to {
            break;
        }
        at = next.end();
        found.push(next.range());
    }
    found
}

proptest! {
    #[test]
    fn looking_ahead_changes_nothing(
        expression in 0..EXPRESSIONS.len(),
        // Matches all over, now and then, hardly any.
        often in prop_oneof![Just(1_u32), Just(30), Just(400)],
        noise in proptest::collection::vec(any::<u32>(), 200..3000),
        cut in 0_usize..40,
    ) {
        let text = |number: &u32| match number % (8 * often) {
            0 | 1 => b'a',
            2 | 3 => b'b',
            4 => b'c',
            5 => b'\n',
            _ => b'.',
        };
        let bytes: Vec<u8> = noise.iter().map(text).collect();
        let expression = EXPRESSIONS[expression];
        let pattern = Pattern::regex(expression).expect("a pattern");
        prop_assert_eq!(pattern.looks_ahead(), (true, true), "{}", expression);
        let (from, end) = (cut, bytes.len() - cut / 3);
        let to = end - cut / 2;
        let mut found = Found { matches: Vec::new(), is_all: true };
        pattern.find_all(&bytes, from..to, end, usize::MAX, &mut found);
        let expected = naive(expression, &bytes, from, to, end);
        prop_assert_eq!(found.matches, expected, "{} in {:?}", expression, String::from_utf8_lossy(&bytes));
        prop_assert!(found.is_all);
    }
}

#[test]
fn what_has_bytes_to_look_for_is_not_looked_at_byte_by_byte() {
    for expression in ["foo[a-z]+", "(?:foo|bar)[0-9]", "[a-z]+@example"] {
        let pattern = Pattern::regex(expression).expect("a pattern");
        assert_eq!(pattern.looks_ahead(), (false, false), "{expression}");
    }
    // Too many states to be worth it: it is searched all the same.
    let large = Pattern::regex(r"\w.{12}[c-k].{20}[e-m]").expect("a pattern");
    assert_eq!(large.looks_ahead(), (true, false));
    let text = b"xxa123456789012c12345678901234567890exx";
    assert_eq!(large.find_from(text, 0..text.len(), text.len()), Some(2..37));
}
