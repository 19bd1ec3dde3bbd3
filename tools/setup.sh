#!/usr/bin/env bash
# Checks for what frazil needs to build and run, and installs the missing Debian packages if this is
# Debian and the user may; otherwise prints their names and stops.
#
# usage: setup.sh [--tests]    --tests: also what only tests need: an emulator, a stock kernel for
#                              its guests, debuggers, fusermount3, and shells. Tests whose tools are
#                              missing are skipped, and say so.
set -euo pipefail
cd "$(dirname "$0")/.."

missing=()
need() { # need PACKAGE CHECK...
    local package=$1
    shift
    "$@" >/dev/null 2>&1 || missing+=("$package")
}
may_install() {
    sudo=""
    [ "$(id -u)" = 0 ] || sudo="sudo -n"
    command -v apt-get >/dev/null && { [ -z "$sudo" ] || $sudo true 2>/dev/null; }
}
install() { # install PACKAGE...
    echo "installing: $*" >&2
    $sudo apt-get update -qq &&
        DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends "$@" >&2
}
has_libclang() {
    ldconfig -p 2>/dev/null | grep -q 'libclang[-.0-9]*\.so' || compgen -G '/usr/lib/llvm-*/lib/libclang[-.][0-9s]*so*' >/dev/null # not libclang-cpp
}

need gcc command -v cc
need libc6-dev test -e /usr/include/stdio.h
need linux-libc-dev test -e /usr/include/linux/userfaultfd.h
need libclang-dev has_libclang # the userfaultfd crate reads the kernel's headers through it

if [ ${#missing[@]} -gt 0 ]; then
    if may_install; then
        install "${missing[@]}"
    else
        echo "missing, by their names in Debian: ${missing[*]}" >&2
        echo "install them with your package manager, then try again" >&2
        exit 1
    fi
fi

# A stock kernel and its modules. An installed one will do; otherwise one is unpacked but not
# installed, since the machine might boot it next time.
kernels=${CARGO_TARGET_DIR:-target}/debian-kernel
has_kernel() {
    compgen -G "/boot/vmlinuz-*-cloud-amd64" || compgen -G "$kernels/boot/vmlinuz-*-cloud-amd64"
}
unpack_kernel() {
    local package temp=$kernels.part
    package=$(apt-cache depends linux-image-cloud-amd64 |
        sed -n 's/.*Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1)
    [ -n "$package" ] || return 1
    echo "unpacking: $package, to $kernels" >&2
    rm -rf "$kernels" "$temp"
    mkdir -p "$temp"
    # apt's sandbox user cannot write here; apt would only warn, but on every run.
    (cd "$temp" && apt-get download -qq -o APT::Sandbox::User=root "$package" >&2) || return 1
    dpkg-deb -x "$temp"/*.deb "$temp" && rm "$temp"/*.deb || return 1
    [ -e "$temp/lib" ] || ln -s usr/lib "$temp/lib"
    anywhere depmod -b "$temp" "${package#linux-image-}" && mv "$temp" "$kernels"
}
anywhere() { # anywhere COMMAND..., which may be on root's PATH only
    PATH=$PATH:/usr/sbin:/sbin "$@"
}
# The debug information of that kernel, with which debuggers read core files: a download of 280 MB,
# from which one file of 590 MB is unpacked.
debug=${CARGO_TARGET_DIR:-target}/debian-debug
kernel_release() { # prints the release of the newest kernel
    local file
    for file in /boot/vmlinuz-*-cloud-amd64 "$kernels"/boot/vmlinuz-*-cloud-amd64; do
        [ ! -e "$file" ] || echo "${file##*/vmlinuz-}"
    done | sort -V | tail -n 1
}
unpack_debug() {
    local release temp=$debug.part
    release=$(kernel_release)
    [ -n "$release" ] || return 1
    [ ! -e "/usr/lib/debug/boot/vmlinux-$release" ] || return 0
    [ ! -e "$debug/usr/lib/debug/boot/vmlinux-$release" ] || return 0
    echo "unpacking: linux-image-$release-dbg, to $debug" >&2
    rm -rf "$debug" "$temp"
    mkdir -p "$temp"
    (cd "$temp" && apt-get download -qq -o APT::Sandbox::User=root "linux-image-$release-dbg" >&2) || return 1
    dpkg-deb --fsys-tarfile "$temp"/*.deb |
        tar -x -C "$temp" "./usr/lib/debug/boot/vmlinux-$release" || return 1
    rm "$temp"/*.deb && mv "$temp" "$debug"
}
is_static() { # is_static PROGRAM
    command -v "$1" && ! ldd "$(command -v "$1")"
}

if [ "${1:-}" = --tests ]; then
    missing=()
    need qemu-system-x86 command -v qemu-system-x86_64
    need qemu-utils command -v qemu-img
    need busybox-static is_static busybox
    need sqlite3 command -v sqlite3
    need socat command -v socat
    need zstd command -v zstd
    need lz4 command -v lz4
    need e2fsprogs anywhere mkfs.ext4 -V
    need binutils command -v strip
    need kmod anywhere depmod -V
    need gdb command -v gdb
    need fuse3 command -v fusermount3
    need zsh command -v zsh
    need fish command -v fish
    need python3-drgn /usr/bin/python3 -c 'import drgn'
    if [ ${#missing[@]} -gt 0 ] && { ! may_install || ! install "${missing[@]}"; }; then
        echo "missing, by their names in Debian: ${missing[*]}" >&2
        echo "tests with stock Linux guests want them, and are skipped where there is no QEMU" >&2
    fi
    if ! has_kernel >/dev/null && ! unpack_kernel; then
        echo "missing: the kernel of the Debian package linux-image-cloud-amd64, for those tests" >&2
    fi
    if ! unpack_debug; then
        rm -rf "$debug.part"
        echo "missing: debug information of that kernel: what drgn sees in a core file is not tested" >&2
    fi
fi

if ! command -v cargo >/dev/null; then
    echo "missing: Rust 1.95 or later; see https://rustup.rs" >&2
    exit 1
fi
if [ ! -e /dev/kvm ]; then
    echo "there is no /dev/kvm: building works, running guests does not" >&2
elif [ ! -r /dev/kvm ] || [ ! -w /dev/kvm ]; then
    echo "no permission for /dev/kvm: join the group that owns it (usually kvm), or run as root" >&2
fi
