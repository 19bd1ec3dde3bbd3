//! `frazil inspect` of the built-in guest on real KVM, compared with the memory that `export`
//! writes and the registers that `show` prints.

use std::collections::BTreeMap;
use std::ops::Range;
use std::process::Command;

use frazil_snapstore::{Description, PAGE_SIZE, Page, PageSet, PageSource};
use frazil_tests::inspect_bed::{bed, hex};
use frazil_tests::vm_harness::{number, text};
use frazil_vmm::workload::GUEST_ELF;
use frazil_vmm::workload::control::{CONTROL_GPA, MAGIC};
use serde_json::{Value, json};

#[test]
fn regions_are_told_by_what_they_are_made_of() {
    let Some(bed) = bed() else { return };
    let map = bed.inspect(&[]).remove(0);
    let ram = &map["regions"][0];
    assert_eq!((text(ram, "name"), number(ram, "pages")), ("ram", (64 << 20) / 4096));
    let mut at = 0;
    let mut counts = [0_u64; 3];
    for range in ram["ranges"].as_array().expect("ranges") {
        let (first, count) =
            (range[0].as_u64().expect("a page"), range[1].as_u64().expect("a count"));
        assert_eq!(first, at);
        at += count;
        let kind = range[2].as_str().expect("a kind");
        let bytes = &bed.ram[first as usize * PAGE_SIZE..at as usize * PAGE_SIZE];
        if kind == "zero" {
            assert!(bytes.iter().all(|byte| *byte == 0), "{range}");
        }
        counts[["zero", "data", "delta"].iter().position(|name| *name == kind).expect("a kind")] +=
            count;
        assert_eq!(range[3].as_u64().expect("bytes") > 0, kind != "zero", "{range}");
    }
    assert_eq!(at, number(ram, "pages"));
    let told = ["zero_pages", "data_pages", "delta_pages"].map(|name| number(ram, name));
    assert_eq!(counts, told);
    let zero_pages =
        bed.ram.chunks(PAGE_SIZE).filter(|page| page.iter().all(|byte| *byte == 0)).count();
    assert_eq!(counts[0], zero_pages as u64);
    let shown = bed.host.ok(&["inspect", &bed.at]).stdout;
    assert!(shown.contains("region ram: 64.00 MiB") && shown.contains("zero"), "{shown}");
}

#[test]
fn memory_is_dumped_as_it_is() {
    let Some(bed) = bed() else { return };
    let dump = bed.inspect(&["--gpa", &format!("{CONTROL_GPA:#x},8")]).remove(0);
    assert_eq!(text(&dump, "hex"), MAGIC.to_le_bytes().map(|byte| format!("{byte:02x}")).concat());
    // Across pages, by physical and by virtual address: the guest maps its memory one to one.
    for (option, place) in [("--gpa", "gpa"), ("--gva", "gva")] {
        let from = CONTROL_GPA - 3000;
        let pages = bed.inspect(&[option, &format!("{from:#x},20000")]);
        assert_eq!(hex(text(&pages[0], place)), from);
        let all: String = pages.iter().map(|page| text(page, "hex")).collect();
        assert_eq!(all, bed.ram_hex(from, 20_000), "{option}");
    }
    let shown = bed.host.ok(&["inspect", &bed.at, "--gpa", "0x100003,40"]).stdout;
    let lines: Vec<&str> = shown.lines().collect();
    assert_eq!(lines.len(), 3, "{shown}");
    assert!(
        lines[0].starts_with("0000000000100000  ") && lines[2].starts_with("0000000000100020  ")
    );
    let dump =
        bed.host.ok(&["inspect", &bed.at, "--gva", &format!("{CONTROL_GPA:#x},16"), "--vcpu", "1"]);
    assert!(
        dump.stdout.contains("4-level paging") && dump.stdout.contains("page directory"),
        "{dump:?}"
    );
    // All of RAM.
    let all = bed.host.ok(&["inspect", &bed.at, "--gpa", "0,64MiB"]).stdout;
    assert!(
        all.lines().count() > 1 << 20 && all.ends_with("0000000004000000\n")
            || all.contains("03fffff0")
    );
}

