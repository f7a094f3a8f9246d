#!/bin/bash
# make.sh plain|duplicates OUT [MEMORY_MIB]
# Boots Debian's kernel with a part of this machine's own userland under QEMU's emulator (no KVM needed), lets it
# work, and writes its physical memory (512 MiB unless said otherwise) from address 0 to OUT, a flat file.
# Status 0: OUT was written, and what it is made of printed. 77: something is not installed. One to two minutes.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../../examples/migrate/nested/common.sh"

variant=${1:-} out=${2:-} memory=${3:-512}
case $variant in
    plain) packages="python3 perl" slim= roots=1 ;;
    # What images for containers leave out as well.
    duplicates) packages="python3" slim='^/usr/share/(doc|info|locale|i18n|man|lintian)/' roots=4 ;;
    *) sed -n '2,5s/^# //p' "$0" >&2; exit 2 ;;
esac
[ -n "$out" ] || { sed -n '2,5s/^# //p' "$0" >&2; exit 2; }
out=$(realpath -m "$out")
PATH=$PATH:/usr/sbin:/sbin
PACKAGE_OF[mke2fs]=e2fsprogs
PACKAGE_OF[dpkg-query]=dpkg
require_packages
for package in $packages; do
    if ! dpkg-query -s "$package" >/dev/null 2>&1; then
        echo "skipped: missing Debian package: $package"
        exit $SKIPPED
    fi
done
make_kernel

scratch=$(mktemp -d "$WORK/image.XXXXXX")
emulator=
finish() {
    [ -z "$emulator" ] || kill "$emulator" 2>/dev/null || true
    rm -rf "$scratch" "$out.part"
}
trap finish EXIT

# Debian's essential packages, the ones named, and all that they depend on.
closure() {
    dpkg-query -W -f '${Package}\t${db:Status-Status}\t${Essential}\t${Priority}\t${Pre-Depends}, ${Depends}\n' |
        awk -F '\t' -v named="$packages" '
            $2 == "installed" {
                gsub(/\([^)]*\)|:any|\|[^,]*| /, "", $5)
                needs[$1] = $5
                if ($3 == "yes" || $4 == "required") todo[++count] = $1
            }
            END {
                words = split(named, word, " ")
                for (i = 1; i <= words; i++) todo[++count] = word[i]
                for (next_one = 1; next_one <= count; next_one++) {
                    package = todo[next_one]
                    if (!(package in needs) || seen[package]++) continue
                    print package
                    words = split(needs[package], word, ",")
                    for (i = 1; i <= words; i++) todo[++count] = word[i]
                }
            }'
}

list() { # FILE
    if [ -L "$1" ] || { [ -f "$1" ] && [ -r "$1" ]; }; then printf '%s\0' "${1#/}"; fi
}

# The files of those packages as a root file system, without what an ordinary user cannot read; once for the machine
# or once for each container.
make_disk() {
    local tree=$scratch/disk.d/1 alias copy file stem compiled
    mkdir -p "$tree"/{dev,proc,sys,tmp,run,root,etc,usr/bin,usr/sbin,usr/lib,usr/lib64}
    for alias in bin sbin lib lib64; do ln -s "usr/$alias" "$tree/$alias"; done
    closure | xargs dpkg-query -L | sed -E 's#^/(bin|sbin|lib|lib64)/#/usr/\1/#' | sort -u |
        { if [ -n "$slim" ]; then grep -Ev "$slim"; else cat; fi; } |
        while read -r file; do
            list "$file"
            # Compiled when the package was installed; Python under an emulator would take half a minute for it.
            case $file in
                *.py)
                    stem=${file##*/}
                    for compiled in "${file%/*}/__pycache__/${stem%.py}".*.pyc; do list "$compiled"; done
                    ;;
            esac
        done > "$scratch/files"
    tar -C / --null --no-recursion -T "$scratch/files" -cf - | tar -C "$tree" -xf - --no-same-owner
    echo 'root:x:0:0:root:/root:/bin/sh' > "$tree/etc/passwd"
    cp "$here"/inside/work "$here"/inside/worker.py "$here"/inside/worker.pl "$tree/root/"
    for copy in $(seq 2 "$roots"); do cp -a "$tree" "$scratch/disk.d/$copy"; done
    mke2fs -q -t ext4 -d "$scratch/disk.d" "$scratch/disk" \
        "$(($(du -sm "$scratch/disk.d" | cut -f 1) * 5 / 4 + 64))M" >/dev/null
    rm -r "$scratch/disk.d"
}

# Kernel and busybox only: everything else comes from the disk, so that the page cache holds it as in any machine.
make_initramfs() {
    "$NESTED/initramfs.sh" -o "$scratch/initramfs" -i "$here/inside/init" -k "$KERNEL_VERSION" \
        -m virtio_pci -m virtio_blk -m ext4
}

boot() {
    coproc monitor {
        exec qemu-system-x86_64 -accel tcg,thread=multi -machine q35 -cpu qemu64 -smp 2 -m "$memory" \
            -nodefaults -no-user-config -display none -no-reboot -monitor stdio -serial "file:$scratch/console" \
            -drive "file=$scratch/disk,format=raw,if=none,id=disk,cache=unsafe" -device virtio-blk-pci,drive=disk \
            -kernel "$WORK/vmlinux" -initrd "$scratch/initramfs" \
            -append "console=ttyS0 quiet panic=-1 tsc=reliable mitigations=off random.trust_cpu=on"
    }
    emulator=$monitor_PID
    exec {answers}<&"${monitor[0]}" {orders}>&"${monitor[1]}"
    cat <&"$answers" > "$scratch/answers" &
}

# Waits for a line of the guest's.
await() { # PATTERN SECONDS
    local left=$2
    until grep -qs "$1" "$scratch/console"; do
        left=$((left - 1))
        if [ $left -lt 0 ] || ! kill -0 "$emulator" 2>/dev/null; then
            echo "make.sh: the machine never said $1; its last words:" >&2
            tail -n 20 "$scratch/console" "$scratch/answers" >&2
            exit 1
        fi
        sleep 1
    done
}

make_disk
make_initramfs
boot
await IMAGE-READY "${TIMEOUT:-900}"
tr -d '\r' < "$scratch/console" | grep -a 'IMAGE-'
mkdir -p "$(dirname "$out")"
printf 'stop\npmemsave 0 %d "%s"\nquit\n' $((memory << 20)) "$out.part" >&"$orders"
wait "$emulator" 2>/dev/null || true
emulator=
if [ "$(stat -c %s "$out.part" 2>/dev/null)" != $((memory << 20)) ]; then
    echo "make.sh: the emulator did not write the memory:" >&2
    tail -n 5 "$scratch/answers" >&2
    exit 1
fi
fallocate --dig-holes "$out.part" 2>/dev/null || true
mv "$out.part" "$out"
cd "$ROOT"
cargo run --quiet --release -p pageferry-benches --bin pageferry-bench -- image "$out"
