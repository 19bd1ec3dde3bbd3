#!/bin/busybox sh
# The init of the machine around the guests, with the functions that tests' scripts use:
#
#   tell KEY WORD…            prints a line for the test
#   start VM ARGUMENT…        runs a VM by this frazil command, in the background; adds --name and
#                             --serial
#   boot VM WORDS ARGUMENT…   starts a new VM with 2 vCPUs; WORDS are for guest.sh
#   network                   makes a tap `tap0` with 10.0.0.1 at this end, and an echo server on
#                             port 7000
#   tap NAME ADDRESS          makes a tap with this address at this end
#   image FILE WORD           makes a file of 1 MiB, full of lines with WORD
#   disk FILE                 makes an ext4 file system of 64 MiB
#   await VM PATTERN [COUNT]  waits until COUNT lines (default: 1) of the guest's console match
#   ticks VM COUNT            waits for COUNT more ticks
#   tick VM                   prints the number of the last tick
#   talks VM                  waits until a higher number has come back over the guest's connection,
#                             or a new one
#   ask VM COMMAND            has the guest's shell run COMMAND, over the socket /run/VM.sock, and
#                             prints the output; VM needs --vsock socket=/run/VM.sock and the word
#                             `shell`
#   whoami VM                 tells the guest's clocks and identities: see WHO below, and who.rs
#   checkpoint VM TAG         takes a checkpoint; tells the ticks before and after it, and a report
#   end VM                    waits for the end of the process; tells its exit status
#   crash VM                  kills the process, as a power cut would
#   halt VM                   runs `frazil stop`, and waits for the end
#   keep FOLDER               keeps a folder, for the test to unpack on its own machine
#   clock VM                  tells the date here and the guest's, at a tick
#   try COMMAND…              runs a command that must succeed
#
# A guest that is silent for QUIET_S seconds has stalled, and ends the script. Generous, since the
# machine may be busy, and a kernel is silent until it has booted.
QUIET_S=90
MEMORY=256MiB
KERNEL=/vmlinuz
# The first three keep the emulated AMD-V from losing interrupts of one-shot timers.
CMDLINE="nohz=off highres=off lapic=notscdeadline console=ttyS0 quiet mitigations=off panic=-1 reboot=k"

/bin/busybox mkdir -p /proc /sys /dev /tmp /run
/bin/busybox mount -t proc proc /proc
export PATH=/bin
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
# Lines for the test have this serial port to themselves: the kernel's go to the first one.
exec >/dev/ttyS1 2>/run/stderr.log </dev/null
stty -opost -echo -F /dev/ttyS1
export HOME=/tmp TMPDIR=/tmp FRAZIL_RUNTIME_DIR=/run/frazil

now() { cut -d' ' -f1 /proc/uptime; }
tell() { echo "TEST $*"; }

# Prints all consoles and logs, and powers off.
over() {
    local file
    for file in /run/*.console; do
        [ ! -e "$file" ] || show CONSOLE "$file"
    done
    for file in /run/*.log; do
        [ ! -e "$file" ] || show LOG "$file"
    done
    tell over
    # Time for the serial port to send everything.
    sleep 1
    poweroff -f
}
show() { # show PREFIX FILE
    local name=${2##*/}
    tr -d '\000\r' <"$2" | sed "s/^/$1 ${name%.*} /"
}
fail() {
    tell failed "$*"
    frazil ps
    dmesg | tail -n 20
    over
}
try() { "$@" || fail "$* (status $?)"; }

start() {
    local vm=$1
    shift
    : >"/run/$vm.console"
    frazil "$@" --name "$vm" --serial "/run/$vm.console" >"/run/$vm.log" 2>&1 &
    echo $! >"/run/$vm.pid"
    tell started "$vm" "$(now)" "$(date +%s)"
}
boot() {
    local vm=$1 words=$2
    shift 2
    start "$vm" run --kernel "$KERNEL" --initrd /guest.cpio --cmdline "$CMDLINE $words" \
        --memory "$MEMORY" --cpus 2 --store /run/store "$@"
}
tap() {
    try tunctl -t "$1" >/dev/null
    try ip address add "$2/24" dev "$1"
    try ip link set "$1" up
}
network() {
    tap tap0 10.0.0.1
    ip link set lo up
    nc -ll -p 7000 -e cat &
}
image() { yes "$2" | head -c 1048576 >"$1"; }
disk() {
    truncate -s 64M "$1"
    try mkfs.ext4 -q -F "$1"
}
is_up() { kill -0 "$(cat "/run/$1.pid")" 2>/dev/null; }
lines() { grep -c "$2" "/run/$1.console"; }

