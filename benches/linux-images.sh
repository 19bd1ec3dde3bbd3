#!/usr/bin/env bash
# Dumps the RAM of a stock Debian kernel at work several times, to FOLDER/ram-0.raw, ram-1.raw, ...,
# for `frazil-bench store-images`. Needs no KVM: the guest runs under QEMU's own translator (TCG),
# since all that matters is what a real kernel and real programs leave in memory.
#
# usage: linux-images.sh [FOLDER]    (default: ./target/linux-images; 6 GiB)
set -euo pipefail

MEMORY_MIB=1024 # below 3 GiB, where a PC's RAM is one flat range
DUMPS=6
INTERVAL_S=1 # how long the guest runs between two dumps
TIMEOUT_S=60 # for booting, and for every answer of QEMU

out=${1:-target/linux-images}
mkdir -p "$out"
out=$(cd "$out" && pwd)
temp=$(mktemp -d)
qemu=""
clean_up() {
    if [ -n "$qemu" ]; then
        kill -KILL "$qemu" 2>/dev/null || true
        wait "$qemu" 2>/dev/null || true
    fi
    rm -rf "$temp" "$out"/ram-*.part
}
trap clean_up EXIT
trap 'exit 130' INT TERM HUP

fail() {
    echo "linux-images: $*" >&2
    exit 1
}

# Fails if a tool is missing; QEMU is installed instead if root runs this.
check_tools() {
    local tool
    for tool in apt-get dpkg-deb python3 gzip; do
        command -v "$tool" >/dev/null || fail "missing: $tool (a Debian system is expected)"
    done
    if ! command -v qemu-system-x86_64 >/dev/null; then
        [ "$(id -u)" = 0 ] || fail "missing: the Debian package qemu-system-x86"
        echo "linux-images: installing qemu-system-x86" >&2
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
            qemu-system-x86 >&2
    fi
}

