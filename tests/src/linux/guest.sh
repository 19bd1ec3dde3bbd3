#!/bin/busybox sh
# The init of a guest. Words on the kernel's command line say what it does:
#
#   until=N   power off after N ticks
#   load      keep both vCPUs busy with work whose results are checked every time
#   disk      mount /dev/vda (ext4) and keep writing to a database there, each row made durable
#             before it is acknowledged; check the whole database at every tick, and the file system
#             at every other tick
#   shell     offer a shell on vsock port 1024, for the host to run commands: see `ask` in outer.sh
#   net=A     take the address A and talk to port 7000 of NET_HOST, over one connection while it
#             lasts; what is sent has to come back
#
# Lines that it prints begin with GUEST. `GUEST bad …` means that something is wrong.

/bin/busybox mkdir -p /proc /sys /dev /mem /run
/bin/busybox mount -t proc proc /proc
export PATH=/bin
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tmpfs -o size=64m tmpfs /mem
exec </dev/null
# No carriage returns are added to lines.
stty -onlcr -F /dev/console

NET_HOST=10.0.0.1
DATABASE=/disk/rows.db

say() { echo "GUEST $*"; }
bad() { say bad "$*"; }
uptime_s() { cut -d' ' -f1 /proc/uptime; }
has() { grep -qw "$1" /proc/cmdline; }
word() { sed -n "s/.*\b$1=\([^ ]*\).*/\1/p" /proc/cmdline; }