#[test]
fn what_cannot_be_read_is_an_error_that_says_so() {
    let Some(bed) = bed() else { return };
    bed.refused(1, &["--gpa", "0x4000000"], &["0x4000000", "0x0 to 0x3ffffff"]);
    bed.refused(2, &["--gpa", "0x3ffff00,16EiB"], &["expected a size"]);
    bed.refused(1, &["--gpa", "0x3ffff00,15EiB"], &["at most 256"]);
    bed.refused(1, &["--gpa", "0x3ffff00,64GiB"], &["at most 256"]);
    bed.refused(1, &["--gva", "0x800000000000"], &["canonical", "4-level"]);
    bed.refused(1, &["--gva", "0xffff888000000000"], &["not mapped", "PML4"]);
    bed.refused(1, &["--gva", "0x1000", "--vcpu", "2"], &["vCPU 2", "0 to 1"]);
    bed.refused(1, &["--region", "disk0"], &["disk0", "ram"]);
    bed.refused(1, &["--search", "hex:123"], &["hex digits"]);
    bed.refused(1, &["--search", "hex:0000"], &["zero"]);
    bed.refused(1, &["--regex", "("], &["regular expression"]);
    bed.refused(1, &["--stack", "--vmlinux", "/dev/null"], &["ELF"]);
    let this = std::env::current_exe().expect("a file").display().to_string();
    bed.refused(1, &["--stack", "--vmlinux", &this], &["another"]);
    bed.refused(2, &["--gpa", "0x10", "--gva", "0x10"], &["--gva"]);
    bed.refused(2, &["--gpa", "zero"], &["0x1000"]);
    bed.refused(2, &["--gpa", "0x10,0"], &["1 or more"]);
    bed.refused(2, &["--gpa", "0x10", "--vcpu", "1"], &["--vcpu"]);
    bed.refused(2, &["--gpa", "0x10", "--vmlinux", "x"], &["--vmlinux"]);
    bed.refused(2, &["--page-tables", "--region", "ram"], &["--region"]);
    // Options that would have no effect are refused.
    bed.refused(2, &["--gpa", "0x10", "--context", "3"], &["--context"]);
    bed.refused(2, &["--stack", "--ranges", "3"], &["--ranges"]);
    bed.refused(2, &["--stack", "--lines"], &["--vmlinux"]);
    bed.refused(2, &["--disassemble", "--lines", "--vmlinux", &this], &["--lines"]);
}

/// Looks go up to the last address that exists, and no further.
#[test]
fn addresses_end() {
    let Some(bed) = bed() else { return };
    let last = "0xffffffffffffffff";
    for look in [&["--gpa", last][..], &["--gpa", "0xffffffffffffffff,2"]] {
        bed.refused(1, look, &["expected RAM"]);
    }
    for look in
        [&["--gva", last][..], &["--gva", "0xffffffffffffff00,0x1000"], &["--disassemble", last]]
    {
        bed.refused(1, look, &["not mapped"]);
    }
    bed.refused(1, &["--page-tables", "0x800000000000"], &["canonical"]);
    bed.refused(1, &["--page-tables", "0x8000_0000_0000,0x1000"], &["canonical"]);
    // A range that begins below the canonical addresses may end within them.
    assert!(bed.inspect(&["--page-tables", "0xffff7fffffff0000,0x20000"]).is_empty());
    let nothing = bed.host.ok(&["inspect", &bed.at, "--page-tables", "0xffffffff80000000,1GiB"]);
    assert!(nothing.stdout.contains("nothing is mapped"), "{nothing:?}");
    // Without a length, the dump ends where the mapping or RAM does.
    let tables = bed.inspect(&["--page-tables"]);
    let end_of = |range: &Value| hex(text(range, "gva")) + range["bytes"].as_u64().expect("bytes");
    let end = tables.iter().map(end_of).max().expect("something is mapped").min(64 << 20);
    let dump = bed.inspect(&["--gva", &format!("{:#x}", end - 48)]);
    assert_eq!((dump.len(), text(&dump[0], "hex").len()), (1, 96));
    bed.refused(1, &["--gva", &format!("{:#x},49", end - 48), "--json"], &["virtual address"]);
    // The dump tells how the address was translated.
    let steps = dump[0]["steps"].as_array().expect("steps");
    assert_eq!(text(&steps[0], "table"), "PML4");
    let entry = hex(text(&steps[0], "gpa"));
    assert_eq!(entry & !0xfff, hex(text(&bed.vcpus[0]["sregs"], "cr3")) & !0xfff);
    let bytes: String = bed.ram_hex(entry, 8);
    let read = u64::from_str_radix(&bytes, 16).expect("hex").swap_bytes();
    assert_eq!(read, hex(text(&steps[0], "entry")));
}