# For loops that wait for a guest: `quiet VM PATTERN` begins the wait; `still`, in the loop, ends
# the script if the guest has stalled, and tells now and then that the wait goes on.
quiet() {
    quiet_vm=$1 quiet_for=$2 quiet_size=0
    quiet_since=$(date +%s)
    quiet_told=$quiet_since
}
still() {
    local size now
    size=$(stat -c %s "/run/$quiet_vm.console")
    now=$(date +%s)
    if [ "$size" != "$quiet_size" ]; then
        quiet_size=$size quiet_since=$now
    elif [ $((now - quiet_since)) -ge $QUIET_S ]; then
        tell stalled "$quiet_vm: $(tail -n 1 "/run/$quiet_vm.console")"
        frazil ps
        frazil top "$quiet_vm" --count 2 | cat
        over
    fi
    if [ $((now - quiet_told)) -ge 20 ]; then
        quiet_told=$now
        tell waiting "$quiet_vm: $quiet_for, $(tick "$quiet_vm")"
    fi
    sleep 0.2
}
await() {
    local vm=$1 pattern=$2 count=${3:-1}
    quiet "$vm" "$pattern"
    while [ "$(lines "$vm" "$pattern")" -lt "$count" ]; do
        # The guest may have printed it just before its end.
        is_up "$vm" || [ "$(lines "$vm" "$pattern")" -ge "$count" ] || fail "$vm ended before: $pattern"
        still
    done
}
# Only whole lines: the last word of a tick is 32 hexadecimal digits.
TICK='^GUEST tick .* random [0-9a-f]\{32\}'
ticks() { await "$1" "$TICK" $(($(lines "$1" "$TICK") + $2)); }
tick() { sed -n 's/^GUEST tick \([0-9]*\) .*/\1/p' "/run/$1.console" | tail -n 1; }
clock() {
    ticks "$1" 1
    tell clock "$1" "$(date +%s)" "$(sed -n 's/^GUEST tick .* date \([0-9]*\).*/\1/p' "/run/$1.console" | tail -n 1)"
}

echoed() { sed -n 's/^GUEST tick .* echoed [0-9]* \([0-9]*\) .*/\1/p' "/run/$1.console" | tail -n 1; }
talks() {
    local vm=$1 turns=0 first
    ticks "$vm" 1
    first=$(echoed "$vm")
    while [ "$(echoed "$vm")" -le "$first" ]; do
        turns=$((turns + 1))
        [ "$turns" -lt 30 ] || fail "$vm has no connection any more"
        ticks "$vm" 1
    done
}

# The answer begins with a line with OK and the connection's port. A connection to a resumed guest
# waits until the guest's driver knows that all earlier connections are gone, but not for ever: if
# that takes longer it is dropped, and has to be made again.
ask() {
    local answer turn
    while [ ! -S "/run/$1.sock" ]; do
        is_up "$1" || fail "$1 cannot be asked: it has ended"
        sleep 0.1
    done
    for turn in 1 2 3; do
        answer=$(printf 'CONNECT 1024\n%s\nexit\n' "$2" |
            socat -t $QUIET_S - "UNIX-CONNECT:/run/$1.sock" | sed 1d)
        [ -z "$answer" ] || break
    done
    echo "$answer"
}
# The guest has no driver for the generation id, and reads it from memory (page 255, where the ACPI
# tables put it); the interrupt that announces a new one is counted by the kernel's driver for ACPI
# events. A network card's address is read when its driver starts. The context id is that of the
# connection which the guest's socat has accepted.
WHO='echo date $(date +%s) rtc $(cat /sys/class/rtc/rtc0/since_epoch) uptime $(cut -d" " -f1 /proc/uptime) \
generation $(dd if=/dev/mem bs=4096 skip=255 count=1 2>/dev/null | head -c 16 | xxd -p) \
tables $(grep -c VM_Gen_Counter /sys/firmware/acpi/tables/DSDT) \
events $(awk "/ACPI:Ged/ {print \$2 + \$3}" /proc/interrupts) \
cid $(sed -n "s/.*accepting connection .* on AF=40 cid:\([0-9]*\) .*/\1/p" /run/asked | tail -n 1) disk $(head -c 8 /dev/vda) mac $(cat /sys/class/net/eth0/address)'
whoami() {
    local before
    before=$(date +%s)
    # Unquoted, so that all the words are on one line.
    tell who "$1" $(ask "$1" "$WHO") between "$before" "$(date +%s)"
}

checkpoint() {
    local vm=$1 tag=$2 before report
    before=$(tick "$vm")
    report=$(frazil checkpoint "$vm" --tag "$tag" --json) || fail "no checkpoint of $vm"
    tell checkpoint "$tag" "${before:-0}" "$(tick "$vm")" "$report"
}

end() {
    local vm=$1
    quiet "$vm" 'its end'
    while is_up "$vm"; do
        still
    done
    wait "$(cat "/run/$vm.pid")"
    tell ended "$vm" $?
}
crash() {
    kill -9 "$(cat "/run/$1.pid")"
    wait "$(cat "/run/$1.pid")"
    tell crashed "$1"
}
halt() {
    try frazil stop "$1" >/dev/null
    end "$1"
}

keep() {
    try tar -c -f /dev/vda -C "${1%/*}" "${1##*/}"
    sync
}

for module in /modules/*.ko; do
    insmod "$module" || fail "insmod $module"
done
tell up "$(now)"
. /test.sh
tell done "$(now)"
over