for module in /modules/*.ko; do
    insmod "$module" 2>/dev/null || say without "$module"
done
until_tick=$(word until)
say up "$(uptime_s)" cpus "$(grep -c ^processor /proc/cpuinfo)" kernel "$(uname -r)"

# A file that never changes, and one that changes every turn and follows from the turn's number.
cp /known /mem/known
known=$(sha256sum </mem/known)
say known "${known%% *}"
contents() { seq $(($1 * 1000)) $(($1 * 1000 + 20000)); }
contents 0 >/mem/turn

# Loads. Each repeats the same computation, and notices when the result differs.
floats() { awk 'BEGIN { for (i = 1; i < 4000; i++) s = s * 1.0001 + 1 / (i + 0.5); printf "%.15g", s }'; }
packed() { head -c 100000 /mem/known | gzip -c | sha256sum; }
load() { # load NAME: repeats it for ever, and counts the rounds in /mem/NAME
    local first again rounds=0
    first=$($1)
    while :; do
        again=$($1)
        [ "$again" = "$first" ] || bad "load $1: expected $first, found $again"
        rounds=$((rounds + 1))
        # Replaced by a rename, so that readers never find it empty.
        echo $rounds >/mem/$1.new
        mv /mem/$1.new /mem/$1
    done
}
echo 0 >/mem/floats
echo 0 >/mem/packed
if has load; then
    load floats &
    renice -n 10 -p $! >/dev/null
    load packed &
    renice -n 10 -p $! >/dev/null
fi

# The statements for a database that a single long-lived process writes to, so that some of its
# state is in memory only. A row's contents follow from its number.
statements() {
    local row
    row=$(cat /mem/row)
    echo ".timeout 30000"
    echo "PRAGMA synchronous=FULL;"
    while :; do
        row=$((row + 1))
        echo "INSERT INTO rows VALUES ($row, printf('%0900d', $row * 7919));"
        # `.once` closes the file, and so has written it, before the next row begins.
        echo ".once /mem/row.new"
        echo "SELECT $row;"
        echo ".shell mv /mem/row.new /mem/row"
        sleep 0.2
    done
}
sql() { sqlite3 -cmd ".timeout 30000" $DATABASE "$@"; }
if has disk; then
    mkdir /disk
    mount -t ext4 /dev/vda /disk || bad "no disk"
    sql "CREATE TABLE rows (number INTEGER PRIMARY KEY, text TEXT NOT NULL)" || bad "no database"
    echo 0 >/mem/row
    statements | sqlite3 -batch $DATABASE 2>&1 | while read -r line; do bad "database: $line"; done &
    while [ "$(cat /mem/row)" = 0 ]; do sleep 0.1; done
fi
check_disk() {
    local acknowledged found
    acknowledged=$(cat /mem/row)
    # Makes the reads come from the disk.
    sync
    echo 3 >/proc/sys/vm/drop_caches
    found=$(sql "PRAGMA integrity_check; SELECT count(*), max(number), sum(text = printf('%0900d', number * 7919)) FROM rows" | tr '\n' ' ')
    rows=${found#ok } rows=${rows%%|*}
    [ "$found" = "ok $rows|$rows|$rows " ] || bad "database: $found"
    [ "$rows" -ge "$acknowledged" ] || bad "database: $rows rows, and $acknowledged were acknowledged"
    [ $((tick % 2)) = 0 ] || return
    fsfreeze --freeze /disk
    echo 3 >/proc/sys/vm/drop_caches
    found=$(e2fsck -fn /dev/vda 2>&1) || bad "file system: $(echo "$found" | tr '\n' ' ')"
    fsfreeze --unfreeze /disk
    say fsck clean
}

# Sends numbers over one connection, and checks that they come back.
client() {
    local connections=0 number=0 answer
    trap '' PIPE
    mkfifo /run/there /run/back
    while :; do
        connections=$((connections + 1))
        nc $NET_HOST 7000 </run/there >/run/back 2>/dev/null &
        exec 3>/run/there 4</run/back
        while :; do
            number=$((number + 1))
            echo $number >&3 2>/dev/null || break
            read -r -t 5 answer <&4 || break
            [ "$answer" = $number ] || bad "network: expected $number, found $answer"
            echo $connections $number >/mem/echoed.new
            mv /mem/echoed.new /mem/echoed
            sleep 0.2
        done
        say reconnects
        exec 3>&- 4<&-
        kill $! 2>/dev/null
        wait $!
    done
}
if [ -n "$(word net)" ]; then
    ip link set lo up
    ip address add "$(word net)/24" dev eth0 || bad "no network"
    ip link set eth0 up
    client &
    while [ ! -s /mem/echoed ]; do sleep 0.1; done
fi
if has shell; then
    # Whoever asks sends nothing more, and waits for the answer. The log shows incoming connections.
    socat -t 60 -d -d -lf /run/asked VSOCK-LISTEN:1024,fork EXEC:/bin/sh &
fi
# The kernel reseeds its generator only once a minute, and this one has no driver for the generation
# id to make it reseed at once; so random bytes are read from the device itself.
entropy=/dev/hwrng
[ -e $entropy ] || entropy=/dev/urandom
say devices $(cat /sys/bus/virtio/devices/*/device 2>/dev/null)

TROUBLE='soft lockup|hard LOCKUP|rcu.*(stall|detected)|Call Trace|WARNING:|BUG:|timekeeping watchdog|blocked for more|segfault'
trouble() { dmesg | grep -E "$TROUBLE"; }
# An emulated processor is not everything that the kernel expects when it boots.
at_boot=$(trouble | wc -l)
trouble | while read -r line; do say boots with "$line"; done
tick=0
while :; do
    sum=$(sha256sum </mem/known)
    [ "$sum" = "$known" ] || bad "known: $sum"
    contents $tick | cmp -s - /mem/turn || bad "what was written at tick $tick"
    tick=$((tick + 1))
    contents $tick >/mem/turn
    rows=0
    ! has disk || check_disk
    [ "$(trouble | wc -l)" = "$at_boot" ] || bad "the kernel says: $(trouble | tail -n 1)"
    say tick $tick uptime "$(uptime_s)" date "$(date +%s)" rounds "$(cat /mem/floats)" "$(cat /mem/packed)" \
        rows $rows echoed $(cat /mem/echoed 2>/dev/null || echo 0 0) random "$(head -c 16 $entropy | xxd -p)"
    [ "$tick" != "$until_tick" ] || break
    sleep 0.2
done
say off
poweroff -f