/// A reader that goes away is not an error; a full disk is.
#[test]
fn what_cannot_be_printed_is_told_unless_nobody_listens() {
    let Some(bed) = bed() else { return };
    let looks = [
        &["--gpa", "0,32MiB"][..],
        &["--gpa", "0,32MiB", "--json"],
        &["--search", "the "],
        &["--json"],
        &["--ranges", "all"],
        &["--disassemble", "-n", "100000"],
    ];
    for look in looks {
        let run = |out: std::process::Stdio| {
            let mut command = bed.host.command(&[&["inspect", &bed.at], look].concat());
            command.stdout(out).stderr(std::process::Stdio::piped());
            command.spawn().expect("it runs").wait_with_output().expect("it ends")
        };
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let gone = run(writer.into());
        let said = String::from_utf8_lossy(&gone.stderr).into_owned();
        // Beyond the end of the code there may be nothing to disassemble.
        let ended = gone.status.success() || said.contains("not mapped");
        assert!(ended && !said.contains("panicked"), "{look:?}: {gone:?}");
        let full = std::fs::File::options().write(true).open("/dev/full").expect("it is there");
        let full = run(full.into());
        let said = String::from_utf8_lossy(&full.stderr).into_owned();
        assert_eq!(full.status.code(), Some(1), "{look:?}: {full:?}");
        assert!(said.contains("No space left"), "{look:?}: {said}");
    }
}

/// The pages of a region that are not zero.
struct Sparse(BTreeMap<u64, Page>);

impl PageSource for Sparse {
    fn read_page(&self, page: u64, out: &mut Page) -> std::io::Result<()> {
        *out = self.0.get(&page).copied().unwrap_or([0; PAGE_SIZE]);
        Ok(())
    }
}

/// The guest physical addresses at which machines have no RAM.
const HOLE: Range<u64> = 3 << 30..4 << 30;

