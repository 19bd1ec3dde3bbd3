//! How a stock Linux guest boots and ends, and gives free memory back while it runs.
//! `frazil_tests::linux` describes where the guest runs.

use frazil_tests::linux::{Checkpoint, run_with, value};
use frazil_tests::vm_harness::number;

/// How much memory the guest fills and frees again, in bytes.
const FILLED_BYTES: u64 = 100_000_000;
const PAGE_BYTES: u64 = 4096;

/// Boots the kernel as distributions ship it (bzImage), and unpacked (vmlinux). The first guest
/// ends by `reboot`, the last by a crash (`panic=`).
const SCRIPT: &str = r#"
boot a 'load shell' --vsock socket=/run/a.sock
await a '^GUEST tick'
checkpoint a before
ask a 'mkdir /big; mount -t tmpfs tmpfs /big'
# In parts, because a machine that says nothing for long counts as stalled. Much, because Linux tells only of
# what is free in pieces of 2 MiB.
for part in 1 2 3 4 5; do
    tell filled $part "$(ask a 'yes | head -c 20000000 >>/big/file; stat -c %s /big/file')"
done
checkpoint a filled
# Linux tells of free memory after two seconds, and of a part at a time.
ask a 'rm /big/file; sleep 12; echo freed' >/run/freed
tell freed "$(cat /run/freed)"
checkpoint a freed
# Nobody answers, and who asks would ask again: the next one at that socket.
ask a 'reboot -f' >/dev/null &
asking=$!
end a
kill $asking
tell reason a "$(grep -c 'reset its machine' /run/a.log)" "$(tail -n 1 /run/a.log)"

start b resume /run/store@freed
ticks b 2
halt b

KERNEL=/vmlinux
boot c 'load shell' --vsock socket=/run/c.sock --no-balloon
await c '^GUEST tick'
ask c 'echo c >/proc/sysrq-trigger' >/dev/null &
asking=$!
end c
kill $asking
tell reason c "$(grep -c 'reset its machine' /run/c.log)" "$(tail -n 1 /run/c.log)"
"#;

#[test]
fn kernels_begin_and_end_and_give_memory_back() {
    let outcome = run_with("boot", SCRIPT, |parts| vec![("/vmlinux", parts.vmlinux())]);
    let Some(outcome) = outcome else { return };
    let report = |tag: &str| Checkpoint::find(&outcome, tag).report;
    assert_eq!(outcome.test_lines("filled").pop().expect("the last part"), ["5", "100000000"]);
    assert_eq!(outcome.only_test_line("freed"), ["freed"]);

    // Freed memory is zero from then on, since the balloon has reported it.
    let (filled, freed) = (report("filled"), report("freed"));
    let pages = FILLED_BYTES / PAGE_BYTES;
    let written = number(&filled, "dirty_pages") - number(&filled, "zero_pages");
    assert!(written > pages, "{written} pages that are not zero: {filled:#}");
    let zero = number(&freed, "zero_pages");
    assert!(zero > pages / 2, "{zero} zero pages: {freed:#}");

    for vm in ["a", "c"] {
        let lines = outcome.test_lines("reason");
        let reason = lines.iter().find(|words| words[0] == vm).expect("a reason");
        assert_eq!(value::<u64>(reason[1]), 1, "{reason:?}");
        outcome.expect_well(vm);
    }
    assert!(outcome.ticks("b").len() >= 2);
    assert_eq!(
        outcome.guest_lines("c", "up")[0][1..3],
        ["cpus", "2"],
        "{:#?}",
        outcome.console("c")
    );
}
