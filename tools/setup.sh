#!/usr/bin/env bash
# Checks for what frazil builds and runs with, and installs what is missing: Debian packages if
# this is Debian and we may, else it prints the list and stops.
set -euo pipefail

missing=()
need() { # need PACKAGE CHECK...
    local package=$1
    shift
    "$@" >/dev/null 2>&1 || missing+=("$package")
}
has_libclang() {
    ldconfig -p 2>/dev/null | grep -q 'libclang[-.0-9]*\.so' || compgen -G '/usr/lib/llvm-*/lib/libclang[-.][0-9s]*so*' >/dev/null # not libclang-cpp
}

need gcc command -v cc
need libc6-dev test -e /usr/include/stdio.h
need linux-libc-dev test -e /usr/include/linux/userfaultfd.h
need libclang-dev has_libclang # the userfaultfd crate reads the kernel's headers through it

if [ ${#missing[@]} -gt 0 ]; then
    sudo=""
    [ "$(id -u)" = 0 ] || sudo="sudo -n"
    if command -v apt-get >/dev/null && { [ -z "$sudo" ] || $sudo true 2>/dev/null; }; then
        echo "installing: ${missing[*]}" >&2
        $sudo apt-get update -qq
        DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2
    else
        echo "missing, by their names in Debian: ${missing[*]}" >&2
        echo "install them with your package manager, then try again" >&2
        exit 1
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
