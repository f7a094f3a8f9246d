#!/bin/bash
# initramfs.sh -o OUT -i INIT [-k KERNEL_VERSION] [-m MODULE]... [-b HOST_BINARY:GUEST_PATH]... [-f HOST_FILE:GUEST_PATH]...
# Builds an uncompressed initramfs: static busybox with all its applets, INIT as /init, kernel modules with
# what they depend on (load order in /modules/order), programs of this host with the shared libraries they need.
set -euo pipefail

out= init= version= modules=() binaries=() files=()
while getopts o:i:k:m:b:f: option; do
    case $option in
        o) out=$OPTARG ;;
        i) init=$OPTARG ;;
        k) version=$OPTARG ;;
        m) modules+=("$OPTARG") ;;
        b) binaries+=("$OPTARG") ;;
        f) files+=("$OPTARG") ;;
        *) exit 2 ;;
    esac
done

tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT

put() { # HOST_FILE GUEST_PATH
    mkdir -p "$tree$(dirname "$2")"
    cp -L "$1" "$tree$2"
}

put_libraries() { # HOST_BINARY
    local library
    { ldd "$1" 2>/dev/null || true; } | awk '/=> \//{print $3} $1 ~ /^\//{print $1}' | while read -r library; do
        [ -e "$tree$library" ] || put "$library" "$library"
    done
}

put_busybox() {
    local busybox applet
    busybox=$(command -v busybox)
    put "$busybox" /bin/busybox
    for applet in $("$busybox" --list); do
        [ -e "$tree/bin/$applet" ] || ln -s busybox "$tree/bin/$applet"
    done
}

put_module() { # NAME
    local verb path arguments
    PATH=$PATH:/usr/sbin:/sbin modprobe -S "$version" --show-depends "$1" | while read -r verb path arguments; do
        if [ "$verb" = insmod ] && ! grep -qs "^$(basename "$path")" "$tree/modules/order"; then
            put "$path" "/modules/$(basename "$path")"
            echo "$(basename "$path") $arguments" >> "$tree/modules/order"
        fi
    done
}

mkdir -p "$tree"/{bin,dev,proc,sys,tmp,modules}
: > "$tree/modules/order"
put_busybox
for module in ${modules[@]+"${modules[@]}"}; do put_module "$module"; done
for binary in ${binaries[@]+"${binaries[@]}"}; do
    put "${binary%%:*}" "${binary#*:}"
    put_libraries "${binary%%:*}"
done
for file in ${files[@]+"${files[@]}"}; do put "${file%%:*}" "${file#*:}"; done
put "$init" /init
chmod +x "$tree/init"

(cd "$tree" && find . -mindepth 1 | cpio -o -H newc -R 0:0 --quiet) > "$out.part"
mv "$out.part" "$out"