/// A machine with RAM on both sides of the hole below 4 GiB.
#[test]
fn there_is_no_memory_in_the_hole() {
    let Some(bed) = bed() else { return };
    let ram_bytes = HOLE.start + (64 << 20);
    let pages = (HOLE.end + (64 << 20)) / PAGE_SIZE as u64;
    let (below, above) = (HOLE.start / PAGE_SIZE as u64 - 1, HOLE.end / PAGE_SIZE as u64);
    let mut contents = BTreeMap::from([(below, [0; PAGE_SIZE]), (above, [0; PAGE_SIZE])]);
    contents.get_mut(&below).expect("it")[PAGE_SIZE - 6..].copy_from_slice(b"border");
    contents.get_mut(&above).expect("it")[..6].copy_from_slice(b"beyond");
    let mut dirty = PageSet::new(pages);
    contents.keys().for_each(|page| {
        dirty.insert(*page);
    });
    let store = bed.host.store();
    let gold = store.resolve("gold").expect("it").id;
    let mut state = store.snapshot(gold).expect("it").states().expect("chunks");
    let machine = state.iter_mut().find(|chunk| chunk.name == "machine").expect("it");
    machine.body["ram_bytes"] = json!(ram_bytes);
    let mut transaction = store.begin(None).expect("nobody writes");
    let region = transaction.region("ram", pages).expect("it");
    transaction.write_pages(region, &dirty, &Sparse(contents)).expect("written");
    let description = Description { state, message: "hole".into(), ..Description::default() };
    let id = transaction.commit(description).expect("published").id;
    let at = bed.host.at(&id.to_string());
    let inspect =
        |args: &[&str]| bed.host.ok(&[&["inspect", &at, "--json"], args].concat()).json_lines();

    let map = inspect(&[]).remove(0);
    let ram = &map["regions"][0];
    let hole_pages = (HOLE.end - HOLE.start) / PAGE_SIZE as u64;
    let ranges: Vec<(u64, u64, &str)> = ram["ranges"]
        .as_array()
        .expect("ranges")
        .iter()
        .map(|range| {
            (range[0].as_u64().unwrap(), range[1].as_u64().unwrap(), range[2].as_str().unwrap())
        })
        .collect();
    assert_eq!(
        ranges,
        [
            (0, below, "zero"),
            (below, 1, "data"),
            (below + 1, hole_pages, "hole"),
            (above, 1, "data"),
            (above + 1, pages - above - 1, "zero"),
        ]
    );
    assert_eq!(number(ram, "hole_pages"), hole_pages);
    assert_eq!(number(ram, "zero_pages"), pages - hole_pages - 2);
    let shown = bed.host.ok(&["inspect", &at]).stdout;
    assert!(shown.contains("region ram: 3.06 GiB") && shown.contains("hole"), "{shown}");
    // The context of a match stops at the hole, which is not shown as zeros.
    let found = inspect(&["--search", "border", "--context", "8"]);
    assert_eq!((found.len(), text(&found[0], "after")), (1, ""));
    let found = inspect(&["--search", "beyond", "--context", "8"]);
    assert_eq!((text(&found[0], "gpa"), text(&found[0], "before")), ("0x100000000", ""));
    assert!(inspect(&["--search", "hex:626f7264657200"]).is_empty(), "behind it is no memory");
    assert!(inspect(&["--regex", r"\x00beyond"]).is_empty());
    for gpa in ["0xc0000000", "0xfee00000", "0xffffffff"] {
        bed.host
            .frazil(&["inspect", &at, "--gpa", gpa])
            .expect_code(1)
            .expect_says(&["0x0 to 0xbfffffff", "0x100000000 to 0x103ffffff"]);
    }
    let refused = bed.host.frazil(&["inspect", &at, "--gpa", "0xbffffff0,32"]);
    refused.expect_code(1).expect_says(&["at most 16"]);
}

/// Imported memory has no machine: it can be read by physical address, and nothing else.
#[test]
fn imported_memory_is_looked_at_as_far_as_there_is_some() {
    let Some(bed) = bed() else { return };
    let file = bed.host.path("imported.raw");
    let mut bytes = vec![0; 1 << 20];
    bytes[0x1234..0x1234 + 6].copy_from_slice(b"needle");
    std::fs::write(&file, &bytes).expect("a file");
    let other = bed.host.path("imported");
    let import = [
        "import",
        "--memory",
        &file.display().to_string(),
        "--store",
        &other.display().to_string(),
    ];
    let _report = bed.host.json(&import);
    let at = format!("{}@latest", other.display());
    let found = bed.host.json(&["inspect", &at, "--search", "needle"]);
    assert_eq!(text(&found, "gpa"), "0x1234");
    let dump = bed.host.json(&["inspect", &at, "--gpa", "0x1234,6"]);
    assert_eq!(text(&dump, "hex"), "6e6565646c65");
    for look in ["--stack", "--disassemble", "--page-tables"] {
        let refused = bed.host.frazil(&["inspect", &at, look]);
        refused.expect_code(1).expect_says(&["frazil import", "without vCPUs", "--gpa"]);
    }
}