# take PACKAGE PATTERN FILE: extracts the file of a Debian package that matches PATTERN to FILE,
# without installing anything.
take() {
    local package=$1 pattern=$2 file=$3
    mkdir "$temp/$package"
    (
        cd "$temp/$package"
        # apt's sandbox user cannot write here; apt would only warn, but on every run.
        apt-get download -qq -o APT::Sandbox::User=root "$package" >&2 ||
            fail "cannot download the Debian package $package (apt-get update may help)"
        dpkg-deb -x ./*.deb .
        # shellcheck disable=SC2086 # the pattern is to be expanded
        mv $pattern "$file"
    )
    rm -rf "${temp:?}/$package"
}

# Fetches the kernel and busybox. Both are kept in the folder, so a second run downloads nothing.
fetch_guest() {
    local package
    if [ ! -e "$out/vmlinuz" ]; then
        package=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null |
            sed -n 's/.*Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1)
        [ -n "$package" ] || fail "apt knows no linux-image-cloud-amd64 (apt-get update may help)"
        take "$package" "boot/vmlinuz-*" "$out/vmlinuz"
    fi
    [ -e "$out/busybox" ] || take busybox-static "bin/busybox" "$out/busybox"
}

# Prints the guest's init, which acts as a small server: a log that grows and is rotated, files that
# are listed, searched, sorted and compressed, and a table of which a few bytes change at a time.
write_init() {
    cat <<'INIT'
#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /tmp /sbin /usr/bin /usr/sbin
/bin/busybox --install -s
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs -o size=512m tmpfs /tmp
cd /tmp || exit 1

records() { # records COUNT SEED: lines such as a program logs
    awk -v count="$1" -v seed="$2" 'BEGIN {
        srand(seed)
        split("open close read write connect retry accept flush", verbs, " ")
        for (i = 0; i < count; i++)
            printf "%010d host%02d app[%d]: %s of object %06x took %d us\n", seed * 1000 + i,
                rand() * 20, 1000 + rand() * 50, verbs[1 + int(rand() * 8)],
                rand() * 16777216, rand() * rand() * 100000
    }'
}

# What was there before: files of all kinds, 48 MiB of records, a table of 16 MiB.
find /sys /proc/sys -type f 2>/dev/null | sort >listing
records 20000 1 >day
for number in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30; do
    sed "s/host/h$number-/" day >"old-$number"
done
gzip -c day >day.gz
dd if=/dev/zero bs=64k count=256 2>/dev/null | tr '\0' '.' >table
cp /bin/busybox program

round=0
while :; do
    round=$((round + 1))
    # The log: more at its end, rotated when it is long.
    records 400 "$round" >>log
    [ "$(stat -c %s log)" -lt 4000000 ] || { gzip -c log >"log-$((round % 4)).gz"; : >log; }
    # A few counters in place, all over the table.
    for field in 1 2 3 4 5 6 7 8; do
        place=$(((round * 7919 + field * 104729) % 2097152))
        printf '%08d' "$round" | dd of=table bs=8 seek=$place conv=notrunc 2>/dev/null
    done
    # Reports: of what was, and of what is.
    awk '{ sum[$2] += $(NF - 1) } END { for (host in sum) print host, sum[host] }' log |
        sort -n -k 2 >report
    sed "s/object/thing/" "old-$((round % 30 + 1))" | sort -k 5 | head -n 2000 >sorted
    find . -type f -name 'old-*' | sort >index
    gzip -c sorted >sorted.gz
    [ "$round" != 2 ] || echo "linux-images: at work" >/dev/console
    sleep 0.02
done
INIT
}

make_initrd() {
    local root=$temp/root
    mkdir -p "$root/bin" "$root/dev"
    cp "$out/busybox" "$root/bin/busybox"
    write_init >"$root/init"
    chmod 755 "$root/init" "$root/bin/busybox"
    # busybox has cpio, so nothing more needs to be installed.
    (cd "$root" && find . | "$out/busybox" cpio -o -H newc 2>/dev/null) | gzip -1 >"$temp/initrd"
}

start_guest() {
    qemu-system-x86_64 -accel tcg,thread=multi -m "$MEMORY_MIB" -smp 2 -nodefaults -nographic \
        -kernel "$out/vmlinuz" -initrd "$temp/initrd" -no-reboot \
        -append "console=ttyS0 quiet nohz=off mitigations=off panic=-1" \
        -serial "file:$temp/console" -qmp "unix:$temp/qmp,server=on,wait=off" \
        </dev/null >"$temp/qemu.log" 2>&1 &
    qemu=$!
}

# Shows the end of the guest's console, without its firmware's terminal control characters.
show_console() {
    tail -n 20 "$temp/console" 2>/dev/null | tr -cd '[:print:]\n' >&2 || true
}

wait_for_guest() {
    local deadline=$((SECONDS + TIMEOUT_S))
    until grep -q "linux-images: at work" "$temp/console" 2>/dev/null; do
        if ! kill -0 "$qemu" 2>/dev/null; then
            tail -n 20 "$temp/qemu.log" >&2 || true
            show_console
            fail "the guest ended before it was at work"
        fi
        if [ "$SECONDS" -ge "$deadline" ]; then
            show_console
            fail "the guest was not at work after $TIMEOUT_S s; its console is above"
        fi
        sleep 0.2
    done
}

# qmp COMMAND [ARGUMENTS as JSON]: has QEMU run a QMP command, and waits for the answer.
qmp() {
    python3 - "$temp/qmp" "$TIMEOUT_S" "$@" <<'QMP' || fail "QEMU did not do: $1"
import json, socket, sys

path, timeout, command, *arguments = sys.argv[1:]
connection = socket.socket(socket.AF_UNIX)
connection.settimeout(float(timeout))
connection.connect(path)
stream = connection.makefile("rw")
json.loads(stream.readline())  # the greeting


def execute(request):
    print(json.dumps(request), file=stream, flush=True)
    for line in stream:
        answer = json.loads(line)
        if "error" in answer:
            sys.exit(answer["error"]["desc"])
        if "return" in answer:  # else an event
            return
    sys.exit("QEMU hung up")


execute({"execute": "qmp_capabilities"})
request = {"execute": command}
if arguments:
    request["arguments"] = json.loads(arguments[0])
execute(request)
QMP
}

# dump FILE: dumps all of the RAM at one instant. Python makes the JSON, since the file's name may
# hold characters that must be escaped.
dump() {
    local file=$1 bytes=$((MEMORY_MIB << 20)) arguments found
    arguments=$(python3 -c 'import json, sys
print(json.dumps({"val": 0, "size": int(sys.argv[1]), "filename": sys.argv[2]}))' \
        "$bytes" "$file.part")
    qmp stop
    qmp pmemsave "$arguments"
    qmp cont
    found=$(stat -c %s "$file.part")
    [ "$found" = "$bytes" ] || fail "dump: expected $bytes bytes, found $found in $file.part"
    mv "$file.part" "$file"
}

check_tools
fetch_guest
make_initrd
rm -f "$out"/ram-*.raw # a shorter run must not leave dumps of another guest
start_guest
wait_for_guest
for ((number = 0; number < DUMPS; number++)); do
    [ "$number" = 0 ] || sleep "$INTERVAL_S"
    dump "$out/ram-$number.raw"
    echo "linux-images: $out/ram-$number.raw" >&2
done