#[test]
fn matches_are_where_they_are_in_the_raw_file() {
    let Some(bed) = bed() else { return };
    let offsets =
        |found: &[Value]| found.iter().map(|one| hex(text(one, "gpa"))).collect::<Vec<_>>();
    // Words of the built-in guest's text.
    let needle = b"the ";
    let mut expected = Vec::new();
    let mut at = 0;
    while let Some(found) = bed.ram[at..].windows(needle.len()).position(|window| window == needle)
    {
        expected.push((at + found) as u64);
        at += found + needle.len();
        if expected.len() == 2000 {
            break;
        }
    }
    assert!(expected.len() > 100, "the built-in guest writes text: {}", expected.len());
    let most = expected.len().to_string();
    for search in ["the ", "text:the ", "hex:74 68_65:20"] {
        let found = bed.inspect(&["--search", search, "-n", &most, "--context", "3"]);
        assert_eq!(offsets(&found), expected, "{search}");
        assert_eq!((text(&found[0], "text"), text(&found[0], "match")), ("the ", "74686520"));
        let before = bed.ram_hex(expected[0] - 3, 3);
        assert_eq!(text(&found[0], "before"), before);
    }
    let found = bed.inspect(&["--regex", "t[h]e\\x20", "-n", &most]);
    assert_eq!(offsets(&found), expected);
    let said = bed.host.ok(&["inspect", &bed.at, "--search", "the ", "-n", "3"]);
    assert_eq!(said.stdout.lines().count(), 3);
    assert!(said.stdout.contains("[the ]") && said.stderr.contains("3 matches"), "{said:?}");
    assert!(bed.inspect(&["--search", "utf16:nobody wrote this"]).is_empty());
}

#[test]
fn code_and_page_tables_are_those_of_the_registers() {
    let Some(bed) = bed() else { return };
    for vcpu in 0..2 {
        let number = vcpu.to_string();
        let rip = bed.register(vcpu, "rip");
        let code = bed.inspect(&["--disassemble", "--vcpu", &number, "-n", "4"]);
        assert_eq!((code.len(), hex(text(&code[0], "gva"))), (4, rip));
        assert_eq!(code[0]["next"], true);
        for one in &code {
            let (at, bytes) = (hex(text(one, "gva")), text(one, "hex"));
            assert_eq!(bytes, bed.ram_hex(at, bytes.len() / 2));
            assert_ne!(text(one, "text"), "(bad)", "the guest's own code");
        }
        let next = hex(text(&code[1], "gva"));
        let from_there =
            bed.inspect(&["--disassemble", &format!("{next:#x}"), "--vcpu", &number, "-n", "1"]);
        assert_eq!(
            (text(&from_there[0], "text"), &from_there[0]["next"]),
            (text(&code[1], "text"), &json!(false))
        );

        let tables = bed.inspect(&["--page-tables", "--vcpu", &number]);
        let holds = |range: &&Value| {
            let first = hex(text(range, "gva"));
            (first..first + range["bytes"].as_u64().expect("bytes")).contains(&rip)
        };
        let range = tables.iter().find(holds).expect("its code is mapped");
        assert_eq!(
            (&range["execute"], &range["user"]),
            (&json!(true), &json!(true)),
            "it runs in ring 3"
        );
        let part = bed.inspect(&["--page-tables", &format!("{rip:#x},1"), "--vcpu", &number]);
        assert_eq!((part.len(), hex(text(&part[0], "gpa"))), (1, rip));
    }
}

#[test]
fn stacks_are_shown_with_and_without_the_guest_s_file() {
    let Some(bed) = bed() else { return };
    let stacks = bed.inspect(&["--stack"]);
    assert_eq!(stacks.len(), 2);
    for (vcpu, stack) in stacks.iter().enumerate() {
        assert_eq!(number(stack, "vcpu"), vcpu as u64);
        // If the stack cannot be unwound, the words on it are shown.
        let words = stack["words"].as_array().expect("words");
        assert_eq!(words.is_empty(), stack["frames"].as_array().expect("frames").len() > 1);
        for word in words {
            let (gva, value) = (hex(text(word, "gva")), hex(text(word, "value")));
            let bytes: String = value.to_le_bytes().map(|byte| format!("{byte:02x}")).concat();
            assert_eq!(bytes, bed.ram_hex(gva, 8));
        }
        assert_eq!(hex(text(&stack["frames"][0], "ip")), bed.register(vcpu, "rip"));
    }
    // The guest's file is stripped; here it gets two symbols.
    let [stripped, named] = ["guest.elf", "named.elf"].map(|name| bed.host.path(name));
    std::fs::write(&stripped, GUEST_ELF).expect("a file");
    let [stripped, named] = [stripped, named].map(|path| path.display().to_string());
    bed.refused(1, &["--stack", "--vmlinux", &stripped], &["stripped"]);
    let symbols = ["all_of_it=.text:0,function,global", "beyond=.text:0x100000,function,global"];
    let mut objcopy = Command::new("objcopy");
    for symbol in symbols {
        objcopy.args(["--add-symbol", symbol]);
    }
    let status = objcopy.args([&stripped, &named]).status().expect("objcopy, of binutils, runs");
    assert!(status.success());
    let one = bed.inspect(&["--stack", "--vcpu", "1", "--vmlinux", &named]);
    assert_eq!(one.len(), 1);
    assert_eq!(one[0]["frames"][0]["function"], "all_of_it", "{one:#?}");
}

/// A guest can write whatever it likes into its page tables.
#[test]
fn tables_that_make_no_sense_are_told_and_end() {
    let Some(bed) = bed() else { return };
    let root = hex(text(&bed.vcpus[0]["sregs"], "cr3")) & !0xfff;
    // Each entry leads back to its table; to nowhere; to two tables by turns, which lead to each
    // other.
    let fills: [&dyn Fn(u64) -> u64; 3] = [&|_| root | 7, &|_| 0xdead_beef_f007, &|index| {
        if index % 2 == 0 { root | 7 } else { (root + 0x1000) | 7 }
    }];
    for (turn, fill) in fills.into_iter().enumerate() {
        let tag = format!("bad-{turn}");
        let mut pages = vec![[0; PAGE_SIZE]; bed.ram.len() / PAGE_SIZE];
        let mut dirty = PageSet::new(pages.len() as u64);
        for page in [root / 4096, root / 4096 + 1] {
            dirty.insert(page);
            let table: &mut Page = &mut pages[page as usize];
            for (index, entry) in (0..).zip(table.chunks_exact_mut(8)) {
                entry.copy_from_slice(&fill(index).to_le_bytes());
            }
        }
        let store = bed.host.store();
        let gold = store.resolve("gold").expect("it").id;
        let state = store.snapshot(gold).expect("it").states().expect("chunks");
        let mut transaction = store.begin(Some(gold)).expect("nobody writes");
        let region = transaction.region("ram", pages.len() as u64).expect("it");
        transaction.write_pages(region, &dirty, &pages).expect("written");
        let description = Description { state, message: tag.clone(), ..Description::default() };
        let id = transaction.commit(description).expect("published").id;
        let at = bed.host.at(&id.to_string());
        for look in [&["--page-tables"][..], &["--gva", "0x1000"], &["--disassemble"], &["--stack"]]
        {
            let looked = bed.host.frazil(&[&["inspect", &at], look].concat());
            assert!(matches!(looked.status.code(), Some(0 | 1)), "{tag} {look:?}: {looked:?}");
            assert!(!looked.stderr.contains("panicked"), "{tag} {look:?}: {looked:?}");
            assert!(looked.stdout.len() < 10_000, "{tag} {look:?}");
        }
        let file = bed.host.path(&tag).display().to_string();
        let report = bed.host.json(&["export", &at, &file, "--format", "elf-core"]);
        assert_eq!(number(&report, "cpus"), 2, "memory and registers are there all the same");
    }
}
